"""
The dataset on disk: token shards as .npy files, and dataset.json, which says what they are.

    DATASET/dataset.json  tokenizer.json  tokenizer_config.json  train-00000.npy …  validation-00000.npy …

A split is one stream of tokens; documents end with the end-of-text id; shards cut the stream every so many tokens.
Where sources have names, each has splits of its own: train-NAME-00000.npy …  validation-NAME-00000.npy …
"""

import io
import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from groundup.errors import DataError
from groundup.runtime.files import sha256_of_file, write_durably
from groundup.tokenizer.tokenizer import Tokenizer, load_tokenizer

MANIFEST = "dataset.json"
FORMAT, VERSION, NAMED_VERSION = "groundup-dataset", 1, 2
"""The second version has named sources; others are written as ever."""
SPLITS = ("train", "validation")
SOURCE_NAME = r"[A-Za-z0-9_-]{1,64}"
"""A regular expression: the names of sources are parts of file names, and of keys in metrics."""


@dataclass(frozen=True)
class Shard:
    """One file of consecutive tokens."""

    name: str
    tokens: int
    sha256: str
    header_bytes: int = 128


@dataclass(frozen=True)
class Split:
    """The shards of train or validation, in order, and what they hold."""

    shards: tuple[Shard, ...] = ()
    documents: int = 0
    bytes: int = 0

    @property
    def tokens(self) -> int:
        """Tokens in all shards."""
        return sum(shard.tokens for shard in self.shards)


def split_key(split: str, source: str | None = None) -> str:
    """What the split of a named source is called."""
    return f"{split}-{source}" if source else split


