"""A run, set up from scratch or from its newest good checkpoint: everything that a training loop needs."""

import contextlib
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from groundup import __version__
from groundup.checkpoint.average import load_average, save_average
from groundup.checkpoint.commit import commit, newest_good, prune, remove_leftovers
from groundup.checkpoint.optimizer import load_optimizer, save_optimizer
from groundup.config.load import Settings
from groundup.config.options import (
    BatchOptions,
    CodeOptions,
    InitialWeightsOptions,
    MachineOptions,
    ModelOptions,
    OptimizerOptions,
    RunOptions,
    ScheduleOptions,
    SelectionOptions,
    SpeedOptions,
    SpikeOptions,
    TargetOptions,
    TrackingOptions,
)
from groundup.config.plan import Plan, plan_run
from groundup.config.rules import FIGURES
from groundup.data.batches import Samples, evaluation_batches_by_source
from groundup.data.fim import FillInTheMiddle
from groundup.data.mixture import Corpus, Mixture
from groundup.errors import ConfigError, DivergedError
from groundup.evaluation.measure import Evaluation, evaluate_sources
from groundup.generation.generate import generate_tokens
from groundup.generation.sampling import Sampler
from groundup.interop.huggingface import load_model, save_model
from groundup.model.checkpointed import checkpoint_activations
from groundup.model.flops import parameter_count
from groundup.model.gpt2 import GPT2, GPT2Config
from groundup.model.initial import initialize
from groundup.model.variants import build_gpt2, caveats
from groundup.optim.optimizers import build_optimizer
from groundup.recipes.corpus import corpus_of_run
from groundup.recipes.initial import Start, freeze, initial_model, larger, require_tokenizer, starting_point
from groundup.recipes.machine import machine_for
from groundup.recipes.passes import optimizer_arguments, passes_for
from groundup.recipes.prepare import DATASET, sources_with_names
from groundup.recipes.record import (
    LOCK,
    SAMPLES,
    TRAINER_STATE,
    identity_of,
    own_left_out,
    read_trainer_state,
    require_disk_space,
    require_identity,
    require_ours,
    say_changes,
    write_config,
)
from groundup.recipes.schedule import schedule_of
from groundup.recipes.selection import best_saved, kept
from groundup.recipes.teacher import Teacher, open_teacher
from groundup.runtime.device import Machine, explained_memory_errors
from groundup.runtime.files import exclusive, explained_os_errors, make_directory
from groundup.runtime.random import derive_seed
from groundup.tokenizer.special import FIM_TOKENS, never_written, usable_ids
from groundup.tokenizer.tokenizer import Tokenizer
from groundup.tracking.metrics import METRICS, read_rows, rewind
from groundup.training.average import WeightAverage
from groundup.training.loop import Course, Range, StepResult, training_steps
from groundup.training.state import TrainState
from groundup.training.step import Learner

Say = Callable[[str], None]


