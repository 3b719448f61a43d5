"""
Datasets that other trainers wrote: nanoGPT's and llm.c's .bin files, opened in place.

nanoGPT: train.bin and val.bin, uint16 tokens without a header (https://github.com/karpathy/nanoGPT, data/*/prepare.py).
llm.c: names with ``_train`` or ``_val``, 256 int32 of header, then tokens (https://github.com/karpathy/llm.c, dev/data).
"""

import struct
from pathlib import Path
from typing import Any

import numpy as np

from groundup.data.shards import Dataset, Shard, Split
from groundup.errors import DataError
from groundup.runtime.files import sha256_of_file
from groundup.tokenizer.tokenizer import Tokenizer

LLMC_HEADER_BYTES = 256 * 4
# (magic, version) to the type of a token: GPT-2's, and Llama 3's.
LLMC_KINDS = {(20240520, 1): "<u2", (20240801, 7): "<u4"}


def foreign_shards(directory: Path) -> dict[str, list[Path]]:
    """The .bin files of a folder by split; both lists are empty where it is no such dataset."""
    found: dict[str, list[Path]] = {"train": [], "validation": []}
    if directory.is_dir():
        for path in sorted(directory.glob("*.bin")):
            if path.stem == "train" or "_train" in path.stem:
                found["train"].append(path)
            elif path.stem == "val" or "_val" in path.stem:
                found["validation"].append(path)
    return found if found["train"] and found["validation"] else {"train": [], "validation": []}


def open_foreign_dataset(directory: Path, tokenizer: Tokenizer) -> Dataset:
    """
    Open a folder of nanoGPT's or llm.c's .bin files; they do not say their tokenizer, so it is given.

    Raises:
        DataError: files of different types, or a length that does not fit the header.
    """
    paths = foreign_shards(directory)
    described = {split: [_describe(path) for path in files] for split, files in paths.items()}
    dtypes = {dtype for shards in described.values() for _, dtype in shards}
    if len(dtypes) != 1:
        raise DataError(f"dataset {directory}: its .bin files have different token types {sorted(dtypes)}; separate them")
    splits = {split: Split(tuple(shard for shard, _ in shards)) for split, shards in described.items()}
    dtype: np.dtype[Any] = np.dtype(dtypes.pop())
    return Dataset(directory, tokenizer, dtype, splits, {"format": "foreign .bin"})


def _describe(path: Path) -> tuple[Shard, str]:
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(12)
    magic, version, tokens = struct.unpack("<3i", head.ljust(12, b"\0"))
    dtype = LLMC_KINDS.get((magic, version))
    if dtype is None and magic in {known for known, _ in LLMC_KINDS}:
        raise DataError(f"dataset file {path}: is llm.c's format in version {version}, which is not known here; convert it")
    if dtype is None:
        if size % 2 or not size:
            raise DataError(
                f"dataset file {path}: {size} bytes is neither llm.c's format nor nanoGPT's uint16 tokens; is it truncated?"
            )
        return Shard(path.name, size // 2, sha256_of_file(path), header_bytes=0), "<u2"
    expected = LLMC_HEADER_BYTES + tokens * np.dtype(dtype).itemsize
    if size != expected:
        raise DataError(
            f"dataset file {path}: {size:,} bytes, but its header says {tokens:,} tokens ({expected:,} bytes); it is "
            "truncated or damaged, fetch it again"
        )
    return Shard(path.name, tokens, sha256_of_file(path), LLMC_HEADER_BYTES), dtype
