"""Where experiments are carried out: small texts, small models, one thread, nothing printed."""

import hashlib
import json
import math
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from groundup.config.load import Given, resolve
from groundup.config.options import PREPARE_GROUPS, TRAIN_GROUPS
from groundup.data.sources import PYTHON_STDLIB, ReadOptions, SourceReport, documents
from groundup.errors import DataError, DivergedError
from groundup.lab.experiment import Measured, Options

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from groundup.recipes.training import Training

TEXT_BYTES = {"train": 1_200_000, "little": 6_000, "validation": 150_000}
"""How much of each text is used: most of it, a little of it to be read again and again, and what no run has read."""
LARGEST_DOCUMENT = 60_000
"""Characters; a larger file would be a text by itself."""

# Float32 and the processor, so that anybody can repeat it; a model that trains a step in 10 ms.
BASE: dict[str, Any] = {
    "n_layer": 2,
    "n_head": 4,
    "n_embd": 64,
    "n_positions": 64,
    "total_batch_tokens": 512,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 64,
    "learning_rate": 3e-3,
    "max_steps": 200,
    "bf16": False,
    "device": "cpu",
    "max_eval_tokens": 8192,
    "spike_threshold": 0,
    "eval_steps": 0,
    "save_steps": 0,
    "sample_tokens": 0,
}
EVALUATIONS = 6
"""Of a run, besides that before its first step."""
POINTS = 40
"""Of a curve of the training loss: each is a mean over the steps since the one before."""


@dataclass(frozen=True)
class Bench:
    """Datasets by name, and a place for runs, all gone afterwards."""

    folder: Path
    digest: str
    """Of the texts."""
    kept: dict[int, Any] = field(default_factory=dict)
    """What an experiment makes once for all settings of a seed."""

    @contextmanager
    def training(self, options: Options, seed: int, text: str = "train") -> "Iterator[Training]":
        """A run that is set up, for a loop of one's own; nothing is printed, and its folder goes when the block ends."""
        from groundup.recipes.training import open_training

        values = {**BASE, **options, "seed": seed}
        settings = resolve(TRAIN_GROUPS, {name: Given(value, f"argument {name}") for name, value in values.items()})
        with (
            TemporaryDirectory(dir=self.folder) as run,
            open_training([str(self.folder / text)], Path(run) / "run", settings, lambda line: None) as training,
        ):
            yield training


def train(bench: Bench, options: Options, seed: int) -> Measured:
    """
    Train and evaluate: the usual measurement of an experiment.

    ``text`` among the options names the text to read, by default ``train``. A run that diverges is measured as far as it got.

    Returns:
        step and loss of the training curve; eval_step and eval_loss, from step 0 on; initial_loss, final_loss (validation),
        train_loss (the last tenth of the steps), best_loss, accuracy (validation), diverged, seconds (of the steps).
    """
    options = dict(options)
    with bench.training(options, seed, options.pop("text", "train")) as training:
        return measured_run(training)


