"""GGUF files: out and in again bit for bit, refused where they are damaged, and the same text from llama.cpp."""

import contextlib
import json
import os
import resource
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import groundup
from groundup.errors import CheckpointError, ConfigError
from groundup.interop import gguf_files
from groundup.interop.gguf_files import DTYPES, largest_logit_difference, read_gguf, write_gguf
from groundup.interop.gguf_tokenizer import PATTERNS
from groundup.model.gpt2 import GPT2, GPT2Config
from groundup.recipes.loading import Loaded
from groundup.tokenizer.tokenizer import (
    TOTAL_PATTERNS,
    Tokenizer,
    byte_to_character,
    byte_tokenizer,
    from_merges,
    load_tokenizer,
)  # fmt: skip
from groundup.tokenizer.training import train_bpe
from tests import test_interop
from tests.conftest import TINY, make_text

CONFIG = GPT2Config(vocab_size=257, n_positions=12, n_embd=32, n_layer=2, n_head=2)
EXPORT = "export: the tokenizer cannot be written"


def new_model(config: GPT2Config = CONFIG, seed: int = 0) -> GPT2:
    return test_interop.new_model(config, seed)


def same_bits(first: GPT2, second: GPT2) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[n].view(torch.int32), theirs[n].view(torch.int32)) for n in ours
    )


def there_and_back(model: GPT2, folder: Path, dtype: str, tokenizer: Tokenizer | None = None) -> gguf_files.Imported:
    write_gguf(model, tokenizer or byte_tokenizer(), folder / "model.gguf", dtype, "a model")
    return read_gguf(folder / "model.gguf")


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe([make_text(500)], 300)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    write_gguf(new_model(), byte_tokenizer(), path, "f32", "a model")
    return path


# Out and in


@settings(max_examples=8, deadline=None)
@given(
    heads=st.integers(1, 3), width=st.sampled_from([1, 3, 16, 32]), layers=st.integers(1, 3),
    inner=st.sampled_from([0, 7, 64]), positions=st.integers(1, 40), tied=st.booleans(), epsilon=st.floats(1e-8, 1e-3),
)  # fmt: skip
@pytest.mark.parametrize("dtype", DTYPES)
def test_import_export_import_is_the_identity(tmp_path_factory, dtype, heads, width, layers, inner, positions, tied, epsilon):
    """For f32 already the first import gives the model; for the others every one after the first."""
    folder = tmp_path_factory.mktemp("identity")
    model = new_model(
        GPT2Config(
            vocab_size=257,
            n_positions=positions,
            n_embd=heads * width,
            n_layer=layers,
            n_head=heads,
            n_inner=inner,
            tie_word_embeddings=tied,
            layer_norm_epsilon=float(str(np.float32(epsilon))),
        )  # fmt: skip
    )
    first = there_and_back(model, folder, dtype)
    content = (folder / "model.gguf").read_bytes()
    second = there_and_back(first.model, folder, dtype, first.tokenizer)
    assert same_bits(first.model, second.model)
    assert first.model.config == second.model.config
    assert (folder / "model.gguf").read_bytes() == content
    expected = replace(model.config, n_inner=0 if inner == 4 * heads * width else inner)
    assert first.model.config == expected
    if dtype == "f32":
        assert same_bits(model, first.model)
    assert (first.missing, first.unexpected, first.reshaped) == ((), (), ())


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_extreme_weights_come_back_the_same(tmp_path_factory, data):
    """Denormal numbers, zeros of both signs, the largest and the smallest: what a first import gives, stays."""
    folder = tmp_path_factory.mktemp("extreme")
    kind = data.draw(st.sampled_from(DTYPES))
    largest = {"f32": 2.0**127, "bf16": 2.0**127, "f16": 65000.0, "q8_0": 2.0**22}[kind]
    values = data.draw(st.lists(st.floats(-largest, largest, width=32), min_size=64, max_size=64))
    scale = data.draw(st.sampled_from([1.0, 1e-4, 1e-8, 1e-30]))
    model = new_model(replace(CONFIG, n_layer=1))
    with torch.no_grad():
        model.wte.weight[0], model.wte.weight[1] = (torch.tensor(values) * scale).view(2, 32)
    first = there_and_back(model, folder, kind)
    second = there_and_back(first.model, folder, kind, first.tokenizer)
    assert same_bits(first.model, second.model)
    if kind == "f32":
        assert same_bits(model, first.model)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_error_of_each_type_is_what_it_must_be(tmp_path, dtype):
    model = new_model()
    found = there_and_back(model, tmp_path, dtype).model.state_dict()
    for name, tensor in model.state_dict().items():
        relative = {"f32": 0.0, "f16": 2**-11, "bf16": 2**-8, "q8_0": 1 / 254 + 2**-11}[dtype]
        # q8_0 has one scale for 32 weights; the others one for each.
        scale = tensor.abs() if dtype != "q8_0" else tensor.abs().max()
        if tensor.ndim == 1 or name == "wpe.weight":
            relative = 0.0
        assert ((found[name] - tensor).abs() <= relative * scale + 2**-25).all(), name


