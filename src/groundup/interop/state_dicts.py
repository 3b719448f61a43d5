"""
Files that hold a state dict: nanoGPT's, build-nanogpt's, LLMs-from-scratch's, Hugging Face's and our own.

A home is recognised by the names and shapes of its tensors, never by the file's name:

    https://github.com/karpathy/nanoGPT            {'model', 'model_args', …}: transformer.h.0.attn.c_attn, (out, in)
    https://github.com/karpathy/build-nanogpt      {'model', 'config', …}: the same, config a GPTConfig object
    https://github.com/rasbt/LLMs-from-scratch     trf_blocks.0.att.W_query, norm1.scale, out_head; a mask in each layer
    https://github.com/huggingface/transformers    transformer.h.0.attn.c_attn or without the prefix, (in, out)

Matrices are (out, in) here, as nn.Linear stores them.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from groundup.config.presets import PRESETS
from groundup.errors import CheckpointError, ConfigError
from groundup.interop.huggingface import (
    CONV1D,
    EMBEDDING,
    HEAD,
    IGNORED,
    INSIDE,
    PREFIX,
    checked_weight,
    read_safetensors,
    summarize,
)
from groundup.interop.imported import Imported, build_model, fit_vocabulary
from groundup.interop.pickled import Settings, read_pickled, shown
from groundup.model.gpt2 import GPT2, GPT2Config
from groundup.tokenizer.tokenizer import Tokenizer

# Where trainers keep the state dict in a larger file.
WEIGHTS_KEYS = ("model", "model_state_dict", "state_dict")
# What torch.compile, FSDP and activation checkpointing put into names, and DistributedDataParallel before them.
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
PARALLEL = "module."
NANOGPT_SETTINGS = frozenset({"n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout"})
MODEL_SETTINGS = ("GPTConfig", "GPT2Config")
HEAD_COUNTS = ("n_head", "n_heads", "num_heads", "num_attention_heads")
PUBLISHED = {
    (PRESETS[name]["n_layer"], PRESETS[name]["n_embd"]): (name, int(PRESETS[name]["n_head"]))
    for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
}

# LLMs-from-scratch: chapter 4's classes, and those of chapter 5's faster scripts (qkv, proj, torch's own LayerNorm).
RASBT_LAYER = re.compile(r"trf_blocks\.(\d+)\.")
RASBT_MODULES = {
    "tok_emb": "wte",
    "pos_emb": "wpe",
    "final_norm": "ln_f",
    "out_head": "lm_head",
    "norm1": "ln_1",
    "norm2": "ln_2",
    "att.W_query": "attn.query",
    "att.W_key": "attn.key",
    "att.W_value": "attn.value",
    "att.qkv": "attn.c_attn",
    "att.out_proj": "attn.c_proj",
    "att.proj": "attn.c_proj",
    "ff.layers.0": "mlp.c_fc",
    "ff.layers.2": "mlp.c_proj",
}
RASBT_PARAMETERS = {"scale": "weight", "shift": "bias"}
QUERY_KEY_VALUE = ("query", "key", "value")

# A part of a name that only one other family has.
OTHER_FAMILIES = {
    "lora_": "a LoRA adapter; merge it into its model first",
    "trf_blocks.0.ff.fc3": "a Llama or Qwen of LLMs-from-scratch",
    "gpt_neox.": "a GPT-NeoX model (Pythia)",
    ".self_attn.q_proj.": "a model of Llama's kind (Llama, Mistral, Qwen, OPT)",
    ".attention.wq.": "a Llama model",
    ".attn.attention.q_proj.": "a GPT-Neo model",
    ".attn.q_proj.": "a GPT-J model",
    ".attn.c_q.": "a nanochat model",
    ".query_key_value.": "a model of Falcon's or BLOOM's kind",
    ".attention.self.query.": "a BERT model",
    ".SelfAttention.q.": "a T5 model",
    ".attn.W_Q": "TransformerLens weights; export from Hugging Face's model instead",
    ".mixer.": "a Mamba model",
}

QKV_BIASES = frozenset({"attn.c_attn.bias"})
LINEAR_BIASES = QKV_BIASES | {"attn.c_proj.bias", "mlp.c_fc.bias", "mlp.c_proj.bias"}
ALL_BIASES = LINEAR_BIASES | {"ln_1.bias", "ln_2.bias", "ln_f.bias"}
# A model without a bias computes what one with a bias of zero does; only whole kinds of them are left out by a home.
OMITTED_BIASES = {
    QKV_BIASES: "the model has no query, key, value bias",
    LINEAR_BIASES: "the model has no biases in its linear layers",
    ALL_BIASES: "the model has no biases",
}
# https://github.com/karpathy/nanoGPT/pull/274; the two functions differ most, by 0.00047, near ±2.7.
EXACT_GELU = "activation function: gelu, exact, as in nanoGPT since June 2023; before, it was gelu_new (the file does not say)"


@dataclass(frozen=True)
class _Found:
    """What a file holds."""

    tensors: dict[str, Tensor]
    """Under the file's names, without what wrappers put into them."""
    settings: Mapping[str, Any]
    """The model's settings where the file has them: nanoGPT's ``model_args``, build-nanogpt's ``config``."""
    n_head: int | None
    format: str
    left_out: tuple[str, ...]
    """What is not weights: optimizer state, settings of training."""


