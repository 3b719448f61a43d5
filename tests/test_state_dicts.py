"""Files of other homes: their forward pass and ours agree, what they lack is said, and nothing in them is ever run."""

import argparse
import io
import os
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file, save_model
from torch import Tensor, nn
from torch.nn import functional as F

from groundup.errors import CheckpointError, ConfigError, GroundupError
from groundup.interop import huggingface, pickled
from groundup.interop.huggingface import load_model, read_hugging_face
from groundup.interop.imported import Imported
from groundup.interop.pickled import Settings, read_pickled
from groundup.interop.state_dicts import OTHER_FAMILIES, _with_heads, read_state_dict
from groundup.model.gpt2 import GPT2, GPT2Config
from groundup.tokenizer.tokenizer import byte_tokenizer
from tests.test_interop import logits_of, new_model, transformers_model


@dataclass
class GPTConfig:
    """build-nanogpt's, which its checkpoints hold as an object."""

    block_size: int = 8
    vocab_size: int = 19
    n_layer: int = 2
    n_head: int = 2
    n_embd: int = 12


class Norm(nn.Module):
    """nanoGPT's, with or without a bias."""

    def __init__(self, width: int, has_bias: bool):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width)) if has_bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class NanoBlock(nn.Module):
    def __init__(self, c: GPTConfig, bias: bool, exact: bool):
        super().__init__()
        self.n_head, self.approximate = c.n_head, "none" if exact else "tanh"
        self.ln_1, self.ln_2 = Norm(c.n_embd, bias), Norm(c.n_embd, bias)
        self.attn = nn.ModuleDict(
            {"c_attn": nn.Linear(c.n_embd, 3 * c.n_embd, bias), "c_proj": nn.Linear(c.n_embd, c.n_embd, bias)}
        )
        self.attn.register_buffer("bias", torch.ones(c.block_size, c.block_size).tril()[None, None])
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(c.n_embd, 4 * c.n_embd, bias), "c_proj": nn.Linear(4 * c.n_embd, c.n_embd, bias)}
        )

    def forward(self, x):
        q, k, v = (
            part.unflatten(2, (self.n_head, -1)).transpose(1, 2) for part in self.attn.c_attn(self.ln_1(x)).chunk(3, dim=2)
        )
        scores = (q @ k.transpose(-1, -2) / k.size(-1) ** 0.5).masked_fill(
            self.attn.bias[:, :, : x.size(1), : x.size(1)] == 0, -torch.inf
        )
        x = x + self.attn.c_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return x + self.mlp.c_proj(F.gelu(self.mlp.c_fc(self.ln_2(x)), approximate=self.approximate))


class NanoGPT(nn.Module):
    """nanoGPT's names; its head is tied."""

    def __init__(self, c: GPTConfig, bias: bool = True, exact: bool = True):
        super().__init__()
        parts = {"wte": nn.Embedding(c.vocab_size, c.n_embd), "wpe": nn.Embedding(c.block_size, c.n_embd)}
        blocks = nn.ModuleList(NanoBlock(c, bias, exact) for _ in range(c.n_layer))
        self.transformer = nn.ModuleDict({**parts, "h": blocks, "ln_f": Norm(c.n_embd, bias)})
        self.lm_head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, ids):
        x = self.transformer.wte(ids) + self.transformer.wpe.weight[: ids.size(1)]
        for block in self.transformer.h:
            x = block(x)
        return self.lm_head(self.transformer.ln_f(x))


class ScaleShift(nn.Module):
    """The layer norm of LLMs-from-scratch."""

    def __init__(self, width: int):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x):
        centred = x - x.mean(-1, keepdim=True)
        return self.scale * centred / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt() + self.shift


