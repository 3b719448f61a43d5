"""Text to a dataset: the same bytes always, nothing half-made, nothing lost, and damage that names its shard."""

import hashlib
import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import groundup.data.prepare as prepare_module
from groundup.config.load import Given, resolve
from groundup.config.options import PREPARE_GROUPS
from groundup.data.foreign import foreign_shards, open_foreign_dataset
from groundup.data.shards import dtype_for, open_dataset, require_windows
from groundup.data.split import content_hash, is_below
from groundup.errors import ConfigError, DataError
from groundup.recipes.loading import is_dataset, open_any_dataset
from groundup.recipes.prepare import prepare_dataset
from groundup.tokenizer.tokenizer import Tokenizer, byte_tokenizer
from tests.conftest import groundup, make_text


def prepared(sources, target, say=lambda line: None, **options):
    """Prepare in this process, with the byte tokenizer unless told."""
    options = {"tokenizer": "byte", "workers": 1, **options}
    settings = resolve(PREPARE_GROUPS, {name: Given(value, name) for name, value in options.items()})
    sources = [sources] if isinstance(sources, str | Path) else sources
    return prepare_dataset([str(source) for source in sources], target, settings, say)


def content(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def tokens(dataset, split):
    stream = dataset.stream(split)
    return stream.read(0, len(stream)) if len(stream) else np.empty(0, dataset.dtype)


def texts(dataset, split):
    """The documents of a split, read back."""
    ids = tokens(dataset, split)
    ends = np.flatnonzero(ids == dataset.tokenizer.end_of_text_id)
    # Whatever the split, its last token ends a document.
    assert not len(ids) or ends[-1] == len(ids) - 1
    return [dataset.tokenizer.decode(part[part != dataset.tokenizer.end_of_text_id]) for part in np.split(ids, ends + 1)[:-1]]


def write_documents(folder, count, words=60, first=0):
    folder.mkdir(exist_ok=True)
    for number in range(first, first + count):
        (folder / f"{number:03}.txt").write_text(f"document {number}\n{make_text(words, seed=number)}", encoding="utf-8")
    return {path.read_text(encoding="utf-8") for path in folder.iterdir()}


# --- the same bytes ---


@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_documents_come_back_whole_in_order_and_split_by_their_content(tmp_path, tokenizer):
    written = write_documents(tmp_path / "texts", 40)
    dataset = prepared(tmp_path / "texts", tmp_path / "data", tokenizer=tokenizer, vocab_size=300, shard_tokens=1000)
    train, validation = texts(dataset, "train"), texts(dataset, "validation")
    assert set(train) | set(validation) == written
    assert len(train) + len(validation) == 40
    assert train == sorted(train, key=lambda text: int(text.split()[1]))
    assert set(validation) == {text for text in written if is_below(content_hash([text])[0], 0.1)}
    assert 0 < len(validation) < 20
    assert dataset.manifest["documents"] == 40
    assert dataset.manifest["bytes"] == sum(len(text.encode()) for text in written)
    for name, found in (("train", train), ("validation", validation)):
        split = dataset.splits[name]
        assert (split.documents, split.bytes) == (len(found), sum(len(text.encode()) for text in found))
    dataset.verify()


def test_shards_hold_what_they_should(tmp_path, text_file):
    dataset = prepared(text_file, tmp_path / "data", shard_tokens=1000)
    names = [shard.name for shard in dataset.splits["train"].shards]
    assert names == [f"train-{number:05}.npy" for number in range(len(names))]
    arrays = [np.load(tmp_path / "data" / name) for name in names]
    assert all(len(array) == 1000 for array in arrays[:-1])
    assert 0 < len(arrays[-1]) <= 1000
    assert all(array.dtype == np.dtype("<u2") for array in arrays)
    # A read across the edges of shards is the same stream.
    assert dataset.stream("train").read(995, 2010).tolist() == np.concatenate(arrays)[995:3005].tolist()


def test_workers_change_no_byte(tmp_path, monkeypatch):
    write_documents(tmp_path / "texts", 12, words=2000)
    monkeypatch.setattr(prepare_module, "TASK_CHARACTERS", 3000)
    one = prepared(tmp_path / "texts", tmp_path / "one", tokenizer="bpe", vocab_size=400, shard_tokens=2**12)
    pooled = []
    pool = prepare_module.ProcessPoolExecutor
    monkeypatch.setattr(prepare_module, "ProcessPoolExecutor", lambda *args: pooled.append(args[0]) or pool(*args))
    monkeypatch.setattr(prepare_module, "POOL_FROM_BYTES", 0)
    prepared(tmp_path / "texts", tmp_path / "three", tokenizer="bpe", vocab_size=400, shard_tokens=2**12, workers=3)
    assert pooled == [3]
    assert content(tmp_path / "one") == content(tmp_path / "three")
    assert len(one.splits["train"].shards) > 2


@pytest.mark.parametrize("order", ["reversed", "shuffled"])
def test_the_order_of_a_directory_changes_no_byte(tmp_path, monkeypatch, order):
    write_documents(tmp_path / "texts", 12)
    write_documents(tmp_path / "texts" / "inner", 5, first=100)
    prepared(tmp_path / "texts", tmp_path / "one")
    scandir = os.scandir

    def disordered(path):
        entries = list(scandir(path))
        random.Random(0).shuffle(entries)
        return entries if order == "shuffled" else sorted(entries, key=lambda entry: entry.name, reverse=True)

    monkeypatch.setattr(os, "scandir", disordered)
    prepared(tmp_path / "texts", tmp_path / "two")
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_the_name_of_the_output_and_the_time_change_no_byte(tmp_path, text_file):
    prepared(text_file, tmp_path / "one", tokenizer="bpe", vocab_size=300)
    os.utime(text_file, (0, 0))
    prepared(text_file, tmp_path / "deep" / "two", tokenizer="bpe", vocab_size=300)
    assert content(tmp_path / "one") == content(tmp_path / "deep" / "two")


def test_the_manifest_is_frozen(tmp_path, monkeypatch):
    """
    The hash was computed with version 0.1.0 as it was before sources could have names (numpy 2.4, x86-64).

    It covers the shards' hashes, the split and the names of all keys; without the tokenizer's own hash, which depends on
    the library that writes its file.
    """
    monkeypatch.chdir(tmp_path)
    write_documents(tmp_path / "texts", 12)
    Path("lone.txt").write_text(make_text(300, seed=99), encoding="utf-8")
    prepared(["texts", "lone.txt"], Path("data"), shard_tokens=1000)
    manifest = json.loads(Path("data", "dataset.json").read_text())
    del manifest["tokenizer_sha256"]
    found = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    assert found == "e77ff3464f710051e64888a87e3e7038fcc10d594e5d74c16dc91bd4f534eac5"


def test_piece_and_chunk_sizes_change_no_token(tmp_path, text_file, monkeypatch):
    whole = prepared(text_file, tmp_path / "one", tokenizer="bpe", vocab_size=300)
    monkeypatch.setattr("groundup.data.sources.CHUNK_BYTES", 7)
    chunked = prepared(text_file, tmp_path / "two", tokenizer="bpe", vocab_size=300)
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert texts(chunked, "train") == texts(whole, "train")


def test_wide_vocabularies_are_stored_wide(tmp_path, text_file):
    assert (dtype_for(2**16).name, dtype_for(2**16 + 1).name) == ("uint16", "uint32")
    spec = json.loads(byte_tokenizer().json)
    # The same 256 bytes, but end-of-text is far out.
    spec["added_tokens"][0]["id"] = 70_000
    spec["model"]["vocab"] |= {f"!{number:x}": number for number in range(256, 70_000)}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    dataset = prepared(text_file, tmp_path / "data", tokenizer=str(tmp_path / "tokenizer.json"))
    assert dataset.tokenizer.end_of_text_id == 70_000
    assert np.load(tmp_path / "data" / "train-00000.npy").dtype == np.dtype("<u4")
    assert tokens(dataset, "train")[-1] == 70_000
    assert "".join(texts(dataset, "train") + texts(dataset, "validation")) == text_file.read_text()


# --- the split ---


def test_adding_documents_moves_none_of_the_others(tmp_path):
    write_documents(tmp_path / "texts", 40)
    before = prepared(tmp_path / "texts", tmp_path / "one")
    sides = {split: set(texts(before, split)) for split in ("train", "validation")}
    assert all(sides.values())
    write_documents(tmp_path / "texts", 40, first=40)
    after = prepared(tmp_path / "texts", tmp_path / "two")
    for split, documents in sides.items():
        assert documents < set(texts(after, split))


def test_a_larger_fraction_only_adds_to_validation(tmp_path):
    write_documents(tmp_path / "texts", 60)
    small, large = (prepared(tmp_path / "texts", tmp_path / str(f), validation_fraction=f) for f in (0.1, 0.4))
    assert set(texts(small, "validation")) < set(texts(large, "validation"))
    assert len(texts(large, "validation")) == pytest.approx(24, abs=12)


def test_a_lone_document_is_split_by_position(tmp_path, text_file):
    dataset = prepared(text_file, tmp_path / "data", validation_fraction=0.25)
    text = text_file.read_text()
    ((train,), (validation,)) = texts(dataset, "train"), texts(dataset, "validation")
    assert train + validation == text
    assert len(train) == int(len(text) * 0.75)


def test_two_lone_documents_are_each_split_by_position(tmp_path, text_file):
    other = tmp_path / "other.txt"
    other.write_text("z" * 1000)
    dataset = prepared([text_file, other], tmp_path / "data")
    assert texts(dataset, "train")[1] == "z" * 900
    assert texts(dataset, "validation")[1] == "z" * 100


def test_validation_sources_are_all_of_validation(tmp_path, text_file):
    held_out = write_documents(tmp_path / "held", 3)
    dataset = prepared(text_file, tmp_path / "data", validation_source=(str(tmp_path / "held"),))
    assert texts(dataset, "train") == [text_file.read_text()]
    assert set(texts(dataset, "validation")) == held_out


def test_a_source_given_for_both_sides_is_on_both_sides(tmp_path, text_file):
    """To see a model memorize, say: training text must not vanish because validation names it too."""
    dataset = prepared(text_file, tmp_path / "data", validation_source=(str(text_file),))
    assert texts(dataset, "validation") == [text_file.read_text()]
    assert texts(dataset, "train") == [text_file.read_text()]


def test_a_fraction_of_zero_has_no_validation(tmp_path):
    write_documents(tmp_path / "texts", 5)
    dataset = prepared(tmp_path / "texts", tmp_path / "data", validation_fraction=0)
    assert (len(texts(dataset, "train")), texts(dataset, "validation")) == (5, [])


@pytest.mark.parametrize("seed", range(6))
def test_validation_is_never_empty_from_two_documents_on(tmp_path, seed):
    write_documents(tmp_path / "texts", 2, first=10 * seed)
    dataset = prepared(tmp_path / "texts", tmp_path / "data", validation_fraction=0.001)
    assert len(texts(dataset, "validation")) == len(texts(dataset, "train")) == 1


def test_training_is_never_empty_from_two_documents_on(tmp_path):
    """Two documents whose hashes both fall below the fraction."""
    folder = tmp_path / "texts"
    folder.mkdir()
    chosen = [text for text in (f"text number {n}" for n in range(200)) if is_below(content_hash([text])[0], 0.1)][:2]
    for number, text in enumerate(chosen):
        (folder / f"{number}.txt").write_text(text)
    dataset = prepared(folder, tmp_path / "data")
    assert len(texts(dataset, "validation")) == len(texts(dataset, "train")) == 1


def test_copies_of_one_document_leave_something_to_train_on(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text("the same text")
    dataset = prepared(folder, tmp_path / "data")
    assert texts(dataset, "train")


# --- again, elsewhere, at the same time ---


def test_a_second_time_reuses_the_dataset_and_says_so(tmp_path, text_file):
    said = []
    prepared(text_file, tmp_path / "data", said.append)
    assert not any("used as it is" in line for line in said)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "data").iterdir()}
    prepared(text_file, tmp_path / "data", said.append)
    assert "made from the same text before, used as it is" in said[-1]
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "data").iterdir()} == before


