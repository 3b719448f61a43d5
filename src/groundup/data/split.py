"""
Which text is for validation: documents by a keyed hash of their content, a lone document by position.

A document's side depends on nothing but its content, so adding documents moves none of the others.
"""

import hashlib
from collections.abc import Iterable

SPLIT_KEY = b"groundup split 1"
SAMPLE_KEY = b"groundup sample 1"


def content_hash(chunks: Iterable[str]) -> tuple[bytes, int, int]:
    """Keyed hash of a document's UTF-8 bytes; with its length in characters and in bytes."""
    digest = hashlib.blake2b(digest_size=16, key=SPLIT_KEY)
    characters = size = 0
    for chunk in chunks:
        data = chunk.encode()
        digest.update(data)
        characters += len(chunk)
        size += len(data)
    return digest.digest(), characters, size


def is_below(digest: bytes, fraction: float) -> bool:
    """Whether a hash, read as a number in [0, 1), is below a fraction."""
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def in_sample(text: str, fraction: float) -> bool:
    """Whether a piece of text belongs to an evenly spread sample of about this fraction."""
    return fraction >= 1 or is_below(hashlib.blake2b(text.encode(), digest_size=8, key=SAMPLE_KEY).digest(), fraction)
