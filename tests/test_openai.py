"""OpenAI's GPT-2 folders: read without TensorFlow, written as it reads them, and refused where they do not fit."""

import hashlib
import json
import os
import pickle
import re
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from groundup.errors import CheckpointError, GroundupError
from groundup.interop.openai import openai_name, read_openai, write_openai
from groundup.interop.tensor_bundle import read_bundle, write_bundle
from groundup.model.gpt2 import GPT2, GPT2Config
from groundup.tokenizer import gpt2_files
from groundup.tokenizer.tokenizer import END_OF_TEXT, GPT2_PATTERN, Tokenizer, byte_tokenizer, from_merges, load_tokenizer
from groundup.tokenizer.training import train_bpe
from tests.conftest import make_text
from tests.golden import make_openai_tiny
from tests.test_interop import assert_same_bits, logits_of, new_model

GOLDEN = Path(__file__).parent / "golden" / "openai-tiny"
SHARDED = GOLDEN.with_name("openai-tiny-sharded")
INDEX, DATA = "model.ckpt.index", "model.ckpt.data-00000-of-00001"
WHAT_WE_WRITE = {"checkpoint", "hparams.json", "encoder.json", "vocab.bpe", INDEX, DATA}
CONFIG = GPT2Config(vocab_size=257, n_positions=6, n_embd=4, n_layer=2, n_head=2)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A folder as we write it."""
    (tmp_path / "written").mkdir()
    write_openai(new_model(CONFIG), byte_tokenizer(), tmp_path / "written")
    return tmp_path / "written"


def reference_logits(weights: dict[str, Any], ids: list[int]) -> Any:
    """GPT-2 in numpy on OpenAI's own names and shapes, from the paper and the names alone."""
    heads, w = make_openai_tiny.HPARAMS["n_head"], {name: value.astype(np.float64) for name, value in weights.items()}

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * w[f"{name}/g"] + w[f"{name}/b"]

    def linear(x, name):
        return x @ w[f"{name}/w"][0] + w[f"{name}/b"]

    def attend(x, name):
        parts = []
        for q, k, v in zip(*(np.split(part, heads, -1) for part in np.split(linear(x, f"{name}/c_attn"), 3, -1)), strict=True):
            scores = np.where(np.tri(len(x)), q @ k.T / np.sqrt(q.shape[-1]), -np.inf)
            chances = np.exp(scores - scores.max(-1, keepdims=True))
            parts.append(chances / chances.sum(-1, keepdims=True) @ v)
        return linear(np.concatenate(parts, -1), f"{name}/c_proj")

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    x = w["model/wte"][ids] + w["model/wpe"][: len(ids)]
    for layer in range(make_openai_tiny.HPARAMS["n_layer"]):
        name = f"model/h{layer}"
        x = x + attend(norm(x, f"{name}/ln_1"), f"{name}/attn")
        x = x + linear(gelu(linear(norm(x, f"{name}/ln_2"), f"{name}/mlp/c_fc")), f"{name}/mlp/c_proj")
    return norm(x, "model/ln_f") @ w["model/wte"].T


@pytest.mark.parametrize("folder", [GOLDEN, SHARDED], ids=lambda folder: folder.name)
def test_the_model_that_tensorflow_saved_computes_what_its_weights_say(folder):
    found, ids = read_openai(folder), [3, 1, 10, 0, 7]
    assert found.format == "OpenAI checkpoint"
    assert (found.tokenizer, found.missing, found.unexpected, found.reshaped) == (None, (), (), ())
    assert not found.model.training
    assert found.model.config == GPT2Config(vocab_size=11, n_positions=5, n_embd=4, n_layer=2, n_head=2)
    expected = torch.from_numpy(reference_logits(make_openai_tiny.weights(), ids))
    torch.testing.assert_close(logits_of(found.model, torch.tensor([ids]))[0].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("wte.weight", "model/wte"),
        ("wpe.weight", "model/wpe"),
        ("ln_f.weight", "model/ln_f/g"),
        ("ln_f.bias", "model/ln_f/b"),
        ("h.0.ln_1.weight", "model/h0/ln_1/g"),
        ("h.10.ln_2.bias", "model/h10/ln_2/b"),
        ("h.47.attn.c_attn.weight", "model/h47/attn/c_attn/w"),
        ("h.3.mlp.c_proj.bias", "model/h3/mlp/c_proj/b"),
    ],
)
def test_names(ours, theirs):
    assert openai_name(ours) == theirs