def test_rows_that_no_block_fits_are_f16_in_q8_0(tmp_path):
    model = new_model(replace(CONFIG, n_embd=32, n_inner=40))
    write_gguf(model, byte_tokenizer(), tmp_path / "m.gguf", "q8_0", "x")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert kinds["blk.0.ffn_down.weight"] == "F16"
    assert {kinds[n] for n in ("blk.0.ffn_up.weight", "token_embd.weight", "blk.1.attn_qkv.weight")} == {"Q8_0"}
    assert {kind for name, kind in kinds.items() if "norm" in name or "bias" in name or "position" in name} == {"F32"}


def test_the_packages_own_reader_agrees(written, bpe, tmp_path):
    """Our reading of the header against the package's: every fact, every tensor."""
    other = tmp_path / "bpe.gguf"
    write_gguf(new_model(replace(CONFIG, vocab_size=310)), bpe, other, "q8_0", "naïve")
    for path in (written, other):
        content, reader = gguf_files._read_content(path), gguf.GGUFReader(path)
        theirs = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
        assert {n: v.tolist() if isinstance(v, np.ndarray) else v for n, v in content.facts.items()} == theirs
        assert {n: (t.shape, t.kind, t.start) for n, t in content.tensors.items()} == {
            t.name: (tuple(t.shape.tolist()[::-1]), int(t.tensor_type), t.data_offset) for t in reader.tensors
        }