class RasbtAttention(nn.Module):
    def __init__(self, c: GPTConfig, qkv_bias: bool):
        super().__init__()
        self.n_head = c.n_head
        self.W_query, self.W_key, self.W_value = (nn.Linear(c.n_embd, c.n_embd, bias=qkv_bias) for _ in range(3))
        self.out_proj = nn.Linear(c.n_embd, c.n_embd)
        self.register_buffer("mask", torch.ones(c.block_size, c.block_size).triu(1))

    def forward(self, x):
        q, k, v = (part(x).unflatten(2, (self.n_head, -1)).transpose(1, 2) for part in (self.W_query, self.W_key, self.W_value))
        scores = (q @ k.transpose(2, 3)).masked_fill(self.mask.bool()[: x.size(1), : x.size(1)], -torch.inf)
        return self.out_proj(((scores / k.size(-1) ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2))


class RasbtBlock(nn.Module):
    def __init__(self, c: GPTConfig, qkv_bias: bool):
        super().__init__()
        self.att, self.norm1, self.norm2 = RasbtAttention(c, qkv_bias), ScaleShift(c.n_embd), ScaleShift(c.n_embd)
        self.ff = nn.ModuleDict(
            {"layers": nn.Sequential(nn.Linear(c.n_embd, 4 * c.n_embd), nn.GELU("tanh"), nn.Linear(4 * c.n_embd, c.n_embd))}
        )

    def forward(self, x):
        x = x + self.att(self.norm1(x))
        return x + self.ff.layers(self.norm2(x))


class Rasbt(nn.Module):
    """The names of LLMs-from-scratch; its head is not tied."""

    def __init__(self, c: GPTConfig, qkv_bias: bool = False):
        super().__init__()
        self.tok_emb, self.pos_emb = nn.Embedding(c.vocab_size, c.n_embd), nn.Embedding(c.block_size, c.n_embd)
        self.trf_blocks = nn.Sequential(*(RasbtBlock(c, qkv_bias) for _ in range(c.n_layer)))
        self.final_norm, self.out_head = ScaleShift(c.n_embd), nn.Linear(c.n_embd, c.vocab_size, bias=False)

    def forward(self, ids):
        return self.out_head(self.final_norm(self.trf_blocks(self.tok_emb(ids) + self.pos_emb.weight[: ids.size(1)])))


def shaken(model: nn.Module, seed: int = 0) -> Any:
    """Weights that are all different: a bias or a norm that is forgotten shows."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.3)
    return model.eval()


def nano(config: GPTConfig | None = None, **options: Any) -> Any:
    return shaken(NanoGPT(config or GPTConfig(), **options))


def rasbt(config: GPTConfig | None = None, **options: Any) -> Any:
    return shaken(Rasbt(config or GPTConfig(), **options))


@torch.no_grad()
def assert_same_logits(imported: Imported, theirs: Callable[[Tensor], Tensor], atol: float = 1e-5) -> None:
    config = imported.model.config
    ids = torch.randint(config.vocab_size, (3, config.n_positions), generator=torch.Generator().manual_seed(1))
    expected = theirs(ids)[..., : config.vocab_size]
    assert expected.std() > 0.1
    torch.testing.assert_close(logits_of(imported.model, ids), expected, rtol=1e-5, atol=atol)


def nanogpt_checkpoint(model: Any, **model_args: Any) -> dict[str, Any]:
    """As nanoGPT's train.py saves it."""
    optimizer = torch.optim.AdamW(model.parameters())
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 12, "block_size": 8, "bias": True, "vocab_size": 19, "dropout": 0.0}
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "model_args": sizes | model_args,
        "iter_num": 7,
        "best_val_loss": torch.tensor(1.5),
        "config": {"n_head": 5, "dataset": "shakespeare_char"},
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "weights"


NO_HEADS = 2  # heads of the models here, which bare state dicts do not say


# Homes


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_checkpoint_of_nanogpt(path, is_zip):
    model = nano()
    torch.save(nanogpt_checkpoint(model), path, _use_new_zipfile_serialization=is_zip)
    imported = read_state_dict(path, None)
    assert_same_logits(imported, model)
    assert imported.format == "nanoGPT checkpoint"
    config = GPT2Config(vocab_size=19, n_positions=8, n_embd=12, n_layer=2, n_head=2, activation_function="gelu")
    assert imported.model.config == config
    assert imported.unexpected == (
        "2 × transformer.h.*.attn.bias",
        *(f"{name} (not weights)" for name in ("best_val_loss", "config", "iter_num", "model_args", "optimizer")),
    )
    assert len(imported.missing) == 1
    assert imported.missing[0].startswith("activation function: gelu, exact")


