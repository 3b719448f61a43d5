"""
The commands as functions, for notebooks and scripts.

Keyword arguments are the options of docs/reference/options.md; what a command prints with ``--json`` is returned.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from groundup.config.load import Given, Settings, resolve
from groundup.config.options import (
    DOCTOR_GROUPS,
    EVALUATE_GROUPS,
    EXPORT_GROUPS,
    GENERATE_GROUPS,
    IMPORT_GROUPS,
    PREPARE_GROUPS,
    SCORE_GROUPS,
    TRAIN_GROUPS,
    WeightsOptions,
)
from groundup.data.shards import Dataset
from groundup.recipes import doctor as doctor_recipe
from groundup.recipes import evaluate as evaluate_recipe
from groundup.recipes import exporting, importing
from groundup.recipes import generate as generate_recipe
from groundup.recipes import score as score_recipe
from groundup.recipes import train as train_recipe
from groundup.recipes import training as training_recipe
from groundup.recipes.loading import Loaded, load_checkpoint
from groundup.recipes.prepare import prepare_dataset
from groundup.recipes.training import Training
from groundup.tracking.progress import progress

Sources = str | Path | Sequence[str | Path]


def prepare(sources: Sources, output_dir: str | Path, **options: Any) -> Dataset:
    """Make a dataset from text: ``groundup prepare``; with ``source=`` from sources with names and weights, and ``[]``."""
    with progress() as shown:
        return prepare_dataset(_names(sources), Path(output_dir), _settings(PREPARE_GROUPS, options), shown.say)


def train(sources: Sources, output_dir: str | Path, **options: Any) -> dict[str, Any]:
    """
    Train on text or a dataset, or go on where ``output_dir`` stopped: ``groundup train``.

    Returns:
        steps, final_checkpoint, best_checkpoint, eval_loss, num_input_tokens_seen, seconds.
    """
    settings = _settings(TRAIN_GROUPS, options)
    with progress() as shown:
        return train_recipe.train(_names(sources), Path(output_dir), settings, shown)


@contextmanager
def open_training(sources: Sources, output_dir: str | Path, **options: Any) -> Iterator[Training]:
    """
    A run that is set up, for a loop of your own::

        with groundup.open_training("my_folder", "run", max_steps=500) as training:
            for step in training:
                print(step.step, step.loss)
            print(training.evaluate())
            training.save()
            training.prune()  # keeps save_total_limit checkpoints
    """
    settings = _settings(TRAIN_GROUPS, options)
    with (
        progress() as shown,
        training_recipe.open_training(_names(sources), Path(output_dir), settings, shown.say) as training,
    ):
        yield training


def load(path: str | Path, weights: str = "trained") -> Loaded:
    """
    Model and tokenizer of a run's newest checkpoint, a checkpoint, or whatever ``groundup import`` reads.

    Args:
        weights: trained, or ema: their moving average, where the run kept one.
    """
    options = _settings((WeightsOptions,), {"weights": weights})[WeightsOptions]
    with progress() as shown:
        return load_checkpoint(Path(path), shown.say, options.weights)


def evaluate(path: str | Path, **options: Any) -> dict[str, Any]:
    """
    Measure a run or checkpoint on every validation window once: ``groundup evaluate``.

    Returns:
        eval_loss, perplexity, bits_per_byte, token_accuracy, tokens, checkpoint; and where sources have names, the same of
        each but checkpoint, under sources.
    """
    with progress() as shown:
        return evaluate_recipe.evaluate(Path(path), _settings(EVALUATE_GROUPS, options), shown.say)


def import_model(source: str | Path, target: str | Path, **options: Any) -> dict[str, Any]:
    """
    Make a checkpoint from other people's weights: ``groundup import``.

    Returns:
        format, parameters, vocab_size, n_positions, missing, unexpected, reshaped, checkpoint.
    """
    with progress() as shown:
        return importing.import_model(str(source), Path(target), _settings(IMPORT_GROUPS, options), shown.say)


def export(path: str | Path, target: str | Path, **options: Any) -> dict[str, Any]:
    """
    Write a run or checkpoint for other programs and read it back: ``groundup export``.

    Returns:
        format, dtype, parameters, bytes, largest_logit_difference, path.
    """
    with progress() as shown:
        return exporting.export(Path(path), Path(target), _settings(EXPORT_GROUPS, options), shown.say)


def generate(path: str | Path, **options: Any) -> dict[str, Any]:
    """
    Continue ``prompt`` (a text or several), or fill the hole between ``prefix`` and ``suffix``: ``groundup generate``.

    Returns:
        completions (prompt, suffix, text, token_ids, finish_reason, stop_string, logprobs, score), tokens_per_second,
        checkpoint. ``prompt`` is a hole's prefix; ``suffix`` is None where there is none.
    """
    with progress() as shown:
        settings = _settings(GENERATE_GROUPS, options)
        return generate_recipe.generate(Path(path), settings, shown.say, stream=lambda text: None)


def score(path: str | Path, **options: Any) -> dict[str, Any]:
    """
    How surprised a run or checkpoint is by each token of ``text`` (a text or several): ``groundup score``.

    Returns:
        texts (text, tokens, loss, perplexity, bits_per_byte), checkpoint.
    """
    with progress() as shown:
        return score_recipe.score(Path(path), _settings(SCORE_GROUPS, options), shown.say)


def doctor(sources: Sources = (), **options: Any) -> dict[str, Any]:
    """
    Examine a run, a checkpoint or what a training would start with, or, without sources, this machine: ``groundup doctor``.

    Returns:
        checks (name, group, passed, measured, expected, advice, culprit, details), passed, failed, culprits.
    """
    with progress() as shown:
        return doctor_recipe.doctor(_names(sources), _settings(DOCTOR_GROUPS, options), shown.say)


def _names(sources: Sources) -> list[str]:
    return [str(sources)] if isinstance(sources, str | Path) else [str(source) for source in sources]


def _settings(groups: tuple[type, ...], options: dict[str, Any]) -> Settings:
    return resolve(groups, {name: Given(value, f"argument {name}") for name, value in options.items()})