def test_the_facts_that_llama_cpp_needs(written):
    facts = gguf_files._read_content(written).facts
    assert facts["general.architecture"] == "gpt2"
    assert facts["general.name"] == "a model"
    expected = {
        "context_length": 12,
        "embedding_length": 32,
        "block_count": 2,
        "feed_forward_length": 128,
        "attention.head_count": 2,
    }
    assert {name: facts[f"gpt2.{name}"] for name in expected} == expected
    assert facts["gpt2.attention.layer_norm_epsilon"] == pytest.approx(1e-5)
    assert (facts["tokenizer.ggml.model"], facts["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert facts["tokenizer.ggml.eos_token_id"] == facts["tokenizer.ggml.bos_token_id"] == 256
    assert facts["tokenizer.ggml.add_bos_token"] is False
    assert facts["tokenizer.ggml.merges"] == []
    assert facts["tokenizer.ggml.tokens"][:2] == ["Ā", "ā"]
    assert facts["tokenizer.ggml.token_type"][255:].tolist() == [1, 3]


def test_a_head_of_its_own_is_kept_and_a_copy_is_tied(tmp_path):
    untied = new_model(replace(CONFIG, tie_word_embeddings=False))
    assert same_bits(untied, there_and_back(untied, tmp_path, "f32").model)
    with torch.no_grad():
        untied.lm_head.weight.copy_(untied.wte.weight)
    found = there_and_back(untied, tmp_path, "f32").model
    assert found.config.tie_word_embeddings
    assert largest_logit_difference(untied, found, seed=0) == 0.0


@pytest.mark.parametrize(("dtype", "value"), [("f16", 7e4), ("q8_0", 1e7), ("f16", float("nan")), ("bf16", float("inf"))])
def test_weights_that_a_type_cannot_hold_are_refused(tmp_path, dtype, value):
    model = new_model()
    with torch.no_grad():
        model.h[1].mlp.c_fc.weight[3, 4] = value
    with pytest.raises(CheckpointError, match=rf"h\.1\.mlp\.c_fc\.weight has a value of .* {dtype} cannot hold"):
        write_gguf(model, byte_tokenizer(), tmp_path / "m.gguf", dtype, "x")
    assert list(tmp_path.iterdir()) == []


def test_a_type_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="'q4_k' is none of f32, f16, bf16, q8_0"):
        write_gguf(new_model(), byte_tokenizer(), tmp_path / "m.gguf", "q4_k", "x")


def test_without_the_package_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    for action in (
        lambda: write_gguf(new_model(), byte_tokenizer(), tmp_path / "m", "f32", "x"),
        lambda: read_gguf(tmp_path / "m"),
    ):
        with pytest.raises(ConfigError, match=r"pip install 'groundup\[gguf\]'"):
            action()


def test_the_largest_difference_is_found():
    model, other = new_model(), new_model()
    assert largest_logit_difference(model, other, seed=1) == 0.0
    with torch.no_grad():
        other.wte.weight[200] += 0.5
    assert largest_logit_difference(model, other, seed=1) > 0.1
    assert largest_logit_difference(model, other, seed=1) == largest_logit_difference(model, other, seed=1)
    with torch.no_grad():
        other.wte.weight[200] = float("nan")
    assert not largest_logit_difference(model, other, seed=1) <= 1e9


# Tokenizers

SAMPLES = ["", "the model learns", " a  token\n\n\nnaïve", "日本 then\t\t1234", "don't we'll I'VE", "x" * 60, "<|endoftext|> a",
           "def f(x):\n    return x**2  # ½ Ⅷ\r\n", "\u00a0\u3000 é e\u0301 \U0001f600\u200d", make_text(60)]  # fmt: skip


def test_a_tokenizer_that_was_trained_here_comes_back_as_the_same_file(tmp_path, bpe):
    for tokenizer in (bpe, byte_tokenizer()):
        model = new_model(replace(CONFIG, vocab_size=tokenizer.vocab_size))
        assert there_and_back(model, tmp_path, "f32", tokenizer).tokenizer.sha256 == tokenizer.sha256


def with_pattern(name: str, **changes: Any) -> Tokenizer:
    """A small tokenizer with another split, and two special tokens in the middle of the ids."""
    letters = byte_to_character()
    vocab = {
        "<a>": 0,
        **{letter: 5 + index for index, letter in enumerate(letters)},
        "Ġt": 262,
        "he": 263,
        "Ġthe": 264,
        "<b>": 4,
    }
    slow = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[("Ġ", "t"), ("h", "e"), ("Ġt", "he")], **changes))
    stages = tokenizers.pre_tokenizers
    slow.pre_tokenizer = stages.Sequence(
        [stages.Split(tokenizers.Regex(PATTERNS[name]), "isolated"), stages.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    slow.decoder = tokenizers.decoders.ByteLevel()
    slow.add_special_tokens([tokenizers.AddedToken(t, normalized=False, special=True) for t in ("<a>", "<b>")])
    return Tokenizer(slow.to_str(), "<b>")


@pytest.mark.parametrize("name", PATTERNS)
def test_other_splits_and_unused_ids_come_back_with_the_same_ids(tmp_path, name):
    tokenizer = with_pattern(name)
    found = there_and_back(new_model(replace(CONFIG, vocab_size=265)), tmp_path, "f32", tokenizer).tokenizer
    facts = gguf_files._read_content(tmp_path / "model.gguf").facts
    assert facts["tokenizer.ggml.pre"] == name
    assert facts["tokenizer.ggml.tokens"][:6] == ["<a>", "[PAD1]", "[PAD2]", "[PAD3]", "<b>", "Ā"]
    assert facts["tokenizer.ggml.token_type"][:6].tolist() == [3, 5, 5, 5, 3, 1]
    assert (found.end_of_text, found.end_of_text_id, found.vocab_size) == ("<b>", 4, 265)
    for text in SAMPLES:
        assert found.encode(text).tolist() == tokenizer.encode(text).tolist()
    assert found.token_bytes == tokenizer.token_bytes
    assert set(PATTERNS.values()) == TOTAL_PATTERNS


def test_gpt2s_own_tokenizer(tmp_path, shared_data):
    tokenizer = load_tokenizer(shared_data / "gpt2")
    config = replace(CONFIG, vocab_size=50304, n_embd=2, n_layer=1)
    found = there_and_back(new_model(config), tmp_path, "f16", tokenizer)
    assert found.model.config.vocab_size == found.tokenizer.vocab_size == 50257
    assert found.reshaped == ("wte.weight (50304, 2) → (50257, 2) (ids without a token)",)
    for text in SAMPLES:
        assert found.tokenizer.encode(text).tolist() == tokenizer.encode(text).tolist()


def test_padding_names_are_unique(tmp_path):
    vocab = {letter: index for index, letter in enumerate(byte_to_character())} | {"[P": 256}
    tokenizer = from_merges(vocab, [("[", "P")])
    spec = json.loads(tokenizer.json)
    spec["added_tokens"].append(spec["added_tokens"][0] | {"id": 258, "content": "[PAD259]"})
    found = there_and_back(new_model(replace(CONFIG, vocab_size=261)), tmp_path, "f32", Tokenizer(json.dumps(spec)))
    tokens = gguf_files._read_content(tmp_path / "model.gguf").facts["tokenizer.ggml.tokens"]
    assert tokens[257:] == ["<|endoftext|>", "[PAD259]", "[PAD259]_", "[PAD260]"]
    assert found.tokenizer.vocab_size == 259


def changed(**changes: Any) -> Tokenizer:
    return Tokenizer(json.dumps(json.loads(byte_tokenizer().json) | changes))


def added(**changes: Any) -> list[dict[str, Any]]:
    first = json.loads(byte_tokenizer().json)["added_tokens"][0]
    return [first, first | {"id": 257, "content": "<x>", "special": False} | changes]


def split(pattern: str, **changes: Any) -> dict[str, Any]:
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    stage = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False} | changes
    return {"type": "Sequence", "pretokenizers": [stage, level]}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"pre_tokenizer": split(r"\d|\D+")}, "how it cuts text"),
        ({"pre_tokenizer": split(PATTERNS["gpt-2"], invert=True)}, "how it cuts text"),
        ({"pre_tokenizer": split(PATTERNS["gpt-2"], behavior="Removed")}, "how it cuts text"),
        ({"normalizer": {"type": "NFC"}}, "normalizer NFC"),
        ({"model": json.loads(byte_tokenizer().json)["model"] | {"dropout": 0.1}}, "dropout"),
        ({"added_tokens": added(lstrip=True)}, "added tokens that look at what is around them"),
        (
            {"added_tokens": added(), "model": json.loads(byte_tokenizer().json)["model"] | {"ignore_merges": True}},
            "ignore_merges",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_tokenizer_that_llama_cpp_would_run_differently_is_refused(tmp_path, changes, problem):
    with pytest.raises(CheckpointError, match=problem) as refusal:
        write_gguf(new_model(replace(CONFIG, vocab_size=258)), changed(**changes), tmp_path / "m.gguf", "f32", "x")
    assert str(refusal.value).startswith(EXPORT)


def test_a_vocabulary_without_some_bytes_is_refused(tmp_path):
    tokenizer = from_merges({"a": 0, "b": 1}, [])
    with pytest.raises(CheckpointError, match="lacks tokens for some bytes"):
        write_gguf(new_model(), tokenizer, tmp_path / "m.gguf", "f32", "x")


def test_ordinary_added_tokens_keep_their_kind(tmp_path):
    tokenizer = changed(added_tokens=added())
    found = there_and_back(new_model(replace(CONFIG, vocab_size=258)), tmp_path, "f32", tokenizer).tokenizer
    assert found.encode("a<x>b").tolist() == tokenizer.encode("a<x>b").tolist() == [97, 257, 98]


def test_end_of_text_is_special_to_llama_cpp_also_where_the_file_lists_it_as_an_ordinary_token(tmp_path):
    model = json.loads(byte_tokenizer().json)["model"]
    tokenizer = changed(added_tokens=[], model=model | {"vocab": model["vocab"] | {"<|endoftext|>": 256}})
    found = there_and_back(new_model(), tmp_path, "f32", tokenizer).tokenizer
    assert gguf_files._read_content(tmp_path / "model.gguf").facts["tokenizer.ggml.token_type"][256] == 3
    assert found.encode("a<|endoftext|>").tolist() == tokenizer.encode("a<|endoftext|>").tolist()


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="the tokenizer has 257 ids, the model knows 200"):
        write_gguf(new_model(replace(CONFIG, vocab_size=200)), byte_tokenizer(), tmp_path / "m.gguf", "f32", "x")