def test_changed_text_is_refused(tmp_path, text_file):
    prepared(text_file, tmp_path / "data")
    before = content(tmp_path / "data")
    text_file.write_text(text_file.read_text().replace("the", "teh", 1))
    with pytest.raises(ConfigError, match=r"the text in .*text.txt (is not what it was made from|has changed)"):
        prepared(text_file, tmp_path / "data")
    assert content(tmp_path / "data") == before


@pytest.mark.parametrize(
    ("option", "value"),
    [("tokenizer", "bpe"), ("validation_fraction", 0.2), ("shard_tokens", 500), ("encoding_errors", "strict")],
)
def test_changed_options_are_refused_and_named(tmp_path, text_file, option, value):
    prepared(text_file, tmp_path / "data")
    with pytest.raises(ConfigError, match="was made with other options") as error:
        prepared(text_file, tmp_path / "data", **{option: value})
    assert option in str(error.value)
    assert str(value) in str(error.value)


def test_options_that_change_nothing_are_not_refused(tmp_path, text_file):
    prepared(text_file, tmp_path / "data")
    assert prepared(text_file, tmp_path / "data", workers=2, vocab_size=999).splits["train"].tokens


def test_a_changed_tokenizer_file_is_refused(tmp_path, text_file):
    file = tmp_path / "tokenizer.json"
    file.write_text(byte_tokenizer().json)
    prepared(text_file, tmp_path / "data", tokenizer=str(file))
    spec = json.loads(byte_tokenizer().json)
    spec["model"] |= {"vocab": spec["model"]["vocab"] | {"th": 257}, "merges": ["t h"]}
    file.write_text(json.dumps(spec))
    assert Tokenizer(file.read_text()).sha256 != byte_tokenizer().sha256
    with pytest.raises(ConfigError, match="tokenizer"):
        prepared(text_file, tmp_path / "data", tokenizer=str(file))


