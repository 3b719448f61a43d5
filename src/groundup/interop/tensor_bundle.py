"""
TensorFlow's checkpoint format V2, the "tensor bundle", without TensorFlow.

``PREFIX.data-00000-of-00001`` holds the tensors' bytes one after the other; ``PREFIX.index`` says which is where. The
index is a LevelDB table: blocks of sorted keys, each block with a type byte and a checksum, and a footer that points to a
block of pointers. A value is a protocol buffer: under the empty key the header, under a tensor's name its entry.

Written from the formats' descriptions:
    LevelDB's doc/table_format.md and doc/log_format.md (the mask of checksums), https://github.com/google/leveldb
    tensorflow/core/protobuf/tensor_bundle.proto, tensorflow/core/framework/{tensor_shape,types,versions}.proto and the
    comments in tensorflow/core/util/tensor_bundle/tensor_bundle.h, https://github.com/tensorflow/tensorflow
    https://protobuf.dev/programming-guides/encoding/

Nothing in these files is code, and nothing in them is believed: every block and every tensor is checked by its CRC32C, and
sizes are compared with the files before memory is taken.
"""

import math
import os.path
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from groundup.errors import CheckpointError

MAGIC = 0xDB4775248B80FB57
FOOTER_BYTES = 48
TRAILER_BYTES = 5  # after each block: its type, its checksum
UNCOMPRESSED, SNAPPY = 0, 1
SNAPPY_MAX_RATIO = 22  # its longest copy is 64 bytes for 3
RESTART_INTERVAL = 16
READ_BYTES = 2**20

# A table is small: GPT-2's largest has 25 KiB. More is a mistake or an attack, and Python would take minutes.
INDEX_MAX_BYTES = 2**23
NAMES_MAX_BYTES = 2**26
MAX_DIMENSIONS = 64  # torch's limit

