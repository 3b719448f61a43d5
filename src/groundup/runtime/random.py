"""
Randomness as a function.

A stream is named by what it is for, never by what came before, so a resumed run draws what an uninterrupted one would.
"""

import hashlib


def derive_seed(seed: int, *labels: str | int) -> int:
    """
    A 63-bit seed for (seed, labels), by hashing: unlike adding, no two labelled tuples share a stream by accident.

    Example: ``derive_seed(42, "dropout", step, micro_batch)``.
    """
    text = "\x1f".join([str(seed), *(f"{type(label).__name__}:{label}" for label in labels)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