def test_a_checkpoint_of_nanogpt_without_biases(path):
    model = nano(bias=False)
    torch.save(nanogpt_checkpoint(model, bias=False), path)
    imported = read_state_dict(path, None)
    assert_same_logits(imported, model)
    assert "2 × attn.c_attn.bias: zeros (the model has no biases)" in imported.missing
    assert "ln_f.bias: zeros (the model has no biases)" in imported.missing
    assert len(imported.missing) == 8  # six in each layer, the last norm's, the activation function


def test_the_old_gelu_of_nanogpt_is_near(path):
    """What the note about the activation function means, in logits of standard deviation 1."""
    model = nano(exact=False)
    torch.save(nanogpt_checkpoint(model), path)
    assert_same_logits(read_state_dict(path, None), model, atol=1e-2)


def test_a_setting_that_nanogpt_has_not_is_reported(path):
    torch.save(nanogpt_checkpoint(nano(), use_relu=True, use_rotary=False, scales=torch.ones(3)), path)
    unexpected = read_state_dict(path, None).unexpected
    assert [note for note in unexpected if "no setting" in note] == [
        "scales = tensor([1., 1., 1.]): no setting of nanoGPT; if it changes the computation, the text will be another",
        "use_relu = True: no setting of nanoGPT; if it changes the computation, the text will be another",
    ]


@pytest.mark.parametrize("module", ["__main__", "train_gpt2"])
def test_a_checkpoint_of_build_nanogpt(path, module, monkeypatch):
    """Its config is an object of a class that we do not have."""
    import sys
    import types

    fake = types.ModuleType(module)
    fake.GPTConfig = GPTConfig
    model = nano(exact=False)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, module, fake)
        patch.setattr(GPTConfig, "__module__", module)
        torch.save({"model": model.state_dict(), "config": GPTConfig(), "step": 5000, "val_loss": 3.1}, path)
    imported = read_state_dict(path, None)
    assert_same_logits(imported, model)
    assert (imported.format, imported.missing) == ("build-nanogpt checkpoint", ())


@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("key", [None, "model_state_dict"])
def test_weights_of_llms_from_scratch(path, key, qkv_bias):
    model = rasbt(qkv_bias=qkv_bias)
    weights = model.state_dict()
    torch.save(weights if key is None else {key: weights, "optimizer_state_dict": {"state": {}}}, path)
    imported = read_state_dict(path, None, NO_HEADS)
    assert_same_logits(imported, model)
    assert imported.format == "LLMs-from-scratch weights"
    assert not imported.model.config.tie_word_embeddings
    note = "2 × attn.c_attn.bias: zeros (the model has no query, key, value bias)"
    assert imported.missing == (() if qkv_bias else (note,))
    assert imported.unexpected[0] == "2 × trf_blocks.*.att.mask"


def test_the_published_files_of_llms_from_scratch_are_tied(path):
    """Its gpt2-small-124M files: OpenAI's weights under its names, the head a copy of the embedding, as safetensors."""
    model = rasbt(qkv_bias=True)
    with torch.no_grad():
        model.out_head.weight.copy_(model.tok_emb.weight)
    save_file(model.state_dict(), path)
    imported = read_state_dict(path, None, NO_HEADS)
    assert_same_logits(imported, model)
    assert imported.model.config.tie_word_embeddings