def read_state_dict(path: Path, tokenizer: Tokenizer | None, n_head: int | None = None) -> Imported:
    """
    Read a GPT-2 from one file of torch.save or safetensors.

    Layer norms have GPT-2's epsilon 1e-5, which all these homes use; dropout rates are 0. Biases that a home leaves out
    are zeros, and are listed as missing, as is a number of heads that the file does not say.

    Args:
        tokenizer: the one that the model was trained with; the vocabulary is cut to its ids.
        n_head: attention heads, where the file does not say and the shape is not a published GPT-2's.

    Raises:
        CheckpointError: unreadable, a pickle that asks for more than data, another family's model, tensors that do not
            fit together, or values that are not finite.
        ConfigError: ``n_head`` is needed, or contradicts the file, or does not divide the width.
    """
    found = _open(path)
    named, left_out = _under_our_names(found.tensors, path)
    raw = {ours: checked_weight(theirs, found.tensors[theirs], str(path)) for ours, theirs in named.items()}
    raw = _tie(_join_query_key_value(raw, path))
    tensors, was_transposed = _as_linear(raw, path)
    config = replace(_shape_of(tensors, path), tie_word_embeddings=HEAD not in tensors)
    _compare_settings(config, found.settings, path)
    config, assumed = _with_heads(config, found.n_head, n_head, path)
    tensors, zeros = _with_omitted_biases(config, tensors)
    config, tensors, reshaped = fit_vocabulary(config, tensors, tokenizer, f"checkpoint {path}")
    home = found.format or _format_of(found.tensors, was_transposed)
    is_nanogpt = home.startswith("nanoGPT")
    config = replace(config, activation_function="gelu" if is_nanogpt else "gelu_new")
    return Imported(
        model=build_model(config, tensors, str(path)),
        tokenizer=tokenizer,
        format=home,
        missing=(*zeros, *assumed, *((EXACT_GELU,) if is_nanogpt else ())),
        unexpected=(*summarize(left_out), *found.left_out),
        reshaped=reshaped,
    )