@dataclass
class Training:
    """A run, set up: iterate over it to train; evaluate, sample and save when you like."""

    run: Path
    settings: Settings
    corpus: Corpus
    tokenizer: Tokenizer
    machine: Machine
    learner: Learner
    teacher: Teacher | None
    average: WeightAverage | None
    course: Course
    eval_batch_size: int
    state: TrainState
    identity: dict[str, Any]

    @property
    def model(self) -> GPT2:
        """The model that is trained."""
        return self.learner.model

    @property
    def plan(self) -> Plan:
        """What the run does, in numbers."""
        return self.course.plan

    def __iter__(self) -> Iterator[StepResult]:
        """Train from where the run is to its planned end, one step at a time."""
        return training_steps(self.learner, self.state, self.course, self.average)

    def source_epochs(self) -> dict[str, float]:
        """How often the whole run reads each source of a mixture; empty for other data."""
        samples = self.course.samples
        samples = samples.samples if isinstance(samples, FillInTheMiddle) else samples
        return samples.epochs(self.plan.total_windows) if isinstance(samples, Mixture) else {}

    def evaluate(self, should_stop: Callable[[], bool] = lambda: False) -> Evaluation | None:
        """Measure on the validation split, on at most ``max_eval_tokens``; None when a stop was asked for meanwhile."""
        batches = evaluation_batches_by_source(
            self.corpus.validation_windows(self.model.config.n_positions),
            self.eval_batch_size,
            self.machine.device,
            self.settings[RunOptions].max_eval_tokens,
        )
        return evaluate_sources(self.model, batches, self.tokenizer.token_byte_counts, self.machine.autocast, should_stop)

    def evaluate_average(self, should_stop: Callable[[], bool] = lambda: False) -> Evaluation | None:
        """As ``evaluate``, with the averaged weights; None also where the run keeps none."""
        if self.average is None:
            return None
        with self.average.applied(self.model):
            return self.evaluate(should_stop)

    def sample(self) -> str:
        """Continue the sample prompt; the same draw at every step, so that samples compare."""
        tracking, tokenizer = self.settings[TrackingOptions], self.tokenizer
        prompt = tokenizer.encode(tracking.sample_prompt).tolist() or [tokenizer.end_of_text_id]
        drawn = generate_tokens(
            self.model,
            [prompt[-self.model.config.n_positions :]],
            Sampler(temperature=0.8, top_k=50),
            seeds=[self.settings[RunOptions].seed],
            max_new_tokens=tracking.sample_tokens,
            end_of_text_id=tokenizer.end_of_text_id,
            usable_ids=usable_ids(tokenizer),
        )
        return tokenizer.decode(choice.token for choice in drawn)

    def save(self) -> Path:
        """
        Commit a checkpoint of this step.

        Raises:
            DivergedError: a weight is not finite; the older checkpoints stay.
        """
        own = [*self.model.named_parameters(), *self.model.named_buffers()]
        bad = [name for name, tensor in own if not torch.isfinite(tensor).all()]
        if bad:
            raise DivergedError(
                f"diverged: {len(bad)} weights are not finite at step {self.state.step} (first: {bad[0]}); not saved, the "
                "checkpoints before are as they were; lower --learning-rate"
            )
        return commit(self.run, self.state.step, self._write_checkpoint)

    def prune(self) -> None:
        """
        Delete the oldest checkpoints beyond ``save_total_limit``; with ``load_best_model_at_end`` not the best.

        While steps are skipped nothing is deleted: the last good checkpoint is among the older ones.
        """
        selection = self.settings[SelectionOptions]
        if not self.state.skipped_in_a_row:
            rows = read_rows(self.run / METRICS)
            best = best_saved(self.run, rows, selection) if selection.load_best_model_at_end else None
            prune(self.run, kept(self.run, self.settings[RunOptions].save_total_limit, best))

    def _write_checkpoint(self, directory: Path) -> None:
        save_model(self.model, directory, self.tokenizer.end_of_text_id, never_written=never_written(self.tokenizer))
        self.tokenizer.save(directory)
        save_optimizer(self.learner.optimizers.parts, self.model, directory / "optimizer.safetensors")
        if self.average is not None:
            save_average(self.average.tensors, directory)
        trainer_state = {
            "global_step": self.state.step,
            "epoch": self.state.samples_seen / self.plan.windows,
            "max_steps": self.plan.total_steps,
            "num_input_tokens_seen": self.state.tokens_seen,
            "train_batch_size": self.plan.per_pass,
            "eval_batch_size": self.eval_batch_size,
            "state": self.state.as_dict(),
            "identity": self.identity,
            "versions": {"groundup": __version__, "torch": torch.__version__},
        }
        (directory / TRAINER_STATE).write_bytes(json.dumps(trainer_state, indent=2).encode())


@dataclass(frozen=True)
class InHand:
    """What a run that goes back has open already: its weights are not among it, and their memory is free."""

    corpus: Corpus
    teacher: Teacher | None


@contextmanager
def open_training(
    sources: Sequence[str], run: Path, settings: Settings, say: Say, in_hand: InHand | None = None
) -> Iterator[Training]:
    """
    Set a run up, from scratch or from its newest good checkpoint, and hold its directory while the block runs.

    Args:
        in_hand: of the same run, which left off to go back; it is not opened again.

    Raises:
        ConfigError: options that contradict each other, the data or the checkpoint; a directory in use.
        DataError: sources or shards that cannot be used.
        CheckpointError: checkpoints, but no good one.
    """
    with ExitStack() as stack:
        # Errors of the set-up are explained; those of the block are the caller's.
        with explained_os_errors(run, "train"), explained_memory_errors():
            training = _set_up(stack, sources, run, settings, say, in_hand)
        yield training


