"""
Hugging Face's GPT-2 files: the weights' names and shapes, whole or in shards, config.json, generation_config.json.

The only difference from our modules is that their linear layers are ``Conv1D``: stored (in, out), ours (out, in). A variant
of GPT-2 is written likewise under a model type of its own, which no other program takes for a GPT-2.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from groundup.errors import CheckpointError
from groundup.interop.imported import VOCABULARY_ROWS, Imported, build_model, fit_vocabulary
from groundup.interop.pickled import SAVE_ADVICE, is_pickle, read_pickled, shown
from groundup.model.gpt2 import GPT2, GPT2Config
from groundup.model.variants import NORM_POSITIONS, NORMS
from groundup.tokenizer.tokenizer import load_tokenizer

PREFIX = "transformer."
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
HEAD, EMBEDDING = "lm_head.weight", "wte.weight"
# Buffers that old files carry: the causal mask.
IGNORED = (".attn.bias", ".attn.masked_bias")
# Where the model's own tensors are; what has another name stands beside it.
INSIDE = ("wte.", "wpe.", "h.", "ln_f.", "lm_head.")

# In the order in which transformers looks for them.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
GPT2_TYPE, VARIANT_TYPE = "gpt2", "groundup_gpt2"
"""model_type in config.json: of a GPT-2, and of the variants, which have the fields norm and norm_position too."""
ADAPTER = "adapter_config.json"
TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))


def to_hugging_face(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under Hugging Face's names and shapes, on the CPU."""
    return {
        (name if name == HEAD else PREFIX + name): (tensor.T if name.endswith(CONV1D) else tensor).detach().cpu().contiguous()
        for name, tensor in weights.items()
    }