# tensorflow/core/framework/types.proto
DTYPES = {
    1: torch.float32, 2: torch.float64, 3: torch.int32, 4: torch.uint8, 5: torch.int16, 6: torch.int8, 9: torch.int64,
    14: torch.bfloat16, 19: torch.float16,
}  # fmt: skip
DTYPE_NUMBERS = {dtype: number for number, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """Where a tensor is and what it is, as the index says."""

    dtype: int
    """A key of DTYPES, or another number of TensorFlow's: strings, for instance."""
    shape: tuple[int, ...]
    shard: int
    offset_bytes: int
    size_bytes: int
    masked_crc32c: int
    is_sliced: bool
    """Cut into slices that are entries of their own: a variable that was spread over several machines."""


class Bundle(Mapping[str, Tensor]):
    """The tensors of a checkpoint by their names; each is read, and its checksum compared, when it is asked for."""

    def __init__(self, prefix: Path, entries: Mapping[str, Entry], num_shards: int):
        self.prefix = prefix
        self.entries = entries
        self.num_shards = num_shards

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries  # without reading it

    def __getitem__(self, name: str) -> Tensor:
        """
        Raises:
            KeyError: no such tensor.
            CheckpointError: its bytes are damaged, or they are of a kind that torch does not have.
        """
        entry = self.entries[name]
        where = f"checkpoint {_shard_path(self.prefix, entry.shard, self.num_shards)}: tensor {name}"
        if entry.is_sliced:
            raise CheckpointError(f"{where}: is stored in slices; save it with TensorFlow as one tensor (no partitioner)")
        dtype = DTYPES.get(entry.dtype)
        if dtype is None:
            known = ", ".join(str(known).removeprefix("torch.") for known in DTYPES.values())
            raise CheckpointError(f"{where}: has TensorFlow's data type {entry.dtype}, which is none of {known}")
        # The second condition: where one size is 0, the others must not overflow in torch.
        strides_end = math.prod(max(size, 1) for size in entry.shape)
        if math.prod(entry.shape) * dtype.itemsize != entry.size_bytes or strides_end * dtype.itemsize >= 2**63:
            raise CheckpointError(
                f"{where}: has {entry.size_bytes:,} bytes, which is not the size of {dtype} {entry.shape}; the index is "
                "damaged: fetch it again"
            )
        return self._read(entry, where).view(dtype).reshape(entry.shape)

    def _read(self, entry: Entry, where: str) -> Tensor:
        """The bytes of a tensor, uint8, (size_bytes,)."""
        content = torch.empty(entry.size_bytes, dtype=torch.uint8)
        target, done, crc = content.numpy(), 0, 0
        try:
            with _shard_path(self.prefix, entry.shard, self.num_shards).open("rb") as file:
                file.seek(entry.offset_bytes)
                while block := file.read(min(READ_BYTES, entry.size_bytes - done)):
                    target[done : done + len(block)] = np.frombuffer(block, dtype=np.uint8)
                    done, crc = done + len(block), _crc32c(block, crc)
        except OSError as error:
            raise CheckpointError(f"{where}: cannot be read ({error.strerror or error}); make the file readable") from None
        if done != entry.size_bytes or _masked(crc) != entry.masked_crc32c:
            raise CheckpointError(f"{where}: is damaged, its CRC32C is not the one in the index; fetch the file again")
        return content


def read_bundle(prefix: Path) -> Bundle:
    """
    Open the checkpoint whose files begin with ``prefix``: read the index and see that the data files can hold it.

    Raises:
        CheckpointError: a file is missing, cut short or damaged; the message names it.
    """
    path = _index_path(prefix)
    try:
        size_bytes = path.stat().st_size
        if size_bytes > INDEX_MAX_BYTES:
            raise ValueError(f"{size_bytes:,} bytes are more than an index has")
        table = _read_table(path.read_bytes())
        num_shards = _read_header(table.pop(b"", b""))
        entries = {}
        for key, value in table.items():
            name = _printable(key)
            if name in entries:
                raise ValueError(f"two tensors are called {name}")
            entries[name] = _read_entry(value, name, num_shards)
    except OSError as error:
        raise CheckpointError(f"checkpoint {path}: cannot be read ({error.strerror}); fetch it, and run again") from None
    except ValueError as error:
        raise CheckpointError(
            f"checkpoint {path}: is not a whole TensorFlow checkpoint index ({error}); fetch the file again"
        ) from None
    _check_shards(prefix, entries, num_shards)
    return Bundle(prefix, entries, num_shards)


def write_bundle(prefix: Path, tensors: Mapping[str, Tensor]) -> None:
    """
    Write a checkpoint that TensorFlow reads: ``prefix.data-00000-of-00001`` and ``prefix.index``.

    Args:
        tensors: by name, of any device and layout; made contiguous one at a time.

    Raises:
        CheckpointError: a data type that TensorFlow's numbers here do not cover, or a name that is empty.
        OSError: the place cannot be written.
    """
    table = [(b"", _field(1, 1) + _field(3, _field(1, 1)))]  # one shard, little-endian, written for readers of version 1
    offset_bytes = 0
    with _shard_path(prefix, 0, 1).open("wb") as file:
        for key, name in sorted((name.encode(), name) for name in tensors):
            tensor = tensors[name].detach().cpu().contiguous()
            if not key or tensor.dtype not in DTYPE_NUMBERS:
                raise CheckpointError(f"export {prefix}: tensor {name!r} of {tensor.dtype} has no place in the format")
            content = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
            file.write(content)
            shape = b"".join(_field(2, _field(1, size)) for size in tensor.shape)
            entry = _field(1, DTYPE_NUMBERS[tensor.dtype]) + _field(2, shape) + _field(4, offset_bytes)
            entry += _field(5, len(content)) + b"\x35" + struct.pack("<I", _masked(_crc32c(content)))
            table.append((key, entry))
            offset_bytes += len(content)
    _index_path(prefix).write_bytes(_table(table))


def _index_path(prefix: Path) -> Path:
    return prefix.with_name(f"{prefix.name}.index")


def _shard_path(prefix: Path, shard: int, num_shards: int) -> Path:
    return prefix.with_name(f"{prefix.name}.data-{shard:05d}-of-{num_shards:05d}")


def _check_shards(prefix: Path, entries: Mapping[str, Entry], num_shards: int) -> None:
    """See that the data files are there and as long as the index says, and that no two tensors share bytes."""
    by_shard: dict[int, list[tuple[int, int, str]]] = {}
    for name, entry in entries.items():
        if not entry.is_sliced:
            place = (entry.offset_bytes, entry.offset_bytes + entry.size_bytes, name)
            by_shard.setdefault(entry.shard, []).append(place)
    for shard, places in sorted(by_shard.items()):
        path = _shard_path(prefix, shard, num_shards)
        try:
            size_bytes = path.stat().st_size
        except OSError as error:
            raise CheckpointError(f"checkpoint {path}: cannot be read ({error.strerror}); fetch it, and run again") from None
        end = 0
        for start, stop, name in sorted(places):
            if stop > size_bytes:
                raise CheckpointError(
                    f"checkpoint {path}: has {size_bytes:,} bytes, tensor {name} ends at {stop:,}: the file is not whole; "
                    "delete it and fetch it again"
                )
            # Without this a small file could ask for its own size once per name.
            if start < end:
                raise CheckpointError(f"checkpoint {path}: tensor {name} overlaps another; fetch the index again")
            end = stop


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """An unsigned number in base 128, least digit first, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError("it ends within a number")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number of more than 10 bytes")


def _encoded(value: int) -> bytes:
    """A number as ``_varint`` reads it."""
    digits = bytearray()
    while value >= 0x80:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*digits, value])


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a message in order: their numbers, and an integer or the bytes of a string or message."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == 0:
            value, at = _varint(message, at)
            yield number, value
            continue
        size, at = _varint(message, at) if wire_type == 2 else ({1: 8, 5: 4}.get(wire_type, -1), at)
        if size < 0 or at + size > len(message):
            raise ValueError(f"field {number} is cut short or of wire type {wire_type}")
        content = message[at : at + size]
        at += size
        yield number, content if wire_type == 2 else int.from_bytes(content, "little")


def _field(number: int, value: int | bytes) -> bytes:
    """A field as ``_fields`` reads it; a zero is left out, as proto3 does."""
    if isinstance(value, bytes):
        return _encoded(number << 3 | 2) + _encoded(len(value)) + value
    return _encoded(number << 3) + _encoded(value) if value else b""


def _integer(value: int | bytes, what: str) -> int:
    """A field that must be a count: 0 to 2^63 - 1; a negative number comes as one above."""
    if isinstance(value, bytes) or value >= 2**63:
        raise ValueError(f"{what} is negative or no number")
    return value


def _message(value: int | bytes, what: str) -> bytes:
    if isinstance(value, int):
        raise ValueError(f"{what} is no message")
    return value


def _read_header(message: bytes) -> int:
    """The number of shards, of BundleHeaderProto."""
    found = dict(_fields(message))
    num_shards = _integer(found.get(1, 0), "num_shards")
    if not 1 <= num_shards < 2**31:
        raise ValueError(f"it says that there are {num_shards} data files")
    if found.get(2, 0) != 0:
        raise ValueError("it was written on a big-endian machine, convert it there")
    # VersionDef: what a reader must at least know.
    if _integer(dict(_fields(_message(found.get(3, b""), "version"))).get(2, 0), "min_consumer") > 1:
        raise ValueError("it asks for a newer reader than one of version 1")
    return num_shards


def _read_entry(message: bytes, name: str, num_shards: int) -> Entry:
    """A BundleEntryProto."""
    shape: tuple[int, ...] = ()
    numbers = dict.fromkeys((1, 3, 4, 5, 6), 0)
    is_sliced = False
    for number, value in _fields(message):
        if number in numbers:
            numbers[number] = _integer(value, f"field {number} of {name}")
        elif number == 2:
            shape = _read_shape(_message(value, f"shape of {name}"), name)
        elif number == 7:
            is_sliced = True
    dtype, shard, offset_bytes, size_bytes, masked_crc32c = numbers.values()
    if shard >= num_shards:
        raise ValueError(f"{name} is said to be in data file {shard} of {num_shards}")
    return Entry(dtype, shape, shard, offset_bytes, size_bytes, masked_crc32c, is_sliced)


def _read_shape(message: bytes, name: str) -> tuple[int, ...]:
    """The sizes of a TensorShapeProto."""
    sizes: list[int] = []
    for number, value in _fields(message):
        if number == 2:
            size = dict(_fields(_message(value, f"dimension of {name}"))).get(1, 0)
            sizes.append(_integer(size, f"size of {name}"))
        elif number == 3 and value:
            raise ValueError(f"{name} has no known shape")
    if len(sizes) > MAX_DIMENSIONS:
        raise ValueError(f"{name} has {len(sizes)} dimensions")
    return tuple(sizes)


def _read_table(data: bytes) -> dict[bytes, bytes]:
    """All keys and values of a table, in its order."""
    if len(data) < FOOTER_BYTES or struct.unpack("<Q", data[-8:])[0] != MAGIC:
        raise ValueError("its end lacks the format's magic number")
    footer = data[-FOOTER_BYTES:-8]
    # Nothing is in the metaindex here, yet a flipped bit in it is a damaged file.
    meta_offset, at = _varint(footer, 0)
    meta_size, at = _varint(footer, at)
    _block(data, meta_offset, meta_size)
    offset, at = _varint(footer, at)
    size, _ = _varint(footer, at)
    found: dict[bytes, bytes] = {}
    last, names_bytes = None, 0
    for _, handle in _entries(_block(data, offset, size)):
        offset, at = _varint(handle, 0)
        size, _ = _varint(handle, at)
        for key, value in _entries(_block(data, offset, size)):
            # Also keeps an index that points to one block a million times from being followed.
            if last is not None and key <= last:
                raise ValueError("its names are not in order")
            last, names_bytes = key, names_bytes + len(key)
            if names_bytes > NAMES_MAX_BYTES:
                raise ValueError("its names have more bytes than any checkpoint's")
            found[key] = value
    return found


def _block(data: bytes, offset: int, size: int) -> bytes:
    """The content of a block, checked and decompressed."""
    end = offset + size
    if end + TRAILER_BYTES > len(data) - FOOTER_BYTES:
        raise ValueError(f"a block ends at byte {end}, after the file's last one")
    if struct.unpack("<I", data[end + 1 : end + TRAILER_BYTES])[0] != _masked(_crc32c(data[offset : end + 1])):
        raise ValueError(f"the CRC32C of the block at byte {offset} is wrong")
    content, kind = data[offset:end], data[end]
    if kind == SNAPPY:
        return _from_snappy(content)
    if kind != UNCOMPRESSED:
        raise ValueError(f"the block at byte {offset} is compressed in the unknown way {kind}")
    return content


def _from_snappy(content: bytes) -> bytes:
    import pyarrow

    size, _ = _varint(content, 0)
    if size > SNAPPY_MAX_RATIO * len(content):
        raise ValueError(f"a block of {len(content)} bytes cannot be {size:,} decompressed")
    try:
        return bytes(pyarrow.Codec("snappy").decompress(content, decompressed_size=size, asbytes=True))
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"a compressed block is damaged: {error}") from None


def _entries(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of a block: each key continues the first bytes of the one before."""
    if len(block) < 4:
        raise ValueError("a block without its restarts")
    end = len(block) - 4 * (1 + struct.unpack("<I", block[-4:])[0])
    if end < 0:
        raise ValueError("a block has more restarts than bytes")
    key, at = b"", 0
    while at < end:
        shared, at = _varint(block, at)
        added, at = _varint(block, at)
        size, at = _varint(block, at)
        if shared > len(key) or at + added + size > end:
            raise ValueError("a name or a value is cut short")
        key = key[:shared] + block[at : at + added]
        at += added + size
        yield key, block[at - size : at]


def _table(pairs: Sequence[tuple[bytes, bytes]]) -> bytes:
    """A table of keys and values that are in order, at least one; below 256 KiB as TensorFlow writes it, to the byte."""
    data = bytearray()
    # TensorFlow's name for the end of the only block: short, and not before any key in it.
    pointer = (_short_successor(pairs[-1][0]), _append(data, _encoded_block(pairs)))
    footer = _append(data, _encoded_block([])) + _append(data, _encoded_block([pointer]))
    return bytes(data) + footer.ljust(FOOTER_BYTES - 8, b"\0") + struct.pack("<Q", MAGIC)


def _encoded_block(pairs: Sequence[tuple[bytes, bytes]]) -> bytes:
    """Entries as ``_entries`` reads them; every so many keys one is written in full, for readers that search."""
    content, restarts, last = bytearray(), [], b""
    for number, (key, value) in enumerate(pairs):
        if number % RESTART_INTERVAL == 0:
            restarts.append(len(content))
            last = b""
        shared = len(os.path.commonprefix([last, key]))
        content += _encoded(shared) + _encoded(len(key) - shared) + _encoded(len(value)) + key[shared:] + value
        last = key
    restarts = restarts or [0]
    return bytes(content) + struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))


def _append(data: bytearray, content: bytes) -> bytes:
    """Add a block to a file; returns its handle."""
    handle = _encoded(len(data)) + _encoded(len(content))
    checked = content + bytes([UNCOMPRESSED])
    data += checked + struct.pack("<I", _masked(_crc32c(checked)))
    return handle


def _short_successor(key: bytes) -> bytes:
    """A short key that is not before ``key``: up to its first byte that can grow by one, and that grown."""
    start = len(key) - len(key.lstrip(b"\xff"))
    return key[:start] + bytes([key[start] + 1]) if start < len(key) else key


def _crc32c(data: bytes, before: int = 0) -> int:
    """CRC-32C (Castagnoli) of bytes that follow those of the checksum ``before``."""
    import google_crc32c

    return int(google_crc32c.extend(before, data))


def _masked(crc: int) -> int:
    """LevelDB's form of a stored checksum: a checksum of bytes that hold their own checksum would be a constant."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _printable(key: bytes) -> str:
    """A tensor's name; what could not be shown in one line is escaped."""
    name = key.decode("utf-8", "backslashreplace")
    return name if name.isprintable() else name.encode("unicode_escape").decode()
