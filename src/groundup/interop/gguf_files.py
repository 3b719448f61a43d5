"""
GGUF, the one-file format of llama.cpp and what is built on it: a GPT-2, out and in.

Written through the ``gguf`` package, whose tables give the names. The header is read here, with every length held against
the file's end, because the package's reader trusts what a file says: a few damaged bytes keep it busy for ever.

Sources: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (the format) and llama.cpp's src/models/gpt2.cpp (the
tensors and keys of a GPT-2).
"""

import mmap
import re
import struct
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from groundup.errors import CheckpointError, ConfigError, DataError
from groundup.interop.gguf_tokenizer import add_tokenizer, tokenizer_of
from groundup.interop.huggingface import checked_weight, require_gpt2
from groundup.interop.imported import Imported, build_model, fit_vocabulary
from groundup.interop.pickled import shown
from groundup.model.gpt2 import GPT2, GPT2Config
from groundup.tokenizer.tokenizer import Tokenizer

ARCHITECTURE = "gpt2"
DTYPES = ("f32", "f16", "bf16", "q8_0")
Q8_0_BLOCK = 32
"""Weights of a row that share one scale in q8_0."""


def write_gguf(model: GPT2, tokenizer: Tokenizer, path: Path, dtype: str, name: str) -> None:
    """
    Write a model and its tokenizer as one file that llama.cpp opens; the caller stages and renames it.

    Biases, norms and position embeddings are always f32, as llama.cpp wants them. With q8_0, matrices whose rows are not a
    multiple of 32 wide are f16. Dropout rates and ``initializer_range`` have no place in the format.

    Args:
        dtype: f32, f16, bf16 or q8_0, of the matrices.
        name: what the model is called in the file.

    Raises:
        ConfigError: ``gguf`` is not installed, or the dtype is none of these.
        CheckpointError: a variant of GPT-2, weights too large for the dtype, or a tokenizer that llama.cpp would run
            differently.
        OSError: the file cannot be written.
    """
    gguf = _library()
    if dtype not in DTYPES:
        raise ConfigError(f"dtype: {dtype!r} is none of {', '.join(DTYPES)}; choose one of them")
    require_gpt2(model.config, "GGUF")
    writer = _writer(gguf)
    _add_facts(gguf, writer, model.config, dtype, name)
    add_tokenizer(gguf, writer, tokenizer, model.config.vocab_size)
    names = _tensor_names(gguf, model.config.n_layer)
    for ours, tensor in model.state_dict().items():
        kind = _kind_of(gguf, ours, tuple(tensor.shape), dtype)
        values = tensor.detach().cpu().float().contiguous().numpy()
        writer.add_tensor(names[ours], _converted(gguf, values, kind, ours), raw_dtype=kind)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_gguf(path: Path) -> Imported:
    """
    Read a GPT-2 and its tokenizer; quantised weights become the float32 values that they stand for.

    Writing what was read and reading it again changes nothing, bit for bit: in f32 for every model; in f16, bf16 and q8_0 for
    weights that came from such a file (in q8_0, one whose scales are those of llama.cpp: the largest weight of 32 is ±127).
    A head that equals the token embedding is taken as tied to it; in a file that has quantised them apart they stay apart.

    Raises:
        ConfigError: ``gguf`` is not installed.
        CheckpointError: not a GGUF file of a GPT-2, or damaged.
    """
    gguf = _library()
    try:
        content = _read_content(path)
        config = _config_of(content)
        tensors, unexpected = _tensors_of(gguf, content, config.n_layer)
        tokenizer = tokenizer_of(content.facts, path)
    except OSError as error:
        raise CheckpointError(f"checkpoint {path}: cannot be read ({error.strerror}); give a .gguf file") from None
    except (ValueError, KeyError, TypeError, NotImplementedError, struct.error, DataError) as error:
        reason = f"has no {error.args[0]}" if isinstance(error, KeyError) else error
        raise CheckpointError(f"checkpoint {path}: damaged, or not a GGUF file of a GPT-2: {reason}; get it again") from None
    if torch.equal(tensors.get("lm_head.weight", tensors["wte.weight"]), tensors["wte.weight"]):
        tensors.pop("lm_head.weight", None)
        config = replace(config, tie_word_embeddings=True)
    config, tensors, reshaped = fit_vocabulary(config, tensors, tokenizer, f"checkpoint {path}")
    return Imported(build_model(config, tensors, str(path)), tokenizer, "GGUF file", unexpected=unexpected, reshaped=reshaped)


