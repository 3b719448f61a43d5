"""
Hugging Face's GPT-2 files: the weights' names and shapes, config.json, generation_config.json.

The only difference from our modules is that their linear layers are ``Conv1D``: stored (in, out), ours (out, in).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
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
        tensors = from_hugging_face(load_file(path))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {path}: cannot be read ({error}); use another checkpoint") from None
    with torch.device("meta"):
        model = GPT2(config)
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


def _read_config(path: Path) -> GPT2Config:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw["model_type"] != "gpt2" or raw.get("activation_function", "gelu_new") != "gelu_new":
            raise CheckpointError(
                f"checkpoint {path}: is a {raw['model_type']!r} with {raw.get('activation_function')!r}, not a GPT-2 "
                "with gelu_new"
            )
        names = GPT2Config.__dataclass_fields__
        config = GPT2Config(**{name: raw[name] or 0 for name in names if name in raw})
        sizes = (config.vocab_size, config.n_positions, config.n_embd, config.n_layer, config.n_head)
        if min(sizes) < 1 or max(sizes) > 2**24 or config.n_embd % config.n_head:
            raise ValueError(f"impossible sizes {sizes}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {path}: cannot be read as a GPT-2's config.json ({error})") from None
    return config
