"""Find and open what a user points at: a run, a checkpoint, a Hugging Face folder, a dataset."""

from dataclasses import dataclass
from pathlib import Path

from groundup.checkpoint.commit import MANIFEST, Say, checkpoints, verify
from groundup.data.foreign import foreign_shards, open_foreign_dataset
from groundup.data.shards import MANIFEST as DATASET_MANIFEST
from groundup.data.shards import Dataset, open_dataset
from groundup.errors import CheckpointError, ConfigError
from groundup.interop.huggingface import load_model
from groundup.model.gpt2 import GPT2
from groundup.recipes.prepare import tokenizer_named
from groundup.tokenizer.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Loaded:
    """A model with its tokenizer, and where they are from."""

    model: GPT2
    tokenizer: Tokenizer
    checkpoint: Path


def load_checkpoint(path: Path, say: Say) -> Loaded:
    """
    Open a run's newest good checkpoint, a checkpoint, or a Hugging Face GPT-2 folder with a tokenizer.json.

    Reading changes nothing: a damaged checkpoint is reported and passed over, not moved.

    Raises:
        CheckpointError: nothing there, or damaged, or model and tokenizer do not fit each other.
    """
    checkpoint = path if (path / "config.json").is_file() else _newest_readable(path, say)
    if (checkpoint / MANIFEST).is_file() or checkpoint.parent == path:
        verify(checkpoint)
    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise CheckpointError(
            f"checkpoint {checkpoint}: its tokenizer has {tokenizer.vocab_size:,} ids, the model knows "
            f"{model.config.vocab_size:,}; they belong to different models"
        )
    return Loaded(model, tokenizer, checkpoint)


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
    if not run.is_dir():
        raise CheckpointError(f"checkpoint {run}: not found; give a run's --output-dir, or a checkpoint in it")
    problems = []
    for path in reversed(checkpoints(run)):
        try:
            verify(path)
            return path
        except CheckpointError as error:
            problems.append(str(error))
            say(f"WARNING: {error}; trying an older one")
    if problems:
        raise CheckpointError(f"run {run}: none of its {len(problems)} checkpoints is good: {problems[0]}")
    raise CheckpointError(f"checkpoint {run}: no checkpoint in it; has its training saved one yet?")