def _set_up(
    stack: ExitStack, sources: Sequence[str], run: Path, settings: Settings, say: Say, in_hand: InHand | None
) -> Training:
    """What ``open_training`` says; what must be let go of afterwards is put on the stack."""
    machine = machine_for(settings[MachineOptions], training=True, speed=settings[SpeedOptions])
    stack.enter_context(machine.float32_products())
    _take_place(stack, sources, run, settings)
    checkpoint = newest_good(run, say)
    start = starting_point(settings, checkpoint, say)
    settings = start.settings if start else settings
    corpus = in_hand.corpus if in_hand else corpus_of_run(sources, run, settings, say, start.tokenizer if start else None)
    options, batch, run_options = settings[ModelOptions], settings[BatchOptions], settings[RunOptions]
    if start:
        for part in corpus.parts:
            require_tokenizer(start, part.dataset, settings[InitialWeightsOptions].init_from)
    corpus.require_windows(options.n_positions)
    if in_hand is None:
        corpus.verify()

    tokenizer = _tokenizer(corpus, start, settings)
    config = GPT2Config(
        vocab_size=tokenizer.vocab_size,
        **{f.name: getattr(options, f.name) for f in fields(options) if f.name != "model"},
    )
    _require_parts(config, settings)
    for line in caveats(config):
        say(line)
    samples = _samples(corpus, tokenizer, settings)
    saved = read_trainer_state(checkpoint) if checkpoint else None
    teacher = in_hand.teacher if in_hand else _teacher(settings, machine, tokenizer, say)
    by_source = corpus.validation_windows(options.n_positions)
    if "ema" in by_source and settings[OptimizerOptions].ema_decay:
        raise ConfigError(
            "source: ema is what the figures of the averaged weights are called (ema_decay "
            f"{settings[OptimizerOptions].ema_decay:g}); give this source another name"
        )
    _require_metric(settings, by_source)
    validation = sum(map(len, by_source.values()))
    sizes = passes_for(settings, config, machine, validation_windows=validation, recorded=saved, say=say)
    plan = plan_run(options, batch, settings[ScheduleOptions], run_options, windows=len(samples), per_pass=sizes.train)
    identity = identity_of(config, corpus, tokenizer, settings, plan, teacher.digest if teacher else None)
    if checkpoint and saved:
        require_identity(checkpoint, saved["identity"], identity)
    state = TrainState(**saved["state"]) if saved else TrainState()

    model = _model(checkpoint, start, config, corpus.tokenizer, settings, say).to(machine.device)
    learner = _learner(model, teacher, settings, machine, say)
    average = WeightAverage(model, settings[OptimizerOptions].ema_decay) if settings[OptimizerOptions].ema_decay else None
    if checkpoint is not None:
        load_optimizer(learner.optimizers.parts, model, checkpoint / "optimizer.safetensors")
        if average is not None:
            average.tensors = {n: t.to(machine.device) for n, t in load_average(checkpoint, average.tensors).items()}
        say_changes(run, settings, say)
        say(f"resuming from {checkpoint.name}: {state.tokens_seen:,} tokens seen")
    require_disk_space(run, model, copies=4 if average else 3)  # weights, AdamW's two moments, the average
    kept_steps = -1 if checkpoint is None else state.step
    rewind(run / METRICS, kept_steps)
    rewind(run / SAMPLES, kept_steps)
    if state.step < plan.total_steps:
        prepared_here = any(part.dataset.directory == run / DATASET for part in corpus.parts)
        write_config(run, sources, settings, prepared_here=prepared_here)
    left_out = tuple((row["first_sample"], row["samples"]) for row in own_left_out(run, identity))
    course = _course(settings, plan, samples, machine, left_out)
    return Training(
        run, settings, corpus, tokenizer, machine, learner, teacher, average, course, sizes.evaluation, state, identity
    )


def _take_place(stack: ExitStack, sources: Sequence[str], run: Path, settings: Settings) -> None:
    """Make the run's directory, and hold it."""
    others = {"init_from": settings[InitialWeightsOptions].init_from, "teacher": settings[TargetOptions].teacher}
    for name, path in others.items():
        if path and Path(path).resolve() == run.resolve():
            raise ConfigError(f"{name}: {path} is the --output-dir itself; name another folder for the run")
    named = [source.path for source in sources_with_names(sources, settings)]
    if any(run.resolve() == Path(source).resolve() for source in [*sources, *named]):
        raise ConfigError(
            f"output_dir: {run} is the source itself; name another folder with --output-dir, for instance {run.name}-run"
        )
    created = not run.exists()
    make_directory(run)
    require_ours(run)
    stack.enter_context(exclusive(run / LOCK, f"run {run}"))
    if created:
        stack.callback(_remove_if_empty, run)
    remove_leftovers(run)


def _tokenizer(corpus: Corpus, start: Start | None, settings: Settings) -> Tokenizer:
    """The run's tokenizer: of data or weights, whichever has more special tokens, with those of holes to fill."""
    tokenizer = corpus.tokenizer
    if start is not None and start.tokenizer is not None:
        tokenizer = larger(start.tokenizer, tokenizer) or tokenizer
    return tokenizer.with_special_tokens(FIM_TOKENS) if settings[CodeOptions].fim_rate else tokenizer