def test_the_faster_scripts_of_llms_from_scratch(path):
    """One matrix for query, key and value, and torch's own layer norm."""
    model = rasbt(qkv_bias=True)
    weights = {}
    for name, tensor in model.state_dict().items():
        if "W_query" in name:
            parts = [model.state_dict()[name.replace("query", part)] for part in ("query", "key", "value")]
            weights[name.replace("W_query", "qkv")] = torch.cat(parts)
        elif not any(part in name for part in ("W_", "mask")):
            weights[name.replace("out_proj", "proj").replace("scale", "weight").replace("shift", "bias")] = tensor
    torch.save(weights, path)
    assert_same_logits(read_state_dict(path, None, NO_HEADS), model)


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_a_state_dict_of_transformers(path, prefix):
    """Conv1D: told by the shape, whatever the prefix."""
    theirs = transformers_model()
    weights = {name.replace("transformer.", prefix): tensor for name, tensor in theirs.state_dict().items()}
    torch.save(weights, path)
    imported = read_state_dict(path, None, NO_HEADS)
    assert imported.format == "Hugging Face GPT-2 weights"
    assert_same_logits(imported, lambda ids: theirs(ids).logits)


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_state_dict_of_ours(path, is_tied):
    model = new_model(GPT2Config(9, 5, 6, 2, 2, n_inner=7, tie_word_embeddings=is_tied))
    save_file(model.state_dict(), path)
    imported = read_state_dict(path, None, 2)
    assert imported.model.config == model.config
    assert imported.format == "groundup weights"
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in imported.model.state_dict().items())


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    home=st.sampled_from(["nano", "rasbt"]), bias=st.booleans(), layers=st.integers(1, 12), heads=st.integers(1, 3),
    width=st.integers(1, 5), vocab=st.integers(2, 30), positions=st.integers(1, 9), is_zip=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_every_shape(tmp_path, home, bias, layers, heads, width, vocab, positions, is_zip, seed):
    """Also more than nine layers: 10 comes after 9, not after 1."""
    config = GPTConfig(positions, vocab, layers, heads, heads * width)
    model = shaken(NanoGPT(config, bias) if home == "nano" else Rasbt(config, bias), seed)
    torch.save(model.state_dict(), tmp_path / "file", _use_new_zipfile_serialization=is_zip)
    imported = read_state_dict(tmp_path / "file", None, heads)
    ids = torch.randint(vocab, (2, positions), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        # float32 sums over up to twelve layers in another order
        torch.testing.assert_close(logits_of(imported.model, ids), model(ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "wrap", ["_orig_mod.", "module.module.", "module._orig_mod.", "_orig_mod.module.", "_fsdp_wrapped_module."]
)
def test_prefixes_of_wrappers_are_stripped(path, wrap):
    model = nano()
    torch.save({f"{wrap}{name}": tensor for name, tensor in model.state_dict().items()}, path)
    assert_same_logits(read_state_dict(path, None, NO_HEADS), model)


def test_compiled_blocks_are_unwrapped_inside_names(path):
    model = nano()
    torch.save({name.replace(".attn.", "._orig_mod.attn."): tensor for name, tensor in model.state_dict().items()}, path)
    assert_same_logits(read_state_dict(path, None, NO_HEADS), model)


def test_a_tied_pair_that_safetensors_stores_once(path):
    model = nano()
    save_model(model, str(path))
    assert_same_logits(read_state_dict(path, None, NO_HEADS), model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_become_float32(path, dtype):
    model = nano().to(dtype)
    torch.save(model.state_dict(), path)
    imported = read_state_dict(path, None, NO_HEADS)
    assert {tensor.dtype for tensor in imported.model.state_dict().values()} == {torch.float32}
    assert_same_logits(imported, model.float())


def test_a_padded_vocabulary_is_cut_to_the_tokenizer(path):
    tokenizer = byte_tokenizer()
    model = nano(GPTConfig(vocab_size=320))
    torch.save(nanogpt_checkpoint(model, vocab_size=320), path)
    imported = read_state_dict(path, tokenizer)
    assert imported.tokenizer is tokenizer
    assert imported.model.config.vocab_size == 257
    assert imported.reshaped == ("wte.weight (320, 12) → (257, 12) (ids without a token)",)
    assert_same_logits(imported, model)
    model = rasbt(GPTConfig(vocab_size=320))
    torch.save(model.state_dict(), path)
    imported = read_state_dict(path, tokenizer, NO_HEADS)
    assert len(imported.reshaped) == 2
    assert_same_logits(imported, model)


def test_a_tokenizer_larger_than_the_model_is_refused(path):
    torch.save(nanogpt_checkpoint(nano()), path)
    with pytest.raises(CheckpointError, match="the tokenizer has 257 ids, the model knows 19"):
        read_state_dict(path, byte_tokenizer())


# Heads


def test_heads_that_nothing_says_are_asked_for(path):
    torch.save(nano().state_dict(), path)
    with pytest.raises(ConfigError, match=r"n_head: .* its 2 layers of width 12 have, .* give --n-head"):
        read_state_dict(path, None)


@pytest.mark.parametrize(
    ("name", "layers", "width", "heads"),
    [("gpt2", 12, 768, 12), ("gpt2-medium", 24, 1024, 16), ("gpt2-large", 36, 1280, 20), ("gpt2-xl", 48, 1600, 25)],
)
def test_a_published_shape_says_its_heads(path, name, layers, width, heads):
    """Both layers and width. Asked without tensors, which would be up to six gigabytes."""
    config, notes = _with_heads(GPT2Config(n_layer=layers, n_embd=width, n_head=1), None, None, path)
    assert config.n_head == heads
    assert notes == (f"n_head: {heads}, as in {name}, which has these layers and this width (the file does not say)",)
    with pytest.raises(ConfigError, match="give --n-head"):
        _with_heads(GPT2Config(n_layer=layers + 1, n_embd=width), None, None, path)


def test_heads_that_contradict_the_file_are_refused(path):
    torch.save(nanogpt_checkpoint(nano()), path)
    assert read_state_dict(path, None, 2).model.config.n_head == 2
    with pytest.raises(ConfigError, match=r"n_head 3: .* says 2; leave --n-head out"):
        read_state_dict(path, None, 3)


@pytest.mark.parametrize("heads", [5, 0, -1])
def test_heads_that_do_not_divide_the_width_are_refused(path, heads):
    torch.save(nano().state_dict(), path)
    with pytest.raises(ConfigError, match=rf"n_head {heads} \(from --n-head\): does not divide the width 12"):
        read_state_dict(path, None, heads)


def test_heads_from_the_settings_of_training(path):
    """A settings object of argparse, as forks save it."""
    model = nano()
    torch.save({"state_dict": model.state_dict(), "args": argparse.Namespace(n_head=2, out=Path("x"))}, path)
    imported = read_state_dict(path, None)
    assert imported.model.config.n_head == 2
    assert_same_logits(imported, model)


# Files that are no GPT-2, or not a whole one


@pytest.mark.parametrize("part", OTHER_FAMILIES)
def test_other_families_are_named(path, part):
    torch.save({f"model.layers.0{part}weight": torch.ones(2, 2), "tok_emb.weight": torch.ones(2, 2)}, path)
    with pytest.raises(CheckpointError, match="these weights are") as refusal:
        read_state_dict(path, None)
    assert OTHER_FAMILIES[part] in str(refusal.value)


def test_weights_of_no_known_home_are_shown(path):
    torch.save({"conv1.weight": torch.ones(2, 2), "fc.bias": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match=r"of no home that groundup knows; .* \(found conv1\.weight, fc\.bias, …\)"):
        read_state_dict(path, None)


def change(model: Any, **tensors: Tensor | None) -> dict[str, Tensor]:
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, tensor in tensors.items():
        weights.pop(name, None)
        if tensor is not None:
            weights[name] = tensor
    return weights


H0, H1 = "transformer.h.0.", "transformer.h.1."
MATRIX = torch.ones(3, 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{H1}attn.c_proj.bias": None}, r"h\.1\.attn\.c_proj\.bias missing"),
        ({f"{H1}attn.c_attn.bias": None}, r"h\.1\.attn\.c_attn\.bias missing"),
        ({f"{H0}mlp.c_proj.bias": None, f"{H1}mlp.c_proj.bias": None}, r"2 tensors .* h\.0\.mlp\.c_proj\.bias missing"),
        ({f"{H1}ln_2.weight": None}, r"h\.1\.ln_2\.weight missing"),
        ({f"{H1}ln_2.gain": torch.ones(12)}, r"h\.1\.ln_2\.gain \(12,\) instead of nothing"),
        ({"transformer.wpe.weight": None}, r"has no wpe\.weight"),
        ({"transformer.wpe.weight": torch.ones(8, 6)}, "token embeddings are 12 wide, position embeddings 6"),
        ({"transformer.wpe.weight": torch.ones(8)}, r"wpe\.weight is \(8,\), GPT-2's is a matrix"),
        ({f"{H0}attn.c_attn.weight": MATRIX}, r"c_attn\.weight is \(3, 5\); GPT-2's of width 12 is \(36, 12\) or \(12, 36\)"),
        ({f"{H1}attn.c_attn.weight": torch.ones(12, 36)}, r"h\.1\.attn\.c_attn\.weight \(12, 36\) instead of \(36, 12\)"),
        ({f"{H1}mlp.c_fc.weight": MATRIX}, r"h\.1\.mlp\.c_fc\.weight \(3, 5\) instead of \(48, 12\)"),
        ({f"{H0}mlp.c_fc.weight": None}, r"has no h\.0\.mlp\.c_fc\.weight"),
        ({"lm_head.weight": torch.ones(2, 12)}, r"the head is \(2, 12\), the token embedding \(19, 12\): a classifier"),
        ({"lm_head.bias": torch.ones(19)}, r"lm_head\.bias \(19,\) instead of nothing"),
        ({"h.1.ln_2.weight": torch.ones(12)}, "are the same tensor of GPT-2; give one of them"),
        ({f"module.{H1}ln_2.weight": torch.ones(12)}, r"holds transformer\.h\.1\.ln_2\.weight twice"),
        ({"transformer.h.7.ln_1.weight": torch.ones(12)}, "has 3 layers, but none with the number 2"),
        ({"transformer.h.999999999.ln_1.weight": torch.ones(12)}, "has 3 layers, but none with the number 2"),
        ({f"{H1}ln_1.weight": torch.ones(12, dtype=torch.int8)}, r"h\.1\.ln_1\.weight is torch\.int8 .* not quantized"),
        ({f"{H1}ln_1.weight": torch.ones(12).to_sparse()}, r"h\.1\.ln_1\.weight is .*sparse"),
        ({f"{H1}ln_1.weight": torch.ones(1).expand(12)}, r"h\.1\.ln_1\.weight is torch\.float32"),
        ({f"{H1}ln_1.bias": torch.full((12,), torch.nan)}, r"transformer\.h\.1\.ln_1\.bias has 12 values that are not finite"),
        ({f"{H1}ln_1.bias": torch.tensor([1e300] * 12, dtype=torch.float64)}, r"ln_1\.bias has 12 values that are not finite"),
    ],
    ids=str,
)  # fmt: skip
def test_weights_that_are_no_whole_gpt2_are_refused(path, changes, message):
    torch.save(change(nano(), **changes), path)
    with pytest.raises(CheckpointError, match=message) as refusal:
        read_state_dict(path, None, NO_HEADS)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trf_blocks.1.att.W_key.weight": None}, r"h\.1\.attn weight: query \(12, 12\), key missing, value \(12, 12\)"),
        ({"trf_blocks.1.att.W_key.weight": torch.ones(6, 12)}, r"key \(6, 12\), .* of one shape"),
        ({"trf_blocks.1.att.W_key.bias": torch.ones(12)}, r"h\.1\.attn bias: query missing, key \(12,\)"),
        ({"pos_emb.weight": None}, r"has no wpe\.weight"),
        ({"out_head.weight": torch.ones(2, 12)}, "a classifier"),
    ],
    ids=str,
)
def test_weights_that_are_no_whole_model_of_llms_from_scratch_are_refused(path, changes, message):
    torch.save(change(rasbt(), **changes), path)
    with pytest.raises(CheckpointError, match=message):
        read_state_dict(path, None, NO_HEADS)


@pytest.mark.parametrize("setting", ["n_layer", "n_embd", "vocab_size", "block_size"])
def test_settings_that_contradict_the_tensors_are_refused(path, setting):
    torch.save(nanogpt_checkpoint(nano(), **{setting: 77}), path)
    with pytest.raises(CheckpointError, match=f"its settings say {setting} 77, its tensors"):
        read_state_dict(path, None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(2)], "holds a list, not a state dict"),
        (torch.ones(2), "holds a Tensor, not a state dict"),
        ({}, r"holds no tensors of a model \(it has: nothing\)"),
        ({"model": {}, "step": 3}, r"holds no tensors of a model \(it has: model, step\)"),
    ],
    ids=str,
)
def test_files_without_weights_are_refused(path, content, message):
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=message):
        read_state_dict(path, None)


