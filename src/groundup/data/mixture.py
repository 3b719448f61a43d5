"""
Several sources with weights: which sample of a run is from which source, as a pure function of the position.

The run is cut into blocks of 65,536 positions. In each block every source has an exact quota, so that weights hold over any
stretch of a run, and a keyed permutation decides who comes where. A source's own samples follow its own epochs.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from hashlib import sha256
from typing import Any

import numpy as np
import numpy.typing as npt

from groundup.data.batches import Samples, ShuffledWindows, Windows
from groundup.data.named import BLOCK, quotas
from groundup.data.order import ids_at, permute, round_keys
from groundup.data.shards import SPLITS, Dataset, TokenStream, require_windows
from groundup.errors import ConfigError
from groundup.tokenizer.tokenizer import Tokenizer

# Part of a mixed run's identity. Raise it with every change to what ``Mixture.read`` gives.
MIXTURE_VERSION = 1
BLOCKS_KEPT = 4


@dataclass(frozen=True)
class Mixture:
    """The windows of several sources, mixed by weight; one epoch is as many samples as all of them have windows."""

    parts: Mapping[str, Windows]
    """The windows of each source by name, all of one length."""
    weights: Mapping[str, float]
    """Of the same names; in any unit."""
    seed: int

    @property
    def length(self) -> int:
        """Tokens in a window, its last target not counted."""
        return next(iter(self.parts.values())).length

    def __len__(self) -> int:
        return sum(len(windows) for windows in self.parts.values())

    @cached_property
    def _quotas(self) -> dict[str, int]:
        # By name, not as they were given: the order is a function of what is mixed.
        found = quotas(self.weights)
        return {name: found[name] for name in sorted(self.parts)}

    def read(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The tokens of the samples at these positions of the run, (N, length + 1)."""
        out = np.empty((len(positions), self.length + 1), dtype=np.int64)
        for name, rows, ids in self.choices(positions):
            out[rows] = self.parts[name].tokens(ids)
        return out

    def choices(self, positions: npt.NDArray[np.int64]) -> list[tuple[str, npt.NDArray[np.bool_], npt.NDArray[np.int64]]]:
        """For each source: its name, which of the positions are its, (N,), and the windows that these read, (rows.sum(),)."""
        sources, samples = _places(positions, self.seed, tuple(self._quotas.values()))
        found = []
        for number, name in enumerate(self._quotas):
            rows = sources == number
            keys = partial(round_keys, self.seed, "source", name)
            found.append((name, rows, ids_at(samples[rows], len(self.parts[name]), keys)))
        return found

    def epochs(self, positions: int) -> dict[str, float]:
        """How often each source is read in the first so many positions."""
        return {name: positions * quota / BLOCK / len(self.parts[name]) for name, quota in self._quotas.items()}


