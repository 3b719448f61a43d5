"""Hugging Face's files: out and in again bit for bit, opened by transformers, and refused where they do not fit."""

import json
import resource
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
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
from groundup.interop.huggingface import from_hugging_face, load_model, read_hugging_face, save_model, to_hugging_face
from groundup.model.gpt2 import GPT2, GPT2Config
from groundup.model.initial import initialize
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_model_can_be_saved_in_another_type(tmp_path, dtype):
    save_model(new_model(), tmp_path, end_of_text_id=30, dtype=dtype)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {dtype}
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["dtype"] == str(dtype).removeprefix("torch.")
    assert_same_bits(
        dict(load_model(tmp_path).state_dict()),
        {name: tensor.to(dtype).float() for name, tensor in new_model().state_dict().items()},
    )


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


@pytest.mark.parametrize("shape", [(), (48,), (16, 16, 3)], ids=str)
def test_a_linear_layer_that_is_no_matrix_is_named(saved, shape):
    rewrite(saved, lambda tensors: tensors.update({"transformer.h.0.attn.c_attn.weight": torch.ones(shape)}))
    with pytest.raises(CheckpointError, match=r"h\.0\.attn\.c_attn\.weight \(.*\) instead of \(48, 16\)"):
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


@pytest.mark.parametrize("read", [load_model, read_hugging_face])
def test_a_head_of_its_own_that_config_json_ties_is_refused(saved, read):
    """Dropping it silently gives other logits."""
    rewrite(saved, lambda tensors: tensors.update({"lm_head.weight": torch.randn(31, 16)}))
    with pytest.raises(CheckpointError, match="though config.json ties them; set tie_word_embeddings to false"):
        read(saved)


@pytest.mark.parametrize("read", [load_model, read_hugging_face])
def test_an_untied_config_without_a_head_is_refused(saved, read):
    set_config(saved, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight missing"):
        read(saved)


def transformers_model(**changes: Any) -> Any:
    import transformers

    torch.manual_seed(3)
    sizes = {"vocab_size": 31, "n_positions": 12, "n_embd": 16, "n_layer": 2, "n_head": 2}
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**{**sizes, "bos_token_id": 30, "eos_token_id": 30, **changes})
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


