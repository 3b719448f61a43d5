"""TensorFlow's checkpoint format: read as TensorFlow wrote it, written as it writes it, and refused where it is damaged."""

import contextlib
import hashlib
import json
import os
import re
import resource
import shutil
import struct
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from groundup.errors import CheckpointError
from groundup.interop import tensor_bundle
from groundup.interop.openai import read_openai, write_openai
from groundup.interop.tensor_bundle import _encoded, _field, _masked, read_bundle, write_bundle
from groundup.tokenizer.tokenizer import byte_tokenizer
from tests.golden import make_openai_tiny
from tests.test_interop import assert_same_bits, new_model
from tests.test_openai import CONFIG, DATA, GOLDEN, INDEX, SHARDED


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    """A copy of what TensorFlow wrote."""
    return Path(shutil.copytree(GOLDEN, tmp_path / "golden"))


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A folder as we write it."""
    (tmp_path / "written").mkdir()
    write_openai(new_model(CONFIG), byte_tokenizer(), tmp_path / "written")
    return tmp_path / "written"


# ---- TensorFlow's files ----


@pytest.mark.parametrize("folder", [GOLDEN, SHARDED], ids=lambda folder: folder.name)
def test_what_tensorflow_wrote_is_read_to_the_bit(folder):
    found = dict(read_bundle(folder / "model.ckpt"))
    expected = {name: torch.from_numpy(value) for name, value in make_openai_tiny.weights().items()}
    assert_same_bits(found, expected)
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}


def test_what_we_write_is_what_tensorflow_writes(tmp_path):
    write_bundle(tmp_path / "model.ckpt", dict(read_bundle(GOLDEN / "model.ckpt")))
    for name in (INDEX, DATA):
        assert (tmp_path / name).read_bytes() == (GOLDEN / name).read_bytes(), name


def tensorflow(verb: str, place: Path) -> str:
    """Run TensorFlow in an environment of its own: it does not live in ours."""
    python = os.environ.get("GROUNDUP_TENSORFLOW_PYTHON")
    if not python:
        pytest.skip("GROUNDUP_TENSORFLOW_PYTHON does not name a Python with TensorFlow")
    done = subprocess.run(
        [python, make_openai_tiny.__file__, verb, str(place)], capture_output=True, check=False, timeout=120
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    return done.stdout.decode()


def test_tensorflow_reads_what_we_write(tmp_path):
    draw = torch.Generator().manual_seed(0)
    tensors = {f"{number:04d}/{'x' * 200}": torch.randn(2, generator=draw) for number in range(2000)}
    tensors |= {str(dtype): torch.randn(3, 5, generator=draw).mul(99).to(dtype) for dtype in tensor_bundle.DTYPES.values()}
    tensors |= {
        "scalar": torch.tensor(7),
        "none": torch.zeros(0, 4),
        "turned": torch.arange(6).view(2, 3).T,
        "a.b": torch.ones(1),
    }
    write_bundle(tmp_path / "x", tensors)
    assert (tmp_path / "x.index").stat().st_size > 2**18, "one block, larger than TensorFlow makes them"
    found = json.loads(tensorflow("dump", tmp_path / "x"))
    assert found == {
        name: [
            str(tensor.dtype).removeprefix("torch."),
            list(tensor.shape),
            hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest(),
        ]
        for name, tensor in tensors.items()
    }


def test_tensorflow_reads_an_exported_model(written):
    found = json.loads(tensorflow("dump", written / "model.ckpt"))
    assert found["model/h1/mlp/c_proj/w"][:2] == ["float32", [1, 16, 4]]
    assert len(found) == 2 * 12 + 4


def test_an_index_of_several_blocks_by_tensorflow_is_read(tmp_path):
    tensorflow("many", tmp_path / "x")
    assert (tmp_path / "x.index").stat().st_size > 2**18
    bundle = read_bundle(tmp_path / "x")
    assert len(bundle) == make_openai_tiny.MANY
    assert [int(tensor[0]) for tensor in bundle.values()] == list(range(make_openai_tiny.MANY))


def test_a_fine_tuned_checkpoint_by_tensorflow_is_read(golden):
    """Adam's two moments of every weight, its powers and the step."""
    tensorflow("training", golden / "model.ckpt")
    found = read_openai(golden)
    assert len(found.unexpected) == 2 * (2 * 12 + 4) + 3
    assert {"global_step", "beta1_power", "model/wte/Adam", "model/wte/Adam_1"} <= set(found.unexpected)
    assert_same_bits(dict(found.model.state_dict()), dict(read_openai(GOLDEN).model.state_dict()))