# Files that are damaged


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"hello, these are my weights\n", "is neither a file of torch.save nor safetensors"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer, .* run git lfs pull"),
        (b"PK\x03\x04" + bytes(100), "cannot be read"),
        (b"\x80\x02" + bytes(100), "is no file of torch.save, or damaged"),
        (struct.pack("<Q", 9) + b'{"a": 1}', "cannot be read"),
        (b"\x80", "cannot be read|is no file"),
    ],
    ids=str,
)
def test_files_that_are_none_are_refused(path, content, message):
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as refusal:
        read_state_dict(path, None)
    assert "\n" not in str(refusal.value)


def test_a_folder_and_nothing_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is a folder; give the file of weights in it"):
        read_state_dict(tmp_path, None)
    with pytest.raises(CheckpointError, match=r"nowhere: cannot be read \(No such file"):
        read_state_dict(tmp_path / "nowhere", None)


@pytest.mark.parametrize("form", ["zip", "bare", "safetensors"])
@pytest.mark.parametrize("kept", [0.2, 0.9, 0.999])
def test_truncated_files_are_refused(path, form, kept):
    weights = {name: tensor.clone() for name, tensor in nano().state_dict().items()}
    if form == "safetensors":
        save_file(weights, path)
    else:
        torch.save(weights, path, _use_new_zipfile_serialization=form == "zip")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(CheckpointError):
        read_state_dict(path, None, NO_HEADS)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), is_zip=st.booleans())
