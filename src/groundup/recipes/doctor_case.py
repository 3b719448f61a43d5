"""What doctor looks at: a run, a checkpoint, or what a training would start with. Nothing is written beside it."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from groundup.checkpoint.commit import MANIFEST
from groundup.config.load import Given, Settings, read_config_file, resolve
from groundup.config.options import (
    TRAIN_GROUPS,
    BatchOptions,
    InitialWeightsOptions,
    ModelOptions,
    OptimizerOptions,
    RunOptions,
    ScheduleOptions,
    SelectionOptions,
    TargetOptions,
    TrackingOptions,
)
from groundup.config.plan import Plan, plan_run
from groundup.config.ramp import ends
from groundup.data.batches import to_batch
from groundup.data.mixture import Corpus
from groundup.data.named import named_sources
from groundup.data.sources import RUN_HEADER, is_run
from groundup.diagnostics.data import READ_TOKENS, Text, Use
from groundup.diagnostics.subject import Subject, gpt2_subject
from groundup.errors import CheckpointError, ConfigError
from groundup.model.flops import parameter_count
from groundup.model.gpt2 import GPT2
from groundup.optim.optimizers import build_optimizer
from groundup.recipes.corpus import open_mixture
from groundup.recipes.loading import CONFIG, is_dataset, is_ours, load_checkpoint, open_any_dataset
from groundup.recipes.passes import optimizer_arguments
from groundup.recipes.prepare import DATASET
from groundup.recipes.training import InHand, Training, open_training
from groundup.tokenizer.tokenizer import Tokenizer
from groundup.tracking.metrics import METRICS, read_rows

Say = Callable[[str], None]
WINDOWS, PER_PASS, LEAST_STEPS = 4, 2, 8
"""Of the global batch of the trainings that are tried here: two passes a step."""


@dataclass(frozen=True)
class Case:
    """What is examined, opened."""

    name: str
    training: Training
    """Set up in a temporary folder, with few windows in a step, not begun."""
    subject: Subject
    plan: Plan
    """Of the whole run, as it was asked for."""
    rows: list[dict[str, Any]] | None
    """Of metrics.jsonl; None where there is no run."""
    settings: Settings
    """As they were asked for."""

    @property
    def corpus(self) -> Corpus:
        """The data."""
        return self.training.corpus

    @property
    def pretrained(self) -> bool:
        """Whether a run starts from somebody's weights."""
        return bool(self.settings[InitialWeightsOptions].init_from)

    def text(self) -> Text:
        """What of the data is looked at."""
        corpus, tokenizer = self.corpus, self.corpus.tokenizer
        manifest = corpus.parts[0].dataset.manifest if len(corpus.parts) == 1 else {}
        return Text(
            corpus.first_tokens("train", READ_TOKENS),
            corpus.first_tokens("validation", READ_TOKENS),
            tokenizer,
            sum(len(part.stream("train")) for part in corpus.parts),
            manifest.get("replaced_sequences"),
        )

    def use(self) -> Use:
        """What a run does with the data."""
        return Use(parameter_count(self.training.model), self.plan.epochs, self.pretrained)


@contextmanager
def open_case(sources: Sequence[str], settings: Settings, say: Say) -> Iterator[Case]:
    """
    Open what is to be examined.

    Args:
        sources: a run or a checkpoint of groundup's, alone; or a dataset, or text, as ``train`` takes them.
        settings: of training; for a run, those that were given on top of its own.

    Raises:
        ConfigError: options that contradict each other or the data; a checkpoint whose data is not known.
        DataError: sources or shards that cannot be used.
        CheckpointError: checkpoints, but no good one.
    """
    path = Path(sources[0]) if len(sources) == 1 else None
    with TemporaryDirectory(prefix="groundup-doctor-") as scratch:
        if path is not None and is_ours(path):
            opening = _open_run(path, settings, Path(scratch), say)
        else:
            opening = _open_sources(sources, settings, Path(scratch), say)
        with opening as case:
            yield case


@contextmanager
def _open_sources(sources: Sequence[str], settings: Settings, scratch: Path, say: Say) -> Iterator[Case]:
    with open_training(sources, scratch / "run", shrunk(settings), say) as training:
        subject = _subject(
            training.model, training, settings, trained=None if settings[InitialWeightsOptions].init_from else False
        )
        yield Case(", ".join(sources), training, subject, _plan(settings, training), None, settings)


@contextmanager
def _open_run(path: Path, given: Settings, scratch: Path, say: Say) -> Iterator[Case]:
    run = path.parent if (path / MANIFEST).is_file() and not is_run(path) else path
    if not is_run(run):
        raise ConfigError(f"run: {path} {_without_configuration(run / CONFIG)}; a run's configuration says what to examine: "
                          "name a run that has one, or text")  # fmt: skip
    settings = settings_of_run(run, given)
    try:
        loaded = load_checkpoint(path, say)
    except CheckpointError as error:
        if list(run.glob("checkpoint-*")):
            raise
        loaded = None
        say(f"{error}; its weights are examined as they are at the start")
    corpus = _corpus_of_run(run, settings, loaded.tokenizer if loaded else None)
    # Its shape is written out in its configuration: the weights that it started from need not be there any more.
    initial = replace(settings[InitialWeightsOptions], init_from="")
    alike = _with(
        shrunk(settings), {InitialWeightsOptions: initial, TargetOptions: replace(settings[TargetOptions], teacher="")}
    )
    with open_training([], scratch / "run", alike, say, InHand(corpus, None)) as training:
        model = loaded.model.to(training.machine.device) if loaded else training.model
        subject = _subject(model, training, settings, trained=bool(loaded) or None)
        yield Case(str(path), training, subject, _plan(settings, training), read_rows(run / METRICS), settings)


