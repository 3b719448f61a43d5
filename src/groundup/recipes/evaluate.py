"""groundup evaluate: how good a model is, over every window of a validation split."""

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from groundup.config.load import Given, Settings, resolve
from groundup.config.options import PREPARE_GROUPS, EvaluationOptions, MachineOptions, WeightsOptions
from groundup.data.batches import evaluation_batches_by_source
from groundup.data.mixture import Corpus
from groundup.data.named import named_sources
from groundup.errors import ConfigError
from groundup.evaluation.measure import Evaluation, evaluate_sources
from groundup.recipes.corpus import open_mixture
from groundup.recipes.loading import CONFIG, Loaded, is_dataset, load_checkpoint, open_any_dataset
from groundup.recipes.machine import machine_for
from groundup.recipes.prepare import DATASET, prepare_dataset
from groundup.runtime.device import explained_memory_errors

Say = Callable[[str], None]


def evaluate(path: Path, settings: Settings, say: Say) -> dict[str, Any]:
    """
    Measure a run's newest checkpoint, or a checkpoint, on every window of the validation text once.

    Returns:
        What ``evaluate --json`` prints: eval_loss, perplexity, bits_per_byte, token_accuracy, tokens; and where sources have
        names, the same of each, under sources.

    Raises:
        ConfigError: no data is known, or it was made with another tokenizer.
    """
    options = settings[EvaluationOptions]
    loaded = load_checkpoint(path, say, settings[WeightsOptions].weights)
    machine = machine_for(settings[MachineOptions], training=False)
    model = loaded.model.to(machine.device)
    length = options.n_positions or model.config.n_positions
    if length > model.config.n_positions:
        raise ConfigError(f"n_positions: {length} is more than the model's {model.config.n_positions}; give at most that")
    with TemporaryDirectory() as scratch, explained_memory_errors():
        corpus = _validation_data(options.data, loaded, Path(scratch), say) if options.data else _data_of_run(loaded)
        corpus.require_windows(length, ("validation",))
        corpus.verify()
        windows = corpus.validation_windows(length)
        batches = evaluation_batches_by_source(windows, options.per_device_eval_batch_size, machine.device)
        result = evaluate_sources(model, batches, loaded.tokenizer.token_byte_counts, machine.autocast)
    assert result is not None  # nothing asks it to stop
    by_source = {name: _measured(part) for name, part in result.sources.items()}
    return {
        "checkpoint": str(loaded.checkpoint),
        **_measured(result),
        **({"sources": by_source} if by_source else {}),
    }


def _measured(result: Evaluation) -> dict[str, Any]:
    return {
        "eval_loss": result.loss,
        "perplexity": result.perplexity,
        "bits_per_byte": result.bits_per_byte,
        "token_accuracy": result.token_accuracy,
        "tokens": result.tokens,
    }


def _data_of_run(loaded: Loaded) -> Corpus:
    """What a checkpoint's run was trained on; nothing else passes for it."""
    run = loaded.checkpoint.parent
    advice = "give --data with a dataset or validation text"
    try:
        trained_on = json.loads((loaded.checkpoint / "trainer_state.json").read_text())["identity"]["dataset_sha256"]
        config = tomllib.loads((run / CONFIG).read_text(encoding="utf-8"))
        sources, named = config["sources"], config.get("data", {}).get("source", [])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"data: {loaded.checkpoint} belongs to no run that says its data; {advice}") from None
    if named:
        corpus = open_mixture(named_sources(named, str(run / CONFIG)), run / DATASET, loaded.tokenizer)
        path = ", ".join(named)
    else:
        places = [run / DATASET, *map(Path, sources[:1])]
        found = next((place for place in places if is_dataset(place)), None)
        if found is None:
            was = " or ".join(map(str, places))
            raise ConfigError(f"data: the dataset of {loaded.checkpoint} is gone (was {was}); {advice}")
        corpus, path = Corpus.of(open_any_dataset(found, loaded.tokenizer)), str(found)
    if corpus.identity != trained_on:
        raise ConfigError(f"data: {path} is not what {loaded.checkpoint} was trained on, it has changed; {advice}")
    return corpus


def _validation_data(data: str, loaded: Loaded, scratch: Path, say: Say) -> Corpus:
    """The dataset named, or validation text tokenized on the spot with the model's tokenizer."""
    if is_dataset(Path(data)):
        dataset = open_any_dataset(Path(data), loaded.tokenizer)
    else:
        settings = resolve(PREPARE_GROUPS, {"validation_source": Given([data], "--data")})
        dataset = prepare_dataset([], scratch / "dataset", settings, say, tokenizer=loaded.tokenizer)
    # The model's may know more: tokens that its training added.
    if not loaded.tokenizer.gives_the_ids_of(dataset.tokenizer):
        raise ConfigError(
            f"data: {data} was made with another tokenizer than {loaded.checkpoint} (sha256 "
            f"{dataset.tokenizer.sha256[:12]}… and {loaded.tokenizer.sha256[:12]}…); give --data the text itself"
        )
    return Corpus.of(dataset)
