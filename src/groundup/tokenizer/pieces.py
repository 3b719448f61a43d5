"""Cut a long text into pieces that tokenize as the whole does, so that memory stays bounded."""

from collections.abc import Iterable, Iterator

PIECE_CHARACTERS = 2**18


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
    end = 2 * size
    while end > size:
        place = max(text.rfind(" ", size, end), text.rfind("\n", size, end))
        if place < 0:
            break
        if text[place - 1].isalnum():
            return place
        end = place
    return 2 * size
