"""Text to ids and back: any text, two engines that must agree, files of other people, and cutting without a trace."""

import json
from functools import cache

import numpy as np
import pytest
import tiktoken
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from groundup.errors import DataError
from groundup.tokenizer.gpt2_files import FILES, gpt2_tokenizer
from groundup.tokenizer.pieces import pieces
from groundup.tokenizer.special import FILE_SEPARATOR, FIM_TOKENS, fim_ids, usable_ids
from groundup.tokenizer.tokenizer import (
    END_OF_TEXT,
    GPT2_PATTERN,
    Tokenizer,
    byte_to_character,
    byte_tokenizer,
    from_merges,
    load_tokenizer,
)
from groundup.tokenizer.training import train_bpe
from tests.conftest import SHARED_DATA, make_text

# Text as it comes, and text that tempts a splitter: contractions, runs of blanks, digits, marks, special tokens.
TEMPTING = st.lists(
    st.sampled_from([
        "the", "The", "'s", "'S", "'ll", "'", " ", "  ", "\n", "\n\n", "\r\n", "\t", "\xa0", "\u2028", "\u3000", "\ufeff",
        "1", "1234", "²", "½", "٣", "é", "e\u0301", "ß", "日本", "한국어", "हिन्दी", "😀", "👩\u200d👩", "\u200b", "\0", "\x7f",
        "!", "...", "==", "_", "#", "<|endoftext|>", "<|", "|>", "Ġ", "Ċ", "ſ", "\U000e0001", "a" * 30, " " * 30,
    ]),
    max_size=25,
).map("".join)  # fmt: skip
ANY_TEXT = st.one_of(st.text(max_size=60), TEMPTING)


@cache
def trained():
    return train_bpe([make_text(4000), "<|endoftext|> isn't   special 123 12\n\n\tdef f(x):\n        return x\n" * 5], 600)


@cache
def gpt2():
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no {SHARED_DATA}")
    return load_tokenizer(SHARED_DATA / "gpt2")


TOKENIZERS = [
    pytest.param(byte_tokenizer, id="byte"),
    pytest.param(trained, id="bpe"),
    pytest.param(gpt2, id="gpt2", marks=pytest.mark.shared_data),
]


@cache
def library(content):
    """The `tokenizers` library, from the file alone."""
    found = tokenizers.Tokenizer.from_str(content)
    found.encode_special_tokens = True
    return found


def slow_ids(tokenizer, text):
    return library(tokenizer.json).encode(text, add_special_tokens=False).ids


def changed(**parts):
    """The trained tokenizer's file with some parts replaced."""
    spec = json.loads(trained().json)
    for name, value in parts.items():
        spec[name] = {**spec[name], **value} if isinstance(spec.get(name), dict) and isinstance(value, dict) else value
    return json.dumps(spec)