def test_the_golden_files_can_be_made_again(tmp_path):
    tensorflow("make", tmp_path)
    for folder in (GOLDEN, SHARDED):
        for file in folder.iterdir():
            assert (tmp_path / folder.name / file.name).read_bytes() == file.read_bytes(), file


# ---- the format ----


def test_the_checksums_are_those_of_the_standard():
    """RFC 3720, B.4; and LevelDB's mask of a checksum, worked out by hand."""
    assert tensor_bundle._crc32c(bytes(32)) == 0x8A9136AA
    assert tensor_bundle._crc32c(b"6789", tensor_bundle._crc32c(b"12345")) == 0xE3069283
    assert _masked(0) == 0xA282EAD8
    assert _masked(0x00008000) == 0xA282EAD8 + 1 + 0x0000_0000 + (0x8000 << 17 & 0xFFFFFFFF)


NAMES = st.text(st.characters(exclude_categories=["Cs", "C", "Z"]), min_size=1, max_size=30)


@st.composite
def any_tensor(draw):
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    dtype = draw(st.sampled_from(list(tensor_bundle.DTYPES.values())))
    size = int(np.prod(shape)) * dtype.itemsize
    content = torch.frombuffer(bytearray(draw(st.binary(min_size=size, max_size=size)) + bytes(8)), dtype=torch.uint8)[:size]
    return content.clone().view(dtype).reshape(shape)


@settings(max_examples=60, deadline=None)
@given(tensors=st.dictionaries(NAMES, any_tensor(), max_size=40))
@example(tensors={f"\x7e{number:03d}": torch.tensor([number]) for number in range(200)})
def test_tensors_come_back_as_they_were(tmp_path_factory, tensors):
    prefix = tmp_path_factory.mktemp("bundle") / "x"
    write_bundle(prefix, tensors)
    found = read_bundle(prefix)
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


def test_a_data_type_that_the_format_lacks_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="'odd' of torch.complex64 has no place"):
        write_bundle(tmp_path / "x", {"odd": torch.zeros(1, dtype=torch.complex64)})


def test_a_damaged_byte_of_the_data_is_refused_by_the_tensors_name(golden):
    bundle, path = read_bundle(golden / "model.ckpt"), golden / DATA
    good = path.read_bytes()
    owners = [(name, entry.offset_bytes, entry.size_bytes) for name, entry in bundle.entries.items()]
    assert sum(size for _, _, size in owners) == len(good)
    with path.open("r+b", buffering=0) as file:
        for name, start, size in owners:
            for at in range(start, start + size):
                os.pwrite(file.fileno(), bytes([good[at] ^ (1 << at % 8)]), at)
                with pytest.raises(
                    CheckpointError, match=rf"{re.escape(DATA)}: tensor {re.escape(name)}: is damaged, its CRC32C"
                ):
                    bundle[name]
                os.pwrite(file.fileno(), good[at : at + 1], at)
            assert bundle[name].numel() == size // 4


def test_a_damaged_byte_of_the_index_is_refused_or_changes_nothing(golden):
    path, expected = golden / INDEX, read_bundle(golden / "model.ckpt").entries
    good, harmless, words = path.read_bytes(), [], set()
    for at in range(len(good)):
        path.write_bytes(good[:at] + bytes([good[at] ^ (1 << at % 8)]) + good[at + 1 :])
        try:
            assert read_bundle(golden / "model.ckpt").entries == expected
            harmless.append(at)
        except CheckpointError as error:
            words.add(str(error))
    assert all(INDEX in text and text.isprintable() for text in words)
    # Only the padding of the footer means nothing, 40 bytes for two pointers that take 6; and a bit before it that goes on
    # with zeros.
    assert set(harmless) <= set(range(len(good) - 48 + 5, len(good) - 8))
    assert len(harmless) < 40


