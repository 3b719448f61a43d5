"""Several sources with weights: shares that hold, epochs that repeat nothing, and a pure function of the position."""

import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import groundup
import groundup.data.prepare as prepare_module
from groundup.config.load import Given, resolve
from groundup.config.options import PREPARE_GROUPS
from groundup.data.batches import ShuffledWindows, Windows
from groundup.data.mixture import MIXTURE_VERSION, Corpus, Mixture, Part
from groundup.data.named import BLOCK, NamedSource, named_sources, parse_source, quotas
from groundup.data.shards import ShardWriter, TokenStream, open_dataset
from groundup.data.split import content_hash, is_below
from groundup.errors import ConfigError, DataError
from groundup.recipes.corpus import open_mixture, prepare_mixture
from groundup.recipes.prepare import prepare_dataset, sources_with_names, summary
from groundup.tokenizer.tokenizer import byte_tokenizer
from groundup.tracking.metrics import read_rows
from tests.conftest import TINY, make_text

pytestmark = pytest.mark.usefixtures("without_pictures")

LENGTH = 4
SIZES = {"wiki": 5000, "code": 997, "notes": 301}
WEIGHTS = {"wiki": 0.7, "code": 0.2, "notes": 0.1}
OFFSETS = {"wiki": 0, "code": 30_000, "notes": 40_000}


# --- what a user writes ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("wiki=wiki.txt:0.7", ("wiki", "wiki.txt", 0.7)),
        ("a-B_9=python-stdlib:1e-1", ("a-B_9", "python-stdlib", 0.1)),
        ("in=-:3", ("in", "-", 3.0)),
        ("w=a=b:c=d:2", ("w", "a=b:c=d", 2.0)),
        (f"{'n' * 64}= with space :1", ("n" * 64, " with space ", 1.0)),
    ],
)
def test_a_source_is_a_name_a_path_and_a_weight(text, expected):
    assert parse_source(text) == NamedSource(*expected)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("wiki.txt", "has no ="),
        ("", "has no ="),
        ("wiki.txt:0.7", "has no ="),
        ("=wiki.txt:0.7", "has the name ''"),
        ("my wiki=wiki.txt:0.7", "has the name 'my wiki'"),
        ("a/b=wiki.txt:0.7", "has the name 'a/b'"),
        ("a.b=wiki.txt:0.7", "has the name 'a.b'"),
        ("ü=wiki.txt:0.7", "has the name 'ü'"),
        ("a\n=wiki.txt:0.7", r"has the name 'a\\n'"),
        (f"{'n' * 65}=wiki.txt:0.7", "has the name 'nnn"),
        ("wiki=wiki.txt", "has no weight"),
        ("wiki=", "has no weight"),
        ("wiki=:0.7", "has no path"),
        ("wiki=wiki.txt:", "has the weight '', which is not a number"),
        ("wiki=wiki.txt:much", "has the weight 'much', which is not a number"),
        ("wiki=wiki.txt:0", "has the weight '0', which is not above 0"),
        ("wiki=wiki.txt:-1", "has the weight '-1', which is not above 0"),
        ("wiki=wiki.txt:nan", "has the weight 'nan', which is not above 0 and finite"),
        ("wiki=wiki.txt:inf", "has the weight 'inf', which is not above 0 and finite"),
    ],
)
def test_a_malformed_source_is_one_line_that_says_what_to_write(text, reason):
    with pytest.raises(ConfigError, match=reason) as error:
        parse_source(text, "file x.toml")
    assert "\n" not in str(error.value)
    assert "(from file x.toml)" in str(error.value)
    assert "write NAME=PATH:WEIGHT, for instance wiki=wiki.txt:0.7" in str(error.value)


@pytest.mark.parametrize(("other", "said"), [("aB", "the name aB "), ("Ab", "the name Ab and aB ")])
def test_a_name_is_given_once_whatever_its_case(other, said):
    with pytest.raises(ConfigError, match=said + r"\(from --source\) is given twice"):
        named_sources(["aB=x:1", f"{other}=y:1"])


def test_the_order_on_the_command_line_changes_nothing():
    texts = ["wiki=w:0.7", "code=c:0.3"]
    assert named_sources(texts) == named_sources(texts[::-1]) == (NamedSource("code", "c", 0.3), NamedSource("wiki", "w", 0.7))
    assert named_sources([]) == ()