def test_linear_layers_are_stored_the_other_way_round(written):
    stored, model = read_bundle(written / "model.ckpt"), new_model(CONFIG)
    assert stored["model/h0/attn/c_attn/w"].shape == (1, 4, 12)
    assert torch.equal(stored["model/h1/mlp/c_proj/w"][0], model.h[1].mlp.c_proj.weight.T)
    assert torch.equal(stored["model/wte"], model.wte.weight)


@settings(max_examples=15, deadline=None)
@given(heads=st.integers(1, 3), width=st.integers(1, 4), layers=st.integers(1, 12), positions=st.integers(1, 9))
def test_there_and_back_is_the_identity(tmp_path_factory, heads, width, layers, positions):
    config = GPT2Config(vocab_size=257, n_positions=positions, n_embd=heads * width, n_layer=layers, n_head=heads)
    model, (once, twice) = new_model(config), (tmp_path_factory.mktemp("folder") for _ in range(2))
    write_openai(model, byte_tokenizer(), once)
    found = read_openai(once)
    assert found.model.config == config
    assert_same_bits(dict(found.model.state_dict()), dict(model.state_dict()))
    write_openai(found.model, found.tokenizer, twice)
    for name in WHAT_WE_WRITE:
        assert (twice / name).read_bytes() == (once / name).read_bytes(), name


def test_the_folder_is_openais(written):
    assert {path.name for path in written.iterdir()} == WHAT_WE_WRITE
    assert (written / "hparams.json").read_text() == (
        '{\n  "n_vocab": 257,\n  "n_ctx": 6,\n  "n_embd": 4,\n  "n_head": 2,\n  "n_layer": 2\n}\n'
    )
    assert (written / "checkpoint").read_bytes() == (GOLDEN / "checkpoint").read_bytes()


def test_the_export_leaves_the_model_as_it_was(tmp_path):
    model = new_model(CONFIG)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    write_openai(model.train(), byte_tokenizer(), tmp_path)
    assert_same_bits(dict(model.state_dict()), before)
    assert model.training


@pytest.mark.shared_data
def test_gpt2s_own_tokenizer_is_written_as_openai_wrote_it(shared_data, tmp_path):
    model = GPT2(GPT2Config(vocab_size=50257, n_positions=1, n_embd=1, n_layer=1, n_head=1))
    write_openai(model, load_tokenizer(shared_data / "gpt2"), tmp_path)
    for name, sha256 in gpt2_files.FILES.items():
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == sha256, name


@pytest.mark.parametrize("size", [300, 400])
def test_a_tokenizer_of_ones_own_comes_back_with_the_same_ids(tmp_path, size):
    tokenizer = train_bpe([make_text(3000)], size)
    write_openai(new_model(GPT2Config(tokenizer.vocab_size, 4, 4, 1, 1)), tokenizer, tmp_path)
    found = read_openai(tmp_path).tokenizer
    assert found.end_of_text_id == tokenizer.end_of_text_id
    assert found.vocab_size == tokenizer.vocab_size
    for text in (make_text(50), "naïve 日本\n\n\t  x", "", END_OF_TEXT):
        assert found.encode(text).tolist() == tokenizer.encode(text).tolist()


def test_a_vocabulary_that_was_padded_is_cut_to_the_tokenizer(tmp_path):
    model = new_model(GPT2Config(vocab_size=320, n_positions=4, n_embd=4, n_layer=1, n_head=1))
    write_openai(model, byte_tokenizer(), tmp_path)
    found = read_openai(tmp_path)
    assert found.reshaped == ("wte.weight (320, 4) → (257, 4) (ids without a token)",)
    assert torch.equal(found.model.wte.weight, model.wte.weight[:257])


