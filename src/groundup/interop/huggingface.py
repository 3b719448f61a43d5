"""
Hugging Face's GPT-2 files: the weights' names and shapes, config.json, generation_config.json.

The only difference from our modules is that their linear layers are ``Conv1D``: stored (in, out), ours (out, in).
"""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from groundup.errors import CheckpointError
from groundup.model.gpt2 import GPT2, GPT2Config

PREFIX = "transformer."
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# Buffers that old files carry, and the head, which is the token embedding.
IGNORED = (".attn.bias", ".attn.masked_bias", "lm_head.weight")


def to_hugging_face(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under Hugging Face's names and shapes, on the CPU."""
    return {
        PREFIX + name: (tensor.detach().cpu().T if name.endswith(CONV1D) else tensor.detach().cpu()).contiguous()
        for name, tensor in weights.items()
    }


def from_hugging_face(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's state dict under our names and shapes."""
    return {
        name.removeprefix(PREFIX): (tensor.T.contiguous() if name.endswith(CONV1D) else tensor)
        for name, tensor in weights.items()
        if not name.endswith(IGNORED)
    }


def save_model(model: GPT2, directory: Path, end_of_text_id: int) -> None:
    """Write model.safetensors, config.json and generation_config.json."""
    save_file(to_hugging_face(model.state_dict()), directory / "model.safetensors", metadata={"format": "pt"})
    config = config_to_hugging_face(model.config, end_of_text_id)
    generation = {"bos_token_id": end_of_text_id, "eos_token_id": end_of_text_id}
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (directory / name).write_bytes(json.dumps(content, indent=2).encode())


def config_to_hugging_face(config: GPT2Config, end_of_text_id: int) -> dict[str, Any]:
    """config.json of a GPT-2."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "vocab_size": config.vocab_size,
        "n_positions": config.n_positions,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": config.n_inner or None,
        "resid_pdrop": config.resid_pdrop,
        "embd_pdrop": config.embd_pdrop,
        "attn_pdrop": config.attn_pdrop,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "initializer_range": config.initializer_range,
        "bos_token_id": end_of_text_id,
        "eos_token_id": end_of_text_id,
        "tie_word_embeddings": True,
        "dtype": "float32",
    }


def load_model(directory: Path) -> GPT2:
    """
    Read a GPT-2 from config.json and model.safetensors, on the CPU in float32, in evaluation mode.

    Raises:
        CheckpointError: a file is missing or damaged, or tensors do not fit the configuration.
    """
    config = _read_config(directory / "config.json")
    path = directory / "model.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
        # Before anything is built: a small file must not ask for a billion layers.
        if config.n_layer > 100 + len(names):
            raise CheckpointError(f"checkpoint {path}: holds {len(names)} tensors, config.json says n_layer {config.n_layer}")
        raw = load_file(path)
        tensors = from_hugging_face(raw)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {path}: cannot be read ({error}); use another checkpoint") from None
    with torch.device("meta"):
        model = GPT2(config)
    head = raw.get("lm_head.weight")
    if head is not None and "wte.weight" in tensors and not torch.equal(head, tensors["wte.weight"]):
        raise CheckpointError(f"checkpoint {path}: lm_head.weight is not wte.weight; GPT-2's head is tied: another model")
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if expected != found:
        wrong = [
            f"{name} {found.get(name, 'missing')} instead of {expected.get(name, 'nothing')}"
            for name in sorted(expected.keys() | found.keys())
            if expected.get(name) != found.get(name)
        ]
        raise CheckpointError(f"checkpoint {path}: {len(wrong)} tensors do not fit config.json: {'; '.join(wrong[:10])}")
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    return model.eval()


# What other values of these mean is another computation than GPT-2's.
REQUIRED = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "tie_word_embeddings": True,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}


def _read_config(path: Path) -> GPT2Config:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        raw.setdefault("model_type", None)
        raw["n_inner"] = raw.get("n_inner") or 0
        for name, required in REQUIRED.items():
            if raw.get(name, required) != required:
                raise CheckpointError(f"checkpoint {path}: {name} is {raw[name]!r}, GPT-2 has {required!r}: another model")
        hints = get_type_hints(GPT2Config)
        known = {f.name: (hints[f.name], raw[f.name]) for f in fields(GPT2Config) if f.name in raw}
        for name, (kind, value) in known.items():
            is_fraction = name.endswith("pdrop")
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 <= value <= (1 if is_fraction else 2**24) or (kind is int and not isinstance(value, int)):
                raise ValueError(f"{name} {value!r}")
        config = GPT2Config(**{name: kind(value) for name, (kind, value) in known.items()})
        if min(config.vocab_size, config.n_positions, config.n_embd, config.n_layer, config.n_head) < 1:
            raise ValueError("a size below 1")
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd {config.n_embd} is not divisible by n_head {config.n_head}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"checkpoint {path}: cannot be read as a GPT-2's config.json ({error})") from None
    return config