def from_hugging_face(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's state dict under our names and shapes."""
    return {
        name.removeprefix(PREFIX): (tensor.T.contiguous() if name.endswith(CONV1D) and tensor.dim() == 2 else tensor)
        for name, tensor in weights.items()
        if not name.endswith(IGNORED)
    }


def save_model(
    model: GPT2, directory: Path, end_of_text_id: int, dtype: torch.dtype = torch.float32, *, never_written: Sequence[int] = ()
) -> None:
    """
    Write model.safetensors, its numbers of the given type, config.json and generation_config.json.

    Args:
        never_written: ids that are no text, which no generation chooses.
    """
    tensors = to_hugging_face(model.state_dict())
    # Batch norm counts its batches in whole numbers.
    weights = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    config = config_to_hugging_face(model.config, end_of_text_id) | {"dtype": str(dtype).removeprefix("torch.")}
    generation: dict[str, Any] = {"bos_token_id": end_of_text_id, "eos_token_id": end_of_text_id}
    if never_written:
        generation["suppress_tokens"] = list(never_written)
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (directory / name).write_bytes(json.dumps(content, indent=2).encode())


def config_to_hugging_face(config: GPT2Config, end_of_text_id: int) -> dict[str, Any]:
    """config.json of a GPT-2, or of a variant, which has another ``model_type``: transformers refuses it as unknown."""
    kind = {"architectures": ["GPT2LMHeadModel"], "model_type": GPT2_TYPE}
    if config.is_variant:
        kind = {"model_type": VARIANT_TYPE, "norm": config.norm, "norm_position": config.norm_position}
    return {
        **kind,
        "activation_function": config.activation_function,
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
        "tie_word_embeddings": config.tie_word_embeddings,
        "dtype": "float32",
    }


def load_model(directory: Path) -> GPT2:
    """
    Read a GPT-2 from config.json and its weights, on the CPU in float32, in evaluation mode.

    The weights are model.safetensors or pytorch_model.bin, whole or in shards.

    Raises:
        CheckpointError: a file is missing or damaged, or tensors do not fit the configuration.
    """
    config, raw, origin = _read_folder(directory)
    return build_model(config, _tie(config, _renamed(raw, origin), origin), str(origin))


def read_hugging_face(directory: Path) -> Imported:
    """
    Read somebody's folder for importing: like ``load_model``, with its tokenizer and with what GPT-2 has no place for.

    The masks of old files, and tensors beside the model (a value or a classification head), are left out and listed. A
    tensor too many inside the model is refused: without it, the numbers would be others.

    Returns:
        The model, its vocabulary as long as the tokenizer's; the tokenizer is None where the folder holds none.

    Raises:
        CheckpointError: as ``load_model``; also another family's model, a LoRA adapter, weights that are not finite.
        DataError: the folder's tokenizer is not byte-level BPE.
    """
    if not directory.is_dir():
        raise CheckpointError(f"checkpoint {directory}: is no folder; give one that holds config.json and model.safetensors")
    if (directory / ADAPTER).is_file() and not any((directory / name).is_file() for name in WEIGHTS):
        raise CheckpointError(
            f"checkpoint {directory}: holds a LoRA adapter ({ADAPTER}), no model; merge it into its model first: peft's "
            "merge_and_unload(), then save_pretrained()"
        )
    config, raw, origin = _read_folder(directory)
    if config.is_variant:
        raise CheckpointError(
            f"checkpoint {directory}: is a variant of GPT-2 that groundup trained; give the whole checkpoint or its run, with "
            "its manifest.json"
        )
    named = _renamed(raw, origin)
    beside = {name for name in named if not name.startswith(INSIDE)}
    tensors = {name: checked_weight(name, tensor, str(origin)) for name, tensor in named.items() if name not in beside}
    tensors = _tie(config, tensors, origin)
    for name in VOCABULARY_ROWS:
        if name in tensors and tensors[name].shape[:1] != (config.vocab_size,):
            raise CheckpointError(
                f"checkpoint {origin}: {name} is {tuple(tensors[name].shape)}, config.json says vocab_size {config.vocab_size}"
            )
    tokenizer = load_tokenizer(directory) if _has_tokenizer(directory) else None
    config, tensors, reshaped = fit_vocabulary(config, tensors, tokenizer, f"checkpoint {directory}")
    unexpected = summarize([*(name for name in raw if name.endswith(IGNORED)), *beside])
    return Imported(
        model=build_model(config, tensors, str(origin)),
        tokenizer=tokenizer,
        format="Hugging Face folder",
        unexpected=unexpected,
        reshaped=reshaped,
    )


def summarize(names: Iterable[str]) -> tuple[str, ...]:
    """Names of tensors, those that every layer has in one: ``12 × h.*.attn.bias``."""
    counts = Counter(re.sub(r"(^|\.)(h|trf_blocks)\.\d+\.", r"\1\2.*.", name) for name in names)
    return tuple(f"{count} × {name}" if ".*." in name else name for name, count in sorted(counts.items()))


def checked_weight(name: str, tensor: Tensor, origin: str) -> Tensor:
    """
    A tensor from somebody's file in float32, contiguous, of the same shape.

    Raises:
        CheckpointError: not plain floating-point numbers, or not all finite.
    """
    # A view that repeats stored numbers would let a small file ask for all memory.
    plain = tensor.layout == torch.strided and not tensor.is_nested
    repeats = plain and tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()
    if not plain or tensor.device.type != "cpu" or not tensor.is_floating_point() or repeats:
        raise CheckpointError(
            f"checkpoint {origin}: {name} is {tensor.dtype} ({tensor.layout}), not plain floating-point weights; give a file "
            "that is not quantized"
        )
    converted = tensor.detach().float().contiguous()
    if not converted.isfinite().all():
        count = int((~converted.isfinite()).sum())
        raise CheckpointError(
            f"checkpoint {origin}: {name} has {count:,} values that are not finite; the training had diverged, or the file is "
            "damaged: give an earlier one"
        )
    return converted


def _renamed(raw: Mapping[str, Tensor], origin: Path) -> dict[str, Tensor]:
    named = from_hugging_face(raw)
    for name in raw:
        if not name.isprintable():
            raise CheckpointError(f"checkpoint {origin}: holds a tensor called {name!r}; it is damaged, use another checkpoint")
        if name.startswith(PREFIX) and name.removeprefix(PREFIX) in raw:
            raise CheckpointError(
                f"checkpoint {origin}: holds {name} twice, with and without {PREFIX!r}; use another checkpoint"
            )
    return named


def _has_tokenizer(directory: Path) -> bool:
    return any(all((directory / name).is_file() for name in names) for names in TOKENIZER_FILES)


def _tie(config: GPT2Config, tensors: Mapping[str, Tensor], origin: Path) -> dict[str, Tensor]:
    """The tensors without a stored copy of the tied head; where only the head is stored, it is the embedding too."""
    tied = dict(tensors)
    if config.tie_word_embeddings and HEAD in tied:
        head = tied.pop(HEAD)
        if not torch.equal(head.float(), tied.setdefault(EMBEDDING, head).float()):
            raise CheckpointError(
                f"checkpoint {origin}: lm_head.weight is not wte.weight, though config.json ties them; set tie_word_embeddings "
                "to false there if the head is meant to be its own"
            )
    return tied


def _read_folder(directory: Path) -> tuple[GPT2Config, dict[str, Tensor], Path]:
    """The configuration, the tensors under the file's names, and the file that named them."""
    config = read_config(directory / "config.json")
    present = [name for name in WEIGHTS if (directory / name).is_file()]
    origin = directory / (present or WEIGHTS)[0]
    if not present:
        raise CheckpointError(
            f"checkpoint {origin}: cannot be read (not found, nor {', '.join(WEIGHTS[1:])}); use another folder"
        )
    if origin.name.endswith(".index.json"):
        shards = _read_index(origin)
        _require_enough_tensors(config, sum(map(len, shards.values())), origin)
        return config, _read_shards(shards, origin), origin
    if origin.suffix == ".safetensors":
        _require_enough_tensors(config, len(_names(origin)), origin)
    raw = _read_weights(origin)
    _require_enough_tensors(config, len(raw), origin)
    return config, raw, origin


def _require_enough_tensors(config: GPT2Config, count: int, origin: Path) -> None:
    # Before anything is built: a small file must not ask for a billion layers.
    if config.n_layer > 100 + count:
        raise CheckpointError(f"checkpoint {origin}: holds {count} tensors, config.json says n_layer {config.n_layer}")


def _names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    if path.is_file() and is_pickle(path):
        return CheckpointError(
            f"checkpoint {path}: cannot be read: it is a pickle under a wrong name, and was not run; {SAVE_ADVICE}"
        )
    return CheckpointError(f"checkpoint {path}: cannot be read ({shown(error)}); use another checkpoint")


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """
    The tensors of a .safetensors file, on the CPU.

    Raises:
        CheckpointError: missing, damaged, or a pickle under this name.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from None


def _read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of model.safetensors, pytorch_model.bin or a shard of them."""
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    content = read_pickled(path)
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()
    ):
        raise CheckpointError(
            f"checkpoint {path}: holds a {type(content).__name__}, not names with their tensors; {SAVE_ADVICE}"
        )
    return dict(content)


