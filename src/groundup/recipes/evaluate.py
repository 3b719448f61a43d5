"""groundup evaluate: how good a model is, over every window of a validation split."""

import json
import tomllib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from groundup.config.load import Given, Settings, resolve
from groundup.config.options import PREPARE_GROUPS, EvaluationOptions, MachineOptions
from groundup.data.batches import Windows, evaluation_batches
from groundup.data.shards import Dataset, require_windows
from groundup.errors import ConfigError
from groundup.evaluation.measure import evaluate_model
from groundup.recipes.loading import Loaded, is_dataset, load_checkpoint, open_any_dataset
from groundup.recipes.machine import machine_for
from groundup.recipes.prepare import prepare_dataset
from groundup.runtime.device import explained_memory_errors

Say = Callable[[str], None]


def evaluate(path: Path, settings: Settings, say: Say) -> dict[str, Any]:
    """
    Measure a run's newest checkpoint, or a checkpoint, on every window of the validation text once.

    Returns:
        What ``evaluate --json`` prints: eval_loss, perplexity, bits_per_byte, token_accuracy, tokens.

    Raises:
        ConfigError: no data is known, or it was made with another tokenizer.
    """
    options = settings[EvaluationOptions]
    loaded = load_checkpoint(path, say)
    machine = machine_for(settings[MachineOptions], training=False)
    model = loaded.model.to(machine.device)
    length = options.n_positions or model.config.n_positions
    if length > model.config.n_positions:
        raise ConfigError(f"n_positions: {length} is more than the model's {model.config.n_positions}; give at most that")
    with TemporaryDirectory() as scratch, explained_memory_errors():
        dataset = _validation_data(options.data, loaded, Path(scratch), say) if options.data else _dataset_of_run(loaded)
        require_windows(dataset, length, ("validation",))
        dataset.verify()
        windows = Windows(dataset.stream("validation"), length, length)
        batches = evaluation_batches(windows, options.per_device_eval_batch_size, machine.device)
        result = evaluate_model(model, batches, loaded.tokenizer.token_byte_counts, machine.autocast)
    assert result is not None  # nothing asks it to stop
    measured = asdict(result)
    return {"checkpoint": str(loaded.checkpoint), "eval_loss": measured.pop("loss"), **measured}


def _dataset_of_run(loaded: Loaded) -> Dataset:
    """The dataset that a checkpoint's run was trained on; no other passes for it."""
    run = loaded.checkpoint.parent
    advice = "give --data with a dataset or validation text"
    try:
        trained_on = json.loads((loaded.checkpoint / "trainer_state.json").read_text())["identity"]["dataset_sha256"]
        sources = tomllib.loads((run / "config.toml").read_text(encoding="utf-8"))["sources"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"data: {loaded.checkpoint} belongs to no run that says its data; {advice}") from None
    path = next((path for path in (run / "dataset", Path(sources[0])) if is_dataset(path)), None)
    if path is None:
        raise ConfigError(f"data: the dataset of {loaded.checkpoint} is gone (was {run / 'dataset'} or {sources[0]}); {advice}")
    dataset = open_any_dataset(path, loaded.tokenizer)
    if dataset.identity != trained_on:
        raise ConfigError(f"data: {path} is not the dataset that {loaded.checkpoint} was trained on, it has changed; {advice}")
    return dataset


def _validation_data(data: str, loaded: Loaded, scratch: Path, say: Say) -> Dataset:
    """The dataset named, or validation text tokenized on the spot with the model's tokenizer."""
    if is_dataset(Path(data)):
        dataset = open_any_dataset(Path(data), loaded.tokenizer)
    else:
        settings = resolve(PREPARE_GROUPS, {"validation_source": Given([data], "--data")})
        dataset = prepare_dataset([], scratch / "dataset", settings, say, tokenizer=loaded.tokenizer)
    if not dataset.tokenizer.gives_the_ids_of(loaded.tokenizer):
        raise ConfigError(
            f"data: {data} was made with another tokenizer than {loaded.checkpoint} (sha256 "
            f"{dataset.tokenizer.sha256[:12]}… and {loaded.tokenizer.sha256[:12]}…); give --data the text itself"
        )
    return dataset