def _require_parts(config: GPT2Config, settings: Settings) -> None:
    """
    What the set-up would find out late is asked of a model without weights: names to freeze, an optimizer that is there.

    Raises:
        ConfigError: one of them is not.
    """
    with torch.device("meta"):
        model = build_gpt2(config)
    freeze(model, settings[InitialWeightsOptions].freeze, settings.origins["freeze"])
    build_optimizer(model, **optimizer_arguments(settings))


def _require_metric(settings: Settings, sources: Collection[str]) -> None:
    """
    The metric that decides must be measured.

    Raises:
        ConfigError: it is of a source that the data has not.
    """
    metric = settings[SelectionOptions].metric_for_best_model.removeprefix("eval_")
    figure = next(name for name in FIGURES if metric.endswith(name))
    name = metric.removesuffix(figure).removesuffix("_")
    if metric not in (figure, f"ema_{figure}") and (not name or name not in sources):
        named = ", ".join(f"{source}_{figure}" for source in sources if source)
        raise ConfigError(
            f"metric_for_best_model: {metric} (from {settings.origins['metric_for_best_model']}) is of no source of the data; "
            f"this run measures {figure}" + (f", {named}" if named else "")
        )


def _samples(corpus: Corpus, tokenizer: Tokenizer, settings: Settings) -> Samples:
    """The training windows in the run's order."""
    length, seed, code = settings[ModelOptions].n_positions, settings[RunOptions].seed, settings[CodeOptions]
    samples = corpus.train_samples(length, settings[BatchOptions].stride or length, seed)
    return FillInTheMiddle(samples, tokenizer, code.fim_rate, code.fim_spm_rate, seed) if code.fim_rate else samples


def _model(
    checkpoint: Path | None, start: Start | None, config: GPT2Config, tokenizer: Tokenizer, settings: Settings, say: Say
) -> GPT2:
    """
    The weights to go on from, to start from, or random ones.

    Args:
        tokenizer: of the data.
    """
    if checkpoint is not None:
        return load_model(checkpoint)
    if start is not None and start.weights is not None:
        return initial_model(start.weights, config, tokenizer, settings[InitialWeightsOptions].init_from, say)
    with torch.device("meta"):
        model = build_gpt2(config)
    model.to_empty(device="cpu")
    # Initial weights are drawn on the CPU, so that they are the same for every device.
    generator = torch.Generator().manual_seed(derive_seed(settings[RunOptions].seed, "init"))
    initialize(model, generator, settings[InitialWeightsOptions].init)
    return model


def _teacher(settings: Settings, machine: Machine, tokenizer: Tokenizer, say: Say) -> Teacher | None:
    """The model whose predictions are learned from too, where there is one."""
    options, context = settings[TargetOptions], settings[ModelOptions].n_positions
    if not options.teacher:
        return None
    temperature, weight = options.teacher_temperature, options.teacher_weight
    return open_teacher(options.teacher, tokenizer, context, machine, temperature, weight, say)


def _learner(model: GPT2, teacher: Teacher | None, settings: Settings, machine: Machine, say: Say) -> Learner:
    """The model with its optimizer, its targets and its precision."""
    smoothing, speed = settings[TargetOptions].label_smoothing_factor, settings[SpeedOptions]
    if frozen := freeze(model, settings[InitialWeightsOptions].freeze, settings.origins["freeze"]):
        count = sum(model.get_parameter(name).numel() for name in frozen)
        say(f"frozen: {len(frozen)} tensors, {count:,} of {parameter_count(model):,} parameters")
    optimizers = build_optimizer(model, **optimizer_arguments(settings))
    if speed.activation_checkpointing:
        checkpoint_activations(model)
    forward: nn.Module = torch.compile(model) if speed.torch_compile else model  # type: ignore[assignment]
    return Learner(model, forward, optimizers, machine.autocast, smoothing, teacher)


def _course(settings: Settings, plan: Plan, samples: Samples, machine: Machine, left_out: tuple[Range, ...]) -> Course:
    """What the loop follows."""
    return Course(
        samples=samples,
        plan=plan,
        schedule=schedule_of(settings[ScheduleOptions], plan.warmup_steps, plan.decay_steps, plan.total_steps),
        max_grad_norm=settings[OptimizerOptions].max_grad_norm,
        spikes=settings[SpikeOptions],
        seed=settings[RunOptions].seed,
        device=machine.device,
        loss_scaling=machine.dtype == torch.float16,
        left_out=left_out,
        health_steps=settings[TrackingOptions].health_steps,
    )


def _remove_if_empty(run: Path) -> None:
    """Leave no folder behind that holds nothing but the lock: a set-up that failed makes no run."""
    with contextlib.suppress(OSError):
        if [path.name for path in run.iterdir()] == [LOCK]:
            (run / LOCK).unlink()
            run.rmdir()