def split_by(pattern):
    """A pre-tokenizer as Llama 3's file has it."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, level]}


# --- any text ---


@pytest.mark.parametrize("make", TOKENIZERS)
@settings(deadline=None)
@given(text=ANY_TEXT)
@example(text="")
@example(text=" \t\n\r\n\0\ufeff<|endoftext|>")
def test_any_text_comes_back_and_the_engines_agree(make, text):
    tokenizer = make()
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint32
    assert ids.ndim == 1
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids.tolist()) == text.encode()
    assert int(tokenizer.token_byte_counts[ids].sum()) == len(text.encode())
    # Text that spells the special token is ordinary text.
    assert tokenizer.end_of_text_id not in ids
    assert tokenizer.runs_fast
    assert ids.tolist() == slow_ids(tokenizer, text)


@pytest.mark.parametrize("make", TOKENIZERS)
def test_every_id_has_its_bytes_and_end_of_text_has_none(make):
    tokenizer = make()
    table = tokenizer.token_bytes
    assert len(table) == tokenizer.vocab_size == tokenizer.end_of_text_id + 1
    assert table[tokenizer.end_of_text_id] == b""
    assert len(set(table)) == len(table)
    assert {bytes([value]) for value in range(256)} <= set(table)


def test_the_byte_tokenizer_is_bytes():
    tokenizer = byte_tokenizer()
    assert tokenizer.encode("aé\0").tolist() == [97, 0xC3, 0xA9, 0]
    assert (tokenizer.vocab_size, tokenizer.end_of_text_id) == (257, 256)


def test_bytes_that_are_no_text_become_replacement_characters():
    assert byte_tokenizer().decode([0xFF, 97, 0xC3]) == "\ufffda\ufffd"


def test_training_learns_merges_and_keeps_to_the_size():
    assert train_bpe([make_text(4000)], 300).vocab_size == 300
    # A corpus without repetition has fewer pairs than were asked for.
    assert 257 <= train_bpe(["abc"], 5000).vocab_size < 300
    assert train_bpe(["aa " * 100], 257).vocab_size == 257
    text = make_text(500, seed=3)
    assert len(trained().encode(text)) < 0.5 * len(text.encode())


def test_training_twice_gives_the_same_file():
    texts = [make_text(1000, seed=seed) for seed in range(3)]
    assert train_bpe(iter(texts), 500).json == train_bpe(iter(texts), 500).json


# --- GPT-2's own ---


@cache
def independent_gpt2():
    """GPT-2's encoding as tiktoken itself builds it, with its own pattern and its own reading of the files."""
    import tiktoken.load

    folder = SHARED_DATA / "gpt2"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", "")
        ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(str(folder / "merges.txt"), str(folder / "vocab.json"))
    pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
    return tiktoken.Encoding("gpt2-again", pat_str=pattern, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: 50256})


@pytest.mark.slow
@pytest.mark.shared_data
@settings(max_examples=10_000, deadline=None)
@given(text=ANY_TEXT)
def test_gpt2_equals_tiktoken_and_tokenizers_on_ten_thousand_texts(text):
    ids = gpt2().encode(text).tolist()
    assert ids == independent_gpt2().encode_ordinary(text)
    assert ids == slow_ids(gpt2(), text)


@pytest.mark.shared_data
def test_gpt2_on_a_whole_book(shared_data):
    text = (shared_data / "the-verdict.txt").read_text(encoding="utf-8")
    ids = gpt2().encode(text)
    assert ids.tolist() == independent_gpt2().encode_ordinary(text)
    # The count that the book "Build a Large Language Model (From Scratch)" prints, chapter 2.
    assert len(ids) == 5145
    assert gpt2().decode(ids) == text


@pytest.mark.shared_data
def test_gpt2_on_known_ids():
    tokenizer = gpt2()
    assert tokenizer.encode("Hello, I'm a language model,").tolist() == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert (tokenizer.vocab_size, tokenizer.end_of_text_id, tokenizer.runs_fast) == (50257, 50256, True)


@pytest.mark.slow
def test_the_two_regex_engines_agree_on_all_of_unicode():
    """
    tiktoken's engine and `tokenizers`' have Unicode tables of their own; a difference would move a split.

    The vocabulary merges any last byte with a following a, 1 or !, so the ids show where the split was.
    """
    letters = byte_to_character()
    vocab = {letter: index for index, letter in enumerate(letters)}
    merges = [(letter, after) for letter in letters for after in "a1!" if letter + after not in vocab]
    vocab |= {left + right: 256 + index for index, (left, right) in enumerate(merges)}
    tokenizer = from_merges(vocab, merges)
    assert tokenizer.runs_fast
    # Planes 4 to 13 are empty, 15 and 16 private.
    planes = (0, 1, 2, 3, 14)
    points = [chr(p) for plane in planes for p in range(plane << 16, (plane + 1) << 16) if not 0xD800 <= p <= 0xDFFF]
    differ = []
    for start in range(0, len(points), 512):
        block = points[start : start + 512]
        text = "\n".join(f"{c}a\n{c}1\n{c}!\n {c}a\n  {c}a\n{c}{c} a" for c in block)
        if tokenizer.encode(text).tolist() != slow_ids(tokenizer, text):
            differ += [c for c in block if tokenizer.encode(f" {c}a").tolist() != slow_ids(tokenizer, f" {c}a")] or [block]
    assert differ == []