# Files that are not what they should be


def rewrite(path: Path, facts: dict[str, Any] | None = None, without: str = "") -> Path:
    """A copy of a file with facts changed (None: left out), or a tensor left out."""
    reader = gguf.GGUFReader(path)
    writer = gguf_files._writer(gguf)
    writer.kv_data[0].clear()
    facts = facts or {}
    for name, field in reader.fields.items():
        if name not in facts and not name.startswith("GGUF."):
            writer.add_key_value(name, field.contents(), field.types[0])
    for name, value in facts.items():
        if value is not None:
            writer.add_key_value(name, value, gguf.GGUFValueType.get_type(value))
    for tensor in reader.tensors:
        if tensor.name != without:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    copy = path.with_name("copy.gguf")
    writer.write_header_to_file(copy)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return copy


def test_a_rewritten_file_is_read(written):
    """The helper above changes nothing by itself."""
    assert same_bits(read_gguf(rewrite(written)).model, new_model())


@pytest.mark.parametrize(
    ("facts", "problem"),
    [
        ({"general.architecture": "llama"}, "is a llama model, groundup reads GPT-2"),
        ({"general.architecture": None}, "has no general.architecture"),
        ({"gpt2.block_count": None}, "has no gpt2.block_count"),
        ({"gpt2.block_count": 10**9}, "block_count is 1000000000"),
        ({"gpt2.block_count": 10**6}, "28 tensors for 1,000,000 blocks"),
        ({"gpt2.block_count": 1}, r"12 tensors .*blk\.1\.attn_norm\.bias"),
        ({"gpt2.context_length": 11}, r"wpe.weight \(12, 32\) instead of \(11, 32\)"),
        ({"gpt2.embedding_length": 34}, "do not fit the model"),
        ({"gpt2.attention.head_count": 3}, "not divisible by head_count 3"),
        ({"gpt2.attention.head_count": 0}, "head_count is 0"),
        ({"gpt2.attention.head_count": "two"}, "head_count is 'two'"),
        ({"gpt2.attention.layer_norm_epsilon": "small"}, "small"),
        ({"gpt2.attention.layer_norm_epsilon": float("nan")}, "nan"),
        ({"split.count": 3}, "is one of 3 parts; put them together with llama-gguf-split --merge"),
        ({"general.alignment": 0}, "general.alignment is 0"),
        ({"tokenizer.ggml.pre": "default"}, "tokenizer.ggml.pre 'default'"),
        ({"tokenizer.ggml.pre": None}, "tokenizer.ggml.pre None"),
        ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.model is 'llama'"),
        ({"tokenizer.ggml.tokens": None}, "has no tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.tokens": ["a"]}, "1 tokens, 257 token types"),
        ({"tokenizer.ggml.tokens": ["a"] * 257}, "two tokens are the same"),
        ({"tokenizer.ggml.tokens": 7}, "is no list of texts"),
        ({"tokenizer.ggml.merges": ["a b"]}, "tokens and merges do not fit"),
        ({"tokenizer.ggml.merges": ["ab"]}, "tokens and merges do not fit"),
        ({"tokenizer.ggml.merges": 3.5}, "is no list of texts"),
        ({"tokenizer.ggml.eos_token_id": 999}, "eos_token_id 999"),
        ({"tokenizer.ggml.eos_token_id": None}, "has no tokenizer.ggml.eos_token_id"),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_facts_that_make_no_sense_are_refused(written, facts, problem):
    with pytest.raises(CheckpointError, match=problem) as refusal:
        read_gguf(rewrite(written, facts))
    assert "\n" not in str(refusal.value)
    assert "copy.gguf" in str(refusal.value)


def test_a_file_without_a_tokenizer_gives_none(written):
    names = [name for name in gguf_files._read_content(written).facts if name.startswith("tokenizer.")]
    found = read_gguf(rewrite(written, dict.fromkeys(names)))
    assert found.tokenizer is None
    assert same_bits(found.model, new_model())


@pytest.mark.parametrize("name", ["token_embd.weight", "position_embd.weight", "blk.1.attn_qkv.bias", "output_norm.weight"])
def test_a_missing_tensor_is_refused(written, name):
    with pytest.raises(CheckpointError, match="1 tensors are missing|has no token_embd"):
        read_gguf(rewrite(written, without=name))


@pytest.mark.parametrize(
    "content", [b"", b"GGUF", b"{}" * 50, b"GGUF" + b"\xff" * 100, b"PK\x03\x04" * 20], ids=lambda c: repr(c[:8])
)
def test_a_file_that_is_no_gguf_is_refused(tmp_path, content):
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"m\.gguf: damaged, or not a GGUF file"):
        read_gguf(tmp_path / "m.gguf")