def _open(path: Path) -> _Found:
    content = _read(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"checkpoint {path}: holds a {type(content).__name__}, not a state dict of names and tensors")
    key = next((key for key in WEIGHTS_KEYS if isinstance(content.get(key), Mapping)), None)
    around = {} if key is None else {str(name): value for name, value in content.items() if name != key}
    weights: Mapping[Any, Any] = content if key is None else content[key]
    tensors = _unwrapped({str(name): value for name, value in weights.items() if isinstance(value, Tensor)}, path)
    if not tensors:
        keys = ", ".join(sorted(map(shown, content))[:8]) or "nothing"
        raise CheckpointError(f"checkpoint {path}: holds no tensors of a model (it has: {keys}); give the file of weights")
    beside = sorted([*around, *(str(name) for name, value in weights.items() if not isinstance(value, Tensor))])
    settings = _model_settings(around)
    strange = tuple(
        f"{shown(name)} = {shown(value)}: no setting of nanoGPT; if it changes the computation, the text will be another"
        for name, value in sorted(settings.items(), key=lambda setting: str(setting[0]))
        if name not in NANOGPT_SETTINGS and value is not False and value is not None
    )
    return _Found(
        tensors=tensors,
        settings=settings,
        n_head=_head_count(around),
        format=_format_around(settings),
        left_out=(*(f"{shown(name)} (not weights)" for name in beside), *strange),
    )