@torch.no_grad()
def largest_logit_difference(ours: GPT2, other: GPT2, seed: int) -> float:
    """
    How far two models are apart: the largest difference of a logit, over two windows of random ids.

    Args:
        other: may know fewer ids, where a padded vocabulary was cut; the ids that both know are compared.
    """
    rows, length = min(ours.config.vocab_size, other.config.vocab_size), ours.config.n_positions
    ids = torch.randint(rows, (2, length), generator=torch.Generator().manual_seed(seed))
    # Every position is computed, some 32 of them are turned into logits: (2, 1024, 50257) would be 400 MB.
    step = -(-length // 32)
    first, second = (
        model.logits(model(ids.to(model.wte.weight.device))[:, ::step])[..., :rows].float().cpu() for model in (ours, other)
    )
    return float((first - second).abs().max())


def _library() -> Any:
    try:
        import gguf
    except ImportError:
        raise ConfigError("gguf: the package is not installed, and GGUF files need it; pip install 'groundup[gguf]'") from None
    return gguf


def _writer(gguf: Any) -> Any:
    class Writer(gguf.GGUFWriter):  # type: ignore[misc]
        """Writes an empty list of texts too, which the package refuses: llama.cpp requires a list of merges."""

        def _pack_val(self, val: Any, vtype: Any, add_vtype: bool, sub_type: Any = None) -> bytes:
            if isinstance(val, list) and not val:
                return struct.pack("<IIQ", ARRAY, STRING, 0)
            packed: bytes = super()._pack_val(val, vtype, add_vtype, sub_type)
            return packed

    return Writer(None, ARCHITECTURE)


# Facts and tensors


def _add_facts(gguf: Any, writer: Any, config: GPT2Config, dtype: str, name: str) -> None:
    kinds = gguf.LlamaFileType
    file_types = {"f32": kinds.ALL_F32, "f16": kinds.MOSTLY_F16, "bf16": kinds.MOSTLY_BF16, "q8_0": kinds.MOSTLY_Q8_0}
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(file_types[dtype])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)


def _tensor_names(gguf: Any, n_layer: int) -> dict[str, str]:
    """GGUF's name of each of our tensors; the head's too, whether a model has one or not."""
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, n_layer)
    with torch.device("meta"):
        block = GPT2(GPT2Config(vocab_size=1, n_positions=1, n_embd=1, n_layer=1, n_head=1, tie_word_embeddings=False))
    names = {}
    for name in block.state_dict():
        for ours in [name.replace("h.0.", f"h.{layer}.", 1) for layer in range(n_layer)] if name.startswith("h.") else [name]:
            theirs = ours if ours.startswith("lm_head") else f"transformer.{ours}"
            names[ours] = table.get_name(theirs, try_suffixes=(".weight", ".bias"))
    return names


def _kind_of(gguf: Any, name: str, shape: tuple[int, ...], dtype: str) -> Any:
    """The type that a tensor is stored in."""
    kinds = gguf.GGMLQuantizationType
    if len(shape) == 1 or name == "wpe.weight":
        return kinds.F32
    if dtype == "q8_0" and shape[-1] % Q8_0_BLOCK:
        return kinds.F16
    return kinds[dtype.upper()]