def test_an_index_cut_anywhere_is_refused(golden):
    path = golden / INDEX
    good = path.read_bytes()
    for size in range(len(good)):
        path.write_bytes(good[:size])
        with pytest.raises(
            CheckpointError, match=rf"{INDEX}: is not a whole TensorFlow checkpoint index .*; fetch the file again"
        ):
            read_bundle(golden / "model.ckpt")


def test_data_cut_anywhere_is_refused_and_says_where_it_should_end(golden):
    for size in range(2239, -1, -7):
        os.truncate(golden / DATA, size)
        with pytest.raises(
            CheckpointError, match=rf"{DATA}: has {size:,} bytes, tensor \S+ ends at [\d,]+: the file is not whole"
        ):
            read_bundle(golden / "model.ckpt")


def test_a_file_cut_after_it_was_opened_is_refused(golden):
    bundle = read_bundle(golden / "model.ckpt")
    os.truncate(golden / DATA, 2239)
    with pytest.raises(CheckpointError, match="tensor model/wte: is damaged"):
        bundle["model/wte"]


def sealed(content: bytes, kind: int = 0) -> bytes:
    """A block with its type and a checksum that is right."""
    return content + bytes([kind]) + struct.pack("<I", _masked(tensor_bundle._crc32c(content + bytes([kind]))))


def block(pairs: list[tuple[bytes, bytes]]) -> bytes:
    """A block as simple as the format allows: no key continues another."""
    entries = b"".join(b"\0" + _encoded(len(key)) + _encoded(len(value)) + key + value for key, value in pairs)
    return entries + struct.pack("<II", 0, 1)


def table(*blocks: bytes) -> bytes:
    """A table of sealed blocks, written apart from the product's writer."""
    data, handles = b"", []
    for content in blocks:
        handles.append(_encoded(len(data)) + _encoded(len(content) - 5))
        data += content
    return with_footer(data, [(bytes([index]), handle) for index, handle in enumerate(handles)])


def with_footer(data: bytes, pointers: list[tuple[bytes, bytes]]) -> bytes:
    handles = b""
    for content in (block([]), block(pointers)):
        handles += _encoded(len(data)) + _encoded(len(content))
        data += sealed(content)
    return data + handles.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)


HEADER = (b"", b"\x08\x01\x1a\x02\x08\x01")
NEGATIVE = 2**64 - 1


def entry(
    dtype: int = 1, shape: tuple[int, ...] = (2,), shard: int = 0, offset: int = 0, size: int = 8, crc: int | None = None
) -> bytes:
    crc = _masked(tensor_bundle._crc32c(bytes(8))) if crc is None else crc
    return (
        _field(1, dtype) + _field(2, b"".join(_field(2, _field(1, length)) for length in shape))
        + _field(3, shard) + _field(4, offset) + _field(5, size) + b"\x35" + struct.pack("<I", crc)
    )  # fmt: skip


def index_of(tmp_path: Path, content: bytes, data: bytes = bytes(8)) -> Path:
    (tmp_path / INDEX).write_bytes(content)
    (tmp_path / DATA).write_bytes(data)
    return tmp_path / "model.ckpt"


def test_a_table_made_by_hand_is_read(tmp_path):
    """The base of the hostile ones below: they are refused for what is wrong with them."""
    blocks = [sealed(block([HEADER])), sealed(block([(b"a", entry())])), sealed(block([(b"b", entry(offset=8))]))]
    bundle = read_bundle(index_of(tmp_path, table(*blocks), bytes(16)))
    assert_same_bits(dict(bundle), {"a": torch.zeros(2), "b": torch.zeros(2)})


def test_a_compressed_block_is_read(tmp_path):
    packed = pyarrow.Codec("snappy").compress(block([HEADER, (b"a", entry()), (b"b", entry(offset=8))]), asbytes=True)
    assert set(read_bundle(index_of(tmp_path, table(sealed(packed, kind=1)), bytes(16)))) == {"a", "b"}


ONE = sealed(block([HEADER, (b"a", entry())]))


def after_header(*pairs: tuple[bytes, bytes]) -> bytes:
    return table(sealed(block([HEADER, *pairs])))


def broken(content: bytes) -> bytes:
    """A block that begins well."""
    return table(sealed(block([HEADER])[:-8] + content + struct.pack("<II", 0, 1)))


