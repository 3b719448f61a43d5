"""Fill in the middle: every sample a legal one of the paper, put together again exactly, a function of its position alone."""

import math
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from groundup.data.fim import FillInTheMiddle, invert
from groundup.data.prepare import PrepareRequest, prepare
from groundup.data.shards import Dataset
from groundup.data.sources import ReadOptions
from groundup.errors import DataError
from groundup.tokenizer.special import FIM_TOKENS, fim_ids
from groundup.tokenizer.tokenizer import Tokenizer, byte_tokenizer
from groundup.tokenizer.training import train_bpe
from tests.conftest import make_text

SAMPLE = make_text(400, seed=5) + "def f(x):\n    return {'ключ': x}  # naïve 日本語 👩\u200d👩 e\u0301\r\n\t\n" * 8


@cache
def byte() -> Tokenizer:
    return byte_tokenizer().with_special_tokens(FIM_TOKENS)


@cache
def bpe() -> Tokenizer:
    """With tokens of several characters, and with characters of several tokens."""
    return train_bpe([SAMPLE], 400).with_special_tokens(FIM_TOKENS)


TOKENIZERS = [pytest.param(byte, id="byte"), pytest.param(bpe, id="bpe")]
SEP, PRE, MID, SUF, PAD = (byte().special_ids[name] for name in FIM_TOKENS)
END = byte().end_of_text_id


@dataclass(frozen=True)
class InMemory:
    """Sample g is row g of an array, (N, length + 1), which starts anew at its end."""

    rows: npt.NDArray[np.int64]

    @property
    def length(self) -> int:
        return self.rows.shape[1] - 1

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return self.rows[positions % len(self.rows)]


def holes(
    rows: Any, tokenizer: Tokenizer | None = None, rate: float = 1.0, spm_rate: float = 0.5, seed: int = 0
) -> FillInTheMiddle:
    return FillInTheMiddle(InMemory(np.asarray(rows, dtype=np.int64)), tokenizer or byte(), rate, spm_rate, seed)


def read_all(samples: FillInTheMiddle, count: int | None = None) -> npt.NDArray[np.int64]:
    return samples.read(np.arange(count or len(samples), dtype=np.int64))


def split(tokens: list[int], end: int) -> list[tuple[list[int], bool]]:
    """The texts between end-of-text, each with whether it is followed by one."""
    parts: list[list[int]] = [[]]
    for token in tokens:
        if token == end:
            parts.append([])
        else:
            parts[-1].append(token)
    return [(part, number + 1 < len(parts)) for number, part in enumerate(parts) if part or number + 1 < len(parts)]


def put_together(text: list[int], tokenizer: Tokenizer) -> tuple[bytes, str]:
    """The bytes of one text of a sample, and how it is ordered: plain, PSM or SPM; read as the paper writes it."""
    ids, table = tokenizer.special_ids, tokenizer.token_bytes
    sep, pre, mid, suf, pad = (ids[name] for name in FIM_TOKENS)
    marks = [token for token in text if token in (pre, mid, suf)]
    text = [token for token in text if token != pad]
    if not marks:
        return b"".join(table[token] for token in text), "plain"
    assert marks == [pre, suf, mid]
    at = [text.index(mark) for mark in marks]
    header, prefix, suffix, middle = text[: at[0]], text[at[0] + 1 : at[1]], text[at[1] + 1 : at[2]], text[at[2] + 1 :]
    assert (header[:1] == [sep]) == bool(header)
    whole = b"".join(table[token] for part in (header, prefix, middle, suffix) for token in part)
    return whole, "PSM" if prefix else "SPM"