def _converted(gguf: Any, values: npt.NDArray[np.float32], kind: Any, name: str) -> npt.NDArray[Any]:
    if kind == gguf.GGMLQuantizationType.F32:
        return values
    with np.errstate(over="ignore", invalid="ignore"):
        converted: npt.NDArray[Any] = gguf.quants.quantize(values, kind)
        if not np.isfinite(gguf.quants.dequantize(converted, kind)).all():
            raise CheckpointError(
                f"export: {name} has a value of {np.abs(values).max():.3g}, which {kind.name.lower()} cannot hold; write f32"
            )
    return converted


def _config_of(content: "_Content") -> GPT2Config:
    """The shape that a file's facts give; whether its tensors have it shows when the model is built."""
    sizes: dict[str, Any] = {}
    for ours, theirs in (
        ("n_positions", "context_length"),
        ("n_embd", "embedding_length"),
        ("n_layer", "block_count"),
        ("n_head", "attention.head_count"),
        ("n_inner", "feed_forward_length"),
    ):
        size = content.facts[f"{ARCHITECTURE}.{theirs}"]
        if not isinstance(size, int) or not 1 <= size <= 2**24:
            raise ValueError(f"{ARCHITECTURE}.{theirs} is {size!r}")
        sizes[ours] = size
    if sizes["n_embd"] % sizes["n_head"]:
        raise ValueError(f"embedding_length {sizes['n_embd']} is not divisible by head_count {sizes['n_head']}")
    if 12 * sizes["n_layer"] > len(content.tensors):
        raise ValueError(f"it holds {len(content.tensors)} tensors for {sizes['n_layer']:,} blocks")
    # Stored as float32: 1e-05 must not come back as 9.999999747378752e-06.
    epsilon = float(str(np.float32(content.facts[f"{ARCHITECTURE}.attention.layer_norm_epsilon"])))
    if not 0 <= epsilon < 1:
        raise ValueError(f"{ARCHITECTURE}.attention.layer_norm_epsilon is {epsilon!r}")
    if sizes["n_inner"] == 4 * sizes["n_embd"]:
        sizes["n_inner"] = 0
    rows = content.tensors["token_embd.weight"].shape[0]
    return GPT2Config(vocab_size=rows, layer_norm_epsilon=epsilon, tie_word_embeddings=False, **sizes)


def _tensors_of(gguf: Any, content: "_Content", n_layer: int) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors in float32 under our names, and the names of those that GPT-2 has no place for."""
    ours = {theirs: name for name, theirs in _tensor_names(gguf, n_layer).items()}
    # Before anything is built: a small file must not ask for a million blocks.
    if missing := sorted(ours.keys() - content.tensors.keys() - {"output.weight"}):
        raise ValueError(f"{len(missing)} tensors are missing: {', '.join(missing[:10])}")
    tensors, read = {}, 0
    for theirs, stored in content.tensors.items():
        if theirs not in ours:
            continue
        kind = gguf.GGMLQuantizationType(stored.kind)
        shape = gguf.quants.quant_shape_to_byte_shape(stored.shape, kind)
        read += prod(shape)
        # Tensors at one place would let a small file ask for any amount of memory.
        if stored.start + prod(shape) > len(content.data) or read > len(content.data):
            raise ValueError(f"{theirs} ends at byte {stored.start + prod(shape):,}, the file at {len(content.data):,}")
        raw = np.frombuffer(content.data, dtype=np.uint8, count=prod(shape), offset=stored.start).reshape(shape)
        values = gguf.quants.dequantize(raw, kind).reshape(stored.shape)
        if kind.name not in ("F32", "F16", "BF16"):
            values = values + 0.0  # a scale of 0 times -3 is -0.0, which no block can say
        tensors[ours[theirs]] = checked_weight(theirs, torch.from_numpy(np.array(values, dtype=np.float32)), "GGUF file")
    left = sorted(content.tensors.keys() - ours.keys())
    if inside := [shown(name) for name in left if re.match(r"blk\.\d", name)]:
        raise ValueError(
            f"{len(inside)} tensors of the model have no place in it, so it is another one: {', '.join(inside[:10])}"
        )
    return tensors, tuple(shown(name) for name in left)


# The file's header


@dataclass(frozen=True)
class _Stored:
    """Where a tensor is: its shape as numpy counts, its type's number, its first byte."""

    shape: tuple[int, ...]
    kind: int
    start: int