def test_a_weight_that_gets_no_place_is_refused():
    with pytest.raises(ConfigError, match=r"the weight 1e-09 of b is 1e-09 of all, less than 1/65,536"):
        named_sources(["a=x:1", "b=y:1e-9"])
    assert quotas({"a": BLOCK - 1, "b": 1}) == {"a": BLOCK - 1, "b": 1}


@settings(max_examples=200, deadline=None)
@given(weights=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12), scale=st.sampled_from([1.0, 2.0, 1024.0]))
def test_quotas_are_the_largest_remainders(weights, scale):
    """All places are given, each source is within one of its exact share, and only shares count."""
    if min(weights) / sum(weights) < 2 / BLOCK:
        return
    named = {str(number): weight for number, weight in enumerate(weights)}
    found = quotas(named)
    assert sum(found.values()) == BLOCK
    for name, quota in found.items():
        assert abs(quota - BLOCK * named[name] / sum(weights)) < 1 + 1e-6
    up = [BLOCK * named[n] / sum(weights) % 1 for n, q in found.items() if q > BLOCK * named[n] / sum(weights)]
    down = [BLOCK * named[n] / sum(weights) % 1 for n, q in found.items() if q < BLOCK * named[n] / sum(weights)]
    assert not up or not down or min(up) >= max(down) - 1e-6
    assert quotas({name: weight * scale for name, weight in named.items()}) == found


def test_quotas_by_hand():
    """65,536 / 3 is 21,845 and a third; / 7 of 2, 2 and 3 leaves a remainder of 0.57, 0.57 and 0.86."""
    assert quotas({"a": 1, "b": 1, "c": 1}) == {"a": 21_846, "b": 21_845, "c": 21_845}
    assert quotas({"a": 2, "b": 2, "c": 3}) == {"a": 18_725, "b": 18_724, "c": 28_087}


# --- the order ---


def windows_of(folder: Path, first: int, count: int) -> Windows:
    """So many windows of their own tokens, counted from ``first``, so that each token says its source and place."""
    folder.mkdir(parents=True)
    writer = ShardWriter(folder, "train", np.dtype("<u2"), 1000)
    writer.append(np.arange(first, first + count * LENGTH + 1))
    return Windows(TokenStream(folder, writer.close(), np.dtype("<u2")), LENGTH, LENGTH)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Windows]:
    folder = tmp_path_factory.mktemp("parts")
    return {name: windows_of(folder / name, OFFSETS[name], size) for name, size in SIZES.items()}


@pytest.fixture(scope="module")
def mixture(parts: dict[str, Windows]) -> Mixture:
    return Mixture(parts, WEIGHTS, seed=42)


@pytest.fixture(scope="module")
def chosen(mixture: Mixture) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """The source, by number, and the window of each of the first million positions, and some more to fill the last block."""
    positions = np.arange(16 * BLOCK)
    who, windows, names = np.empty_like(positions), np.empty_like(positions), sorted(SIZES)
    for start in range(0, len(positions), 4096):
        for name, rows, ids in mixture.choices(positions[start : start + 4096]):
            who[start : start + 4096][rows], windows[start : start + 4096][rows] = names.index(name), ids
    return who, windows, names


def test_a_million_positions_have_the_weights(chosen):
    """Exactly in each block; in any stretch within what chance would do."""
    who, _, names = chosen
    assert len(who) > 10**6
    for number, name in enumerate(names):
        blocks = (who == number).reshape(16, BLOCK).sum(1)
        assert blocks.tolist() == [quotas(WEIGHTS)[name]] * 16
        share, size = WEIGHTS[name], 4096
        counts = (who == number).reshape(-1, size).sum(1)
        deviation = math.sqrt(size * share * (1 - share))
        assert np.abs(counts - size * share).max() < 5 * deviation
        assert counts.std() == pytest.approx(deviation, rel=0.25)


def test_blocks_and_seeds_have_orders_of_their_own(chosen, parts):
    who = chosen[0].reshape(16, BLOCK)
    agreement = sum(share**2 for share in WEIGHTS.values())  # of two draws that know nothing of each other
    size = BLOCK // 8
    others = [Mixture(parts, WEIGHTS, seed).choices(np.arange(size)) for seed in (43, 44)]
    rows = [*who[:4, :size], *(sum(n * r.astype(int) for n, (_, r, _) in enumerate(other)) for other in others)]
    for one in range(len(rows)):
        for other in range(one):
            assert (rows[one] == rows[other]).mean() == pytest.approx(agreement, abs=0.03)
    # And who comes now says nothing about who comes next.
    assert (chosen[0][1:] == chosen[0][:-1]).mean() == pytest.approx(agreement, abs=0.002)


