"""Cut a long text into pieces that tokenize as the whole does, so that memory stays bounded."""

import re
from collections.abc import Iterable, Iterator

PIECE_CHARACTERS = 2**18
SAFE_PLACE = re.compile(r"(?<=[^\W_])[ \n]")
"""A space or newline after a letter or digit."""


def pieces(chunks: Iterable[str], size: int = PIECE_CHARACTERS) -> Iterator[str]:
    """
    Regroup chunks of one text into pieces of about ``size`` characters.

    A cut lies between a letter or digit and a space or newline. No token of GPT-2's pattern, nor of its successors',
    spans such a place, and what follows starts there whether or not the text before it is seen; so the ids are those
    of the whole text. Only a run of ``size`` characters without such a place is cut elsewhere.
    """
    buffer = ""
    for chunk in chunks:
        buffer += chunk
        while len(buffer) >= 2 * size:
            cut = _cut(buffer, size)
            yield buffer[:cut]
            buffer = buffer[cut:]
    if buffer:
        yield buffer


def _cut(text: str, size: int) -> int:
    """The first safe place from ``size`` on, or 2 × ``size`` where there is none."""
    found = SAFE_PLACE.search(text, size, 2 * size)
    return found.start() if found else 2 * size