# --- other people's files ---


def test_merges_that_do_not_follow_ranks_fall_back_and_encode_right():
    """ids in another order than the merges: tiktoken would merge bc first, the file says ab."""
    vocab = {letter: index for index, letter in enumerate(byte_to_character())} | {"bc": 256, "ab": 257}
    tokenizer = from_merges(vocab, [("a", "b"), ("b", "c")])
    assert not tokenizer.runs_fast
    assert tokenizer.encode("abc").tolist() == [257, ord("c")]
    assert tokenizer.decode(tokenizer.encode("abc naïve")) == "abc naïve"
    assert END_OF_TEXT not in [tokenizer._slow.id_to_token(i) for i in tokenizer.encode(f"a{END_OF_TEXT}")]


def test_a_token_that_no_merge_reaches_falls_back():
    """tiktoken would take "abc" whole because it is in the vocabulary; the file's merges never build it."""
    vocab = {letter: index for index, letter in enumerate(byte_to_character())} | {"bc": 256, "ab": 257, "abc": 258}
    tokenizer = from_merges(vocab, [("b", "c"), ("a", "b")])
    assert not tokenizer.runs_fast
    assert tokenizer.encode("abc").tolist() == [ord("a"), 256]


LLAMA_3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@cache
def llama_style():
    return Tokenizer(changed(pre_tokenizer=split_by(LLAMA_3_PATTERN)))


@settings(deadline=None)
@given(text=ANY_TEXT)
def test_a_split_pattern_like_llama_3s_runs_fast_and_agrees(text):
    assert llama_style().runs_fast
    ids = llama_style().encode(text)
    assert ids.tolist() == slow_ids(llama_style(), text)
    assert llama_style().decode(ids) == text


@pytest.mark.parametrize("pattern", [r"\d{1,3}", r"\p{L}+", r"[^\n]+"])
def test_a_split_pattern_that_leaves_text_over_loses_none_of_it(pattern):
    """`tokenizers` keeps what lies between the matches; tiktoken would drop it."""
    tokenizer = Tokenizer(changed(pre_tokenizer=split_by(pattern)))
    text = "the model 12345\nlearns"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(text).tolist() == slow_ids(tokenizer, text)


