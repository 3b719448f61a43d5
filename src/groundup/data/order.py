"""
The order of training data as a pure function of (seed, epoch, position).

A keyed permutation: a balanced Feistel network over the next even power of two, with cycle-walking (Black and Rogaway
2002, https://web.cs.ucdavis.edu/~rogaway/papers/subset.pdf). No state but the position, O(1) to resume, and any number
of processes sees the same global batch.
"""

import hashlib
from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt

# Written into checkpoints: an order that changes is another order. Raise it with every change to this file's output.
ORDER_VERSION = 1
ROUNDS = 6

UInt64Array = npt.NDArray[np.uint64]


def window_ids(seed: int, first_sample: int, count: int, windows: int) -> npt.NDArray[np.int64]:
    """
    Which windows the samples ``first_sample … first_sample + count - 1`` of a run read, (count,).

    Sample g belongs to epoch g // windows; each epoch is a permutation of all windows, another one for each epoch.

    Args:
        seed: the run's seed.
        first_sample: samples seen before, since the start of the run.
        windows: windows in one epoch, at least 1.
    """
    samples = np.arange(first_sample, first_sample + count, dtype=np.int64)
    return ids_at(samples, windows, partial(epoch_keys, seed))


def ids_at(samples: npt.NDArray[np.int64], windows: int, keys: Callable[[int], list[int]]) -> npt.NDArray[np.int64]:
    """
    Which of ``windows`` windows each sample reads, (N,): sample k is of epoch k // windows, and each epoch a permutation.

    Args:
        samples: numbers of samples from 0, in any order, (N,).
        keys: the round keys of an epoch.
    """
    epochs, positions = np.divmod(samples, windows)
    ids = np.empty(len(samples), dtype=np.int64)
    for epoch in np.unique(epochs):
        rows = epochs == epoch
        ids[rows] = permute(positions[rows].astype(np.uint64), windows, keys(int(epoch))).astype(np.int64)
    return ids


def epoch_keys(seed: int, epoch: int) -> list[int]:
    """Round keys of one epoch of the only source of a run."""
    return round_keys(seed, epoch)


def round_keys(seed: int, *labels: str | int) -> list[int]:
    """Keys by hashing a labelled tuple: (seed 0, epoch 1) shares nothing with (seed 1, epoch 0)."""
    label = "\x1f".join([f"groundup data order {ORDER_VERSION}", str(seed), *map(str, labels)]).encode()
    digest = hashlib.blake2b(label, digest_size=8 * ROUNDS).digest()
    return [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(ROUNDS)]


def permute(positions: UInt64Array, size: int, keys: list[int]) -> UInt64Array:
    """Image of each position below ``size`` under the keyed permutation of 0 … size - 1; same shape."""
    half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    result = _feistel(positions, half_bits, keys)
    # The network permutes a power of four that is at least size; walk on until the image falls below size.
    while (outside := result >= np.uint64(size)).any():
        result[outside] = _feistel(result[outside], half_bits, keys)
    return result


def _feistel(values: UInt64Array, half_bits: np.uint64, keys: list[int]) -> UInt64Array:
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = values >> half_bits, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right + np.uint64(key)) & mask)
    return (left << half_bits) | right


def _mix(values: UInt64Array) -> UInt64Array:
    """splitmix64's finalizer (Steele, Lea and Flood 2014): every input bit reaches every output bit."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
