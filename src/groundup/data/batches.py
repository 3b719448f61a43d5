"""Shards and order to batches: windows of a token stream, read ahead of the device."""

import hashlib
import queue
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from groundup.data.order import epoch_keys, ids_at
from groundup.data.shards import TokenStream

READ_AHEAD_BATCHES = 2
WINDOWS_BETWEEN_CHECKS = 256
"""Windows read between two looks at whether the run has stopped."""


@dataclass(frozen=True)
class Batch:
    """Windows and their targets: ``labels[b, t]`` is the token after ``input_ids[b, t]``; both (B, T) int64."""

    input_ids: torch.Tensor
    labels: torch.Tensor

    def rows(self, first: int, count: int) -> "Batch":
        """Some of the windows, (count, T)."""
        return Batch(self.input_ids[first : first + count], self.labels[first : first + count])


@dataclass(frozen=True)
class Windows:
    """The windows of a stream: window i is tokens [i · stride, i · stride + length], target included."""

    stream: TokenStream
    length: int
    stride: int

    def __len__(self) -> int:
        return max(0, (len(self.stream) - self.length - 1) // self.stride + 1)

    def tokens(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The tokens of some windows with their last target, (len(ids), length + 1) int64."""
        out = np.empty((len(ids), self.length + 1), dtype=np.int64)
        for row, index in enumerate(ids):
            out[row] = self.stream.read(int(index) * self.stride, self.length + 1)
        return out


class Samples(Protocol):
    """What a run reads, in its order: a function of the position alone, so that nothing else must survive a restart."""

    @property
    def length(self) -> int:
        """Tokens in a window, its last target not counted."""

    def __len__(self) -> int:
        """Windows in one epoch."""

    def read(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """
        The tokens of the samples at these positions, (N, length + 1).

        Args:
            positions: counted from 0 over the whole run, epochs included, in any order, (N,).
        """


@dataclass(frozen=True)
class ShuffledWindows:
    """All windows of one stream, in another order in each epoch."""

    windows: Windows
    seed: int

    @property
    def length(self) -> int:
        """Tokens in a window, its last target not counted."""
        return self.windows.length

    def __len__(self) -> int:
        return len(self.windows)

    def read(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The tokens of the samples at these positions of the run, (N, length + 1)."""
        return self.windows.tokens(ids_at(positions, len(self.windows), partial(epoch_keys, self.seed)))


@dataclass(frozen=True)
class GlobalBatch:
    """The windows of one optimizer step, and a digest of their tokens."""

    batch: Batch
    digest: str


def global_batches(samples: Samples, ranges: Iterator[tuple[int, int]], device: torch.device) -> Iterator[GlobalBatch]:
    """
    The batches of a run, one for each range; read by a thread, so that the device never waits.

    Args:
        ranges: first position and number of samples of each step. The thread asks for them ahead of the steps.
    """
    ahead: queue.Queue[GlobalBatch | BaseException | None] = queue.Queue(READ_AHEAD_BATCHES)
    stopped = threading.Event()

    def offer(item: GlobalBatch | BaseException | None) -> None:
        while not stopped.is_set():
            try:
                ahead.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def read() -> None:
        try:
            for first, count in ranges:
                positions = np.arange(first, first + count, dtype=np.int64)
                parts = []
                for start in range(0, count, WINDOWS_BETWEEN_CHECKS):
                    if stopped.is_set():
                        return
                    parts.append(samples.read(positions[start : start + WINDOWS_BETWEEN_CHECKS]))
                tokens = np.concatenate(parts)
                digest = hashlib.blake2b(tokens.astype("<u4").tobytes(), digest_size=16).hexdigest()
                offer(GlobalBatch(to_batch(tokens, device), digest))
                if stopped.is_set():
                    return
            offer(None)
        except BaseException as error:
            offer(error)

    reader = threading.Thread(target=read, name="groundup-batches", daemon=True)
    reader.start()
    try:
        while (item := ahead.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        reader.join(timeout=10)


def evaluation_batches_by_source(
    windows: Mapping[str, Windows], batch_size: int, device: torch.device, max_tokens: int = 0
) -> dict[str, Iterator[Batch]]:
    """The ``evaluation_batches`` of each source; ``max_tokens`` is shared out as the sources' sizes are."""
    total = sum(len(part) for part in windows.values())
    return {
        name: evaluation_batches(part, batch_size, device, max_tokens and max(1, max_tokens * len(part) // total))
        for name, part in windows.items()
    }


def evaluation_batches(windows: Windows, batch_size: int, device: torch.device, max_tokens: int = 0) -> Iterator[Batch]:
    """
    Every window once, in order; or, above ``max_tokens``, an evenly spread part of them, always the same.

    Yields batches of (batch_size, T), the last one smaller.
    """
    count = len(windows)
    if max_tokens:
        count = min(count, max(1, max_tokens // windows.length))
    ids = np.arange(count, dtype=np.int64) * len(windows) // count
    for start in range(0, count, batch_size):
        yield to_batch(windows.tokens(ids[start : start + batch_size]), device)


def to_batch(tokens: npt.NDArray[np.int64], device: torch.device) -> Batch:
    """Tokens (B, T + 1) to inputs and shifted targets on the device; pinned and copied asynchronously for CUDA."""
    whole = torch.from_numpy(tokens)
    if device.type == "cuda":
        whole = whole.pin_memory().to(device, non_blocking=True)
    elif device.type != "cpu":
        whole = whole.to(device)
    return Batch(whole[:, :-1], whole[:, 1:])
