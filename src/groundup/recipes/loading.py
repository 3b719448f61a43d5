"""Find and open what a user points at: a run, a checkpoint, a Hugging Face folder, a dataset."""

import tomllib
from dataclasses import dataclass
from pathlib import Path

import torch

from groundup.checkpoint.average import load_average
from groundup.checkpoint.commit import FORMAT, MANIFEST, Say, checkpoints, verify
from groundup.config.options import SelectionOptions
from groundup.data.foreign import foreign_shards, open_foreign_dataset
from groundup.data.shards import MANIFEST as DATASET_MANIFEST
from groundup.data.shards import Dataset, open_dataset
from groundup.data.sources import is_run
from groundup.errors import CheckpointError, ConfigError
from groundup.interop.huggingface import load_model
from groundup.model.gpt2 import GPT2
from groundup.recipes.prepare import tokenizer_named
from groundup.recipes.selection import best_saved
from groundup.recipes.weights import open_weights, say_report, tokenizer_hint
from groundup.tokenizer.tokenizer import Tokenizer, load_tokenizer
from groundup.tracking.metrics import METRICS, read_rows

CONFIG = "config.toml"


@dataclass(frozen=True)
class Loaded:
    """A model with its tokenizer, and where they are from."""

    model: GPT2
    tokenizer: Tokenizer
    checkpoint: Path


def load_checkpoint(path: Path, say: Say, weights: str = "trained") -> Loaded:
    """
    Open a run's newest good checkpoint, a checkpoint, or whatever else ``open_weights`` reads.

    Of a run that ends with its best checkpoint (load_best_model_at_end) it is the best. Reading changes nothing: a damaged
    checkpoint is reported and passed over, not moved.

    Args:
        weights: trained, or ema: their moving average.

    Raises:
        CheckpointError: nothing there, or damaged, or model and tokenizer do not fit each other; or no averaged weights.
        ConfigError: the files hold no tokenizer.
    """
    if not is_ours(path):
        if weights != "trained":
            raise CheckpointError(f"checkpoint {path}: only checkpoints of groundup hold averaged weights; leave --weights out")
        imported = open_weights(str(path), say)
        if imported.tokenizer is None:
            raise ConfigError(
                f"tokenizer: {path} holds none; import it with the one that it was trained with: groundup import {path} FOLDER "
                f"--tokenizer {tokenizer_hint(imported)}"
            )
        say_report(imported, say)
        return Loaded(imported.model, imported.tokenizer, path)
    checkpoint = checkpoint_of(path, say)
    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise CheckpointError(
            f"checkpoint {checkpoint}: its tokenizer has {tokenizer.vocab_size:,} ids, the model knows "
            f"{model.config.vocab_size:,}; they belong to different models"
        )
    if weights == "ema":
        own = dict(model.named_parameters()) | dict(model.named_buffers())
        average = load_average(checkpoint, own)
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(average[name])
    return Loaded(model, tokenizer, checkpoint)


def is_ours(path: Path) -> bool:
    """Whether a path is a run or a checkpoint of groundup, good or damaged; other trainers call folders alike."""
    try:
        return _is_checkpoint(path) or is_run(path) or any(_is_checkpoint(saved) for saved in checkpoints(path))
    except OSError:
        return False


def _is_checkpoint(folder: Path) -> bool:
    """By what the manifest says it is, or, where that is damaged, by the run around it."""
    manifest = folder / MANIFEST
    return manifest.is_file() and (FORMAT.encode() in manifest.read_bytes() or is_run(folder.parent))


def checkpoint_of(path: Path, say: Say) -> Path:
    """The checkpoint itself, verified, of a run or a checkpoint of groundup."""
    checkpoint = path if _is_checkpoint(path) else _newest_readable(path, say)
    verify(checkpoint)
    return checkpoint


def is_dataset(path: Path) -> bool:
    """Whether a source is a dataset, ours or another trainer's, rather than text."""
    try:
        return (path / DATASET_MANIFEST).is_file() or any(foreign_shards(path).values())
    except (OSError, ValueError):
        return False  # it is not text either, and opening it as text says why


def open_any_dataset(path: Path, tokenizer: Tokenizer | str | None) -> Dataset:
    """
    Open a dataset of ours, or .bin files of nanoGPT or llm.c.

    Args:
        tokenizer: for .bin files, which do not say theirs: a tokenizer, or an option's name for one.
    """
    if (path / DATASET_MANIFEST).is_file():
        return open_dataset(path)
    if tokenizer is None or tokenizer == "bpe":
        raise ConfigError(
            f"tokenizer: {path} holds .bin files, which do not say their tokenizer; name the one that made them, usually "
            "--tokenizer gpt2"
        )
    return open_foreign_dataset(path, tokenizer_named(tokenizer) if isinstance(tokenizer, str) else tokenizer)


def _newest_readable(run: Path, say: Say) -> Path:
    problems = []
    best = best_checkpoint(run)
    for path in ([best] if best else []) + checkpoints(run)[::-1]:
        try:
            verify(path)
            return path
        except CheckpointError as error:
            problems.append(str(error))
            say(f"WARNING: {error}; trying an older one")
    if problems:
        raise CheckpointError(f"run {run}: none of its {len(problems)} checkpoints is good: {problems[0]}")
    raise CheckpointError(f"checkpoint {run}: no checkpoint in it; has its training saved one yet?")


def best_checkpoint(run: Path) -> Path | None:
    """The best checkpoint of a run whose configuration says that it is used; None for others, and where it cannot be told."""
    try:
        document = tomllib.loads((run / CONFIG).read_text(encoding="utf-8"))
        options = SelectionOptions(**document["selection"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not options.load_best_model_at_end:
        return None
    best = best_saved(run, read_rows(run / METRICS), options)
    return run / f"checkpoint-{best.step}" if best else None