@dataclass(frozen=True)
class _Content:
    facts: dict[str, Any]
    tensors: dict[str, _Stored]
    data: mmap.mmap


# struct's letter for GGUF's number types; 8 is a string, 9 an array.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


class _Cursor:
    """Reads a header from its start, never past the file's end. Each step of it takes bytes, so it comes to an end."""

    def __init__(self, data: mmap.mmap):
        self.data, self.position = data, 0

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.position:
            raise ValueError(f"it ends at byte {len(self.data):,}, in the middle of its header")
        self.position += size
        return self.data[self.position - size : self.position]

    def number(self, letter: str) -> Any:
        return struct.unpack(f"<{letter}", self.take(struct.calcsize(f"<{letter}")))[0]

    def string(self) -> str:
        return self.take(self.number("Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.number(_letter(kind))
        kind, count = self.number("I"), self.number("Q")
        if kind == STRING:
            return [self.string() for _ in range(count)]
        letter = _letter(kind)
        return np.frombuffer(self.take(count * struct.calcsize(f"<{letter}")), dtype=f"<{letter}")


def _letter(kind: int) -> str:
    if kind not in SCALARS:
        raise ValueError(f"a value in it is of type {kind}, which does not exist here")
    return SCALARS[kind]


def _read_content(path: Path) -> _Content:
    """
    The facts of a file, and where its tensors are.

    Raises:
        ValueError, KeyError, OSError: it is damaged, or no GGUF file.
        CheckpointError: it is another model's, or a part.
    """
    with path.open("rb") as file:
        if path.stat().st_size < 24:
            raise ValueError("it is too short")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    cursor = _Cursor(data)
    if (magic := cursor.take(4)) != b"GGUF":
        raise ValueError(f"it starts with {magic!r}, not with GGUF")
    if (version := cursor.number("I")) not in (2, 3):
        raise ValueError(f"version {version}, only little-endian 2 and 3 are known")
    tensor_count, fact_count = cursor.number("Q"), cursor.number("Q")
    facts: dict[str, Any] = {}
    for _ in range(fact_count):
        name = cursor.string()
        if name in facts:
            raise ValueError(f"{name} is there twice")
        facts[name] = cursor.value(cursor.number("I"))
    places = []
    for _ in range(tensor_count):
        name, dimensions = cursor.string(), cursor.number("I")
        if not 1 <= dimensions <= 4:
            raise ValueError(f"{name} has {dimensions} dimensions")
        shape = tuple(cursor.number("Q") for _ in range(dimensions))
        places.append((name, shape[::-1], cursor.number("I"), cursor.number("Q")))
    # A file that is whole, but another model's or a part, is named as such.
    if (architecture := facts["general.architecture"]) != ARCHITECTURE:
        raise CheckpointError(f"checkpoint {path}: is a {architecture} model, groundup reads GPT-2 (general.architecture gpt2)")
    if (parts := facts.get("split.count", 1)) > 1:
        raise CheckpointError(f"checkpoint {path}: is one of {parts} parts; put them together with llama-gguf-split --merge")
    alignment = facts.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= 2**20:
        raise ValueError(f"general.alignment is {alignment!r}")
    start = -(-cursor.position // alignment) * alignment
    tensors = {name: _Stored(shape, kind, start + offset) for name, shape, kind, offset in places}
    if len(tensors) != tensor_count:
        raise ValueError("two tensors have the same name")
    return _Content(facts, tensors, data)