def spec_of(change: dict[str, Any]) -> Tokenizer:
    """The byte tokenizer with a part of its file changed."""
    spec = json.loads(byte_tokenizer().json)
    spec["model"] |= change.pop("model", {})
    end_of_text = change.pop("end", END_OF_TEXT)
    return Tokenizer(json.dumps(spec | change), end_of_text)


LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
SPLIT = {"type": "Split", "pattern": {"Regex": GPT2_PATTERN}, "behavior": "Isolated", "invert": False}
EXTRA = {"id": 257, "special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
END = EXTRA | {"content": END_OF_TEXT, "id": 256}
DIGITS = {"type": "Digits", "individual_digits": True}


def test_a_tokenizer_that_names_gpt2s_pattern_itself_is_written(tmp_path):
    tokenizer = spec_of({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [SPLIT, LEVEL]}})
    write_openai(new_model(CONFIG), tokenizer, tmp_path)
    assert read_openai(tmp_path).tokenizer.encode("a b").tolist() == tokenizer.encode("a b").tolist()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"normalizer": {"type": "NFC"}}, "prepares text in another way"),
        ({"pre_tokenizer": LEVEL}, "prepares text in another way"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [SPLIT | {"behavior": "Removed"}, LEVEL]}}, "prepares text"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [DIGITS, LEVEL]}}, "prepares"),
        ({"model": {"ignore_merges": True}}, "BPE uses ignore_merges"),
        ({"model": {"byte_fallback": True}}, "BPE uses byte_fallback"),
        ({"added_tokens": [END, EXTRA | {"content": "<pad>"}]}, "special tokens are .*<pad>"),
        ({"added_tokens": [END | {"content": "<end>"}], "end": "<end>"}, "special tokens are '<end>', OpenAI's is"),
    ],
    ids=str,
)  # fmt: skip
def test_a_tokenizer_that_the_two_files_cannot_hold_is_refused(tmp_path, change, words):
    tokenizer = spec_of(dict(change))
    with pytest.raises(CheckpointError, match=f"export to OpenAI's format: has no place .*{words}.*; use --format hf"):
        write_openai(new_model(GPT2Config(300, 4, 4, 1, 1)), tokenizer, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_token_that_the_two_files_would_change_is_refused(tmp_path):
    """A space inside a token breaks vocab.bpe, whose pairs are split at one: found by reading the files again."""
    vocab = {character: index for index, character in enumerate(["a", "b ", "ab "])}
    with pytest.raises(CheckpointError, match="cannot hold this tokenizer"):
        write_openai(new_model(CONFIG), from_merges(vocab, [("a", "b ")]), tmp_path)


def test_an_end_of_text_that_is_ordinary_text_would_not_be_so_again_and_is_refused(tmp_path):
    tokenizer = spec_of({"added_tokens": [END | {"special": False}]})
    with pytest.raises(CheckpointError, match="cannot hold this tokenizer"):
        write_openai(new_model(CONFIG), tokenizer, tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tie_word_embeddings": False}, "its head is a matrix of its own"),
        ({"n_inner": 7}, "n_inner is 7, OpenAI's is 4 × n_embd = 16"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06, OpenAI's is 1e-05"),
        ({"vocab_size": 256}, "the tokenizer has 257 ids, the model knows 256"),
    ],
    ids=str,
)
def test_a_model_that_the_format_cannot_hold_is_refused(tmp_path, change, words):
    model = GPT2(GPT2Config(**(CONFIG.__dict__ | change)))
    with pytest.raises(CheckpointError, match=re.escape(words)):
        write_openai(model, byte_tokenizer(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_inner_width_of_four_times_is_written(tmp_path):
    write_openai(GPT2(GPT2Config(**(CONFIG.__dict__ | {"n_inner": 16}))), byte_tokenizer(), tmp_path)
    assert read_openai(tmp_path).model.h[0].mlp.c_fc.out_features == 16


@pytest.mark.parametrize("name", sorted(WHAT_WE_WRITE - {"checkpoint"}))
def test_a_file_that_is_missing_is_named(written, name):
    (written / name).unlink()
    with pytest.raises(CheckpointError, match=rf"checkpoint {re.escape(str(written / name))}: .*(fetch|finish the download)"):
        read_openai(written)


def test_a_folder_without_tokenizer_has_none(written):
    (written / "encoder.json").unlink()
    (written / "vocab.bpe").unlink()
    assert read_openai(written).tokenizer is None


def test_without_the_file_checkpoint_the_only_index_is_meant(written):
    (written / "checkpoint").unlink()
    assert read_openai(written).unexpected == ()
    shutil.copy(written / INDEX, written / "other.index")
    with pytest.raises(CheckpointError, match=r"no file named checkpoint and holds model.ckpt.index, other.index; fetch"):
        read_openai(written)
    (written / INDEX).unlink()
    (written / "other.index").unlink()
    with pytest.raises(CheckpointError, match="no file named checkpoint and holds no file that ends in .index"):
        read_openai(written)


@pytest.mark.parametrize(
    "path", ["/home/x/models/117M/model-7", r"C:\\models\\117M\\model-7", "model-7", "./model-7", r"/h\303\251/model-7"]
)
def test_the_checkpoint_that_is_meant_is_found_wherever_it_was_saved(written, path):
    for name in (INDEX, DATA):
        (written / name).rename(written / name.replace("model.ckpt", "model-7"))
    (written / "model-3.index").write_bytes(b"older")
    (written / "checkpoint").write_text(f'model_checkpoint_path: "{path}"\nall_model_checkpoint_paths: "model-3"\n')
    assert read_openai(written).model.config == CONFIG


@pytest.mark.parametrize(
    "content",
    ["", "model.ckpt", 'model_checkpoint_path: ""', 'model_checkpoint_path: "/"', 'model_checkpoint_path: ".."',
     'model_checkpoint_path: "a\\303"', 'model_checkpoint_path: "a', 'all_model_checkpoint_paths: "model.ckpt"',
     'model_checkpoint_path: "model.ckpt"\nmodel_checkpoint_path: "other"'],
    ids=repr,
)  # fmt: skip
def test_a_file_checkpoint_of_odd_content_is_refused_and_nothing_is_guessed(written, content):
    (written / "checkpoint").write_text(content)
    with pytest.raises(CheckpointError, match=f"{written}/checkpoint: does not say which checkpoint is meant"):
        read_openai(written)


@pytest.mark.timeout(10)
@pytest.mark.parametrize(
    "content", ["\n" * 10**6, " \t" * 500_000, 'model_checkpoint_path: "' + "\\a" * 500_000], ids=lambda text: repr(text[:4])
)
def test_a_file_checkpoint_made_to_be_slow_is_refused_fast(written, content):
    (written / "checkpoint").write_text(content)
    started = time.monotonic()
    with pytest.raises(CheckpointError, match="does not say which checkpoint is meant"):
        read_openai(written)
    assert time.monotonic() - started < 5


def test_a_file_checkpoint_that_names_what_is_not_there_is_refused(written):
    (written / "checkpoint").write_text('model_checkpoint_path: "model-9"')
    with pytest.raises(CheckpointError, match=r"model-9\.index: cannot be read \(No such file or directory\); fetch it"):
        read_openai(written)


def set_hparams(folder: Path, **changes: Any) -> None:
    path = folder / "hparams.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.timeout(10)
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_head": 3}, "hparams.json: n_embd 4 is not divisible by n_head 3"),
        ({"n_head": 0}, "hparams.json: n_head is '0', must be a whole number of 1 to"),
        ({"n_layer": -1}, "hparams.json: n_layer is '-1'"),
        ({"n_vocab": 2.5}, "hparams.json: n_vocab is '2.5'"),
        ({"n_vocab": True}, "hparams.json: n_vocab is 'True'"),
        ({"n_ctx": "6"}, "hparams.json: n_ctx is '6'"),
        ({"n_ctx": None}, "hparams.json: n_ctx is 'None'"),
        ({"n_embd": 10**30}, "hparams.json: n_embd is '1000"),
        ({"n_layer": 10**7}, "holds 28 tensors, hparams.json says n_layer 10000000"),
        ({"scale_by_depth": True}, "hparams.json: holds .*'scale_by_depth'; GPT-2's has n_vocab, n_ctx"),
        ({"n_layer": 3}, r"12 of the model's 40 tensors are missing: model/h2/ln_1/g, .*, …; it is another model"),
        ({"n_ctx": 7}, r"1 tensors do not fit hparams.json: model/wpe \(6, 4\) instead of \(7, 4\)"),
        ({"n_embd": 8}, r"28 tensors do not fit hparams.json: .*model/h0/attn/c_attn/w \(1, 4, 12\) instead of \(1, 8, 24\)"),
        ({"n_vocab": 2**24}, r"model/wte \(257, 4\) instead of \(16777216, 4\)"),
    ],
    ids=str,
)  # fmt: skip
def test_hparams_that_make_no_sense_or_do_not_fit_are_refused(written, changes, words):
    set_hparams(written, **changes)
    with pytest.raises(CheckpointError, match=words):
        read_openai(written)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", "7", "{}", "[" * 100_000, "\udcff", " " * 2**21], ids=lambda text: repr(text[:8])
)
def test_hparams_that_are_none_are_refused(written, content):
    (written / "hparams.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=r"hparams\.json: ") as refusal:
        read_openai(written)
    assert len(str(refusal.value)) < 500


@pytest.mark.parametrize("name", ["hparams.json", "checkpoint"])
def test_a_small_file_that_is_huge_is_not_read(written, name):
    os.truncate(written / name, 2**40)
    with pytest.raises(CheckpointError, match=f"{name}: cannot be read .1,099,511,627,776 bytes are too many.;"):
        read_openai(written)


def rewrite(folder: Path, change: Any) -> None:
    tensors = dict(read_bundle(folder / "model.ckpt"))
    change(tensors)
    write_bundle(folder / "model.ckpt", tensors)


def test_tensors_that_are_missing_are_named(written):
    rewrite(written, lambda tensors: [tensors.pop(name) for name in ("model/h1/attn/c_proj/b", "model/wpe")])
    with pytest.raises(CheckpointError, match=r"2 of the model's 28 tensors are missing: model/\S+, model/\S+;") as refusal:
        read_openai(written)
    assert "model/h1/attn/c_proj/b" in str(refusal.value)
    assert "model/wpe" in str(refusal.value)


def test_what_fine_tuning_adds_is_listed_and_left_out(written):
    extra = {"global_step": torch.tensor(1000), "beta1_power": torch.tensor(0.9), "model/wte/Adam": torch.ones(257, 4)}
    rewrite(written, lambda tensors: tensors.update(extra))
    found = read_openai(written)
    assert found.unexpected == ("beta1_power", "global_step", "model/wte/Adam")
    assert_same_bits(dict(found.model.state_dict()), dict(new_model(CONFIG).state_dict()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_are_read_as_float32(written, dtype):
    rewrite(written, lambda tensors: tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()}))
    for name, tensor in read_openai(written).model.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, new_model(CONFIG).state_dict()[name].to(dtype).float())


def test_whole_numbers_are_no_weights(written):
    rewrite(written, lambda tensors: tensors.update({"model/wpe": torch.ones(6, 4, dtype=torch.int64)}))
    with pytest.raises(CheckpointError, match=r"model/wpe of whole numbers \(torch.int64\)"):
        read_openai(written)


class Bomb:
    """A pickle that, when opened, leaves a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


@pytest.mark.parametrize("name", sorted(WHAT_WE_WRITE))
@pytest.mark.parametrize("save", [pickle.dumps, None], ids=["pickle", "torch.save"])
def test_a_pickle_under_a_files_name_never_runs(written, tmp_path, name, save):
    marker, path = tmp_path / "it ran", written / name
    if save:
        path.write_bytes(save(Bomb(marker)))
    else:
        torch.save({"x": Bomb(marker)}, path)
    with pytest.raises(GroundupError, match=re.escape(name)):
        read_openai(written)
    assert not marker.exists()
    torch.load(path, weights_only=False) if save is None else pickle.loads(path.read_bytes())
    assert marker.exists(), "the bomb is none"
