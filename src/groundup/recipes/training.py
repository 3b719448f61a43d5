"""A run, set up from scratch or from its newest good checkpoint: everything that a training loop needs."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import tomli_w
import torch

from groundup import __version__
from groundup.checkpoint.commit import checkpoints, commit, newest_good, prune, remove_leftovers
from groundup.checkpoint.optimizer import load_optimizer, save_optimizer
from groundup.config.load import Settings
from groundup.config.options import (
    PREPARE_GROUPS,
    BatchOptions,
    InitialWeightsOptions,
    MachineOptions,
    ModelOptions,
    OptimizerOptions,
    RunOptions,
    SpeedOptions,
    TokenizerOptions,
)
from groundup.config.plan import Plan, plan_run
from groundup.data.batches import Windows, evaluation_batches
from groundup.data.order import ORDER_VERSION
from groundup.data.shards import Dataset, require_windows
from groundup.data.sources import RUN_HEADER, is_run
from groundup.errors import CheckpointError, ConfigError, DivergedError, ResourceError
from groundup.evaluation.measure import Evaluation, evaluate_model
from groundup.generation.generate import generate_tokens
from groundup.generation.sampling import Sampler
from groundup.interop.huggingface import load_model, save_model
from groundup.model.flops import parameter_count
from groundup.model.gpt2 import GPT2, GPT2Config, initialize
from groundup.optim.adamw import build_adamw
from groundup.recipes.initial import freeze, initial_model, require_tokenizer, starting_point
from groundup.recipes.loading import is_dataset, open_any_dataset
from groundup.recipes.machine import machine_for
from groundup.recipes.prepare import DATASET, prepare_dataset, report
from groundup.runtime.device import Machine, explained_memory_errors
from groundup.runtime.files import exclusive, existing_parent, explained_os_errors, make_directory, replace_durably
from groundup.runtime.random import derive_seed
from groundup.tokenizer.tokenizer import Tokenizer
from groundup.tracking.metrics import METRICS, rewind
from groundup.training.loop import StepResult, training_steps
from groundup.training.state import TrainState
from groundup.training.step import Forward

Say = Callable[[str], None]
CONFIG, SAMPLES, LOCK = "config.toml", "samples.jsonl", ".lock"
PICTURES = ("loss.png", "perplexity.png")


@dataclass
class Training:
    """A run, set up: iterate over it to train; evaluate, sample and save when you like."""

    run: Path
    settings: Settings
    dataset: Dataset
    machine: Machine
    model: GPT2
    forward: Forward
    optimizer: torch.optim.Optimizer
    plan: Plan
    state: TrainState
    identity: dict[str, Any]

    def __iter__(self) -> Iterator[StepResult]:
        """Train from where the run is to its planned end, one step at a time."""
        run = self.settings[RunOptions]
        return training_steps(
            self.model,
            self.forward,
            self.optimizer,
            self.state,
            self._windows("train", self.settings[BatchOptions].stride),
            self.plan,
            self.settings[OptimizerOptions],
            seed=run.seed,
            max_skipped_steps=run.max_skipped_steps,
            device=self.machine.device,
            autocast=self.machine.autocast,
        )

    def evaluate(self, should_stop: Callable[[], bool] = lambda: False) -> Evaluation | None:
        """Measure on the validation split, on at most ``max_eval_tokens``; None when a stop was asked for meanwhile."""
        batches = evaluation_batches(
            self._windows("validation"),
            self.settings[BatchOptions].per_device_eval_batch_size,
            self.machine.device,
            self.settings[RunOptions].max_eval_tokens,
        )
        counts = self.dataset.tokenizer.token_byte_counts
        return evaluate_model(self.model, batches, counts, self.machine.autocast, should_stop)

    def sample(self) -> str:
        """Continue the sample prompt; the same draw at every step, so that samples compare."""
        run, tokenizer = self.settings[RunOptions], self.dataset.tokenizer
        prompt = tokenizer.encode(run.sample_prompt).tolist() or [tokenizer.end_of_text_id]
        drawn = generate_tokens(
            self.model,
            [prompt[-self.model.config.n_positions :]],
            Sampler(temperature=0.8, top_k=50),
            seeds=[run.seed],
            max_new_tokens=run.sample_tokens,
            end_of_text_id=tokenizer.end_of_text_id,
        )
        return tokenizer.decode(choice.token for choice in drawn)

    def save(self) -> Path:
        """
        Commit a checkpoint of this step, then delete the oldest beyond ``save_total_limit``.

        While steps are skipped nothing is deleted: the last good checkpoint is among the older ones.

        Raises:
            DivergedError: a weight is not finite; the older checkpoints stay.
        """
        bad = [name for name, p in self.model.named_parameters() if not torch.isfinite(p).all()]
        if bad:
            raise DivergedError(
                f"diverged: {len(bad)} weights are not finite at step {self.state.step} (first: {bad[0]}); not saved, the "
                "checkpoints before are as they were; lower --learning-rate"
            )
        checkpoint = commit(self.run, self.state.step, self._write_checkpoint)
        if not self.state.skipped_in_a_row:
            prune(self.run, self.settings[RunOptions].save_total_limit)
        return checkpoint

    def _windows(self, split: str, stride: int = 0) -> Windows:
        length = self.model.config.n_positions
        return Windows(self.dataset.stream(split), length, stride or length)

    def _write_checkpoint(self, directory: Path) -> None:
        save_model(self.model, directory, self.dataset.tokenizer.end_of_text_id)
        self.dataset.tokenizer.save(directory)
        save_optimizer(self.optimizer, self.model, directory / "optimizer.safetensors")
        trainer_state = {
            "global_step": self.state.step,
            "epoch": self.state.samples_seen / self.plan.windows,
            "max_steps": self.plan.total_steps,
            "num_input_tokens_seen": self.state.tokens_seen,
            "state": self.state.as_dict(),
            "identity": self.identity,
            "versions": {"groundup": __version__, "torch": torch.__version__},
        }
        (directory / "trainer_state.json").write_bytes(json.dumps(trainer_state, indent=2).encode())


@contextmanager
def open_training(sources: Sequence[str], run: Path, settings: Settings, say: Say) -> Iterator[Training]:
    """
    Set a run up, from scratch or from its newest good checkpoint, and hold its directory while the block runs.

    Raises:
        ConfigError: options that contradict each other, the data or the checkpoint; a directory in use.
        DataError: sources or shards that cannot be used.
        CheckpointError: checkpoints, but no good one.
    """
    with ExitStack() as stack:
        # Errors of the set-up are explained; those of the block are the caller's.
        with explained_os_errors(run, "train"), explained_memory_errors():
            training = _set_up(stack, sources, run, settings, say)
        yield training


def _set_up(stack: ExitStack, sources: Sequence[str], run: Path, settings: Settings, say: Say) -> Training:
    """What ``open_training`` says; what must be let go of afterwards is put on the stack."""
    machine = machine_for(settings[MachineOptions], training=True)
    initial = settings[InitialWeightsOptions].init_from
    if initial and Path(initial).resolve() == run.resolve():
        raise ConfigError(
            f"init_from: {initial} is the --output-dir itself; name another folder for the run that starts from it"
        )
    if any(run.resolve() == Path(source).resolve() for source in sources):
        raise ConfigError(
            f"output_dir: {run} is the source itself; name another folder with --output-dir, for instance {run.name}-run"
        )
    created = not run.exists()
    make_directory(run)
    _require_ours(run)
    stack.enter_context(exclusive(run / LOCK, f"run {run}"))
    if created:
        stack.callback(_remove_if_empty, run)
    remove_leftovers(run)

    checkpoint = newest_good(run, say)
    start = starting_point(settings, checkpoint, say)
    settings = start.settings if start else settings
    dataset = _dataset(sources, run, settings, say, start.tokenizer if start else None)
    source, options = settings[InitialWeightsOptions].init_from, settings[ModelOptions]
    if start:
        require_tokenizer(start, dataset, source)
    require_windows(dataset, options.n_positions)
    dataset.verify()

    model_config = GPT2Config(
        vocab_size=dataset.tokenizer.vocab_size,
        **{f.name: getattr(options, f.name) for f in fields(options) if f.name != "model"},
    )
    batch, optim, run_options = settings[BatchOptions], settings[OptimizerOptions], settings[RunOptions]
    windows = Windows(dataset.stream("train"), options.n_positions, batch.stride or options.n_positions)
    plan = plan_run(options, batch, optim, run_options, windows=len(windows))
    identity = _identity(model_config, dataset, settings, plan)

    state = TrainState() if checkpoint is None else _resumed_state(checkpoint, identity)
    if checkpoint is not None:
        model = load_model(checkpoint)
    elif start is not None and start.weights is not None:
        model = initial_model(start.weights, model_config, dataset.tokenizer, source, say)
    else:
        model = _fresh_model(model_config, run_options.seed)
    model.to(machine.device)
    if frozen := freeze(model, settings[InitialWeightsOptions].freeze, settings.origins["freeze"]):
        kept = sum(model.get_parameter(name).numel() for name in frozen)
        say(f"frozen: {len(frozen)} tensors, {kept:,} of {parameter_count(model):,} parameters")
    optimizer = build_adamw(
        model, learning_rate=optim.learning_rate, beta1=optim.adam_beta1, beta2=optim.adam_beta2,
        epsilon=optim.adam_epsilon, weight_decay=optim.weight_decay,
    )  # fmt: skip
    if checkpoint is not None:
        load_optimizer(optimizer, model, checkpoint / "optimizer.safetensors")
        _say_changes(run, settings, say)
        say(f"resuming from {checkpoint.name}: {state.tokens_seen:,} tokens seen")
    _require_disk_space(run, model)
    kept_steps = -1 if checkpoint is None else state.step
    rewind(run / METRICS, kept_steps)
    rewind(run / SAMPLES, kept_steps)
    if state.step < plan.total_steps:
        _write_config(run, sources, settings, prepared_here=dataset.directory == run / DATASET)
    forward: Forward = torch.compile(model) if settings[SpeedOptions].torch_compile else model
    return Training(run, settings, dataset, machine, model, forward, optimizer, plan, state, identity)


def _dataset(sources: Sequence[str], run: Path, settings: Settings, say: Say, tokenizer: Tokenizer | None = None) -> Dataset:
    """
    The dataset to train on: the source itself, or RUN/dataset made from the sources.

    Args:
        tokenizer: that of the weights to start from, instead of the one that the option names.
    """
    if len(sources) == 1 and is_dataset(Path(sources[0])):
        dataset = open_any_dataset(Path(sources[0]), tokenizer or _given_tokenizer(settings))
        if tokenizer is None and (name := _given_tokenizer(settings)) and "request" in dataset.manifest:
            was = dataset.manifest["request"]["tokenizer"]
            if name != was:
                raise ConfigError(
                    f"tokenizer: {name!r} (from {settings.origins['tokenizer']}), but {sources[0]} was made with {was!r}; "
                    "leave --tokenizer out, or prepare the text again"
                )
        given = [f.name for group in PREPARE_GROUPS for f in fields(group) if settings.origins[f.name] != "default"]
        if idle := [name for name in given if name != "tokenizer"]:
            say(f"no effect, because {sources[0]} is prepared already: {', '.join(idle)}")
        report(dataset, say)
        return dataset
    # Nothing was learned from the dataset of a run without checkpoints: it may still change.
    fresh = not any(run.glob("checkpoint-*"))
    if tokenizer is None and settings[InitialWeightsOptions].init_from and _given_tokenizer(settings) is None:
        raise ConfigError(
            f"tokenizer: {settings[InitialWeightsOptions].init_from} holds none; name the one that it was trained with, "
            "usually --tokenizer gpt2"
        )
    return prepare_dataset(sources, run / DATASET, settings, say, replace=fresh, tokenizer=tokenizer)


def _given_tokenizer(settings: Settings) -> str | None:
    """The tokenizer option, where somebody gave it."""
    return None if settings.origins["tokenizer"] == "default" else settings[TokenizerOptions].tokenizer


def _fresh_model(config: GPT2Config, seed: int) -> GPT2:
    with torch.device("meta"):
        model = GPT2(config)
    model.to_empty(device="cpu")
    # Initial weights are drawn on the CPU, so that they are the same for every device.
    initialize(model, torch.Generator().manual_seed(derive_seed(seed, "init")))
    return model


def _identity(config: GPT2Config, dataset: Dataset, settings: Settings, plan: Plan) -> dict[str, Any]:
    """What must not change between the parts of one run."""
    dropout = max(config.resid_pdrop, config.embd_pdrop, config.attn_pdrop) > 0
    initial = settings[InitialWeightsOptions]
    return {
        **asdict(config),
        **({"init_from": initial.init_from} if initial.init_from else {}),
        **({"freeze": list(initial.freeze)} if initial.freeze else {}),
        # A pass draws one mask for all its windows.
        **({"per_device_train_batch_size": settings[BatchOptions].per_device_train_batch_size} if dropout else {}),
        "tokenizer_sha256": dataset.tokenizer.sha256,
        "dataset_sha256": dataset.identity,
        "seed": settings[RunOptions].seed,
        "total_batch_tokens": plan.tokens_per_step,
        "stride": settings[BatchOptions].stride or config.n_positions,
        "order_version": ORDER_VERSION,
    }


def _resumed_state(checkpoint: Path, identity: dict[str, Any]) -> TrainState:
    path = checkpoint / "trainer_state.json"
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        state, was = TrainState(**saved["state"]), saved["identity"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {path}: cannot be read ({error}); use another checkpoint") from None
    # Options that are younger than the checkpoint had their default.
    was = {f.name: f.default for f in fields(GPT2Config)} | was
    keys = sorted(was.keys() | identity.keys())
    if differences := [f"{k}: {was.get(k)} → {identity.get(k)}" for k in keys if was.get(k) != identity.get(k)]:
        raise ConfigError(
            f"run {checkpoint.parent}: cannot resume {checkpoint.name} with changed {'; '.join(differences)}; give the "
            f"values it was started with (they are in {checkpoint.parent / CONFIG}, which --config reads), or another "
            "--output-dir for a new run"
        )
    return state


def _say_changes(run: Path, settings: Settings, say: Say) -> None:
    """Options that may change on resume, and did, are said."""
    import tomllib

    try:
        before = tomllib.loads((run / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    was = {key: value for table in before.values() if isinstance(table, dict) for key, value in table.items()}
    now = {key: list(value) if isinstance(value, tuple) else value for key, value in settings.flat().items()}
    for key in sorted(was.keys() & now.keys()):
        if was[key] != now[key]:
            say(f"changed since this run was started: {key} {was[key]} → {now[key]}")


def _write_config(run: Path, sources: Sequence[str], settings: Settings, *, prepared_here: bool) -> None:
    """Write every option that took effect; those of preparing did only where the run prepared its data."""
    document: dict[str, Any] = {"sources": list(sources)}
    # With somebody's weights comes their tokenizer: the options about one had no effect.
    unused: tuple[type, ...] = (TokenizerOptions,) if settings[InitialWeightsOptions].init_from else ()
    unused = unused if prepared_here else PREPARE_GROUPS
    for group, options in settings.groups.items():
        name = group.__name__.removesuffix("Options").lower()
        document[name] = {
            key: value
            for key, value in asdict(options).items()
            if value is not None and (group not in unused or settings.origins[key] != "default")
        }
    head = f"{RUN_HEADER} {__version__}); another like it, from the same folder:\n"
    head += f"# groundup train --config {run / CONFIG} --output-dir ANOTHER\n\n"
    replace_durably(run / CONFIG, (head + tomli_w.dumps(document)).encode(errors="backslashreplace"))


def _remove_if_empty(run: Path) -> None:
    """Leave no folder behind that holds nothing but the lock: a set-up that failed makes no run."""
    with contextlib.suppress(OSError):
        if [path.name for path in run.iterdir()] == [LOCK]:
            (run / LOCK).unlink()
            run.rmdir()


def _require_ours(run: Path) -> None:
    """A run's files are rewritten as it goes on: refuse a folder where files of these names are somebody else's."""
    ours = is_run(run)
    for name in (CONFIG, METRICS, SAMPLES, *PICTURES, *(path.name for path in checkpoints(run))):
        if not ours and (run / name).exists():
            raise ConfigError(
                f"output_dir: {run} holds a {name} that no run of groundup wrote, and a run would replace it; choose another "
                "--output-dir"
            )


def _require_disk_space(run: Path, model: GPT2) -> None:
    needed = 3 * 4 * parameter_count(model)  # weights and AdamW's two moments, in float32
    free = shutil.disk_usage(existing_parent(run)).free
    if free < needed:
        raise ResourceError(
            f"output_dir: {run} has {free / 2**20:,.0f} MiB free, one checkpoint takes {needed / 2**20:,.0f} MiB; free some "
            "space or choose another --output-dir"
        )