def measured_run(training: "Training", each: Callable[[Any], None] = lambda step: None) -> Measured:
    """
    Train a run to its end, as ``train`` says.

    Args:
        each: shown every step's result.
    """
    total = training.plan.total_steps
    due = {round(total * number / EVALUATIONS) for number in range(1, EVALUATIONS + 1)}
    losses, seconds, diverged = [], 0.0, False
    evaluations = [(0, _evaluated(training))]
    try:
        for step in training:
            each(step)
            losses.append(step.loss)
            seconds += step.seconds
            if step.step in due:
                evaluations.append((step.step, _evaluated(training)))
    except DivergedError:
        diverged = True
    if evaluations[-1][0] < training.state.step:
        evaluations.append((training.state.step, _evaluated(training)))
    last = losses[-max(1, len(losses) // 10) :]
    eval_losses = [loss for _, (loss, _) in evaluations]
    steps, curve = thinned(losses)
    return {
        "step": steps,
        "loss": [rounded(loss) for loss in curve],
        "eval_step": [step for step, _ in evaluations],
        "eval_loss": [rounded(loss) for loss in eval_losses],
        "initial_loss": rounded(eval_losses[0]),
        "final_loss": rounded(eval_losses[-1]),
        "best_loss": rounded(min(eval_losses)),
        "train_loss": rounded(sum(last) / len(last)),
        "accuracy": rounded(evaluations[-1][1][1]),
        "diverged": diverged,
        "seconds": round(seconds, 2),
    }


def validation_windows(training: "Training", count: int) -> "npt.NDArray[np.int64]":
    """At most so many windows of validation text, spread evenly, (N, T + 1): the same for every run of one shape."""
    import numpy as np

    windows = next(iter(training.corpus.validation_windows(training.model.config.n_positions).values()))
    return windows.tokens(np.linspace(0, len(windows) - 1, min(count, len(windows)), dtype=np.int64))


def thinned(losses: list[float]) -> tuple[list[int], list[float]]:
    """A curve of at most ``POINTS`` points, (last step, mean loss) of as many groups of steps."""
    ends = sorted({round(len(losses) * number / POINTS) for number in range(1, POINTS + 1)} - {0})
    groups = [losses[first:end] for first, end in zip([0, *ends], ends, strict=False)]
    return ends, [sum(group) / len(group) for group in groups]


def rounded(value: float) -> float | None:
    """Six digits, as JSON can hold them."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _evaluated(training: "Training") -> tuple[float, float]:
    """Loss and token accuracy on validation text."""
    result = training.evaluate()
    assert result is not None  # nobody asks it to stop
    return result.loss, result.token_accuracy


@contextmanager
def opened_bench() -> Iterator[Bench]:
    """
    Prepare the texts; they and all runs are gone when the block ends.

    Raises:
        DataError: this Python has no standard library to read.
    """
    with TemporaryDirectory(prefix="groundup-lab-") as place, one_thread():
        folder = Path(place)
        texts = read_texts()
        _prepare(folder, texts)
        digest = hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()
        yield Bench(folder, digest)


def read_texts() -> dict[str, list[str]]:
    """
    Documents for training, a part of these, and documents for validation, from Python's standard library.

    Which file is for what depends on its name alone.

    Raises:
        DataError: there are none.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found = {document.name: document for document in documents(PYTHON_STDLIB, ReadOptions(), SourceReport())}
    texts: dict[str, list[str]] = {"train": [], "validation": []}
    room = {name: TEXT_BYTES[name] for name in texts}
    for name in sorted(found, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if all(left < TEXT_BYTES[part] / 20 for part, left in room.items()):
            break  # nearly full; reading the whole library would take longer than a run
        text = "".join(found[name].open())
        part = "validation" if hashlib.sha256(name.encode()).digest()[0] < 28 else "train"
        if len(text) <= min(LARGEST_DOCUMENT, room[part]):
            texts[part].append(text)
            room[part] -= len(text)
    if not texts["train"] or not texts["validation"]:
        raise DataError(f"{PYTHON_STDLIB}: no Python files below {root}; the labs read them; use a Python that has its library")
    return {**texts, "little": ["".join(texts["train"])[: TEXT_BYTES["little"]]]}


def _prepare(folder: Path, texts: Mapping[str, list[str]]) -> None:
    """Datasets of bytes, ``train`` and ``little``, with the same validation text."""
    from groundup.recipes.prepare import prepare_dataset

    for name, contents in texts.items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in contents)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    given = {"tokenizer": "byte", "validation_source": str(folder / "validation.jsonl"), "workers": 1}
    for name in ("train", "little"):
        settings = resolve(PREPARE_GROUPS, {key: Given(value, f"argument {key}") for key, value in given.items()})
        prepare_dataset([str(folder / f"{name}.jsonl")], folder / name, settings, lambda line: None)


@contextmanager
def one_thread() -> Iterator[None]:
    """Models this small wait for their own threads; and one thread adds in the same order everywhere."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