def _read_index(path: Path) -> dict[Path, set[str]]:
    """The shards that an index names, each with the tensors it promises there."""
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not weight_map or not all(isinstance(file, str) for file in weight_map.values()):
            raise ValueError("weight_map does not give a file for each tensor")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"checkpoint {path}: cannot be read as the index of a model in shards ({shown(error)})") from None
    shards: dict[Path, set[str]] = {}
    for name, file in weight_map.items():
        # A name alone: an index from elsewhere must not make us open a file outside its folder.
        if file in ("", ".", "..") or not file.isprintable() or any(mark in file for mark in "/\\:"):
            raise CheckpointError(f"checkpoint {path}: shard {file!r} of {name} is not a plain file name beside the index")
        shards.setdefault(path.parent / file, set()).add(name)
    missing = sorted(shard.name for shard in shards if not shard.is_file())
    if missing:
        raise CheckpointError(
            f"checkpoint {path}: {len(missing)} of its {len(shards)} shards are missing: {', '.join(missing[:5])}; copy them "
            "beside it"
        )
    return shards


def _read_shards(shards: Mapping[Path, set[str]], index: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path, promised in shards.items():
        found = _read_weights(path)
        if found.keys() != promised:
            wrong = sorted(found.keys() ^ promised)
            where = "is in it, but not by the index" if wrong[0] in found else "is not in it"
            raise CheckpointError(
                f"checkpoint {path}: does not hold the {len(promised)} tensors that {index.name} says: {wrong[0]} {where}; the "
                "shards are of different models, copy them again"
            )
        tensors |= found
    return tensors


# transformers' names of the two forms of GELU.
ACTIVATIONS = {"gelu_new": "gelu_new", "gelu_pytorch_tanh": "gelu_new", "gelu": "gelu"}
# What other values of these mean is another computation than GPT-2's, or its variants'.
REQUIRED = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}