@pytest.mark.parametrize("where", ["nowhere", "a folder"])
def test_a_path_that_is_no_file_is_refused(tmp_path, where):
    path = tmp_path if where == "a folder" else tmp_path / "nowhere.gguf"
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_gguf(path)


@pytest.mark.timeout(60)
def test_every_truncation_is_refused(written):
    content = written.read_bytes()
    header = content.index(b"output_norm") if b"output_norm" in content else 8000
    for length in [*range(0, header, 97), header, len(content) // 2, len(content) - 40]:
        written.write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            read_gguf(written)


@pytest.mark.timeout(120)
@settings(max_examples=60, deadline=None)
@given(position=st.integers(0, 12_000), value=st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]), width=st.sampled_from([1, 4, 8]))
def test_damaged_bytes_never_end_in_a_traceback(tmp_path_factory, position, value, width):
    """It is refused, or read as another model where only a weight or a name changed; quickly, and in little memory."""
    path = tmp_path_factory.mktemp("damaged") / "m.gguf"
    write_gguf(new_model(replace(CONFIG, n_layer=1, n_embd=2, n_inner=2)), byte_tokenizer(), path, "f32", "x")
    content = bytearray(path.read_bytes())
    content[position : position + width] = bytes([value]) * width
    path.write_bytes(content)
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with contextlib.suppress(CheckpointError):
        read_gguf(path)
    assert time.monotonic() - started < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # KiB