def _without_configuration(config: Path) -> str:
    """What is wrong with the configuration of a folder that has checkpoints of ours."""
    if not os.path.lexists(config):
        return f"has no run around it: there is no {config}"
    if not config.is_file():
        return f"cannot be examined: {config} is no file"
    if not config.stat().st_size:
        return f"cannot be examined: {config} is empty"
    return f"cannot be examined: {config} is not a run's or is damaged (it begins with {RUN_HEADER!r} in one)"


def settings_of_run(run: Path, given: Settings) -> Settings:
    """The options of a run, and over them those that somebody gave just now."""
    layers = read_config_file(run / CONFIG)
    layers.pop("sources", None)
    declared = given.flat()
    layers = {name: item for name, item in layers.items() if name in declared}
    own = {name for name, origin in given.origins.items() if not origin.startswith(("default", "preset", "fine-tuning"))}
    # The verb's own options are no training's.
    names = {name for group in TRAIN_GROUPS for name in group.__dataclass_fields__}
    layers |= {name: Given(declared[name], given.origins[name]) for name in own & names}
    return resolve(TRAIN_GROUPS, {name: item for name, item in layers.items() if name in names})


def shrunk(settings: Settings) -> Settings:
    """The settings of a training that is only tried: few windows in a step, nothing drawn, sent or evaluated on the way."""
    batch, length = settings[BatchOptions], settings[ModelOptions].n_positions
    asked = batch.total_batch_tokens
    windows = max(1, min(WINDOWS, min(ends(asked)) // length)) if not batch.gradient_accumulation_steps else WINDOWS
    small = replace(
        batch, total_batch_tokens=windows * length, gradient_accumulation_steps=0, per_device_train_batch_size=PER_PASS,
        per_device_eval_batch_size=PER_PASS,
    )  # fmt: skip
    asked_steps = settings[RunOptions].max_steps
    run = replace(
        settings[RunOptions], eval_steps=0, save_steps=0, max_steps=max(asked_steps, LEAST_STEPS) if asked_steps else 0
    )
    tracking = replace(settings[TrackingOptions], report_to=(), health_steps=0, sample_tokens=0)
    return _with(
        settings, {BatchOptions: small, RunOptions: run, TrackingOptions: tracking, SelectionOptions: SelectionOptions()}
    )


def _with(settings: Settings, groups: dict[type, Any]) -> Settings:
    return Settings({**settings.groups, **groups}, settings.origins)


def _corpus_of_run(run: Path, settings: Settings, tokenizer: Tokenizer | None) -> Corpus:
    """
    The data of a run, where it is.

    Raises:
        ConfigError: it is gone.
    """
    layers = read_config_file(run / CONFIG)
    named = layers["source"].value if "source" in layers else ()
    if isinstance(named, list | tuple) and named:
        if tokenizer is None:
            tokenizer = open_any_dataset(run / DATASET, None).tokenizer
        return open_mixture(named_sources(tuple(map(str, named)), str(run / CONFIG)), run / DATASET, tokenizer)
    sources = layers["sources"].value if "sources" in layers else []
    first = sources[0] if isinstance(sources, list) and sources else sources
    places = [run / DATASET, *([Path(first)] if isinstance(first, str) else [])]
    found = next((place for place in places if is_dataset(place)), None)
    if found is None:
        raise ConfigError(f"data: the dataset of {run} is gone (was {' or '.join(map(str, places))}); put it back there")
    return Corpus.of(open_any_dataset(found, tokenizer))


def _plan(settings: Settings, training: Training) -> Plan:
    """What the whole run does, as it was asked for."""
    batch = settings[BatchOptions]
    model = training.settings[ModelOptions]  # with the shape of the weights that it starts from
    per_pass = batch.per_device_train_batch_size
    if min(ends(batch.total_batch_tokens)) < model.n_positions:
        return training.plan
    return plan_run(
        model, batch, settings[ScheduleOptions], settings[RunOptions], windows=len(training.course.samples),
        per_pass=per_pass if isinstance(per_pass, int) else 1,
    )  # fmt: skip


def _subject(model: GPT2, training: Training, settings: Settings, trained: bool | None) -> Subject:
    """The model with a batch of the run's own data, its loss and its optimizer."""
    samples = training.course.samples
    tokens = samples.read(np.arange(min(WINDOWS, len(samples)), dtype=np.int64))
    batch, arguments = to_batch(tokens, training.machine.device), optimizer_arguments(settings)
    plan = _plan(settings, training)
    frozen = tuple(name for name, parameter in training.model.named_parameters() if not parameter.requires_grad)
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    return gpt2_subject(
        model, batch.input_ids, batch.labels,
        label_smoothing=settings[TargetOptions].label_smoothing_factor,
        make_optimizer=lambda copy, rate: build_optimizer(copy, **{**arguments, "learning_rate": rate}),
        learning_rate=arguments["learning_rate"], warmup_steps=plan.warmup_steps,
        max_grad_norm=settings[OptimizerOptions].max_grad_norm, trained=trained, frozen=frozen,
        seed=settings[RunOptions].seed,
    )  # fmt: skip
