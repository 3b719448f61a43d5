"""Hugging Face's files: out and in again bit for bit, opened by transformers, and refused where they do not fit."""

import json
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import groundup
from groundup.checkpoint.commit import checkpoints
from groundup.errors import CheckpointError
from groundup.interop.huggingface import from_hugging_face, load_model, save_model, to_hugging_face
from groundup.model.gpt2 import GPT2, GPT2Config, initialize
from groundup.tokenizer.tokenizer import byte_tokenizer
from tests.conftest import TINY, make_text
from tests.conftest import groundup as command

CONFIG = GPT2Config(vocab_size=31, n_positions=12, n_embd=16, n_layer=2, n_head=2)


def new_model(config: GPT2Config = CONFIG, seed: int = 0) -> GPT2:
    draw = torch.Generator().manual_seed(seed)
    model = GPT2(config)
    initialize(model, draw)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.1)
    return model.eval()


@torch.no_grad()
def logits_of(model: GPT2, ids: Tensor) -> Tensor:
    return model.logits(model(ids))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder as we write it."""
    save_model(new_model(), tmp_path, end_of_text_id=30)
    return tmp_path


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@settings(max_examples=15, deadline=None)
@given(heads=st.integers(1, 3), width=st.integers(1, 5), layers=st.integers(1, 3), inner=st.sampled_from([0, 7]))
def test_there_and_back_is_the_identity(heads, width, layers, inner):
    model = new_model(
        GPT2Config(vocab_size=9, n_positions=5, n_embd=heads * width, n_layer=layers, n_head=heads, n_inner=inner)
    )
    weights = model.state_dict()
    assert_same_bits(from_hugging_face(to_hugging_face(weights)), dict(weights))


def test_saved_and_loaded_is_the_same_model(saved):
    loaded, model = load_model(saved), new_model()
    assert_same_bits(dict(loaded.state_dict()), dict(model.state_dict()))
    assert loaded.config == model.config
    assert not loaded.training


def test_saving_what_was_loaded_gives_the_same_files(saved, tmp_path_factory):
    """Also where rates are zero: 0.0 must not come back as 0."""
    again = tmp_path_factory.mktemp("again")
    save_model(load_model(saved), again, end_of_text_id=30)
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert (again / name).read_bytes() == (saved / name).read_bytes(), name


def test_linear_layers_are_stored_the_other_way_round(saved):
    """Hugging Face's Conv1D is (in, out)."""
    stored = load_file(saved / "model.safetensors")
    model = new_model()
    assert stored["transformer.h.0.attn.c_attn.weight"].shape == (16, 48)
    assert torch.equal(stored["transformer.h.1.mlp.c_proj.weight"], model.h[1].mlp.c_proj.weight.T)
    assert torch.equal(stored["transformer.wte.weight"], model.wte.weight)


@pytest.fixture(scope="module", params=["byte", "bpe"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interop")
    (folder / "text.txt").write_text(make_text(800), encoding="utf-8")
    options = TINY | {"eval_steps": 0, "tokenizer": request.param, "vocab_size": 300}
    groundup.train(folder / "text.txt", folder / "run", **options)
    return folder / "run"


def test_transformers_opens_a_checkpoint_as_it_is(run):
    import transformers

    checkpoint = checkpoints(run)[-1]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    assert type(theirs).__name__ == "GPT2LMHeadModel"
    assert theirs.lm_head.weight is theirs.transformer.wte.weight
    ours = groundup.load(run)
    ids = torch.randint(ours.model.config.vocab_size, (3, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(logits_of(ours.model, ids), theirs(ids).logits, rtol=1e-5, atol=1e-5)


def test_the_tokenizer_of_transformers_gives_our_ids(run):
    import transformers

    theirs, ours = transformers.AutoTokenizer.from_pretrained(checkpoints(run)[-1]), groundup.load(run).tokenizer
    assert theirs.eos_token_id == ours.end_of_text_id
    assert len(theirs) == ours.vocab_size
    for text in ("the model learns", " a  token\n\nnaïve", "日本 then", "", "x" * 50, "don't we'll\t1234", make_text(100)):
        assert theirs(text)["input_ids"] == ours.encode(text).tolist()
        assert theirs.decode(ours.encode(text).tolist()) == text


def test_the_generation_config_stops_at_our_end_of_text(run):
    import transformers

    config = transformers.GenerationConfig.from_pretrained(checkpoints(run)[-1])
    assert config.eos_token_id == groundup.load(run).tokenizer.end_of_text_id


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors of a folder."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def test_files_without_the_prefix_and_with_old_buffers_are_read(saved):
    """As in OpenAI's weights on the Hub: no ``transformer.``, masks stored beside, the head written out."""
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(saved / "model.safetensors").items()}
    for layer in range(2):
        tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 12, 12).tril()
        tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    tensors["lm_head.weight"] = tensors["wte.weight"].clone()
    save_file(tensors, saved / "model.safetensors")
    assert_same_bits(dict(load_model(saved).state_dict()), dict(new_model().state_dict()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_are_read_as_float32(saved, dtype):
    rewrite(saved, lambda tensors: tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()}))
    for name, tensor in load_model(saved).state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, new_model().state_dict()[name].to(dtype).float())


def test_a_missing_tensor_is_named(saved):
    rewrite(saved, lambda tensors: tensors.pop("transformer.h.1.attn.c_proj.weight"))
    with pytest.raises(CheckpointError, match=r"h\.1\.attn\.c_proj\.weight missing") as refusal:
        load_model(saved)
    assert "1 tensors do not fit" in str(refusal.value)


def test_an_extra_tensor_is_named(saved):
    rewrite(saved, lambda tensors: tensors.update({"transformer.h.2.ln_1.weight": torch.ones(16)}))
    with pytest.raises(CheckpointError, match=r"h\.2\.ln_1\.weight \(16,\) instead of nothing"):
        load_model(saved)


def test_a_wrong_shape_is_named_with_both_shapes(saved):
    rewrite(saved, lambda tensors: tensors.update({"transformer.wpe.weight": torch.zeros(11, 16)}))
    with pytest.raises(CheckpointError, match=r"wpe\.weight \(11, 16\) instead of \(12, 16\)"):
        load_model(saved)


def test_at_most_ten_wrong_tensors_are_listed(saved):
    rewrite(saved, lambda tensors: [tensors.pop(name) for name in sorted(tensors)[2:]])
    with pytest.raises(CheckpointError) as refusal:
        load_model(saved)
    assert str(refusal.value).count("instead of") == 10
    assert "26 tensors" in str(refusal.value)


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "text", "pickle"])
def test_weights_that_cannot_be_read_are_refused(saved, damage):
    path = saved / "model.safetensors"
    content = path.read_bytes()
    path.unlink()
    if damage == "pickle":
        torch.save({"transformer.wte.weight": torch.zeros(31, 16)}, path)
    elif damage != "missing":
        path.write_bytes({"empty": b"", "truncated": content[:-8], "text": b"not a tensor\n" * 9}[damage])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read"):
        load_model(saved)