IDS = torch.randint(31, (3, 12), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def assert_same_logits(ours: GPT2, theirs: Any) -> None:
    torch.testing.assert_close(logits_of(ours, IDS), theirs(IDS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("is_tied", [True, False])
def test_transformers_opens_our_folder_tied_or_not(tmp_path, is_tied):
    import transformers

    model = new_model(replace(CONFIG, tie_word_embeddings=is_tied))
    save_model(model, tmp_path, end_of_text_id=30)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    assert (theirs.lm_head.weight is theirs.transformer.wte.weight) == is_tied
    assert_same_logits(model, theirs)
    assert_same_bits(dict(load_model(tmp_path).state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("read", [load_model, lambda folder: read_hugging_face(folder).model], ids=["load", "import"])
@pytest.mark.parametrize("is_tied", [True, False])
def test_a_folder_of_transformers_is_read_tied_or_not(tmp_path, is_tied, read):
    theirs = transformers_model(tie_word_embeddings=is_tied)
    theirs.save_pretrained(tmp_path)
    model = read(tmp_path)
    assert (model.lm_head is None) == is_tied
    assert_same_logits(model, theirs)


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("form", ["shards", "bin", "bin shards"])
def test_weights_in_shards_and_in_old_files_are_read(tmp_path, form, is_tied):
    theirs = transformers_model(tie_word_embeddings=is_tied)
    theirs.save_pretrained(tmp_path, max_shard_size="10KB" if form == "shards" else "1GB")
    if form == "shards":
        assert len(list(tmp_path.glob("model-0000*-of-0000*.safetensors"))) > 1
    else:
        (tmp_path / "model.safetensors").unlink()
        as_bin(theirs.state_dict(), tmp_path, shards=3 if form == "bin shards" else 1)
    assert_same_logits(load_model(tmp_path), theirs)
    imported = read_hugging_face(tmp_path)
    assert_same_logits(imported.model, theirs)
    assert (imported.missing, imported.unexpected, imported.reshaped, imported.tokenizer) == ((), (), (), None)


def as_bin(weights: dict[str, Tensor], folder: Path, shards: int = 1) -> None:
    """The old files of Hugging Face, which its newest version no longer writes."""
    if shards == 1:
        torch.save(weights, folder / "pytorch_model.bin")
        return
    files = [f"pytorch_model-{shard + 1:05d}-of-{shards:05d}.bin" for shard in range(shards)]
    weight_map = {name: files[index % shards] for index, name in enumerate(weights)}
    for file in files:
        torch.save({name: weights[name].clone() for name in weights if weight_map[name] == file}, folder / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")


@pytest.fixture
def sharded(saved: Path) -> Path:
    """Our folder, its weights in two shards: a.safetensors holds wte, b.safetensors the rest."""
    tensors = load_file(saved / "model.safetensors")
    (saved / "model.safetensors").unlink()
    parts = {"a.safetensors": ["transformer.wte.weight"]}
    parts["b.safetensors"] = [name for name in tensors if name not in parts["a.safetensors"]]
    for file, names in parts.items():
        save_file({name: tensors[name] for name in names}, saved / file)
    set_index(saved, {name: file for file, names in parts.items() for name in names})
    return saved


def set_index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")


def weight_map_of(folder: Path) -> dict[str, str]:
    return json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]


def test_shards_are_one_model(sharded):
    assert_same_bits(dict(load_model(sharded).state_dict()), dict(new_model().state_dict()))


def test_a_missing_shard_is_named(sharded):
    (sharded / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"1 of its 2 shards are missing: b\.safetensors"):
        load_model(sharded)


@pytest.mark.parametrize(
    "file", ["../a.safetensors", "/etc/passwd", "sub/a.safetensors", "..", "", "..\\a.safetensors", "c:a", "a\n"]
)
def test_a_shard_that_is_no_plain_file_name_is_refused(sharded, file):
    """An index from elsewhere must not make us open a file outside its folder."""
    (sharded.parent / "a.safetensors").write_bytes((sharded / "a.safetensors").read_bytes())
    set_index(sharded, weight_map_of(sharded) | {"transformer.wte.weight": file})
    with pytest.raises(CheckpointError, match="is not a plain file name beside the index") as refusal:
        load_model(sharded)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("lie", ["promises more", "promises less", "says another shard"])
def test_an_index_that_lies_is_refused(sharded, lie):
    names = weight_map_of(sharded)
    if lie == "promises more":
        names["transformer.ln_g.weight"] = "a.safetensors"
    elif lie == "promises less":
        del names["transformer.ln_f.weight"]
    else:
        names["transformer.ln_f.weight"] = "a.safetensors"
    set_index(sharded, names)
    with pytest.raises(CheckpointError, match=r"ln_.\.weight is (not in it|in it, but not by the index)"):
        load_model(sharded)


@pytest.mark.parametrize("weight_map", [None, {}, [], {"a": 1}, "a", {"a": None}], ids=str)
def test_an_index_that_is_none_is_refused(sharded, weight_map):
    set_index(sharded, weight_map)
    with pytest.raises(CheckpointError, match=r"index\.json: cannot be read as the index of a model in shards"):
        load_model(sharded)


def test_a_folder_without_weights_says_what_it_looked_for(saved):
    (saved / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"not found, nor model\.safetensors\.index\.json, pytorch_model\.bin"):
        load_model(saved)


def test_importing_lists_what_was_left_out(saved):
    """Masks of old files and heads beside the model change nothing; a tensor too many in the model would."""
    extra = {f"transformer.h.{layer}.attn.{name}": torch.ones(1) for layer in range(2) for name in ("bias", "masked_bias")}
    rewrite(saved, lambda tensors: tensors.update({**extra, "score.weight": torch.ones(2, 16)}))
    imported = read_hugging_face(saved)
    assert imported.unexpected == ("score.weight", "2 × transformer.h.*.attn.bias", "2 × transformer.h.*.attn.masked_bias")
    assert imported.format == "Hugging Face folder"
    assert_same_bits(dict(imported.model.state_dict()), dict(new_model().state_dict()))
    rewrite(saved, lambda tensors: tensors.update({"transformer.h.1.attn.gate.weight": torch.ones(2)}))
    with pytest.raises(CheckpointError, match=r"h\.1\.attn\.gate\.weight \(2,\) instead of nothing"):
        read_hugging_face(saved)


def test_importing_names_what_is_missing(saved):
    rewrite(saved, lambda tensors: tensors.pop("transformer.h.1.attn.c_proj.bias"))
    with pytest.raises(CheckpointError, match=r"h\.1\.attn\.c_proj\.bias missing"):
        read_hugging_face(saved)


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("files", ["tokenizer.json", "vocab.json"])
def test_importing_cuts_a_padded_vocabulary_to_the_tokenizer(tmp_path, is_tied, files):
    config = GPT2Config(vocab_size=320, n_positions=12, n_embd=16, n_layer=1, n_head=2, tie_word_embeddings=is_tied)
    save_model(new_model(config), tmp_path, end_of_text_id=256)
    tokenizer = byte_tokenizer()
    if files == "tokenizer.json":
        tokenizer.save(tmp_path)
    else:
        ids = {token: index for token, index in json.loads(tokenizer.json)["model"]["vocab"].items() if index < 256}
        (tmp_path / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
        (tmp_path / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    imported = read_hugging_face(tmp_path)
    assert imported.tokenizer is not None
    assert imported.tokenizer.vocab_size == imported.model.config.vocab_size == 257
    assert len(imported.reshaped) == (1 if is_tied else 2)
    ids = torch.arange(12)[None]
    torch.testing.assert_close(logits_of(imported.model, ids), logits_of(load_model(tmp_path), ids)[..., :257])


def test_rows_that_config_json_does_not_know_are_refused(tmp_path):
    """Although cutting to the tokenizer would hide them."""
    save_model(new_model(replace(CONFIG, vocab_size=320)), tmp_path, end_of_text_id=256)
    byte_tokenizer().save(tmp_path)
    set_config(tmp_path, vocab_size=300)
    with pytest.raises(CheckpointError, match=r"wte\.weight is \(320, 16\), config\.json says vocab_size 300"):
        read_hugging_face(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_importing_weights_that_are_not_finite_is_refused(saved, value):
    def poison(tensors: dict[str, Tensor]) -> None:
        tensors["transformer.h.1.mlp.c_fc.weight"][2, 3] = value

    rewrite(saved, poison)
    with pytest.raises(CheckpointError, match=r"h\.1\.mlp\.c_fc\.weight has 1 values that are not finite"):
        read_hugging_face(saved)


def test_importing_quantized_weights_is_refused(saved):
    rewrite(saved, lambda tensors: tensors.update({"transformer.wpe.weight": torch.ones(12, 16, dtype=torch.int8)}))
    with pytest.raises(CheckpointError, match=r"wpe\.weight is torch\.int8 .* not quantized"):
        read_hugging_face(saved)


@pytest.mark.parametrize("read", [load_model, read_hugging_face])
def test_another_family_is_named(saved, read):
    set_config(saved, model_type="llama")
    with pytest.raises(CheckpointError, match=r"config\.json: a llama model; groundup imports GPT-2"):
        read(saved)


def test_a_lora_adapter_is_named(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    save_file({"base_model.model.lora_A.weight": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="holds a LoRA adapter .* merge it into its model first"):
        read_hugging_face(tmp_path)


def test_importing_what_is_no_folder_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is no folder; give one that holds config.json"):
        read_hugging_face(tmp_path / "nowhere")


@pytest.mark.parametrize("read", [load_model, read_hugging_face])
def test_a_tensor_stored_under_both_of_its_names_is_refused(saved, read):
    rewrite(saved, lambda tensors: tensors.update({"wpe.weight": torch.ones(12, 16)}))
    with pytest.raises(CheckpointError, match=r"holds transformer\.wpe\.weight twice"):
        read(saved)


def test_a_name_with_control_characters_does_not_reach_the_terminal(saved):
    rewrite(saved, lambda tensors: tensors.update({"\x1b[31m": torch.ones(2)}))
    with pytest.raises(CheckpointError, match=r"holds a tensor called '\\x1b\[31m'"):
        load_model(saved)


def test_a_tied_head_stored_alone_is_the_embedding_too(saved):
    """safetensors.torch.save_model keeps one name of a tied pair, and it is the head's."""
    rewrite(saved, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("transformer.wte.weight")}))
    assert_same_bits(dict(load_model(saved).state_dict()), dict(new_model().state_dict()))


@pytest.mark.parametrize(
    "content", [[torch.ones(2)], {"transformer.wte.weight": 3}, {1: torch.ones(2)}, torch.ones(2)], ids=repr
)
def test_a_pytorch_model_bin_of_something_else_is_refused(saved, content):
    (saved / "model.safetensors").unlink()
    torch.save(content, saved / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: holds a .* not names with their tensors"):
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
    with pytest.raises(CheckpointError, match="tokenizer has 257 ids, the model knows 31"):
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