def dtype_for(vocab_size: int) -> np.dtype[Any]:
    """uint16 where every id fits, else uint32."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


@dataclass
class ShardWriter:
    """Append tokens; full shards are written at once, durably, into a staging directory."""

    directory: Path
    split: str
    dtype: np.dtype[Any]
    shard_tokens: int
    shards: list[Shard] = field(default_factory=list)
    _buffer: list[npt.NDArray[Any]] = field(default_factory=list)
    _buffered: int = 0

    def append(self, tokens: npt.NDArray[Any]) -> None:
        """Add tokens, (N,), to the stream."""
        self._buffer.append(tokens.astype(self.dtype))
        self._buffered += len(tokens)
        if self._buffered >= self.shard_tokens:
            stream = np.concatenate(self._buffer)
            whole = len(stream) - len(stream) % self.shard_tokens
            for start in range(0, whole, self.shard_tokens):
                self._write(stream[start : start + self.shard_tokens])
            self._buffer, self._buffered = [stream[whole:]], len(stream) - whole

    def close(self) -> tuple[Shard, ...]:
        """Write what is left; returns all shards."""
        if self._buffered:
            self._write(np.concatenate(self._buffer))
        self._buffer, self._buffered = [], 0
        return tuple(self.shards)

    def _write(self, tokens: npt.NDArray[Any]) -> None:
        content = io.BytesIO()
        np.lib.format.write_array(content, tokens, version=(1, 0))
        data = content.getvalue()
        name = f"{self.split}-{len(self.shards):05d}.npy"
        write_durably(self.directory / name, data)
        header = len(data) - tokens.nbytes
        self.shards.append(Shard(name, len(tokens), sha256(data).hexdigest(), header))


@dataclass(frozen=True)
class TokenStream:
    """The tokens of one split, read by place. Holds no open files, so any number of shards and threads will do."""

    directory: Path
    shards: tuple[Shard, ...]
    dtype: np.dtype[Any]

    def __len__(self) -> int:
        return int(self._starts[-1])

    @cached_property
    def _starts(self) -> npt.NDArray[np.int64]:
        return np.cumsum([0, *(shard.tokens for shard in self.shards)], dtype=np.int64)

    def read(self, start: int, length: int) -> npt.NDArray[Any]:
        """
        Tokens ``start`` to ``start + length`` of the stream, across shards, (length,).

        Raises:
            DataError: a shard has gone or become shorter since it was checked.
        """
        parts = []
        index = int(np.searchsorted(self._starts, start, side="right")) - 1
        while length > 0:
            shard, offset = self.shards[index], start - int(self._starts[index])
            count = min(length, shard.tokens - offset)
            parts.append(self._read_shard(shard, offset, count))
            start, length, index = start + count, length - count, index + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _read_shard(self, shard: Shard, offset: int, count: int) -> npt.NDArray[Any]:
        path = self.directory / shard.name
        size = self.dtype.itemsize
        try:
            handle = os.open(path, os.O_RDONLY)
            try:
                # pread, not a memory map: a shard that vanishes is an error, not a bus error.
                data = os.pread(handle, count * size, shard.header_bytes + offset * size)
            finally:
                os.close(handle)
        except OSError as error:
            raise DataError(f"shard {path}: cannot be read ({error.strerror}); restore it or prepare again") from None
        if len(data) != count * size:
            raise DataError(f"shard {path}: ends early; it changed after it was checked; restore it or prepare again")
        return np.frombuffer(data, dtype=self.dtype)


@dataclass(frozen=True)
class Dataset:
    """A dataset directory, opened: its tokenizer and its splits."""

    directory: Path
    tokenizer: Tokenizer
    dtype: np.dtype[Any]
    splits: dict[str, Split]
    manifest: dict[str, Any]
    sources: tuple[str, ...] = ()
    """Names of sources, where they have some: then each has its own splits."""

    def split(self, split: str, source: str | None = None) -> Split:
        """What train or validation holds: of one named source, or of all, one after the other."""
        found = [self.splits[split_key(split, name)] for name in self._names(source)]
        shards = tuple(shard for part in found for shard in part.shards)
        return Split(shards, sum(part.documents for part in found), sum(part.bytes for part in found))

    def stream(self, split: str, source: str | None = None) -> TokenStream:
        """The tokens of train or validation: of one named source, or of all, one after the other."""
        return TokenStream(self.directory, self.split(split, source).shards, self.dtype)

    @property
    def identity(self) -> str:
        """Hash of everything that training reads: equal datasets have equal tokens and tokenizers."""
        return self.identity_of(None)

    def identity_of(self, source: str | None) -> str:
        """The ``identity`` of one named source; None is all of the dataset."""
        keys = [split_key(split, name) for split in SPLITS for name in self._names(source)]
        shards = [[key, s.name, s.tokens, s.sha256] for key in keys for s in self.splits[key].shards]
        text = json.dumps([self.tokenizer.sha256, self.dtype.str, shards], sort_keys=True)
        return sha256(text.encode()).hexdigest()

    def _names(self, source: str | None) -> Sequence[str | None]:
        return (source,) if source else self.sources or (None,)

    def verify(self, source: str | None = None) -> None:
        """
        Read every shard once: its hash must be the manifest's, and every id must be in the vocabulary.

        Args:
            source: only this named source; None is all of the dataset.

        Raises:
            DataError: names the shard, what was found and what was expected.
        """
        for split in SPLITS:
            for shard in self.split(split, source).shards:
                try:
                    self._verify_shard(shard)
                except OSError as error:
                    raise DataError(f"shard {self.directory / shard.name}: cannot be read ({error.strerror})") from None

    def _verify_shard(self, shard: Shard) -> None:
        path = self.directory / shard.name
        stream = TokenStream(self.directory, (shard,), self.dtype)
        _require_size(path, shard, self.dtype)
        if (found := sha256_of_file(path)) != shard.sha256:
            raise DataError(
                f"shard {path}: damaged: its sha256 is {found[:12]}…, {MANIFEST} says {shard.sha256[:12]}…; restore "
                "it from a copy, or delete the dataset and prepare again"
            )
        for start in range(0, shard.tokens, 2**20):
            highest = int(stream.read(start, min(2**20, shard.tokens - start)).max())
            if highest >= self.tokenizer.vocab_size:
                raise DataError(
                    f"shard {path}: holds token {highest}, but the tokenizer has ids below "
                    f"{self.tokenizer.vocab_size}; the shard was made with another tokenizer (--tokenizer)"
                )


def write_manifest(directory: Path, tokenizer: Tokenizer, dtype: np.dtype[Any], splits: dict[str, Split],
                   facts: dict[str, Any], sources: tuple[str, ...] = ()) -> None:  # fmt: skip
    """Write dataset.json, the last file of a dataset."""
    manifest = {
        "format": FORMAT,
        "version": NAMED_VERSION if sources else VERSION,
        **({"sources": list(sources)} if sources else {}),
        "tokenizer_sha256": tokenizer.sha256,
        "end_of_text": tokenizer.end_of_text,
        "vocab_size": tokenizer.vocab_size,
        "dtype": dtype.name,
        "splits": {name: {"tokens": split.tokens, **asdict(split)} for name, split in splits.items()},
        **facts,
    }
    write_durably(directory / MANIFEST, json.dumps(manifest, indent=2).encode())


def open_dataset(directory: Path) -> Dataset:
    """
    Open a dataset that ``groundup prepare`` wrote; sizes are checked here, content by ``verify``.

    Raises:
        DataError: a file is missing, damaged or of another version.
    """
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT or manifest["version"] not in (VERSION, NAMED_VERSION):
            raise DataError(
                f"dataset {path}: is {manifest['format']!r} version {manifest['version']}, this groundup reads "
                f"{FORMAT!r} version {VERSION} or {NAMED_VERSION}; prepare it again"
            )
        sources = _source_names(manifest) if manifest["version"] == NAMED_VERSION else ()
        splits = {
            name: Split(tuple(_shard(shard) for shard in manifest["splits"][name]["shards"]),
                        int(manifest["splits"][name]["documents"]), int(manifest["splits"][name]["bytes"]))
            for name in (split_key(split, source) for split in SPLITS for source in sources or (None,))
        }  # fmt: skip
        tokenizer = load_tokenizer(directory)
        dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
        expected = manifest["tokenizer_sha256"]
    except FileNotFoundError:
        raise DataError(f"dataset {directory}: has no {MANIFEST}; make one with `groundup prepare`") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"dataset {path}: damaged ({type(error).__name__}: {error}); prepare it again") from None
    if tokenizer.sha256 != expected:
        raise DataError(
            f"dataset {directory}: tokenizer.json is not the one that made the shards (sha256 {tokenizer.sha256[:12]}…, "
            f"{MANIFEST} says {expected[:12]}…); restore it or prepare again"
        )
    for name, split in splits.items():
        if tampered := [s.name for s in split.shards if "/" in s.name or not s.name.startswith(name)]:
            raise DataError(f"dataset {path}: shard name {tampered[0]!r} is not one that groundup writes")
        for shard in split.shards:
            _require_size(directory / shard.name, shard, dtype)
    return Dataset(directory, tokenizer, dtype, splits, manifest, sources)


def _source_names(manifest: dict[str, Any]) -> tuple[str, ...]:
    names = manifest["sources"]
    if not names or not all(re.fullmatch(SOURCE_NAME, name) for name in names) or len(set(names)) < len(names):
        raise ValueError(f"sources {names!r} are no names")
    return tuple(names)


def _shard(described: dict[str, Any]) -> Shard:
    shard = Shard(**described)
    if not (isinstance(shard.tokens, int) and isinstance(shard.header_bytes, int) and isinstance(shard.sha256, str)):
        raise TypeError(f"shard {shard.name}: wrong types")
    return shard


def require_windows(dataset: Dataset, length: int, splits: Sequence[str] = SPLITS, source: str | None = None) -> None:
    """
    Every split must hold at least one window and its target; of a dataset with named sources that of each.

    Args:
        length: tokens in a window.
        source: only this named source.

    Raises:
        DataError: with the numbers, and what to change.
    """
    advice = {
        "train": "add text, or lower --n-positions",
        "validation": f"raise --validation-fraction, {'' if dataset.sources else 'give --validation-source, '}or lower "
        "--n-positions",
    }
    names: Sequence[str | None] = (source,) if source else dataset.sources or (None,)
    for split, name in ((split, name) for name in names for split in splits):
        tokens = dataset.split(split, name).tokens
        if tokens < length + 1:
            raise DataError(
                f"dataset {dataset.directory}: {split_key(split, name)} has {tokens:,} tokens, one window of n_positions "
                f"{length} needs {length + 1:,}; {advice[split]}"
            )


def _require_size(path: Path, shard: Shard, dtype: np.dtype[Any]) -> None:
    expected = shard.header_bytes + shard.tokens * dtype.itemsize
    found = path.stat().st_size if path.is_file() else None
    if found != expected:
        state = "missing" if found is None else f"{found:,} bytes long"
        raise DataError(
            f"shard {path}: is {state}, expected {expected:,} bytes ({shard.tokens:,} tokens); restore it or prepare again"
        )