def test_a_folder_that_is_no_dataset_is_not_touched(tmp_path, text_file):
    target = tmp_path / "mine"
    target.mkdir()
    (target / "precious.txt").write_text("keep")
    with pytest.raises(ConfigError, match="exists and is no dataset"):
        prepared(text_file, target)
    with pytest.raises(ConfigError, match="exists and is no dataset"):
        prepared(text_file, text_file)
    assert (target / "precious.txt").read_text() == "keep"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "text.txt"]


def test_an_empty_folder_becomes_the_dataset(tmp_path, text_file):
    (tmp_path / "data").mkdir()
    prepared(text_file, tmp_path / "data")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "text.txt"]


def test_the_working_directory_is_not_replaced(tmp_path, text_file, monkeypatch):
    """A shell that stands in a folder would stand in nothing after the rename."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ConfigError, match="working directory"):
        prepared(text_file, Path())
    assert list((tmp_path / "here").iterdir()) == []


def test_a_link_to_an_empty_folder_is_followed(tmp_path, text_file):
    """An output that a link puts on a larger disk."""
    (tmp_path / "large-disk").mkdir()
    (tmp_path / "data").symlink_to("large-disk")
    prepared(text_file, tmp_path / "data")
    assert (tmp_path / "data").is_symlink()
    assert (tmp_path / "large-disk" / "dataset.json").is_file()


def test_a_source_that_changes_while_it_is_read_is_refused(tmp_path, text_file):
    def change(line):
        if line.startswith("read "):
            text_file.write_text("something else entirely")

    with pytest.raises(DataError, match="a source changed while it was read"):
        prepared(text_file, tmp_path / "data", change)
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_two_at_once_into_one_folder(tmp_path, text_file):
    """The second is told who is there; the first is not disturbed."""
    refused = []

    def intrude(line):
        if line.startswith("read "):
            with pytest.raises(ConfigError, match=rf"in use by another process \(pid {os.getpid()} on ") as error:
                prepared(text_file, tmp_path / "data")
            refused.append(error)

    dataset = prepared(text_file, tmp_path / "data", intrude)
    assert len(refused) == 1
    dataset.verify()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "text.txt"]


@pytest.mark.parametrize("point", ["read ", "tokenizer "])
def test_an_interruption_leaves_nothing(tmp_path, text_file, point):
    def interrupt(line):
        if line.startswith(point):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepared(text_file, tmp_path / "data", interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


@pytest.mark.parametrize(("tokens_there", "length"), [(9, 9), (1, 16), (0, 1)])
def test_too_little_text_is_an_error_with_the_numbers(tmp_path, tokens_there, length):
    source = tmp_path / "short.txt"
    source.write_text("x" * 20)
    dataset = prepared(source, tmp_path / "data", validation_fraction=0)
    require_windows(dataset, 20, ("train",))
    with pytest.raises(DataError, match=r"train has 21 tokens, one window of n_positions 21 needs 22"):
        require_windows(dataset, 21)
    with pytest.raises(DataError, match=rf"validation has 0 tokens, one window of n_positions {length} needs {length + 1}"):
        require_windows(dataset, length)


@pytest.mark.parametrize("text", ["", "folder"])
def test_no_text_is_an_error_and_leaves_nothing(tmp_path, text):
    source = tmp_path / "source"
    source.mkdir() if text == "folder" else source.write_text(text)
    with pytest.raises(DataError, match="no text found in .*source"):
        prepared(source, tmp_path / "data")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_missing_sources_and_standard_input_twice(tmp_path):
    with pytest.raises(ConfigError, match="sources: none given"):
        prepared([], tmp_path / "data")
    with pytest.raises(ConfigError, match="given twice"):
        prepared(["-", "-"], tmp_path / "data")
    with pytest.raises(DataError, match="source nowhere: not found"):
        prepared("nowhere", tmp_path / "data")
    assert list(tmp_path.iterdir()) == []


# --- damage ---


@pytest.fixture
def damaged(tmp_path, text_file):
    """A good dataset to be damaged, with several shards of training text."""
    dataset = prepared(text_file, tmp_path / "data", shard_tokens=2000)
    dataset.verify()
    return tmp_path / "data"


@pytest.mark.parametrize("place", [0, 60, 127, 128, -1])
def test_a_flipped_bit_names_its_shard(damaged, place):
    path = damaged / "train-00001.npy"
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"train-00001.npy: damaged: its sha256 is"):
        open_dataset(damaged).verify()


@pytest.mark.parametrize("change", ["one byte short", "header only", "empty", "one byte more", "missing"])
def test_a_shard_of_another_size_is_refused_at_once(damaged, change):
    path = damaged / "train-00001.npy"
    data = path.read_bytes()
    if change == "missing":
        path.unlink()
    else:
        path.write_bytes({"one byte short": data[:-1], "header only": data[:128], "empty": b""}.get(change, data + b"\0"))
    found = "missing" if change == "missing" else f"{path.stat().st_size:,} bytes long"
    with pytest.raises(DataError, match=f"train-00001.npy: is {found}, expected {len(data):,} bytes"):
        open_dataset(damaged)


def test_a_shard_that_vanishes_or_shrinks_while_in_use_is_an_error_not_a_crash(damaged):
    stream = open_dataset(damaged).stream("train")
    assert len(stream.read(1990, 20)) == 20
    path = damaged / "train-00001.npy"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError, match="train-00001.npy: ends early"):
        stream.read(0, 4000)
    path.unlink()
    with pytest.raises(DataError, match="train-00001.npy: cannot be read"):
        stream.read(1990, 20)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda m: m.update(version=99), id="version"),
        pytest.param(lambda m: m.update(format="other"), id="format"),
        pytest.param(lambda m: m.pop("splits"), id="no splits"),
        pytest.param(lambda m: m.update(dtype="nonsense"), id="dtype"),
        pytest.param(lambda m: m.update(tokenizer_sha256="0" * 64), id="tokenizer"),
        pytest.param(lambda m: m["splits"]["train"]["shards"][0].update(tokens=7), id="tokens"),
        pytest.param(lambda m: m["splits"]["train"]["shards"][0].update(tokens="7"), id="tokens as text"),
        pytest.param(lambda m: m["splits"]["train"]["shards"][0].update(name="../../secret"), id="path"),
        pytest.param(lambda m: m["splits"].pop("validation"), id="no validation"),
    ],
)
def test_a_damaged_manifest_is_refused(damaged, damage):
    path = damaged / "dataset.json"
    manifest = json.loads(path.read_text())
    damage(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=str(damaged)):
        open_dataset(damaged).verify()


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"format": "groundup-dataset"}'])
def test_an_unreadable_manifest_is_refused(damaged, data):
    (damaged / "dataset.json").write_bytes(data)
    with pytest.raises(DataError, match="dataset.json"):
        open_dataset(damaged)


def test_a_tokenizer_that_did_not_make_the_shards_is_refused(damaged):
    spec = json.loads((damaged / "tokenizer.json").read_text())
    spec["model"] |= {"vocab": spec["model"]["vocab"] | {"th": 257}, "merges": ["t h"]}
    (damaged / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(DataError, match="tokenizer.json is not the one that made the shards"):
        open_dataset(damaged)


# --- other trainers' files ---


def write_llmc(path, ids, *, dtype="<u2", magic=20240520, version=1, count=None):
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(ids) if count is None else count
    path.write_bytes(header.tobytes() + np.array(ids, dtype=dtype).tobytes())


def test_nanogpts_pair_opens_and_reads_right(tmp_path):
    ids = np.arange(3000) % 256
    ids[:2500].astype("<u2").tofile(tmp_path / "train.bin")
    ids[2500:].astype("<u2").tofile(tmp_path / "val.bin")
    assert is_dataset(tmp_path)
    dataset = open_any_dataset(tmp_path, "byte")
    dataset.verify()
    assert tokens(dataset, "train").tolist() == ids[:2500].tolist()
    assert tokens(dataset, "validation").tolist() == ids[2500:].tolist()


@pytest.mark.parametrize(("dtype", "magic", "version"), [("<u2", 20240520, 1), ("<u4", 20240801, 7)])
def test_llmcs_shards_open_and_read_right(tmp_path, dtype, magic, version):
    ids = np.random.default_rng(0).integers(0, 257, 900)
    kind = {"dtype": dtype, "magic": magic, "version": version}
    write_llmc(tmp_path / "tiny_train_000001.bin", ids[:500], **kind)
    write_llmc(tmp_path / "tiny_train_000002.bin", ids[500:600], **kind)
    write_llmc(tmp_path / "tiny_val_000000.bin", ids[600:], **kind)
    dataset = open_foreign_dataset(tmp_path, byte_tokenizer())
    dataset.verify()
    assert tokens(dataset, "train").tolist() == ids[:600].tolist()
    assert dataset.stream("train").read(490, 20).tolist() == ids[490:510].tolist()
    assert tokens(dataset, "validation").tolist() == ids[600:].tolist()


def test_ids_out_of_range_name_the_shard_the_id_and_the_vocabulary(tmp_path):
    np.array([1, 2, 257], dtype="<u2").tofile(tmp_path / "train.bin")
    np.array([1, 2, 256], dtype="<u2").tofile(tmp_path / "val.bin")
    with pytest.raises(DataError, match=r"train.bin: holds token 257, but the tokenizer has ids below 257"):
        open_any_dataset(tmp_path, "byte").verify()
    np.array([1, 2, 256], dtype="<u2").tofile(tmp_path / "train.bin")
    open_any_dataset(tmp_path, "byte").verify()


def test_bin_files_need_their_tokenizer_named(tmp_path):
    for name in ("train.bin", "val.bin"):
        np.arange(10, dtype="<u2").tofile(tmp_path / name)
    for missing in (None, "bpe"):
        with pytest.raises(ConfigError, match="do not say their tokenizer.*--tokenizer gpt2"):
            open_any_dataset(tmp_path, missing)


def test_one_bin_file_alone_is_no_dataset(tmp_path):
    np.arange(10, dtype="<u2").tofile(tmp_path / "train.bin")
    assert not is_dataset(tmp_path)
    assert foreign_shards(tmp_path / "nowhere") == {"train": [], "validation": []}


@pytest.mark.parametrize("damage", ["truncated", "odd", "empty", "mixed types", "unknown version"])
def test_damaged_bin_files_are_named(tmp_path, damage):
    write_llmc(tmp_path / "a_val_0.bin", range(100))
    path = tmp_path / "a_train_0.bin"
    if damage == "truncated":
        write_llmc(path, range(100), count=101)
    elif damage == "mixed types":
        write_llmc(path, range(100), dtype="<u4", magic=20240801, version=7)
    elif damage == "unknown version":
        # Its header must not be trained on as if it were nanoGPT's tokens.
        write_llmc(path, range(100), version=2)
    else:
        path.write_bytes(b"abc" if damage == "odd" else b"")
    with pytest.raises(DataError, match="different token types" if damage == "mixed types" else "a_train_0.bin"):
        open_foreign_dataset(tmp_path, byte_tokenizer())


def test_a_header_of_llmc_is_read_as_little_endian(tmp_path):
    write_llmc(tmp_path / "a_train_0.bin", [7] * 50)
    assert struct.unpack("<3i", (tmp_path / "a_train_0.bin").read_bytes()[:12]) == (20240520, 1, 50)


# --- in a process of its own: memory and sudden death ---

PEAK = """
import resource, sys
from groundup.cli.main import run
code = run(sys.argv[1:])
print("PEAK", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, file=sys.stderr)
sys.exit(code)
"""


def peak_mebibytes(*arguments):
    done = subprocess.run([sys.executable, "-c", PEAK, *map(str, arguments)], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    return int(done.stderr.rsplit("PEAK ", 1)[1])


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["lines", "one line", "no spaces", "one line of marks"])
def test_memory_does_not_grow_with_the_source(tmp_path, shape):
    """60 MB of text; the interpreter and its libraries alone take about 100 MiB."""
    unit = {"lines": make_text(2000), "one line": make_text(2000).replace("\n", " "), "no spaces": "abcdefgh" * 2000,
            "one line of marks": "! ? " * 4000}[shape].encode()  # fmt: skip
    small, large = tmp_path / "small.txt", tmp_path / "large.txt"
    small.write_bytes(unit * (2_000_000 // len(unit)))
    with large.open("wb") as file:
        for _ in range(60_000_000 // len(unit)):
            file.write(unit)
    common = ("--tokenizer", "byte", "--workers", "1", "--json")
    base = peak_mebibytes("prepare", small, "--output-dir", tmp_path / "a", *common)
    peak = peak_mebibytes("prepare", large, "--output-dir", tmp_path / "b", *common)
    assert peak < base + 60, f"{peak} MiB for 60 MB of text, {base} MiB for 2 MB"


@pytest.mark.slow
def test_memory_does_not_grow_with_what_a_small_zst_unpacks_to(tmp_path):
    import zstandard

    small, bomb = tmp_path / "small.txt", tmp_path / "bomb.txt.zst"
    small.write_bytes(b"a b " * 500_000)
    compressor = zstandard.ZstdCompressor(level=3).compressobj()
    with bomb.open("wb") as file:
        for _ in range(80):
            file.write(compressor.compress(b"a b " * 250_000))
        file.write(compressor.flush())
    assert bomb.stat().st_size < 100_000
    common = ("--tokenizer", "byte", "--workers", "1", "--json")
    base = peak_mebibytes("prepare", small, "--output-dir", tmp_path / "a", *common)
    peak = peak_mebibytes("prepare", bomb, "--output-dir", tmp_path / "b", *common)
    assert peak < base + 60, f"{peak} MiB for a .zst of 80 MB, {base} MiB for 2 MB of text"


@pytest.mark.slow
def test_a_kill_at_any_moment_then_the_same_command_gives_the_same_bytes(tmp_path):
    write_documents(tmp_path / "texts", 30, words=4000)
    arguments = ["prepare", tmp_path / "texts", "--tokenizer", "bpe", "--vocab-size", 500, "--shard-tokens", 2000]
    start = time.monotonic()
    assert groundup(*arguments, "--output-dir", tmp_path / "clean").code == 0
    duration = time.monotonic() - start
    clean, draw, killed = content(tmp_path / "clean"), random.Random(0), 0
    for attempt in range(10):
        target = tmp_path / f"killed-{attempt}"
        command = [sys.executable, "-m", "groundup", *map(str, arguments), "--output-dir", str(target)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(draw.uniform(0.4, 1.0) * duration)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        # Under its final name there is a whole dataset or nothing.
        assert not target.exists() or content(target) == clean
        assert groundup(*arguments, "--output-dir", target).code == 0
        assert content(target) == clean
    assert killed >= 5
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["clean", *(f"killed-{attempt}" for attempt in range(10)), "texts"]


POOL = """
import sys
import groundup.data.prepare as p
p.POOL_FROM_BYTES, p.TASK_CHARACTERS = 0, 1000
encode, count = p._encode_in_worker, 0
from groundup.cli.main import run
if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc")
def test_a_kill_leaves_no_worker_behind(tmp_path):
    """Tokenizing processes must not outlive a parent that was killed."""
    write_documents(tmp_path / "texts", 60, words=30_000)
    script = tmp_path / "main.py"
    script.write_text(POOL)
    command = [sys.executable, script, "prepare", tmp_path / "texts", "--tokenizer", "byte", "--workers", "2",
               "--output-dir", tmp_path / "data"]  # fmt: skip
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    children, deadline = [], time.monotonic() + 60
    while len(children) < 3 and process.poll() is None and time.monotonic() < deadline:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        time.sleep(0.02)
    time.sleep(0.3)
    process.kill()
    process.wait()
    assert len(children) >= 2, "the pool never started"

    def alive():
        return [pid for pid in children if Path(f"/proc/{pid}").is_dir() and " Z " not in Path(f"/proc/{pid}/stat").read_text()]

    deadline = time.monotonic() + 15
    while alive() and time.monotonic() < deadline:
        time.sleep(0.1)
    left = alive()
    for pid in left:
        os.kill(int(pid), signal.SIGKILL)
    assert left == []