HOSTILE_TABLES = {
    "no header": ("it says that there are 0 data files", table(sealed(block([(b"a", entry())])))),
    "no data files": ("it says that there are 0 data files", table(sealed(block([(b"", b"\x08\x00")])))),
    "minus one data files": ("num_shards is negative", table(sealed(block([(b"", _field(1, NEGATIVE))])))),
    "big-endian": ("big-endian machine", table(sealed(block([(b"", HEADER[1] + _field(2, 1))])))),
    "for a newer reader": ("newer reader", table(sealed(block([(b"", _field(1, 1) + _field(3, _field(2, 9)))])))),
    "a version that is a number": ("version is no message", table(sealed(block([(b"", _field(1, 1) + _field(3, 7))])))),
    "names that go back": ("names are not in order", after_header((b"b", entry()), (b"a", entry(offset=8)))),
    "a name twice": ("names are not in order", after_header((b"a", entry()), (b"a", entry()))),
    "a name twice when shown": ("two tensors are called", after_header((b"\\xff", entry()), (b"\xff", entry(offset=8)))),
    "a shard that is not there": ("a is said to be in data file 1 of 1", after_header((b"a", entry(shard=1)))),
    "a negative shard": ("field 3 of a is negative", after_header((b"a", entry(shard=NEGATIVE)))),
    "a negative offset": ("field 4 of a is negative", after_header((b"a", entry(offset=NEGATIVE)))),
    "a negative size": ("field 5 of a is negative", after_header((b"a", entry(size=NEGATIVE)))),
    "a negative length": ("size of a is negative", after_header((b"a", entry(shape=(NEGATIVE,))))),
    "a shape that is a number": ("shape of a is no message", after_header((b"a", _field(2, 7)))),
    "an unknown rank": ("a has no known shape", after_header((b"a", _field(2, _field(3, 1))))),
    "65 dimensions": ("a has 65 dimensions", after_header((b"a", entry(shape=(1,) * 65)))),
    "a number without end": ("more than 10 bytes", after_header((b"a", b"\x08" + b"\xff" * 100))),
    "a field of another wire type": ("of wire type 3", after_header((b"a", b"\x0b"))),
    "a field cut short": ("field 2 is cut short", after_header((b"a", b"\x12\x7f"))),
    "a key that continues nothing": ("a name or a value is cut short", broken(b"\x05\x01\x00a")),
    "a value after the end": ("a name or a value is cut short", broken(b"\x00\x01\x08a")),
    "more restarts than bytes": ("more restarts than bytes", table(sealed(struct.pack("<II", 0, 2**31)))),
    "a block of nothing": ("without its restarts", table(sealed(b""))),
    "an unknown compression": ("unknown way 2", table(sealed(block([HEADER]), kind=2))),
    "damaged snappy": ("compressed block is damaged", table(sealed(b"\x20" + b"\xff" * 12, kind=1))),
    "a snappy bomb": ("cannot be 1,099,511,627,776 decompressed", table(sealed(_encoded(2**40) + b"\x00" * 12, kind=1))),
    "a block after the end": ("after the file's last one", with_footer(b"", [(b"a", _encoded(2**40) + _encoded(5))])),
    "a block of a huge size": ("after the file's last one", with_footer(b"", [(b"a", _encoded(0) + _encoded(2**63))])),
    "one block a million times": ("names are not in order", with_footer(ONE, [(b"", b"\0" + _encoded(len(ONE) - 5))] * 1000)),
    "a footer of numbers without end": ("more than 10 bytes", b"\xff" * 40 + struct.pack("<Q", 0xDB4775248B80FB57)),
    "nothing": ("magic number", b""),
    "text": ("magic number", b"a checkpoint\n" * 20),
}  # fmt: skip