def check(window: list[int], sample: list[int], tokenizer: Tokenizer) -> Counter[str]:
    """
    What must hold of any sample beside the window that it was made of; returns how its texts are ordered.

    The texts in order, each whole, but the last, which may have lost its end; and a character that the edges cut.
    """
    end, pad, table = tokenizer.end_of_text_id, tokenizer.special_ids["<|fim_pad|>"], tokenizer.token_bytes
    assert len(sample) == len(window)
    if sample == window:
        return Counter(plain=len(split(window, end)))
    pads = len(sample) - len("".join("x" if token == pad else " " for token in sample).rstrip("x"))
    made = split(sample[: len(sample) - pads], end)
    assert pad not in sample[: len(sample) - pads]
    originals, orders = split(window, end), Counter[str]()
    assert len(made) <= len(originals)
    decoded = invert(sample, tokenizer)
    assert len(decoded) == len(made)
    lost = len(originals) - len(made)
    for number, ((tokens, ended), (was, was_ended)) in enumerate(zip(made, originals, strict=False)):
        found, order = put_together(tokens, tokenizer)
        orders[order] += 1
        expected = b"".join(table[token] for token in was)
        assert decoded[number] == found.decode(errors="replace")
        if order != "plain":
            found.decode()
            assert ended, "a text with a hole ends, also one that the window cut"
            if number == 0 and not expected.startswith(found):
                skipped = next(n for n in (1, 2, 3) if b"".join(table[token] for token in was[n:]).startswith(found))
                assert expected[0] & 0xC0 == 0x80, "only the rest of a character is left out"
                expected = expected[sum(len(table[token]) for token in was[:skipped]) :]
        if number < len(made) - 1:
            assert found == expected
            assert ended == was_ended
        else:
            assert expected.startswith(found)
            lost += found != expected
    # Nothing gives way without need: what is left over is no room for a text with its marks, whose cuts split tokens.
    assert pads <= 20 or not lost
    return orders


def mixed_stream(tokenizer: Tokenizer, documents: int, seed: int) -> npt.NDArray[np.int64]:
    """Documents of 0 to 120 characters from everywhere in the sample text."""
    random = np.random.default_rng(seed)
    tokens: list[int] = []
    for _ in range(documents):
        start, length = int(random.integers(len(SAMPLE))), int(random.choice([0, 1, 2, 5, 20, 60, 120]))
        tokens += [*tokenizer.encode(SAMPLE[start : start + length]).tolist(), tokenizer.end_of_text_id]
    return np.array(tokens, dtype=np.int64)


# --- the samples are those of the paper ---


def legal(text: str, tokenizer: Tokenizer, header: str = "") -> set[tuple[int, ...]]:
    """All samples of one text, as section 3 and appendix D write them: PSM, and SPM's variant 2; parts tokenized apart."""
    ids = fim_ids(tokenizer)
    assert ids is not None
    encode, found = lambda part: tokenizer.encode(part).tolist(), set()
    start = [ids.file_separator, *encode(header)] if header else []
    for first in range(len(text) + 1):
        for second in range(first, len(text) + 1):
            prefix, middle, suffix = encode(text[:first]), encode(text[first:second]), encode(text[second:])
            psm = [ids.prefix, *prefix, ids.suffix, *suffix, ids.middle, *middle, tokenizer.end_of_text_id]
            spm = [ids.prefix, ids.suffix, *suffix, ids.middle, *prefix, *middle, tokenizer.end_of_text_id]
            found |= {(*start, *psm), (*start, *spm)}
    return found


@pytest.mark.parametrize("make", TOKENIZERS)
@pytest.mark.parametrize("text", ["abc", "日é", "the model"])
@pytest.mark.parametrize("header", ["", "a/b.py\n"])
def test_every_legal_sample_and_no_other_is_made(make, text, header):
    tokenizer = make()
    start = [tokenizer.special_ids["<|file_sep|>"], *tokenizer.encode(header).tolist()] if header else []
    window = [*start, *tokenizer.encode(text).tolist(), tokenizer.end_of_text_id]
    expected = legal(text, tokenizer, header)
    room = max(map(len, expected)) + 5
    # One text that fits with room to spare, then one that may be cut.
    row = [*window, *tokenizer.encode("x" * room).tolist()][:room]
    samples = read_all(holes([row], tokenizer), 60 * len(expected))
    found = {tuple(sample[: sample.index(tokenizer.end_of_text_id) + 1]) for sample in samples.tolist()}
    assert found == expected