def test_a_source_repeats_nothing_before_it_was_read_whole(chosen):
    """Each source's samples, in the order of the run, are one permutation of its windows after the other."""
    who, windows, names = chosen
    for number, name in enumerate(names):
        size = SIZES[name]
        mine = windows[who == number]
        epochs = mine[: len(mine) // size * size].reshape(-1, size)
        assert len(epochs) > 100
        assert (np.sort(epochs, 1) == np.arange(size)).all()
        assert len({tuple(epoch) for epoch in epochs.tolist()}) == len(epochs)


def test_sources_of_one_size_have_orders_of_their_own(parts):
    """Or two copies of one text would come in step."""
    twins = Mixture({"a": parts["code"], "b": parts["code"]}, {"a": 1, "b": 1}, 42)
    (_, _, a), (_, _, b) = twins.choices(np.arange(BLOCK // 8))
    both = min(len(a), len(b))
    assert (a[:both] == b[:both]).mean() == pytest.approx(1 / SIZES["code"], abs=0.005)


def test_a_sample_is_the_window_that_was_chosen(mixture, chosen):
    who, windows, names = chosen
    positions = np.array([0, 1, 2, 70_000, 5, BLOCK - 1, BLOCK, 1_000_000, 5])
    first = [OFFSETS[names[who[p]]] + windows[p] * LENGTH for p in positions]
    assert mixture.read(positions).tolist() == (np.array(first)[:, None] + np.arange(LENGTH + 1)).tolist()
    assert mixture.read(np.array([], dtype=np.int64)).shape == (0, LENGTH + 1)


@settings(max_examples=40, deadline=None)
@given(first=st.integers(BLOCK - 60, BLOCK + 20), count=st.integers(1, 60), cut=st.integers(0, 60))
def test_samples_do_not_depend_on_how_they_are_asked_for(mixture, first, count, cut):
    """Across the edge of a block: the position is the whole state, so a run goes on from anywhere."""
    positions = np.arange(first, first + count)
    whole = mixture.read(positions)
    parts = [mixture.read(positions[:cut]), mixture.read(positions[cut:])]
    assert np.concatenate(parts).tolist() == whole.tolist()
    assert mixture.read(positions[::-1]).tolist() == whole[::-1].tolist()


def test_another_object_far_into_the_run_reads_the_same(mixture, parts):
    """Nothing is kept between reads, and names in another order are the same mixture."""
    far = 10**12 + np.arange(50)
    expected = mixture.read(far)
    again = Mixture(dict(reversed(parts.items())), {name: 10 * weight for name, weight in WEIGHTS.items()}, 42)
    assert again.read(far).tolist() == expected.tolist()


def test_an_epoch_is_as_many_samples_as_there_are_windows(mixture):
    assert (mixture.length, len(mixture)) == (LENGTH, 6298)
    found = mixture.epochs(6298)
    assert found == {name: pytest.approx(6298 * WEIGHTS[name] / size, rel=1e-3) for name, size in SIZES.items()}


def test_the_order_is_frozen(mixture):
    """
    Computed by this code, MIXTURE_VERSION 1 and ORDER_VERSION 1 (numpy 2.4, x86-64).

    They must never change under that version: runs that stopped would go on with other data.
    """
    assert MIXTURE_VERSION == 1, "new version: freeze new numbers"
    first = [11592, 17716, 40856, 2916, 11152, 41188, 2124, 11652, 2432, 30156, 18376, 19016]
    assert mixture.read(np.arange(12))[:, 0].tolist() == first
    assert mixture.read(123_456_789 + np.arange(8))[:, 0].tolist() == [12688, 12348, 1856, 33684, 2660, 32756, 4784, 7720]


# --- a dataset with named sources ---


def resolved(**options: Any) -> Any:
    options = {"tokenizer": "byte", "workers": 1, **options}
    return resolve(PREPARE_GROUPS, {name: Given(value, f"--{name}") for name, value in options.items()})


def prepared(target: Path, *sources: str, say: Callable[[str], None] = lambda line: None, **options: Any) -> Any:
    return prepare_dataset([], target, resolved(source=sources, **options), say)


def mixed(target: Path, *sources: str, say: Callable[[str], None] = lambda line: None, tokenizer: Any = None,
          **options: Any) -> Corpus:  # fmt: skip
    found = resolved(source=sources, **options)
    return prepare_mixture(sources_with_names([], found), target, found, say, tokenizer=tokenizer)


def texts(dataset: Any, split: str, source: str | None = None) -> list[str]:
    stream = dataset.stream(split, source)
    ids = stream.read(0, len(stream))
    assert ids[-1] == dataset.tokenizer.end_of_text_id
    ends = np.flatnonzero(ids == dataset.tokenizer.end_of_text_id)
    return [dataset.tokenizer.decode(part[part != dataset.tokenizer.end_of_text_id]) for part in np.split(ids, ends + 1)[:-1]]


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def wiki(tmp_path: Path) -> Path:
    """One document."""
    (tmp_path / "wiki.txt").write_text(make_text(600), encoding="utf-8")
    return tmp_path / "wiki.txt"


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """Thirty documents."""
    (tmp_path / "code").mkdir()
    for number in range(30):
        (tmp_path / "code" / f"{number:02}.py").write_text(f"# {number}\n{make_text(40, seed=number)}", encoding="utf-8")
    return tmp_path / "code"


def test_each_source_has_its_shards_and_is_split_by_its_own_rule(tmp_path, wiki, code):
    dataset = prepared(tmp_path / "data", f"wiki={wiki}:0.7", f"code={code}:0.3", shard_tokens=1000)
    assert dataset.sources == ("code", "wiki")
    assert list(dataset.splits) == ["train-code", "train-wiki", "validation-code", "validation-wiki"]
    whole = wiki.read_text()
    assert texts(dataset, "train", "wiki") == [whole[: int(len(whole) * 0.9)]]
    assert texts(dataset, "validation", "wiki") == [whole[int(len(whole) * 0.9) :]]
    written = {path.read_text() for path in code.iterdir()}
    held_out = {text for text in written if is_below(content_hash([text])[0], 0.1)}
    assert set(texts(dataset, "validation", "code")) == held_out
    assert set(texts(dataset, "train", "code")) == written - held_out
    names = [shard.name for shard in dataset.split("train", "code").shards]
    assert names == [f"train-code-{number:05}.npy" for number in range(len(names))]
    assert len(names) > 2
    dataset.verify()


def test_all_sources_together_are_one_after_the_other(tmp_path, wiki, code):
    dataset = prepared(tmp_path / "data", f"wiki={wiki}:0.7", f"code={code}:0.3")
    for split in ("train", "validation"):
        assert texts(dataset, split) == texts(dataset, split, "code") + texts(dataset, split, "wiki")
        whole, alone = dataset.split(split), [dataset.split(split, name) for name in dataset.sources]
        assert whole.tokens == sum(part.tokens for part in alone) == len(dataset.stream(split))
        assert (whole.documents, whole.bytes) == (sum(p.documents for p in alone), sum(p.bytes for p in alone))


def test_the_manifest_says_the_sources_but_no_weights(tmp_path, wiki, code):
    prepared(tmp_path / "data", f"wiki={wiki}:0.7", f"code={code}:0.3")
    manifest = json.loads((tmp_path / "data" / "dataset.json").read_text())
    assert manifest["version"] == 2
    assert manifest["sources"] == manifest["request"]["names"] == ["code", "wiki"]
    assert manifest["request"]["sources"] == [str(code), str(wiki)]
    said: list[str] = []
    again = prepared(tmp_path / "data", f"code={code}:5", f"wiki={wiki}:1", say=said.append)
    assert "used as it is" in said[-1]
    assert again.identity == open_dataset(tmp_path / "data").identity


def test_a_plain_dataset_says_nothing_of_names(tmp_path, wiki):
    dataset = prepare_dataset([str(wiki)], tmp_path / "data", resolved(), lambda line: None)
    manifest = (tmp_path / "data" / "dataset.json").read_text()
    assert json.loads(manifest)["version"] == 1
    assert dataset.sources == ()
    assert list(json.loads(manifest)) == [
        "format", "version", "tokenizer_sha256", "end_of_text", "vocab_size", "dtype", "splits", "documents", "bytes",
        "skipped", "replaced_sequences", "content_sha256", "request",
    ]  # fmt: skip
    assert list(json.loads(manifest)["request"]) == [
        "sources", "validation_sources", "validation_fraction", "read", "shard_tokens", "tokenizer",
    ]  # fmt: skip


def test_a_source_has_both_sides_where_another_would_hold_them_all(tmp_path):
    """The lowest hash of each source is for validation, not only that of all."""
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        for number in range(2):
            (tmp_path / name / f"{number}.txt").write_text(f"text {number} of {name}")
    dataset = prepared(tmp_path / "data", *(f"{name}={tmp_path / name}:1" for name in "abc"), validation_fraction=0.001)
    for name in "abc":
        assert len(texts(dataset, "train", name)) == len(texts(dataset, "validation", name)) == 1


def test_one_tokenizer_is_trained_on_all_training_text(tmp_path):
    """A pair that only one source has is merged, and what only validation has is not."""
    for name, word in (("a", "xqxqxq "), ("b", "kzkzkz ")):
        (tmp_path / f"{name}.txt").write_text(word * 900 + "jwjw" * 150)
    dataset = prepared(tmp_path / "data", f"a={tmp_path}/a.txt:1", f"b={tmp_path}/b.txt:1", tokenizer="bpe", vocab_size=300)
    assert {b"xq", b"kz"} <= set(dataset.tokenizer.token_bytes)
    assert b"jw" not in dataset.tokenizer.token_bytes


def test_workers_change_no_byte(tmp_path, wiki, code, monkeypatch):
    monkeypatch.setattr(prepare_module, "TASK_CHARACTERS", 1500)
    sources = (f"wiki={wiki}:0.7", f"code={code}:0.3")
    prepared(tmp_path / "one", *sources, tokenizer="bpe", vocab_size=300, shard_tokens=500)
    monkeypatch.setattr(prepare_module, "POOL_FROM_BYTES", 0)
    prepared(tmp_path / "two", *sources, tokenizer="bpe", vocab_size=300, shard_tokens=500, workers=2)
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_the_report_and_the_summary_are_by_source(tmp_path, wiki, code):
    said: list[str] = []
    dataset = prepared(tmp_path / "data", f"wiki={wiki}:0.7", f"code={code}:0.3", say=said.append)
    for name, split in dataset.splits.items():
        assert any(line.startswith(f"{name}: {split.tokens:,} tokens") for line in said)
    found = summary(dataset)
    assert found["train_tokens"] == sum(part["train_tokens"] for part in found["sources"].values())
    assert found["sources"]["wiki"] == {
        "train_tokens": dataset.split("train", "wiki").tokens,
        "validation_tokens": dataset.split("validation", "wiki").tokens,
    }
    plain = summary(prepare_dataset([str(wiki)], tmp_path / "plain", resolved(), lambda line: None))
    assert "sources" not in plain


def test_other_names_are_another_dataset(tmp_path, wiki, code):
    prepared(tmp_path / "data", f"wiki={wiki}:1", f"code={code}:1")
    with pytest.raises(ConfigError, match=r"other options \(names \['code', 'wiki'\] → \['code', 'web'\]\)"):
        prepared(tmp_path / "data", f"web={wiki}:1", f"code={code}:1")
    with pytest.raises(ConfigError, match=r"other options \(names \['code', 'wiki'\] → None\)"):
        prepare_dataset([str(code), str(wiki)], tmp_path / "data", resolved(), lambda line: None)
    prepare_dataset([str(code), str(wiki)], tmp_path / "plain", resolved(), lambda line: None)
    with pytest.raises(ConfigError, match=r"other options \(names None → \['code', 'wiki'\]\)"):
        prepared(tmp_path / "plain", f"wiki={wiki}:1", f"code={code}:1")


def test_changed_text_of_one_source_is_refused(tmp_path, wiki, code):
    prepared(tmp_path / "data", f"wiki={wiki}:1", f"code={code}:1")
    wiki.write_text(wiki.read_text() + "more")
    with pytest.raises(ConfigError, match="is not what it was made from"):
        prepared(tmp_path / "data", f"wiki={wiki}:1", f"code={code}:1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_source": ("w",)}, r"validation_source: w \(from --validation_source\) has no place beside --source"),
        ({"validation_fraction": 0}, r"validation_fraction: 0 \(from --validation_fraction\) leaves nothing"),
    ],
)
def test_options_that_do_not_go_with_named_sources(tmp_path, wiki, options, message):
    with pytest.raises(ConfigError, match=message):
        prepared(tmp_path / "data", f"a={wiki}:1", **options)