@pytest.mark.timeout(10)
@pytest.mark.parametrize("case", HOSTILE_TABLES)
def test_a_hostile_index_is_refused(tmp_path, case):
    words, content = HOSTILE_TABLES[case]
    prefix = index_of(tmp_path, content, bytes(16))
    with pytest.raises(CheckpointError, match=rf"{INDEX}: is not a whole TensorFlow checkpoint index \(.*{words}") as refusal:
        read_bundle(prefix)
    assert str(refusal.value).isprintable()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"dtype": 7}, "tensor a: has TensorFlow's data type 7, which is none of float32,"),
        ({"dtype": 10**6}, "tensor a: has TensorFlow's data type 1000000"),
        ({"dtype": 2}, r"tensor a: has 8 bytes, which is not the size of torch.float64 \(2,\)"),
        ({"shape": (2**62,)}, "tensor a: has 8 bytes"),
        ({"shape": (2**62,) * 64}, "tensor a: has 8 bytes"),
        ({"shape": (0, 2**62, 2**62), "size": 0}, "tensor a: has 0 bytes"),
        ({"shape": (2**61 + 2,)}, "tensor a: has 8 bytes"),
        ({"crc": 0}, "tensor a: is damaged, its CRC32C"),
    ],
    ids=str,
)  # fmt: skip
def test_a_hostile_tensor_is_refused_when_it_is_read(tmp_path, changed, words):
    prefix = index_of(tmp_path, table(sealed(block([HEADER, (b"a", entry(**changed)), (b"b", entry(offset=8))]))), bytes(16))
    bundle = read_bundle(prefix)
    with pytest.raises(CheckpointError, match=f"{DATA}: {words}"):
        bundle["a"]
    assert torch.equal(bundle["b"], torch.zeros(2))


def test_a_tensor_in_slices_is_refused_when_it_is_read(tmp_path):
    bundle = read_bundle(index_of(tmp_path, table(sealed(block([HEADER, (b"a", entry() + _field(7, b"\x0a\x00"))])))))
    with pytest.raises(CheckpointError, match="tensor a: is stored in slices; save it"):
        bundle["a"]


@pytest.mark.parametrize(
    ("offset", "words"), [(9, "tensor b ends at 17"), (2**62, "tensor b ends at"), (7, "tensor b overlaps another")]
)
def test_tensors_outside_the_data_or_over_each_other_are_refused(tmp_path, offset, words):
    prefix = index_of(tmp_path, table(sealed(block([HEADER, (b"a", entry()), (b"b", entry(offset=offset))]))), bytes(16))
    with pytest.raises(CheckpointError, match=f"{DATA}: .*{words}"):
        read_bundle(prefix)


def test_a_name_that_is_no_text_stays_on_one_line(tmp_path):
    prefix = index_of(tmp_path, table(sealed(block([HEADER, (b"a\n\x1b[31m\xff", entry(crc=0))]))))
    (name,) = bundle = read_bundle(prefix)
    assert name == r"a\n\x1b[31m\\xff"
    with pytest.raises(CheckpointError) as refusal:
        bundle[name]
    assert str(refusal.value).isprintable()


@pytest.mark.timeout(20)
@pytest.mark.parametrize("case", ["a gigabyte", "names that repeat"])
def test_an_absurd_index_takes_neither_time_nor_memory(tmp_path, case):
    if case == "a gigabyte":
        prefix = index_of(tmp_path, b"")
        os.truncate(tmp_path / INDEX, 2**30)
    else:  # each name is the one before and a byte more: 4 bytes in the file, up to 60 KB in memory
        keys = b"".join(_encoded(number) + b"\x01\x00a" for number in range(1, 60_000))
        prefix = index_of(tmp_path, table(sealed(b"\x00\x01\x00a" + keys + struct.pack("<II", 0, 1))))
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match="more than an index has|more bytes than any"):
        read_bundle(prefix)
    assert time.monotonic() - started < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # KiB


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_an_index_that_lies_under_right_checksums_is_refused_or_read(tmp_path_factory, data):
    """Damage that no checksum finds: the block is sealed again after the change."""
    content = (GOLDEN / INDEX).read_bytes()
    names = tensor_bundle._read_table(content)
    inner = bytearray(tensor_bundle._encoded_block(list(names.items())))
    for _ in range(data.draw(st.integers(1, 4))):
        inner[data.draw(st.integers(0, len(inner) - 1))] = data.draw(st.integers(0, 255))
    folder = tmp_path_factory.mktemp("lies")
    shutil.copy(GOLDEN / DATA, folder / DATA)
    (folder / INDEX).write_bytes(table(sealed(bytes(inner))))
    bundle: Any = {}
    with contextlib.suppress(CheckpointError):
        bundle = read_bundle(folder / "model.ckpt")
    for name in bundle:
        with contextlib.suppress(CheckpointError):
            assert bundle[name].nbytes <= 2240
