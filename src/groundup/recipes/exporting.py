"""groundup export: a model of ours for other people's programs, checked by reading it back."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from groundup.config.load import Settings
from groundup.config.options import ExportOptions, WeightsOptions
from groundup.errors import CheckpointError, ConfigError
from groundup.interop.gguf_files import largest_logit_difference, read_gguf, write_gguf
from groundup.interop.huggingface import load_model, require_gpt2, save_model
from groundup.interop.model_card import card_of_checkpoint
from groundup.interop.openai import read_openai, write_openai
from groundup.model.flops import parameter_count
from groundup.model.gpt2 import GPT2
from groundup.recipes.importing import require_new
from groundup.recipes.loading import Loaded, load_checkpoint
from groundup.runtime.device import explained_memory_errors
from groundup.runtime.files import new_place, sync_file
from groundup.tokenizer.special import never_written

Say = Callable[[str], None]
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
# How far each form of a weight may move a logit, in standard deviations of all logits; more than this means a wrong file.
SUSPICIOUS = {"f32": 1e-3, "f16": 0.03, "bf16": 0.3, "q8_0": 0.3}


def export(path: Path, target: Path, settings: Settings, say: Say) -> dict[str, Any]:
    """
    Write a run's newest checkpoint, or a checkpoint, in another form; then read it back and compare.

    Returns:
        What ``export --json`` prints: format, dtype, parameters, bytes, largest_logit_difference, path.

    Raises:
        ConfigError: the target is taken, or the format has no such dtype.
        CheckpointError: the format has no place for this model, or what was written does not read back as it.
    """
    options = settings[ExportOptions]
    if options.format == "openai-state-dict" and options.dtype != "f32":
        raise ConfigError(f"dtype: {options.dtype} is not for openai-state-dict, which is f32; leave --dtype out")
    if options.format == "hf" and options.dtype not in DTYPES:
        raise ConfigError(f"dtype: {options.dtype} is for gguf only; hf takes {', '.join(DTYPES)}")
    if options.format == "hf" and target.suffix == ".gguf":
        raise ConfigError(f"format: hf makes a folder, and {target} is the name of a GGUF file; add --format gguf")
    require_new(target)
    loaded = load_checkpoint(path, say, settings[WeightsOptions].weights)
    require_gpt2(loaded.model.config, options.format)
    with explained_memory_errors(), new_place(target, "export") as staged:
        if options.format == "gguf":
            if options.dtype == "q8_0" and loaded.model.config.n_embd % 32:
                say("q8_0 takes rows of a multiple of 32 weights: the other matrices are f16")
            write_gguf(loaded.model, loaded.tokenizer, staged, options.dtype, target.stem)
            written = [staged]
        else:
            staged.mkdir()
            _write_folder(loaded, staged, options.format, options.dtype)
            written = sorted(staged.iterdir())
        difference, checked_by = _checked(loaded.model, staged, target, options, say)
        for file in written:
            file.chmod(0o666 & ~_umask())
            sync_file(file)
        size = sum(file.stat().st_size for file in written)
    say(f"read back by {' and '.join(checked_by)}: the largest difference of a logit is {difference:.2g}")
    return {
        "format": options.format,
        "dtype": options.dtype,
        "parameters": parameter_count(loaded.model),
        "bytes": size,
        "largest_logit_difference": difference,
        "path": str(target),
    }


def _write_folder(loaded: Loaded, directory: Path, form: str, dtype: str) -> None:
    if form == "openai-state-dict":
        write_openai(loaded.model, loaded.tokenizer, directory)
        return
    largest = torch.finfo(DTYPES[dtype]).max
    for name, weight in loaded.model.state_dict().items():
        if (most := float(weight.abs().max())) > largest:
            raise CheckpointError(
                f"export: {name} has a weight of {most:.3g}, {dtype} ends at {largest:,.0f}; give --dtype bf16 or f32"
            )
    end_of_text_id, marks = loaded.tokenizer.end_of_text_id, never_written(loaded.tokenizer)
    save_model(loaded.model, directory, end_of_text_id, DTYPES[dtype], never_written=marks)
    loaded.tokenizer.save(directory)
    (directory / "README.md").write_bytes(card_of_checkpoint(loaded.checkpoint).encode())


def _checked(model: GPT2, staged: Path, target: Path, options: ExportOptions, say: Say) -> tuple[float, list[str]]:
    """
    How far the logits of what was written are from the model's, and who read it.

    Raises:
        CheckpointError: farther than the rounding of its type explains.
    """
    difference, checked_by = largest_logit_difference(model, _read_back(staged, options.format), seed=0), ["groundup"]
    if options.format == "hf" and (theirs := _difference_in_transformers(model, staged)) is not None:
        difference = max(difference, theirs)
        checked_by.append("transformers")
    inexact = options.format == "gguf" and model.config.activation_function == "gelu"
    if inexact:
        say("llama.cpp computes GELU in its tanh form, this model the exact one: its text may differ a little")
    if not difference <= max(SUSPICIOUS[options.dtype], 0.1 * inexact) * _spread(model):
        raise CheckpointError(
            f"export: {target} does not read back as the same model (a logit differs by {difference:.3g}); nothing was "
            "written, please report this"
        )
    return difference, checked_by


def _read_back(path: Path, form: str) -> GPT2:
    if form == "gguf":
        return read_gguf(path).model
    if form == "openai-state-dict":
        return read_openai(path).model
    return load_model(path)


@torch.no_grad()
def _spread(model: GPT2) -> float:
    """Standard deviation of the logits of random ids; at least 1, which is that of a model that has hardly learned."""
    ids = torch.randint(
        model.config.vocab_size, (1, min(model.config.n_positions, 64)), generator=torch.Generator().manual_seed(0)
    )
    return max(1.0, float(model.logits(model(ids)).std()))


def _difference_in_transformers(model: GPT2, folder: Path) -> float | None:
    """The largest difference of a logit when transformers opens the folder; None where it is not installed."""
    try:
        import transformers
    except ImportError:
        return None
    library: Any = transformers
    library.utils.logging.disable_progress_bar()
    theirs = library.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs.eval()
    length = min(model.config.n_positions, 64)
    ids = torch.randint(model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return float((theirs(ids).logits - model.logits(model(ids))).abs().max())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