def test_a_changed_byte_is_an_error_of_ours_or_another_number(tmp_path, data, is_zip):
    file = io.BytesIO()
    torch.save({"model": {"wte.weight": torch.ones(2)}, "args": argparse.Namespace(n_head=2)}, file,
               _use_new_zipfile_serialization=is_zip)  # fmt: skip
    content = bytearray(file.getvalue())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "file").write_bytes(content)
    try:
        read_state_dict(tmp_path / "file", None)
    except GroundupError as error:
        assert "\n" not in str(error)  # noqa: PT017 - most changes are refused, some are not seen


# Pickles that want more


class Calls:
    """An object whose pickle calls a function when it is read."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self.called = function, arguments

    def __reduce__(self):
        return self.called


ATTACKS = {
    "os.system": lambda marker: Calls(os.system, f"touch '{marker}'"),
    "eval": lambda marker: Calls(eval, f"open({str(marker)!r}, 'w')"),
    "exec": lambda marker: Calls(exec, f"open({str(marker)!r}, 'w')"),
    "open": lambda marker: Calls(open, str(marker), "w"),
    "getattr": lambda marker: Calls(getattr, Calls(__import__, "os"), "system"),
}
PLACES = {
    "alone": lambda evil: evil,
    "in the weights": lambda evil: {"wte.weight": torch.ones(2), "h.0.attn.c_attn.weight": evil},
    "beside the weights": lambda evil: {"model": {"wte.weight": torch.ones(2)}, "optimizer": [{"lr": evil}]},
    "in settings": lambda evil: {"model": {"wte.weight": torch.ones(2)}, "args": argparse.Namespace(n_head=evil)},
}


@pytest.fixture(params=[*ATTACKS])
def attack(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    evil = ATTACKS[request.param](tmp_path / "marker")
    yield evil
    assert not (tmp_path / "marker").exists(), "the pickle ran"


def test_the_attacks_are_attacks(tmp_path):
    """Without protection they do run: else the tests below could not fail."""
    for name in ("os.system", "eval", "exec", "open"):
        marker = tmp_path / name
        pickle.loads(pickle.dumps(ATTACKS[name](marker), protocol=2))
        assert marker.exists(), name


@pytest.mark.parametrize("form", ["zip", "bare", "pickle"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["ckpt.pt", "weights.safetensors"])
def test_a_pickle_that_wants_more_is_not_run(tmp_path, attack, place, form, name):
    path, content = tmp_path / name, PLACES[place](attack)
    if form == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(
        CheckpointError, match=r"not run; where it was trained, save the weights alone: torch\.save\("
    ) as refusal:
        read_state_dict(path, None)
    assert "asks for" in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("protocol", range(6))
def test_no_protocol_of_pickle_runs(tmp_path, attack, protocol):
    """Newer ones name functions in another way, the oldest are text."""
    path = tmp_path / "ckpt.pt"
    path.write_bytes(pickle.dumps({"model": attack}, protocol=protocol))
    with pytest.raises(CheckpointError, match=r"torch\.save\(model\.state_dict\(\)|cannot be read"):
        read_state_dict(path, None)


@pytest.mark.parametrize("read", [load_model, read_hugging_face])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("is_zip", [True, False])
def test_a_pickle_in_a_folder_is_not_run(tmp_path, attack, name, read, is_zip):
    huggingface.save_model(new_model(), tmp_path, end_of_text_id=30)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"wte.weight": attack}, tmp_path / name, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(CheckpointError, match=r"not run; where it was trained, save the weights alone"):
        read(tmp_path)


def test_a_whole_pickled_model_is_refused_by_name(path):
    torch.save(nano(), path)
    with pytest.raises(CheckpointError, match=r"asks for tests\.test_state_dicts\.NanoGPT, which is code"):
        read_state_dict(path, None)


def test_settings_objects_are_inert(path):
    """Nothing of their class is imported or called, and what they were given is kept."""
    torch.save({"a": GPTConfig(n_head=7), "b": argparse.Namespace(c=np.float64(2.0), d=Path("x"))}, path)
    allowed = torch.serialization.get_safe_globals()
    found = read_pickled(path)
    assert isinstance(found["a"], Settings)
    assert not isinstance(found["a"], GPTConfig)
    assert found["a"].values["n_head"] == 7
    assert type(found["b"]).__name__ == "Namespace"
    assert set(torch.serialization.get_safe_globals()) == set(allowed)


def test_a_settings_class_of_a_dangerous_module_is_refused(path):
    path.write_bytes(b"\x80\x02cos\nGPTConfig\n.")
    with pytest.raises(CheckpointError, match=r"asks for os\.GPTConfig, which is code"):
        read_pickled(path)


def test_settings_of_endlessly_many_classes_are_refused(path):
    """Each is found by reading once more."""
    names = b"".join(f"cm{index}\nGPTConfig\n".encode() for index in range(pickled.MOST_STAND_INS + 1))
    path.write_bytes(b"\x80\x02" + names + b".")
    with pytest.raises(CheckpointError, match=rf"asks for m{pickled.MOST_STAND_INS}\.GPTConfig"):
        read_pickled(path)


def test_control_characters_do_not_reach_the_terminal(path):
    path.write_bytes(b"\x80\x02cevil\n\x1b[31mred\n.")
    with pytest.raises(CheckpointError, match=r"asks for 'evil\.\\x1b\[31mred'"):
        read_pickled(path)


def test_names_with_control_characters_do_not_either(path):
    red = "transformer.\x1b[31m\nred"
    torch.save(change(nano(), **{red: torch.ones(2)}), path)
    with pytest.raises(CheckpointError, match=r"holds a tensor called 'transformer\.\\x1b\[31m\\nred'"):
        read_state_dict(path, None, NO_HEADS)
    torch.save(nanogpt_checkpoint(nano(), **{red: 1}) | {red: 2}, path)
    notes = read_state_dict(path, None).unexpected
    assert len([note for note in notes if "x1b" in note]) == 2
    assert all(map(str.isprintable, notes))


def test_weights_stay_on_disk_until_they_are_used(path, monkeypatch):
    """A checkpoint holds twice its weights in optimizer state, which is not read."""
    seen = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **options: seen.append(options["mmap"]) or load(*args, **options))
    torch.save(nano().state_dict(), path)
    read_pickled(path)
    assert seen == [True]


def test_a_model_can_be_trained_after_reading(path):
    """The tensors are the model's own: changing them leaves the file as it is."""
    torch.save(nanogpt_checkpoint(nano()), path)
    before = path.read_bytes()
    model: GPT2 = read_state_dict(path, None).model.train()
    model.logits(model(torch.arange(8)[None])).sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.sub_(parameter.grad)
    assert path.read_bytes() == before