def test_plain_and_named_sources_are_not_mixed(tmp_path, wiki):
    with pytest.raises(ConfigError, match=r"^sources: wiki.txt and --source a=\S+ \(from --source\) cannot be mixed; give all"):
        prepare_dataset(["wiki.txt"], tmp_path / "data", resolved(source=(f"a={wiki}:1",)), lambda line: None)


def test_sources_that_hold_too_little_are_named(tmp_path, wiki):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no text found in \S+/empty \(skipped"):
        prepared(tmp_path / "data", f"a={wiki}:1", f"b={tmp_path / 'empty'}:1")
    (tmp_path / "short.txt").write_text("x")
    with pytest.raises(DataError, match=r"source \S+short.txt: 1 document, and no text for train of b; give it more text"):
        prepared(tmp_path / "data", f"a={wiki}:1", f"b={tmp_path / 'short.txt'}:1")
    with pytest.raises(DataError, match="source nowhere: not found"):
        prepared(tmp_path / "data", f"a={wiki}:1", "b=nowhere:1")
    with pytest.raises(ConfigError, match="given twice; it can be read once"):
        prepared(tmp_path / "data", "a=-:1", "b=-:1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "short.txt", "wiki.txt"]


@pytest.mark.parametrize("names", [None, [], ["code", "code"], ["code", "../wiki"], ["code", 3], "code", ["code"], ["web"]])
def test_a_damaged_list_of_sources_is_refused(tmp_path, wiki, code, names):
    prepared(tmp_path / "data", f"wiki={wiki}:1", f"code={code}:1")
    path = tmp_path / "data" / "dataset.json"
    manifest = json.loads(path.read_text())
    manifest["sources"] = names
    path.write_text(json.dumps(manifest))
    if names == ["code"]:  # less than there is, but nothing wrong
        assert open_dataset(tmp_path / "data").sources == ("code",)
        return
    with pytest.raises(DataError, match="dataset.json: damaged"):
        open_dataset(tmp_path / "data")


# --- what a run reads ---


def test_a_dataset_alone_is_read_as_ever(tmp_path, wiki):
    dataset = prepare_dataset([str(wiki)], tmp_path / "data", resolved(), lambda line: None)
    corpus = Corpus.of(dataset)
    assert (corpus.identity, corpus.weights, corpus.tokenizer) == (dataset.identity, {}, dataset.tokenizer)
    samples = corpus.train_samples(16, 8, seed=3)
    assert samples == ShuffledWindows(Windows(dataset.stream("train"), 16, 8), 3)
    assert corpus.validation_windows(16) == {"": Windows(dataset.stream("validation"), 16, 16)}
    assert corpus.first_tokens("train", 10).tolist() == dataset.stream("train").read(0, 10).tolist()
    assert len(corpus.first_tokens("validation", 10**9)) == len(dataset.stream("validation"))


def test_a_mixture_reads_each_source_by_its_weight(tmp_path, wiki, code):
    corpus = mixed(tmp_path / "data", f"wiki={wiki}:3", f"code={code}:1")
    assert corpus.weights == {"code": 0.25, "wiki": 0.75}
    samples = corpus.train_samples(16, 16, seed=3)
    assert isinstance(samples, Mixture)
    dataset = open_dataset(tmp_path / "data")
    assert samples.parts == {name: Windows(dataset.stream("train", name), 16, 16) for name in ("code", "wiki")}
    assert len(samples.read(np.arange(100))) == 100
    assert corpus.validation_windows(8) == {
        name: Windows(dataset.stream("validation", name), 8, 8) for name in ("code", "wiki")
    }
    first = corpus.first_tokens("train", 40)
    assert first.tolist() == [
        *dataset.stream("train", "code").read(0, 10), *dataset.stream("train", "wiki").read(0, 30)
    ]  # fmt: skip


def test_a_dataset_with_names_alone_is_one_stream_but_is_evaluated_by_source(tmp_path, wiki, code):
    dataset = prepared(tmp_path / "data", f"wiki={wiki}:3", f"code={code}:1")
    corpus = Corpus.of(dataset)
    assert corpus.weights == {}
    assert len(corpus.train_samples(16, 16, 0)) == len(Windows(dataset.stream("train"), 16, 16))
    assert list(corpus.validation_windows(16)) == ["code", "wiki"]


def test_the_identity_covers_names_weights_and_data(tmp_path, wiki, code):
    sources = (f"wiki={wiki}:3", f"code={code}:1")
    one = mixed(tmp_path / "data", *sources)
    assert mixed(tmp_path / "data", *sources[::-1]).identity == one.identity
    assert mixed(tmp_path / "data", f"wiki={wiki}:0.75", f"code={code}:0.25").identity == one.identity
    others = [mixed(tmp_path / "data", f"wiki={wiki}:3", f"code={code}:2")]
    others.append(mixed(tmp_path / "names", f"web={wiki}:3", f"code={code}:1"))
    others.append(mixed(tmp_path / "fraction", *sources, validation_fraction=0.2))
    others.append(mixed(tmp_path / "swapped", f"wiki={code}:3", f"code={wiki}:1"))
    assert len({one.identity, *(other.identity for other in others)}) == 5
    plain = prepare_dataset([str(wiki)], tmp_path / "plain", resolved(), lambda line: None)
    a, b = (mixed(tmp_path / "unused", f"{name}={plain.directory}:1") for name in "ab")
    assert a.identity != b.identity != plain.identity


def test_datasets_are_mixed_where_they_are(tmp_path, wiki, code):
    """A plain one under any name, one with names under these; and each is a source of its own."""
    plain = prepare_dataset([str(wiki)], tmp_path / "plain", resolved(), lambda line: None)
    both = prepared(tmp_path / "both", f"wiki={wiki}:1", f"code={code}:1")
    said: list[str] = []
    corpus = mixed(tmp_path / "unused", f"any={plain.directory}:2", f"code={both.directory}:1", say=said.append)
    assert not (tmp_path / "unused").exists()
    assert [(part.name, part.dataset.directory, part.source) for part in corpus.parts] == [
        ("any", plain.directory, None),
        ("code", both.directory, "code"),
    ]
    found = corpus.validation_windows(16)
    assert found["any"].stream == plain.stream("validation")
    assert found["code"].stream == both.stream("validation", "code")
    corpus.verify()
    corpus.require_windows(16)
    twice = mixed(tmp_path / "unused", f"wiki={both.directory}:2", f"code={both.directory}:1", say=said.append)
    assert {part.source for part in twice.parts} == {"wiki", "code"}
    with pytest.raises(ConfigError, match=r"both has no source web, it holds code, wiki; name one of these"):
        mixed(tmp_path / "unused", f"web={both.directory}:2")


def test_text_beside_a_dataset_is_tokenized_as_it_is(tmp_path, wiki, code):
    first = prepare_dataset([str(wiki)], tmp_path / "first", resolved(tokenizer="bpe", vocab_size=290), lambda line: None)
    sources = (f"wiki={first.directory}:1", f"code={code}:1")
    corpus = mixed(tmp_path / "made", *sources, tokenizer_train_bytes=2**20)
    made = open_dataset(tmp_path / "made")
    assert (made.sources, made.tokenizer.sha256) == (("code",), first.tokenizer.sha256)
    assert made.manifest["request"]["tokenizer"] == "of a dataset"
    assert corpus.parts[0].dataset.directory == made.directory
    said: list[str] = []
    assert mixed(tmp_path / "made", *sources, say=said.append).identity == corpus.identity
    assert "used as it is" in said[-1]
    with pytest.raises(ConfigError, match=r"tokenizer: byte \(from \S+\), but \S+/first was made with another; leave"):
        mixed(tmp_path / "other", *sources, tokenizer="byte")
    assert mixed(tmp_path / "made", *sources, tokenizer="bpe").identity == corpus.identity


def test_datasets_of_different_tokenizers_are_not_mixed(tmp_path, wiki, code):
    for name, source, tokenizer in (("one", wiki, "bpe"), ("two", code, "byte")):
        prepare_dataset([str(source)], tmp_path / name, resolved(tokenizer=tokenizer, vocab_size=290), lambda line: None)
    with pytest.raises(
        ConfigError, match=r"^source: \S+/two \(b\) was made with another tokenizer than \S+/one \(a\): 257 and"
    ):
        mixed(tmp_path / "unused", f"a={tmp_path / 'one'}:1", f"b={tmp_path / 'two'}:1")


def test_a_dataset_is_no_text_to_prepare(tmp_path, wiki):
    prepare_dataset([str(wiki)], tmp_path / "plain", resolved(), lambda line: None)
    with pytest.raises(ConfigError, match=r"source \S+/plain \(a\): is a dataset that is prepared already; leave it out"):
        prepared(tmp_path / "data", f"a={tmp_path / 'plain'}:1")


def test_a_mixture_opens_again_without_its_text(tmp_path, wiki, code):
    plain = prepare_dataset([str(wiki)], tmp_path / "plain", resolved(), lambda line: None)
    sources = (f"wiki={plain.directory}:2", f"code={code}:1")
    corpus = mixed(tmp_path / "made", *sources)
    for path in code.iterdir():
        path.unlink()
    code.rmdir()
    again = open_mixture(named_sources(sources), tmp_path / "made", byte_tokenizer())
    assert again.identity == corpus.identity
    os.rename(tmp_path / "made", tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"data: the dataset of source code is gone \(was \S+/code\); put it back there, or"):
        open_mixture(named_sources(sources), tmp_path / "made", byte_tokenizer())


def test_too_little_of_one_source_and_damage_of_it_are_named(tmp_path, wiki, code):
    corpus = mixed(tmp_path / "data", f"wiki={wiki}:3", f"code={code}:1")
    sizes = {name: open_dataset(tmp_path / "data").split("validation", name).tokens for name in ("wiki", "code")}
    small = min(sizes, key=lambda name: sizes[name])
    corpus.require_windows(sizes[small] - 1)
    with pytest.raises(DataError, match=rf"validation-{small} has {sizes[small]:,} tokens, one window .*fraction, or lower"):
        corpus.require_windows(sizes[small])
    path = tmp_path / "data" / "validation-code-00000.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(DataError, match=r"validation-code-00000.npy: damaged"):
        corpus.verify()
    only_wiki = Corpus((Part("wiki", 1.0, open_dataset(tmp_path / "data"), "wiki"),))
    only_wiki.verify()


# --- training on it ---


def test_a_run_that_goes_on_reads_what_the_straight_one_does(tmp_path, wiki, code):
    """And it is another run with another weight."""
    sources = (f"wiki={wiki}:3", f"code={code}:1")
    options = TINY | {"eval_steps": 0, "sample_tokens": 0, "max_steps": 8}
    groundup.train([], tmp_path / "straight", source=sources, **options)
    groundup.train(
        [], tmp_path / "parts", source=sources, **options | {"max_steps": 4, "lr_scheduler_type": "constant_with_warmup"}
    )
    groundup.train([], tmp_path / "parts", source=sources[::-1], **options)
    digests = [[row["batch_digest"] for row in read_rows(tmp_path / name / "metrics.jsonl")] for name in ("straight", "parts")]
    assert len(digests[0]) == 8
    assert digests[0] == digests[1]
    dataset = open_dataset(tmp_path / "straight" / "dataset")
    windows = {name: Windows(dataset.stream("train", name), 16, 16) for name in dataset.sources}
    tokens = Mixture(windows, {"wiki": 3, "code": 1}, 42).read(np.arange(8))
    assert digests[0][0] == hashlib.blake2b(tokens.astype("<u4").tobytes(), digest_size=16).hexdigest()
    with pytest.raises(ConfigError, match="cannot resume checkpoint-8 with changed sources: "):
        groundup.train([], tmp_path / "parts", source=(f"wiki={wiki}:2", f"code={code}:1"), **options | {"max_steps": 9})


def test_a_run_logs_the_loss_of_each_source(tmp_path, wiki, code):
    sources = (f"wiki={wiki}:3", f"code={code}:1")
    groundup.train([], tmp_path / "run", source=sources, **TINY | {"max_steps": 1, "sample_tokens": 0, "max_eval_tokens": 160})
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "eval_loss" in row]
    assert [row["step"] for row in rows] == [0, 1]
    for row in rows:
        low, high = sorted((row["eval_code_loss"], row["eval_wiki_loss"]))
        assert low < row["eval_loss"] < high
        assert 128 <= row["eval_tokens"] <= 160