def test_added_tokens_that_are_not_special_keep_their_ids():
    """Such tokens (Phi's runs of blanks, for one) are matched in text; the model was trained with their ids."""
    added = json.loads(trained().json)["added_tokens"]
    token = {**added[0], "id": trained().vocab_size, "content": "hello world", "special": False}
    tokenizer = Tokenizer(changed(added_tokens=[*added, token]))
    text = "say hello world now"
    assert tokenizer.encode(text).tolist() == slow_ids(tokenizer, text)
    assert token["id"] in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param({"normalizer": {"type": "NFC"}}, id="slow"),
        pytest.param({}, id="fast"),
    ],
)
def test_a_file_that_truncates_or_pads_does_not_do_so_here(parts):
    """Files saved after fine-tuning often say truncation or padding; a corpus must not lose or gain tokens by it."""
    truncation = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": {"Fixed": 99}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
               "pad_token": "!"}  # fmt: skip
    text = "the model learns a token from text"
    for extra in ({"truncation": truncation}, {"padding": padding}):
        tokenizer = Tokenizer(changed(**parts, **extra))
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_normalizer_is_obeyed_on_the_slow_path():
    tokenizer = Tokenizer(changed(normalizer={"type": "Lowercase"}))
    assert not tokenizer.runs_fast
    assert tokenizer.decode(tokenizer.encode("THE Model")) == "the model"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "cannot be read"),
        ("{}", "cannot be read"),
        ('{"model": {"type": "BPE"', "cannot be read"),
        (json.dumps({"version": "1.0", "added_tokens": [],
                     "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}),
         "WordLevel is not byte-level BPE"),
        (json.dumps({"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"},
                     "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}), "not byte-level BPE"),
    ],
)  # fmt: skip
def test_what_is_no_byte_level_bpe_is_refused(tmp_path, content, words):
    file = tmp_path / "tokenizer.json"
    file.write_text(content)
    with pytest.raises(DataError, match=words) as error:
        load_tokenizer(tmp_path)
    assert str(file) in str(error.value)


def test_a_model_without_its_type_is_read_or_refused():
    """Older files leave the type out; the library reads them."""
    spec = json.loads(trained().json)
    del spec["model"]["type"]
    try:
        tokenizer = Tokenizer(json.dumps(spec))
    except DataError as error:
        assert "tokenizer" in str(error)  # noqa: PT017
    else:
        assert tokenizer.encode("the model").tolist() == trained().encode("the model").tolist()


def test_a_tokenizer_without_end_of_text_is_refused_until_its_own_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text(trained().json.replace("<|endoftext|>", "</s>"))
    with pytest.raises(DataError, match=r"no end-of-text token '<\|endoftext\|>'.*eos_token"):
        load_tokenizer(tmp_path)
    for eos in ("</s>", {"content": "</s>"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
        assert load_tokenizer(tmp_path).end_of_text == "</s>"
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config.json: cannot be read"):
        load_tokenizer(tmp_path)


def test_a_missing_tokenizer_says_what_can_be_given(tmp_path):
    with pytest.raises(DataError, match=f"{tmp_path}/absent: not found; give byte, bpe, gpt2"):
        load_tokenizer(tmp_path / "absent")
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="not UTF-8"):
        load_tokenizer(tmp_path)


# --- files of ours ---


@pytest.mark.parametrize("make", TOKENIZERS)
def test_saving_and_loading_changes_nothing(make, tmp_path):
    tokenizer = make()
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert (loaded.sha256, loaded.vocab_size, loaded.end_of_text_id) == (
        tokenizer.sha256, tokenizer.vocab_size, tokenizer.end_of_text_id)  # fmt: skip
    before = (tmp_path / "tokenizer.json").read_bytes()
    loaded.save(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == before
    text = make_text(300, seed=9)
    assert loaded.encode(text).tolist() == tokenizer.encode(text).tolist()


def test_another_end_of_text_is_another_tokenizer(tmp_path):
    assert trained().sha256 != Tokenizer(trained().json.replace("<|endoftext|>", "</s>"), "</s>").sha256


@pytest.mark.parametrize("make", TOKENIZERS)
def test_transformers_reads_the_saved_folder_as_the_same_tokenizer(make, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = make()
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("Hello, I'm a language model,", "naïve 日本 😀\n\n  def f(x):\r\n\treturn 1234 ", " lead", "don't  ."):
        assert theirs(text)["input_ids"] == tokenizer.encode(text).tolist()
        assert theirs.decode(theirs(text)["input_ids"]) == text
    assert (theirs.eos_token_id, len(theirs)) == (tokenizer.end_of_text_id, tokenizer.vocab_size)


@pytest.mark.shared_data
def test_gpt2s_files_under_both_names_give_the_same(shared_data, tmp_path):
    for theirs, openai in (("vocab.json", "encoder.json"), ("merges.txt", "vocab.bpe")):
        (tmp_path / openai).write_bytes((shared_data / "gpt2" / theirs).read_bytes())
    assert load_tokenizer(tmp_path).sha256 == gpt2().sha256
    # The folder holds the files, so nothing is fetched and the hashes are those that we know.
    assert gpt2_tokenizer(tmp_path, base_url="http://127.0.0.1:9/").sha256 == gpt2().sha256


def test_offline_without_gpt2s_files_says_which_files_to_put_where(tmp_path):
    folder = tmp_path / "cache"
    with pytest.raises(DataError) as error:
        gpt2_tokenizer(folder, base_url="http://127.0.0.1:9/")
    for words in ("encoder.json", "vocab.bpe", "vocab.json", "merges.txt", str(folder), "http://127.0.0.1:9/"):
        assert words in str(error.value)
    assert list(folder.iterdir()) == []


def test_a_file_that_is_not_openais_is_refused_by_its_hash(tmp_path):
    for name in FILES:
        (tmp_path / name).write_text("{}")
    with pytest.raises(DataError, match=r"encoder.json is not OpenAI's file \(its sha256 is not 196139668be6"):
        gpt2_tokenizer(tmp_path, base_url="http://127.0.0.1:9/")


def test_a_file_is_fetched_once_and_kept(tmp_path):
    """From a file URL: the way of a download, without a network."""
    server, folder = tmp_path / "server", tmp_path / "cache"
    server.mkdir()
    (server / "encoder.json").write_text("{}")
    for _ in range(2):
        with pytest.raises(DataError, match="is not OpenAI's"):
            gpt2_tokenizer(folder, base_url=f"{server.as_uri()}/")
        assert [path.name for path in folder.iterdir()] == ["encoder.json"]
        (server / "encoder.json").unlink(missing_ok=True)


@pytest.mark.parametrize("merges", ["#version\na b c\n", "#version\nzz qq\n"])
def test_damaged_gpt2_files_are_named(tmp_path, merges):
    (tmp_path / "vocab.json").write_text(json.dumps({c: i for i, c in enumerate(byte_to_character())}))
    (tmp_path / "merges.txt").write_text(merges)
    with pytest.raises(DataError, match=r"vocab.json.*merges.txt: cannot be read"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text("[1")
    with pytest.raises(DataError, match=r"vocab.json"):
        load_tokenizer(tmp_path)


# --- cutting ---


@pytest.mark.parametrize("make", [*TOKENIZERS, pytest.param(llama_style, id="llama")])
@settings(deadline=None)
@given(text=st.lists(TEMPTING, max_size=4).map(" ".join), size=st.integers(1, 12), chunk=st.integers(1, 40))
@example(text="a b c d e f g h i j k l", size=1, chunk=5)
@example(text="don't won't  can't\n\n\tit's 12 345", size=3, chunk=7)
def test_cutting_at_a_boundary_never_changes_the_ids(make, text, size, chunk):
    tokenizer = make()
    cut = list(pieces((text[start : start + chunk] for start in range(0, len(text), chunk)), size))
    assert "".join(cut) == text
    assert "" not in cut
    # A run of 2 · size characters without a boundary may be cut elsewhere, and says nothing here.
    at_boundaries = all(a[-1].isalnum() and b[0] in " \n" for a, b in zip(cut, cut[1:], strict=False))
    if at_boundaries:
        joined = [index for piece in cut for index in tokenizer.encode(piece).tolist()]
        assert joined == tokenizer.encode(text).tolist()


@given(words=st.lists(st.sampled_from(["the", "naïve", "x1", "日本", "12"]), min_size=10, max_size=60))
def test_words_are_always_cut_at_boundaries(words):
    """The case above is not empty: text of short words always has a boundary, and is really cut."""
    text = " ".join(words)
    cut = list(pieces([text], 8))
    assert len(cut) > 1 or len(text) < 16
    assert all(a[-1].isalnum() and b[0] == " " for a, b in zip(cut, cut[1:], strict=False))
    assert max(map(len, cut)) <= 2 * 8


def test_pieces_do_not_depend_on_the_chunks():
    text = make_text(3000)
    whole = list(pieces([text], 1000))
    assert len(whole) > 5
    for chunk in (1, 7, 999, 1000, 5000):
        assert list(pieces((text[start : start + chunk] for start in range(0, len(text), chunk)), 1000)) == whole


def test_a_run_without_boundaries_is_cut_all_the_same():
    assert [len(piece) for piece in pieces(["x" * 1000], 100)] == [200] * 4 + [200]
    assert list(pieces([], 10)) == list(pieces([""], 10)) == []


def test_the_split_pattern_is_gpt2s():
    """The possessive spelling splits as the released one; `tokenizers` runs the released one."""
    released = tiktoken.Encoding(
        "released", pat_str=GPT2_PATTERN, mergeable_ranks=trained()._fast._mergeable_ranks, special_tokens={}
    )
    text = make_text(2000) + " isn't   we'll\n\n\n  \t x  12 \xa0\xa0 !!  "
    assert trained().encode(text).tolist() == released.encode_ordinary(text)


# --- special tokens ---


@pytest.mark.parametrize("make", [*TOKENIZERS, pytest.param(llama_style, id="llama")])
def test_special_tokens_are_added_after_the_last_id(make):
    base = make()
    tokenizer = base.with_special_tokens(FIM_TOKENS)
    size = base.vocab_size
    assert tokenizer.vocab_size == size + 5
    assert tokenizer.special_ids == base.special_ids | dict(zip(FIM_TOKENS, range(size, size + 5), strict=True))
    assert tokenizer.end_of_text_id == base.end_of_text_id
    assert tokenizer.runs_fast
    assert tokenizer.token_bytes == base.token_bytes + [b""] * 5
    assert tokenizer.token_byte_counts[size:].tolist() == [0] * 5
    assert [tokenizer.spelled(size + number) for number in range(5)] == list(FIM_TOKENS)
    assert tokenizer.decode([size, *tokenizer.encode("a"), size + 4]) == "a"
    added = json.loads(tokenizer.json)["added_tokens"]
    assert [(t["content"], t["id"]) for t in added if t["special"]][-5:] == list(tokenizer.special_ids.items())[-5:]
    # Asking again changes nothing, and another order of asking has its own ids.
    assert tokenizer.with_special_tokens(FIM_TOKENS) is tokenizer
    assert tokenizer.with_special_tokens(FIM_TOKENS[:2]) is tokenizer
    assert base.vocab_size == size


@pytest.mark.parametrize("make", TOKENIZERS)
@settings(deadline=None)
@given(text=st.lists(st.sampled_from([*FIM_TOKENS, "<|endoftext|>", "a", " the", "<|", "\n"]), max_size=8).map("".join))
def test_text_that_spells_a_special_token_is_ordinary_text(make, text):
    base, tokenizer = make(), extended(make)
    ids = tokenizer.encode(text)
    assert ids.tolist() == base.encode(text).tolist() == slow_ids(tokenizer, text)
    assert tokenizer.decode(ids) == text


@cache
def extended(make):
    return make().with_special_tokens(FIM_TOKENS)


def test_special_tokens_that_are_there_stay_where_they_are():
    """A model's data with paths adds the separator; training to fill holes adds the rest."""
    some = trained().with_special_tokens([FILE_SEPARATOR])
    assert some.vocab_size == trained().vocab_size + 1
    assert some.with_special_tokens(FIM_TOKENS).special_ids == trained().with_special_tokens(FIM_TOKENS).special_ids
    other = trained().with_special_tokens(["<|fim_pad|>"]).with_special_tokens(FIM_TOKENS)
    assert other.special_ids["<|fim_pad|>"] == trained().vocab_size
    assert len(set(other.special_ids.values())) == 6
    # Qwen's own file has them as tokens that text may spell.
    added = json.loads(trained().json)["added_tokens"]
    plain = {**added[0], "id": trained().vocab_size, "content": FILE_SEPARATOR, "special": False}
    tokenizer = Tokenizer(changed(added_tokens=[*added, plain]))
    assert tokenizer.encode(FILE_SEPARATOR).tolist() == [trained().vocab_size]
    special = tokenizer.with_special_tokens([FILE_SEPARATOR])
    assert special.special_ids[FILE_SEPARATOR] == trained().vocab_size == special.vocab_size - 1
    assert special.encode(FILE_SEPARATOR).tolist() == trained().encode(FILE_SEPARATOR).tolist()


def test_a_special_token_that_finds_no_place_is_refused():
    with pytest.raises(DataError, match="'the' is one of its tokens of ordinary text"):
        from_merges({c: i for i, c in enumerate([*byte_to_character(), "th", "the"])}, [("t", "h"), ("th", "e")]) \
            .with_special_tokens(["the"])  # fmt: skip
    spec = json.loads(byte_tokenizer().json)
    spec["model"]["vocab"]["\u0100x"] = 400
    with pytest.raises(DataError, match="gaps below 401"):
        Tokenizer(json.dumps(spec)).with_special_tokens(FIM_TOKENS)


@pytest.mark.parametrize("make", TOKENIZERS)
def test_transformers_opens_a_tokenizer_with_special_tokens(make, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = extended(make)
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).sha256 == tokenizer.sha256
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == tokenizer.vocab_size
    assert {name: theirs.convert_tokens_to_ids(name) for name in tokenizer.special_ids} == tokenizer.special_ids
    text = "def f(x):\n    return naïve 日本 😀"
    assert theirs(text)["input_ids"] == tokenizer.encode(text).tolist()
    # There, as everywhere in transformers, a special token is also what its name spells.
    ids = tokenizer.special_ids
    hole = [ids["<|fim_prefix|>"], *tokenizer.encode("a"), ids["<|fim_suffix|>"], *tokenizer.encode("b"), ids["<|fim_middle|>"]]
    assert theirs("<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>")["input_ids"] == hole
    assert theirs.decode(hole, skip_special_tokens=True) == "ab" == tokenizer.decode(hole)


@pytest.mark.parametrize("make", TOKENIZERS)
def test_more_special_tokens_give_the_ids_of_fewer_and_not_the_other_way_round(make):
    base, some, all_of_them = make(), make().with_special_tokens([FILE_SEPARATOR]), extended(make)
    assert all_of_them.gives_the_ids_of(some)
    assert all_of_them.gives_the_ids_of(base)
    assert some.gives_the_ids_of(base)
    assert not base.gives_the_ids_of(some)
    assert not some.gives_the_ids_of(all_of_them)
    # Other tokens at the same ids mean something else.
    other = base.with_special_tokens(["<|im_start|>"])
    assert not other.gives_the_ids_of(some)
    assert not some.gives_the_ids_of(other)


def test_the_marks_of_a_hole_are_not_written():
    for make in (byte_tokenizer, trained):
        base, tokenizer = make(), extended(make)
        size = base.vocab_size
        ids = fim_ids(tokenizer)
        assert (ids.file_separator, ids.prefix, ids.middle, ids.suffix, ids.pad) == tuple(range(size, size + 5))
        # The separator begins a new document of a model that learned paths; the four after it are the marks.
        assert usable_ids(tokenizer) == size + 1
        assert fim_ids(base) is None
        assert usable_ids(base) == size
        assert fim_ids(base.with_special_tokens([FILE_SEPARATOR])) is None
        # Where text comes after them, no limit can leave them out.
        later = tokenizer.with_special_tokens(["<|end|>"])
        spec = json.loads(later.json)
        spec["added_tokens"][-1]["special"] = False
        assert usable_ids(later) == size + 1
        assert usable_ids(Tokenizer(json.dumps(spec))) == size + 6