def read_config(path: Path) -> GPT2Config:
    """
    The shape of a GPT-2, or of a variant of groundup's, from a config.json.

    Raises:
        CheckpointError: missing, damaged, of another family, or of values that mean another computation.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        raw["n_inner"] = raw.get("n_inner") or 0
        _require_family(raw, path)
        for name, required in REQUIRED.items():
            if raw.get(name, required) != required:
                raise CheckpointError(f"checkpoint {path}: {name} is {raw[name]!r}, GPT-2 has {required!r}: another model")
        activation = raw.setdefault("activation_function", "gelu_new")
        if activation not in ACTIVATIONS:
            raise CheckpointError(
                f"checkpoint {path}: activation_function is {shown(activation)}, GPT-2 has gelu_new or gelu: another model"
            )
        raw["activation_function"] = ACTIVATIONS[activation]
        hints = get_type_hints(GPT2Config)
        known = {f.name: (hints[f.name], raw[f.name]) for f in fields(GPT2Config) if f.name in raw}
        for name, (kind, value) in known.items():
            is_fraction = name.endswith("pdrop")
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if kind in (bool, str) and isinstance(value, kind):
                continue
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


def _require_family(raw: Mapping[str, Any], path: Path) -> None:
    """See that a config.json is of a GPT-2, which has GPT-2's norms, or of a variant, which says its own."""
    family = raw.get("model_type")
    if isinstance(family, str) and family not in (GPT2_TYPE, VARIANT_TYPE):
        raise CheckpointError(f"checkpoint {path}: a {shown(family)} model; groundup imports GPT-2")
    if family not in (GPT2_TYPE, VARIANT_TYPE):
        raise CheckpointError(f"checkpoint {path}: model_type is {family!r}, GPT-2 has {GPT2_TYPE!r}: another model")
    for name, known in (("norm", tuple(NORMS)), ("norm_position", NORM_POSITIONS)):
        allowed = known if family == VARIANT_TYPE else known[:1]
        value = raw.get(name, known[0] if family == GPT2_TYPE else None)
        if value not in allowed:
            raise CheckpointError(
                f"checkpoint {path}: {name} is {shown(value)}, a {family} model has {' or '.join(allowed)}: another model"
            )


def require_gpt2(config: GPT2Config, form: str) -> None:
    """
    Refuse a variant where other programs are to open what is written.

    Args:
        form: what is to be written, for the message.

    Raises:
        CheckpointError: the model has norms that GPT-2 has not.
    """
    if config.is_variant:
        raise CheckpointError(
            f"export: this model has norm {config.norm} and norm_position {config.norm_position}, which {form} cannot express: "
            "whoever opens it computes GPT-2's, layer and pre; share the checkpoint's folder, which groundup opens"
        )