def _places(
    positions: npt.NDArray[np.int64], seed: int, quotas: tuple[int, ...]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The source of each position, by number, and which of this source's samples it is, counted from 0; both (N,)."""
    sources, samples = np.empty_like(positions), np.empty_like(positions)
    blocks, places = np.divmod(positions, BLOCK)
    for block in np.unique(blocks):
        rows = blocks == block
        who, rank = _block(seed, int(block), quotas)
        sources[rows] = who[places[rows]]
        samples[rows] = np.array(quotas)[sources[rows]] * block + rank[places[rows]]
    return sources, samples


@lru_cache(maxsize=BLOCKS_KEPT)
def _block(seed: int, block: int, quotas: tuple[int, ...]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The source at each place of a block, and how many of the same source are before it; both (BLOCK,)."""
    slots = permute(np.arange(BLOCK, dtype=np.uint64), BLOCK, round_keys(seed, "mixture", block))
    who = np.repeat(np.arange(len(quotas)), quotas)[slots.astype(np.int64)]
    rank = np.empty(BLOCK, dtype=np.int64)
    for number in range(len(quotas)):
        rank[who == number] = np.arange(quotas[number])
    return who, rank


@dataclass(frozen=True)
class Part:
    """A dataset, or one named source of it, under the name and with the weight that it has in a mixture."""

    name: str
    weight: float
    dataset: Dataset
    source: str | None = None

    def stream(self, split: str) -> TokenStream:
        """The tokens of a split."""
        return self.dataset.stream(split, self.source)


@dataclass(frozen=True)
class Corpus:
    """
    All that a run reads: one dataset, or a mixture of named parts.

    Raises:
        ConfigError: the parts were made with different tokenizers.
    """

    parts: tuple[Part, ...]
    mixed: bool = True
    """The parts have names and weights."""

    def __post_init__(self) -> None:
        first = self.parts[0]
        for part in self.parts[1:]:
            one, other = part.dataset.tokenizer, first.dataset.tokenizer
            if not (one.gives_the_ids_of(other) and other.gives_the_ids_of(one)):
                raise ConfigError(
                    f"source: {part.dataset.directory} ({part.name}) was made with another tokenizer than "
                    f"{first.dataset.directory} ({first.name}): {one.vocab_size:,} and {other.vocab_size:,} ids; give the "
                    "text itself, or prepare it again with --tokenizer"
                )

    @classmethod
    def of(cls, dataset: Dataset) -> "Corpus":
        """A single dataset, as it is."""
        return cls((Part("", 1.0, dataset),), mixed=False)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of all parts."""
        return self.parts[0].dataset.tokenizer

    @property
    def weights(self) -> dict[str, float]:
        """Share of each source, as a run reads it, 1 in sum; empty without a mixture."""
        if not self.mixed:
            return {}
        found = quotas({part.name: part.weight for part in self.parts})
        return {name: quota / BLOCK for name, quota in found.items()}

    @cached_property
    def identity(self) -> str:
        """Hash of everything that training reads, and of the shares: those of a dataset alone are the dataset's own."""
        if not self.mixed:
            return self.parts[0].dataset.identity
        shares = quotas(self.weights)
        parts: list[list[Any]] = [[p.name, shares[p.name], p.dataset.identity_of(p.source)] for p in self.parts]
        text = json.dumps([f"mixture {MIXTURE_VERSION}", sorted(parts)])
        return sha256(text.encode()).hexdigest()

    def verify(self) -> None:
        """
        Read every shard once, as ``Dataset.verify`` does.

        Raises:
            DataError: a shard is damaged, or holds ids that the tokenizer has not.
        """
        for part in self.parts:
            part.dataset.verify(part.source)

    def require_windows(self, length: int, splits: Sequence[str] = SPLITS) -> None:
        """
        Every split of every source must hold at least one window and its target.

        Raises:
            DataError: with the numbers, and what to change.
        """
        for part in self.parts:
            require_windows(part.dataset, length, splits, part.source)

    def train_samples(self, length: int, stride: int, seed: int) -> Samples:
        """
        The training windows in the run's order.

        Args:
            length: tokens in a window, without its last target.
            stride: tokens between the starts of two windows.
            seed: the run's seed.
        """
        windows = {part.name: Windows(part.stream("train"), length, stride) for part in self.parts}
        return Mixture(windows, self.weights, seed) if self.mixed else ShuffledWindows(windows[""], seed)

    def validation_windows(self, length: int) -> dict[str, Windows]:
        """The validation windows of each source; of a dataset without named sources all of them, under the name ''."""
        if self.mixed:
            return {part.name: Windows(part.stream("validation"), length, length) for part in self.parts}
        dataset = self.parts[0].dataset
        names: tuple[str | None, ...] = dataset.sources or (None,)
        return {name or "": Windows(dataset.stream("validation", name), length, length) for name in names}

    def first_tokens(self, split: str, count: int) -> npt.NDArray[Any]:
        """At most ``count`` tokens from the start of a split; of a mixture so many of each source as its share is, (N,)."""
        shares = self.weights or {"": 1.0}
        streams = [(part.stream(split), math.floor(shares[part.name] * count)) for part in self.parts]
        return np.concatenate([stream.read(0, min(len(stream), limit)) for stream, limit in streams])