def header_with(*facts: bytes, tensors: int = 0, count: int | None = None) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, len(facts) if count is None else count) + b"".join(facts) + b"\0" * 64


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "content",
    [
        header_with(count=2**60),
        header_with(tensors=2**60),
        header_with(struct.pack("<Q", 2**62)),
        header_with(struct.pack("<Q1sIIQ", 1, b"a", 9, 8, 2**40)),
        header_with(struct.pack("<Q1sIIQ", 1, b"a", 9, 4, 2**61)),
        header_with(struct.pack("<Q1sIIQ", 1, b"a", 9, 0, 2**63)),
        header_with(struct.pack("<Q1sI", 1, b"a", 9) + struct.pack("<IQ", 9, 1) * 100_000),
        header_with(struct.pack("<Q1sI", 1, b"a", 77)),
    ],
    ids=["facts", "tensors", "a name", "texts", "numbers", "bytes", "lists of lists", "a type"],
)  # fmt: skip
def test_a_header_that_promises_too_much_is_refused_at_once(tmp_path, content):
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=r"m\.gguf"):
        read_gguf(path)
    assert time.monotonic() - started < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024  # KiB


def test_tensors_at_one_place_do_not_multiply(written):
    """Every tensor points at the same bytes, more than the file holds together."""
    content = bytearray(written.read_bytes())
    reader = gguf.GGUFReader(written)
    largest = next(t for t in reader.tensors if t.name == "token_embd.weight")
    for tensor in reader.tensors:
        offset = tensor.field.offset + 8 + len(tensor.name) + 4 + 8 * len(tensor.shape) + 4
        content[offset : offset + 8] = struct.pack("<Q", largest.data_offset - reader.data_offset)
    start = reader.data_offset + largest.n_bytes
    written.write_bytes(content[: max(start, largest.data_offset + largest.n_bytes)])
    with pytest.raises(CheckpointError, match="ends at byte"):
        read_gguf(written)