def _read(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            is_safetensors = file.read(9)[8:] == b"{"  # eight bytes of length, then JSON
    except OSError:
        is_safetensors = False
    # What is neither is read as a pickle too, which says what is wrong with it.
    return read_safetensors(path) if is_safetensors else read_pickled(path)


def _unwrapped(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        short = name
        for wrapper in WRAPPERS:
            short = short.replace(wrapper, "")
        while short.startswith(PARALLEL):
            short = short.removeprefix(PARALLEL)
        if not short.isprintable():
            raise CheckpointError(f"checkpoint {path}: holds a tensor called {shown(name)}; it is damaged, copy it again")
        if short in plain:
            raise CheckpointError(f"checkpoint {path}: holds {short} twice, once as {name}; give a file with one model")
        plain[short] = tensor
    return plain


def _values(thing: object) -> Mapping[str, Any]:
    if isinstance(thing, Settings):
        return thing.values
    return thing if isinstance(thing, Mapping) else {}


def _model_settings(around: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of the model alone: nanoGPT's, whose ``config`` holds those of training, else build-nanogpt's."""
    if "model_args" in around:
        return _values(around["model_args"])
    config = around.get("config")
    return config.values if isinstance(config, Settings) and type(config).__name__ in MODEL_SETTINGS else {}


def _head_count(around: Mapping[str, Any]) -> int | None:
    said = [_values(around.get(name)) for name in ("model_args", "config", "args")]
    return next((values[name] for values in said for name in HEAD_COUNTS if type(values.get(name)) is int), None)


def _format_around(settings: Mapping[str, Any]) -> str:
    if not settings:
        return ""
    return "nanoGPT checkpoint" if "bias" in settings else "build-nanogpt checkpoint"


def _under_our_names(tensors: Mapping[str, Tensor], path: Path) -> tuple[dict[str, str], list[str]]:
    """Our name of each tensor of the model to the file's, and the file's names of masks and of what stands beside it."""
    is_rasbt = "tok_emb.weight" in tensors and any(map(RASBT_LAYER.match, tensors))
    rename = _from_rasbt if is_rasbt else lambda name: name.removeprefix(PREFIX)
    family = next((family for part, family in OTHER_FAMILIES.items() if any(part in name for name in tensors)), None)
    if family is None and not is_rasbt and not any(name.endswith("attn.c_attn.weight") for name in tensors):
        family = "of no home that groundup knows"
    if family is not None:
        some = ", ".join(sorted(tensors)[:4])
        raise CheckpointError(f"checkpoint {path}: these weights are {family}; groundup imports GPT-2 (found {some}, …)")
    named: dict[str, str] = {}
    left_out = []
    for theirs in tensors:
        ours = rename(theirs)
        if theirs.endswith((*IGNORED, ".att.mask")) or not ours.startswith(INSIDE):
            left_out.append(theirs)
        elif ours in named:
            raise CheckpointError(
                f"checkpoint {path}: {theirs} and {named[ours]} are the same tensor of GPT-2; give one of them"
            )
        else:
            named[ours] = theirs
    return named, left_out


def _from_rasbt(name: str) -> str:
    layer = RASBT_LAYER.match(name)
    module, _, parameter = name[layer.end() if layer else 0 :].rpartition(".")
    renamed = f"{RASBT_MODULES.get(module, module)}.{RASBT_PARAMETERS.get(parameter, parameter)}"
    return f"h.{layer[1]}.{renamed}" if layer else renamed


def _join_query_key_value(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Separate query, key and value (C, C) of a layer, in this order, as one c_attn (3 × C, C); likewise their biases."""
    joined = dict(tensors)
    for name in tensors:
        stem, _, kind = name.rpartition(".")
        layer, _, part = stem.rpartition(".")
        if part not in QUERY_KEY_VALUE or f"{layer}.c_attn.{kind}" in joined:
            continue
        parts = [joined.pop(f"{layer}.{which}.{kind}", None) for which in QUERY_KEY_VALUE]
        there = [tensor for tensor in parts if tensor is not None]
        if len(there) < 3 or len({tensor.shape for tensor in there}) > 1:
            shapes = ", ".join(
                f"{which} {'missing' if tensor is None else tuple(tensor.shape)}"
                for which, tensor in zip(QUERY_KEY_VALUE, parts, strict=True)
            )
            raise CheckpointError(f"checkpoint {path}: {layer} {kind}: {shapes}; GPT-2 has all three, of one shape")
        joined[f"{layer}.c_attn.{kind}"] = torch.cat(there)
    return joined


def _tie(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without a head that is the embedding; safetensors stores a tied pair once, under either name."""
    tied = dict(tensors)
    head = tied.get(HEAD)
    if head is not None and torch.equal(head, tied.setdefault(EMBEDDING, head)):
        del tied[HEAD]
    return tied


def _as_linear(tensors: Mapping[str, Tensor], path: Path) -> tuple[dict[str, Tensor], bool]:
    """The tensors with (out, in) matrices, and whether they were Conv1D's (in, out): c_attn's two sides tell."""
    width = _matrix(tensors, EMBEDDING, path)[1]
    first = "h.0.attn.c_attn.weight"
    shape = _matrix(tensors, first, path)
    if shape not in ((width, 3 * width), (3 * width, width)):
        raise CheckpointError(
            f"checkpoint {path}: {first} is {shape}; GPT-2's of width {width} is {(3 * width, width)} or {(width, 3 * width)}"
        )
    is_conv1d = shape[0] == width
    turned = {
        name: tensor.T.contiguous() if is_conv1d and name.endswith(CONV1D) and tensor.dim() == 2 else tensor
        for name, tensor in tensors.items()
    }
    return turned, is_conv1d


def _matrix(tensors: Mapping[str, Tensor], name: str, path: Path) -> tuple[int, int]:
    tensor = tensors.get(name)
    if tensor is None:
        raise CheckpointError(f"checkpoint {path}: has no {name}; it is not the whole of a GPT-2")
    if tensor.dim() != 2 or not tensor.numel():
        raise CheckpointError(f"checkpoint {path}: {name} is {tuple(tensor.shape)}, GPT-2's is a matrix")
    return tensor.size(0), tensor.size(1)


def _shape_of(tensors: Mapping[str, Tensor], path: Path) -> GPT2Config:
    """The sizes that the tensors show, all but the number of heads; a tensor that disagrees is refused when it is used."""
    vocab_size, width = _matrix(tensors, EMBEDDING, path)
    n_positions, position_width = _matrix(tensors, "wpe.weight", path)
    if position_width != width:
        raise CheckpointError(
            f"checkpoint {path}: token embeddings are {width} wide, position embeddings {position_width}; the file mixes models"
        )
    if HEAD in tensors and _matrix(tensors, HEAD, path) != (vocab_size, width):
        raise CheckpointError(
            f"checkpoint {path}: the head is {tuple(tensors[HEAD].shape)}, the token embedding {(vocab_size, width)}: a "
            "classifier, or another model's head; groundup imports language models"
        )
    layers = {int(part) for part in (name.split(".")[1] for name in tensors if name.startswith("h.")) if part.isdecimal()}
    if missing := [str(layer) for layer in range(len(layers)) if layer not in layers]:
        raise CheckpointError(f"checkpoint {path}: has {len(layers)} layers, but none with the number {', '.join(missing[:5])}")
    inner = _matrix(tensors, "h.0.mlp.c_fc.weight", path)[0]
    return GPT2Config(
        vocab_size=vocab_size,
        n_positions=n_positions,
        n_embd=width,
        n_layer=len(layers),
        n_head=1,
        n_inner=0 if inner == 4 * width else inner,
    )


def _compare_settings(config: GPT2Config, settings: Mapping[str, Any], path: Path) -> None:
    for name, found in (
        ("n_layer", config.n_layer),
        ("n_embd", config.n_embd),
        ("vocab_size", config.vocab_size),
        ("block_size", config.n_positions),
    ):
        said = settings.get(name)
        if isinstance(said, int) and said != found:
            raise CheckpointError(
                f"checkpoint {path}: its settings say {name} {said}, its tensors {found}; the file is damaged"
            )


def _with_heads(config: GPT2Config, said: int | None, given: int | None, path: Path) -> tuple[GPT2Config, tuple[str, ...]]:
    """The configuration with its number of heads, which no tensor shows, and what had to be assumed for it."""
    if said is not None and given is not None and said != given:
        raise ConfigError(f"n_head {given}: {path} says {said}; leave --n-head out")
    heads = said if said is not None else given
    note: tuple[str, ...] = ()
    if heads is None:
        published = PUBLISHED.get((config.n_layer, config.n_embd))
        if published is None:
            raise ConfigError(
                f"n_head: {path} does not say how many attention heads its {config.n_layer} layers of width {config.n_embd} "
                "have, and no tensor shows it; give --n-head as in its training (groundup import has it)"
            )
        preset, heads = published
        note = (f"n_head: {heads}, as in {preset}, which has these layers and this width (the file does not say)",)
    if heads < 1 or config.n_embd % heads:
        source = "--n-head" if said is None else str(path)
        raise ConfigError(f"n_head {heads} (from {source}): does not divide the width {config.n_embd} of {path}")
    return replace(config, n_head=heads), note


def _with_omitted_biases(config: GPT2Config, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Zeros for the kinds of biases that a home leaves out of every layer, and what was filled."""
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in GPT2(config).state_dict().items()}
    missing = [name for name in expected if name not in tensors]
    kinds = frozenset(_kind(name) for name in missing)
    whole = {name for name in expected if _kind(name) in kinds} == set(missing)
    if kinds not in OMITTED_BIASES or not whole:
        return dict(tensors), ()
    reason = OMITTED_BIASES[kinds]
    filled = {**tensors, **{name: torch.zeros(expected[name]) for name in missing}}
    return filled, tuple(f"{name}: zeros ({reason})" for name in _counted(missing))


def _kind(name: str) -> str:
    return re.sub(r"^h\.\d+\.", "", name)


def _counted(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(name.replace("h.*.", "") for name in summarize(names))


def _format_of(tensors: Iterable[str], was_transposed: bool) -> str:
    """The home of a bare state dict."""
    names = set(tensors)
    if "tok_emb.weight" in names:
        return "LLMs-from-scratch weights"
    if was_transposed:
        return "Hugging Face GPT-2 weights"
    return "nanoGPT weights" if any(name.startswith(PREFIX) for name in names) else "groundup weights"