def set_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", "7", '"gpt2"', "{}", "\udcff", "[" * 100_000], ids=lambda content: repr(content[:8])
)
def test_a_config_that_is_none_is_refused(saved, content):
    (saved / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_model(saved)


def test_a_missing_config_is_refused(saved):
    (saved / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_model(saved)


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "llama"},
        {"activation_function": "relu"},
        {"n_head": 3},
        {"n_head": 0},
        {"n_layer": -1},
        {"vocab_size": None},
        {"vocab_size": "31"},
        {"vocab_size": 31.5},
        {"vocab_size": float("nan")},
        {"n_embd": [16]},
        {"n_inner": -4},
        {"n_inner": "wide"},
        {"resid_pdrop": 1.5},
        {"attn_pdrop": "half"},
        {"layer_norm_epsilon": "small"},
    ],
    ids=str,
)
def test_a_config_that_makes_no_sense_is_refused(saved, change):
    set_config(saved, **change)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_model(saved)


@pytest.mark.parametrize(
    "change",
    [
        {"tie_word_embeddings": False},
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"add_cross_attention": True},
    ],
    ids=str,
)
def test_a_config_that_means_another_computation_is_refused(saved, change):
    """Loading it anyway would give other numbers than transformers does, and say nothing."""
    set_config(saved, **change)
    with pytest.raises(CheckpointError, match=next(iter(change))):
        load_model(saved)


def test_a_head_of_its_own_is_refused(saved):
    """Weights that are not tied have a head that our model has not: dropping it silently gives other logits."""
    rewrite(saved, lambda tensors: tensors.update({"lm_head.weight": torch.randn(31, 16)}))
    with pytest.raises(CheckpointError, match="head"):
        load_model(saved)


@pytest.mark.timeout(10)
@pytest.mark.parametrize(
    "change",
    [
        {"n_layer": 10**9},
        {"n_layer": 10**6},
        {"n_layer": 10**100},
        {"vocab_size": 10**12},
        {"n_embd": 2**40, "n_head": 2},
        {"n_positions": 10**12},
        {"n_inner": 10**15},
    ],
    ids=str,
)
def test_huge_sizes_are_refused_fast_and_without_memory(saved, change):
    set_config(saved, **change)
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError):
        load_model(saved)
    assert time.monotonic() - started < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # KiB


def test_a_header_that_promises_too_much_is_refused(saved):
    """A safetensors file of a few bytes with a tensor of 10^12 elements."""
    header = json.dumps({"transformer.wte.weight": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}})
    (saved / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header.encode())
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_model(saved)


def test_a_folder_from_elsewhere_generates(saved):
    """A Hugging Face folder, not a run: config.json, weights and a tokenizer, without our manifest."""
    model = new_model(GPT2Config(vocab_size=257, n_positions=12, n_embd=16, n_layer=1, n_head=2))
    save_model(model, saved, end_of_text_id=256)
    byte_tokenizer().save(saved)
    found = groundup.generate(saved, prompt="x", max_new_tokens=4, device="cpu")["completions"][0]
    assert 1 <= len(found["token_ids"]) <= 4


def test_a_tokenizer_of_a_larger_vocabulary_is_refused(saved):
    byte_tokenizer().save(saved)
    with pytest.raises(CheckpointError, match="its tokenizer has 257 ids, the model knows 31"):
        groundup.load(saved)


@pytest.mark.parametrize("where", ["nowhere", "an empty folder", "a file"])
def test_there_is_nothing_to_load(tmp_path, where):
    path = tmp_path / "place"
    if where == "an empty folder":
        path.mkdir()
    elif where == "a file":
        path.write_text("text", encoding="utf-8")
    with pytest.raises(CheckpointError, match=str(path)):
        groundup.load(path)


@pytest.mark.slow
def test_a_refused_checkpoint_is_one_line_and_exit_code_4(saved):
    byte_tokenizer().save(saved)
    shutil.copy(saved / "config.json", saved / "model.safetensors")
    done = command("generate", saved, "--prompt", "x", "--json")
    assert done.code == 4, done.err
    assert done.out == ""
    assert len(done.error_lines) == 1
    assert "model.safetensors" in done.error_lines[0]