# The same text from llama.cpp: GROUNDUP_LLAMA_CPP_PYTHON names an interpreter that has llama-cpp-python

LLAMA_CPP = """
import json, sys
import numpy as np
import llama_cpp.llama
defaults = llama_cpp.llama.llama_cpp.llama_model_default_params
def plain_buffers():
    params = defaults()
    # Its 8-bit weights in AMX layout crash on some machines, its own files too: github.com/ggml-org/llama.cpp/issues/20824
    params.use_extra_bufts = False
    return params
llama_cpp.llama.llama_cpp.llama_model_default_params = plain_buffers
request = json.load(sys.stdin)
model = llama_cpp.Llama(request["path"], n_ctx=request["n_ctx"], logits_all=True, type_k=0, type_v=0,
                        flash_attn=False, n_threads=1, verbose=False)
answer = {"ids": [model.tokenize(text.encode(), add_bos=False, special=False) for text in request["texts"]],
          "eos": model.token_eos(), "n_vocab": model.n_vocab(), "generated": [], "logits": []}
for prompt in request["prompts"]:
    model.reset()
    model.eval(prompt)
    answer["logits"].append(model.scores[model.n_tokens - 1].tolist())
    generated = []
    for _ in range(request["new_tokens"]):
        generated.append(int(np.argmax(model.scores[model.n_tokens - 1])))
        model.eval(generated[-1:])
    answer["generated"].append(generated)
print(json.dumps(answer))
"""

TEXTS = [*SAMPLES[1:], "  leading", "trailing  ", "\n\n \n  x", "a\u2028b\u0085c", "½²₃ ①一 ٣٤", "Ünï cöde ßtraße ǅ ﬁ",
         "עברית العربية हिन्दी",
         "if (a<=b) { c[i] += 1e-5; }\n\treturn 'it''s';", "'S 'Re we'RE can't", "\u00ad\ufeff\u200b"]  # fmt: skip
PROMPTS = ["the model", "a token from text and then", "日本 writes\nit "]
NEW_TOKENS = 64
RUN = TINY | {"n_layer": 2, "n_embd": 64, "n_positions": 128, "total_batch_tokens": 1024, "max_steps": 300,
              "learning_rate": 3e-3, "eval_steps": 0, "save_steps": 0, "logging_steps": 100}  # fmt: skip
RUNS = {"bpe": {"tokenizer": "bpe", "vocab_size": 400}, "byte, untied": {"tokenizer": "byte", "tie_word_embeddings": False}}


@pytest.fixture(scope="module")
def interpreter() -> str:
    found = os.environ.get("GROUNDUP_LLAMA_CPP_PYTHON", "")
    if not found:
        pytest.skip("GROUNDUP_LLAMA_CPP_PYTHON does not name an interpreter with llama-cpp-python")
    return found