def test_a_text_that_fills_its_window_gives_way_by_what_the_marks_need():
    """With bytes for tokens a hole needs four: three marks and end-of-text."""
    window = list(b"abcdefgh")
    for sample in read_all(holes([window]), 300).tolist():
        assert tuple(sample) in legal("abcd", byte())


# --- exactly invertible ---


def all_invert(tokenizer: Tokenizer, count: int, length: int, seed: int) -> Counter[str]:
    stream = mixed_stream(tokenizer, 4000, seed)
    starts = np.random.default_rng(seed).integers(0, len(stream) - length, count)
    rows = stream[starts[:, None] + np.arange(length + 1)]
    samples = read_all(holes(rows, tokenizer, rate=0.7, seed=seed))
    orders = Counter[str]()
    for window, sample in zip(rows.tolist(), samples.tolist(), strict=True):
        orders += check(window, sample, tokenizer)
    return orders


@pytest.mark.parametrize("make", TOKENIZERS)
@pytest.mark.parametrize("count", [1_250, pytest.param(25_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("length", [24, 80])
def test_samples_invert_to_their_texts(make, count, length):
    """A hundred thousand in all, windows that begin inside characters and texts that end with the window among them."""
    orders = all_invert(make(), count, length, seed=count + length)
    assert min(orders["plain"], orders["PSM"], orders["SPM"]) > count / 20


TEXT = st.one_of(
    st.text(max_size=12), st.sampled_from(["", "😀", "日本", "e\u0301", "\0", "<|fim_prefix|>", "<|endoftext|>", "a\r\nb"])
)


@pytest.mark.parametrize("make", TOKENIZERS)
@settings(deadline=None)
@given(texts=st.lists(TEXT, min_size=1, max_size=6), start=st.integers(0, 5), length=st.integers(1, 60),
       rate=st.sampled_from([0.5, 1.0]), spm_rate=st.sampled_from([0.0, 0.5, 1.0]), seed=st.integers(0, 2**32))  # fmt: skip
@example(texts=["😀😀"], start=1, length=6, rate=1.0, spm_rate=0.0, seed=0)
@example(texts=["", "", "a"], start=0, length=20, rate=1.0, spm_rate=1.0, seed=0)
def test_any_text_inverts(make, texts, start, length, rate, spm_rate, seed):
    tokenizer = make()
    stream = [token for text in texts for token in [*tokenizer.encode(text).tolist(), tokenizer.end_of_text_id]]
    window = (stream[start:] + [tokenizer.end_of_text_id] * length)[: length + 1]
    samples = holes([window], tokenizer, rate=rate, spm_rate=spm_rate, seed=seed)
    for sample in read_all(samples, 8).tolist():
        check(window, sample, tokenizer)


def test_inverting_a_sample_by_hand():
    a, b, c = b"abc"
    psm, spm = [PRE, a, SUF, c, MID, b, END], [PRE, SUF, c, MID, a, b, END]
    assert invert([*psm, *spm, a, b, END, END, c], byte()) == ["abc", "abc", "ab", "", "c"]
    assert invert([*psm, PAD, PAD], byte()) == ["abc"]
    assert invert([SEP, a, 10, *psm], byte()) == ["a\nabc"]
    assert invert([PAD, PAD], byte()) == invert([], byte()) == []
    assert invert([a, END, b], byte_tokenizer()) == ["a", "b"]


# --- which, how many, and where they are cut ---


def near(count: int, trials: int, probability: float) -> bool:
    """Within four standard deviations."""
    return abs(count - trials * probability) <= 4 * math.sqrt(trials * probability * (1 - probability)) + 1e-9


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_so_many_texts_are_chosen_each_by_itself(rate):
    """Two short texts at the start of a window always fit, whatever happens to them."""
    window = [*b"abc", END, *b"defg", END, *b"h" * 30]
    counts = Counter[tuple[bool, bool]]()
    for sample in read_all(holes([window], rate=rate, seed=3), 4000).tolist():
        first, second = split(sample, END)[:2]
        counts[PRE in first[0], PRE in second[0]] += 1
    for one in (False, True):
        for other in (False, True):
            expected = (rate if one else 1 - rate) * (rate if other else 1 - rate)
            assert near(counts[one, other], 4000, expected), counts


@pytest.mark.parametrize("spm_rate", [0.0, 0.3, 1.0])
def test_so_many_begin_with_the_suffix(spm_rate):
    text = [*b"x" * 40, END]
    samples = read_all(holes([[*text, *b"y" * 20]], spm_rate=spm_rate, seed=1), 4000)
    # PSM with an empty prefix looks like SPM: the first of two cuts among 41 places is at the start.
    empty = 1 - (40 / 41) ** 2
    assert near(int((samples[:, 1] == SUF).sum()), 4000, spm_rate + (1 - spm_rate) * empty)


def test_cuts_are_uniform_between_characters():
    """Two independent draws, sorted: a pair of different places is twice as likely as a place twice."""
    text = "é日a😀b"
    row = [*byte().encode(text).tolist(), END, *b"y" * 20]
    counts = Counter[tuple[int, int]]()
    for sample in read_all(holes([row], spm_rate=0.0, seed=2), 6000).tolist():
        start, end = sample.index(SUF), sample.index(MID)
        prefix, suffix = byte().decode(sample[:start]), byte().decode(sample[start:end])
        counts[len(prefix), len(text) - len(suffix)] += 1
    places = len(text) + 1
    assert len(counts) == places * (places + 1) // 2
    for (first, second), count in counts.items():
        assert near(count, 6000, (1 if first == second else 2) / places**2)


# --- a function of the position alone ---


def test_any_chunking_and_order_gives_the_same_samples():
    rows = mixed_stream(byte(), 200, 0)[: 41 * 40].reshape(40, 41)
    samples = holes(rows, rate=0.5, seed=7)
    whole = read_all(samples, 120)
    for chunk in (1, 7, 64):
        parts = [samples.read(np.arange(start, min(start + chunk, 120))) for start in range(0, 120, chunk)]
        assert np.array_equal(np.concatenate(parts), whole)
    order = np.random.default_rng(0).permutation(120)
    again = holes(rows.copy(), rate=0.5, seed=7)
    assert np.array_equal(again.read(order), whole[order])
    assert samples.read(np.empty(0, dtype=np.int64)).shape == (0, 41)


def test_another_position_and_another_seed_draw_anew():
    """The same window comes again in the next epoch, and is cut elsewhere."""
    rows = [[*b"the model learns from text", END]]
    samples = read_all(holes(rows), 50)
    assert len(np.unique(samples, axis=0)) > 30
    assert not np.array_equal(samples, read_all(holes(rows, seed=1), 50))
    assert not np.array_equal(holes(rows).read(np.array([2**40])), holes(rows).read(np.array([2**40 + 1])))


def test_the_draws_are_frozen():
    """Made by this code: a run that goes on with another version must see what it would have seen."""
    row = [*b"abcdef", END, *b"ghijklm", END, *b"nopqrs"]
    signs = {PRE: "<", SUF: "|", MID: ">", END: ".", PAD: "_"}
    samples = read_all(holes([row], rate=0.5, seed=42), 6).tolist()
    assert ["".join(signs.get(token) or chr(token) for token in sample) for sample in samples] == [
        "<|ef>abcd.<|lm>ghijk.",
        "abcdef.<|ijklm>gh.nop",
        "abcdef.<|>ghijklm.___",
        "<abc|def>.<gh|jklm>i.",
        "<abc|def>.ghijklm.nop",
        "abcdef.<gh|m>ijkl.___",
    ]


# --- what stays ---


@pytest.mark.parametrize("make", TOKENIZERS)
def test_rate_0_changes_nothing_and_rate_1_leaves_no_text_as_it_was(make):
    tokenizer = make()
    rows = mixed_stream(tokenizer, 1200, 1)[: 41 * 200].reshape(200, 41)
    none = read_all(holes(rows, tokenizer, rate=0.0))
    assert np.array_equal(none, rows)
    assert none.dtype == np.int64
    prefix = tokenizer.special_ids["<|fim_prefix|>"]
    for window, sample in zip(rows.tolist(), read_all(holes(rows, tokenizer)).tolist(), strict=True):
        check(window, sample, tokenizer)
        for text, _ in split(sample, tokenizer.end_of_text_id):
            assert prefix in text or not tokenizer.decode(text).strip("\ufffd")


def test_windows_without_a_chosen_text_stay_bit_for_bit():
    rows = mixed_stream(byte(), 3000, 2)[: 41 * 1000].reshape(1000, 41)
    samples = read_all(holes(rows, rate=0.3))
    plain = ~((samples == PRE) | (samples == PAD)).any(axis=1)
    assert 100 < plain.sum() < 900
    assert np.array_equal(samples[plain], rows[plain])


def test_the_samples_underneath_are_only_read():
    rows = np.array([[*b"abcdef", END]], dtype=np.int64)
    rows.flags.writeable = False
    samples = FillInTheMiddle(InMemory(rows), byte(), 1.0, 0.5, 0)
    samples.read(np.array([0]))
    assert (samples.length, len(samples)) == (6, 1)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param([], id="empty"),
        pytest.param([97, 0xFF, 98], id="bytes that are no text"),
        pytest.param([97, 98, 0x80], id="half a character"),
        pytest.param([97, SEP, 98], id="a special token inside"),
        pytest.param([SEP, *b"a path"], id="a path without its end"),
        pytest.param([SEP, *b"a path\n"], id="a path and nothing else"),
        pytest.param([0x80, 0x81, 0x82, 0x83, 97], id="more than a character's rest"),
    ],
)
def test_a_text_that_cannot_be_cut_stays(text):
    window = [*b"ab", END, *text, END, *b"cdefghijklmnopqrst"]
    for sample in read_all(holes([window]), 20).tolist():
        assert [part for part, _ in split(sample, END)][1] == text
        assert PRE in sample[:2]


def test_a_path_stays_in_front():
    window = [SEP, *b"a/b.py\n", *b"one\ntwo\n", END, SEP, *b"c.py\n", *b"x" * 20]
    for sample in read_all(holes([window]), 60).tolist():
        (first, _), (second, _) = split(sample, END)
        assert (*first, END) in legal("one\ntwo\n", byte(), "a/b.py\n")
        assert (*second, END) in legal("x" * 13, byte(), "c.py\n")


@pytest.mark.parametrize("length", [7, 8])
def test_a_path_goes_with_its_text(length):
    """A hole of one character needs five tokens besides the path's six; the hole before took three more than its text."""
    window = [*b"ab", END, SEP, *b"c.py\n", *b"x" * length]
    for sample in read_all(holes([window]), 20).tolist():
        assert tuple(sample[:6]) in legal("ab", byte())
        if length == 8:
            assert tuple(sample[6:]) in legal("x", byte(), "c.py\n")
        else:
            assert sample[6:] == [PAD] * 10


def test_a_tokenizer_without_marks_is_refused():
    samples = holes([[97, 98, END]], byte_tokenizer())
    with pytest.raises(DataError, match=r"no tokens for a hole"):
        samples.read(np.array([0]))


# --- paths in front of documents ---


def prepared_with_paths(sources: list[Path], target: Path, path_context: bool = True, **options: Any) -> Dataset:
    request = PrepareRequest(
        **{"sources": tuple(map(str, sources)), "validation_sources": (), "validation_fraction": 0.0, "read": ReadOptions(),
           "shard_tokens": 2**20, "tokenizer": "byte", "vocab_size": 300, "tokenizer_train_bytes": 10**6,
           "path_context": path_context} | options
    )  # fmt: skip
    build = (lambda texts: train_bpe(texts, 300)) if request.tokenizer == "bpe" else lambda texts: byte_tokenizer()
    return prepare(request, target, build, 1, lambda line: None)


def tokens_of(dataset: Dataset, name: str = "train") -> list[int]:
    stream = dataset.stream(name)
    return [int(token) for token in stream.read(0, len(stream))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "code" / "a").mkdir(parents=True)
    (tmp_path / "code" / "a" / "b.py").write_text("x = 1\n")
    (tmp_path / "code" / "é\n.py").write_text("y" * 10)
    return tmp_path / "code"


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_a_document_begins_with_its_path_after_the_separator(folder, tmp_path, kind):
    """One that is read in many pieces too, and only at its beginning."""
    (folder / "long.py").write_text("z = 3\n" * 100_000)
    dataset = prepared_with_paths([folder], tmp_path / "data", tokenizer=kind)
    tokenizer = dataset.tokenizer
    separator = tokenizer.special_ids["<|file_sep|>"]
    assert separator == tokenizer.vocab_size - 1 == tokenizer.end_of_text_id + 1
    found = split(tokens_of(dataset), tokenizer.end_of_text_id)
    assert all(text[0] == separator and separator not in text[1:] and ended for text, ended in found)
    assert [tokenizer.decode(text) for text, _ in found] == [
        "a/b.py\nx = 1\n", "long.py\n" + "z = 3\n" * 100_000, "é .py\n" + "y" * 10,
    ]  # fmt: skip
    # Path and text are tokenized apart, so that a hole's path has the tokens that it has here.
    assert found[0][0][1:] == [*tokenizer.encode("a/b.py\n").tolist(), *tokenizer.encode("x = 1\n").tolist()]
    assert dataset.splits["train"].documents == 3
    assert dataset.splits["train"].bytes == sum(len(tokenizer.decode_bytes(text)) for text, _ in found)
    # Filling holes adds its marks after the separator, and keeps the paths in front.
    window = [*found[0][0], tokenizer.end_of_text_id, *tokenizer.encode("more")]
    every = holes([window], tokenizer.with_special_tokens(FIM_TOKENS))
    assert {sample[0] for sample in read_all(every, 20).tolist()} == {separator}


def test_without_paths_a_dataset_is_as_it_was(folder, tmp_path):
    dataset = prepared_with_paths([folder], tmp_path / "data", path_context=False)
    assert dataset.tokenizer.sha256 == byte_tokenizer().sha256
    assert "path_context" not in dataset.manifest["request"]
    paths = prepared_with_paths([folder], tmp_path / "paths")
    assert paths.manifest["request"]["path_context"] is True
    separators = [token for token in tokens_of(paths) if token == 257]
    assert len(tokens_of(dataset)) == len(tokens_of(paths)) - len(separators) - len("a/b.py\né .py\n".encode())


def test_both_parts_of_a_lone_document_begin_with_its_path(tmp_path):
    (tmp_path / "one.py").write_text("abcdefghij" * 10)
    dataset = prepared_with_paths([tmp_path / "one.py"], tmp_path / "data", validation_fraction=0.1)
    for name, text in (("train", "abcdefghij" * 9), ("validation", "abcdefghij")):
        tokens = tokens_of(dataset, name)
        assert (tokens[0], tokens[-1]) == (257, 256)
        assert byte_tokenizer().decode(tokens[1:-1]) == f"one.py\n{text}"


def test_another_path_makes_another_dataset(folder, tmp_path):
    """Where paths are text; else only content counts."""
    first, plain = (prepared_with_paths([folder], tmp_path / str(on), path_context=on) for on in (True, False))
    (folder / "a" / "b.py").rename(folder / "a" / "c.py")
    again, same = (prepared_with_paths([folder], tmp_path / f"{on} again", path_context=on) for on in (True, False))
    assert again.manifest["content_sha256"] != first.manifest["content_sha256"]
    assert same.manifest["content_sha256"] == plain.manifest["content_sha256"]
    assert same.identity == plain.identity