@pytest.fixture(scope="module", params=RUNS)
def trained(request: pytest.FixtureRequest, interpreter: str, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = tmp_path_factory.mktemp("llama")
    (folder / "text.txt").write_text(make_text(20_000), encoding="utf-8")
    groundup.train(folder / "text.txt", folder / "run", **RUN | RUNS[request.param])
    return groundup.load(folder / "run")


def llama_cpp(interpreter: str, path: Path, **request: Any) -> dict[str, Any]:
    request = {"path": str(path), "n_ctx": 128, "texts": [], "prompts": [], "new_tokens": 0} | request
    done = subprocess.run(
        [interpreter, "-c", LLAMA_CPP], input=json.dumps(request), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@torch.no_grad()
def greedy(model: GPT2, prompt: list[int]) -> tuple[Tensor, list[int]]:
    """Logits after the prompt, (V,), and the most likely next tokens, each from a pass over everything before it."""
    first, tokens = model.logits(model(torch.tensor([prompt])))[0, -1], list(prompt)
    for _ in range(NEW_TOKENS):
        tokens.append(int(model.logits(model(torch.tensor([tokens])))[0, -1].argmax()))
    return first, tokens[len(prompt) :]


@pytest.mark.llama_cpp
def test_llama_cpp_gives_the_same_ids_and_the_same_text(trained, interpreter, tmp_path):
    path, tokenizer = tmp_path / "model.gguf", trained.tokenizer
    write_gguf(trained.model, tokenizer, path, "f32", "groundup's test")
    prompts = [tokenizer.encode(text).tolist() for text in PROMPTS]
    answer = llama_cpp(interpreter, path, texts=TEXTS, prompts=prompts, new_tokens=NEW_TOKENS)
    assert (answer["eos"], answer["n_vocab"]) == (tokenizer.end_of_text_id, tokenizer.vocab_size)
    for text, ids in zip(TEXTS, answer["ids"], strict=True):
        assert ids == tokenizer.encode(text).tolist(), text
    for prompt, logits, generated in zip(prompts, answer["logits"], answer["generated"], strict=True):
        expected, tokens = greedy(trained.model, prompt)
        assert expected.max() - expected.mean() > 2, "logits too flat to tell anything"
        torch.testing.assert_close(torch.tensor(logits), expected, rtol=1e-4, atol=1e-3)
        assert generated == tokens


@pytest.mark.llama_cpp
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_llama_cpp_opens_the_smaller_types(trained, interpreter, tmp_path, dtype):
    path, tokenizer = tmp_path / "model.gguf", trained.tokenizer
    write_gguf(trained.model, tokenizer, path, dtype, "groundup's test")
    prompt = tokenizer.encode(PROMPTS[1]).tolist()
    answer = llama_cpp(interpreter, path, prompts=[prompt], new_tokens=NEW_TOKENS)
    assert len(answer["generated"][0]) == NEW_TOKENS
    # Against the weights as we read them from that file: what is left is arithmetic, in f16 or with 8-bit activations.
    expected, _ = greedy(read_gguf(path).model, prompt)
    allowed = {"f16": 0.02, "bf16": 0.1, "q8_0": 0.2}[dtype]
    assert (torch.tensor(answer["logits"][0]) - expected).abs().max() < allowed


@pytest.mark.llama_cpp
def test_llama_cpp_cuts_gpt2s_text_the_same(interpreter, shared_data, tmp_path):
    tokenizer = load_tokenizer(shared_data / "gpt2")
    write_gguf(new_model(replace(CONFIG, vocab_size=50304)), tokenizer, tmp_path / "m.gguf", "f16", "x")
    answer = llama_cpp(interpreter, tmp_path / "m.gguf", texts=TEXTS)
    assert answer["n_vocab"] == 50304
    assert answer["ids"] == [tokenizer.encode(text).tolist() for text in TEXTS]
