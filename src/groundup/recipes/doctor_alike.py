"""What must come out the same: a batch in one pass and in several, two runs, a run that was stopped and one that was not."""

import copy
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import nn

from groundup.data.batches import Batch
from groundup.diagnostics.check import Check
from groundup.model.gpt2 import GPT2, Attention
from groundup.optim.optimizers import build_optimizer
from groundup.recipes.doctor_case import Case
from groundup.recipes.training import InHand, Training, open_training
from groundup.training.loop import StepResult
from groundup.training.step import Learner, train_step

GROUP = "equivalence"
STEPS = 4
TOLERANCE = 1e-4
"""Of the largest change of a weight: float32 sums in another order differ by some 10⁻⁶ of it."""
LOADER_SECONDS, LOADER_WINDOWS = 0.5, 32


def accumulation_check(case: Case) -> Check:
    """One step on a batch, in one pass and in several, on copies, in float32, without dropout, by plain gradient descent."""
    name, expected = "accumulation", f"the same weights to {TOLERANCE:.0e} of their change"
    model = case.training.model
    if model.config.norm == "batch":
        return Check(name, GROUP, None, "batch norm depends on how a batch is cut", expected)
    batch = Batch(case.subject.inputs, case.subject.labels)
    count = len(batch.labels)
    if count < 2:
        return Check(name, GROUP, None, "the data has one window", expected)
    ways = (((0, count),), ((0, 1), (1, count - 1)))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    whole, cut = (_stepped(model, batch, passes) for passes in ways)
    change = max((a - b).abs().max().item() for a, b in zip(whole, before, strict=True))
    apart = max((a - b).abs().max().item() for a, b in zip(whole, cut, strict=True))
    share = apart / change if change else float("inf")
    passed = share <= TOLERANCE
    measured = f"a step on {count} windows in one pass and in two: weights differ by {share:.1e} of their change"
    advice = (
        "" if passed else "the loss is not a mean over the tokens of the whole batch, or the model keeps state between passes"
    )
    return Check(name, GROUP, passed, measured, expected, advice, "" if passed else "accumulation", {"difference": share})


def _stepped(model: GPT2, batch: Batch, passes: tuple[tuple[int, int], ...]) -> list[torch.Tensor]:
    """The weights of a copy after one step."""
    twin = copy.deepcopy(model)
    for part in twin.modules():  # masks are drawn for each pass
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        elif isinstance(part, Attention):
            part.attn_pdrop = 0.0
    optimizers = build_optimizer(twin, optim="sgd", learning_rate=0.1, beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.0,
                                 weight_decay_type="decoupled", sgd_momentum=0.0, muon_momentum=0.0)  # fmt: skip
    learner = Learner(twin, twin, optimizers, nullcontext)
    train_step(learner, batch, passes, seed=0, step=1, learning_rate=0.1, max_grad_norm=0.0)
    return [parameter.detach() for parameter in twin.parameters()]


@dataclass(frozen=True)
class Trial:
    """Some steps of a training that was tried, and what its weights were afterwards."""

    losses: tuple[float, ...]
    norms: tuple[float, ...]
    weights: tuple[torch.Tensor, ...]
    tokens_per_second: float


def alike_check(first: Trial, second: Trial) -> Check:
    """Did two trainings of the same seed do the same?"""
    passed = _equal(first, second)
    measured = f"{len(first.losses)} steps twice: " + (
        "every loss, norm and weight equal" if passed else _difference(first, second)
    )
    advice = (
        "" if passed else "something is drawn without a seed, or a kernel is not deterministic; runs cannot be compared exactly"
    )
    return Check("two_runs_alike", GROUP, passed, measured, "equal, bit for bit", advice, "" if passed else "not_reproducible")


def resume_check(straight: Trial, resumed: Trial) -> Check:
    """Does a training that was stopped and went on end where one ends that was not?"""
    passed = _equal(straight, resumed)
    steps = len(straight.losses)
    measured = f"{steps} steps, and {steps // 2} with a checkpoint and {steps - steps // 2} more: "
    measured += "every loss, norm and weight equal" if passed else _difference(straight, resumed)
    advice = "" if passed else "a checkpoint does not hold all of the state; report it, with this configuration"
    return Check("resume", GROUP, passed, measured, "equal, bit for bit", advice, "" if passed else "resume")


def examine_alike(case: Case, wanted: Callable[[str], bool]) -> Iterator[Check]:
    """The equivalences that are wanted; and how fast the loader is beside the training, which is trained here anyway."""
    if wanted("accumulation"):
        yield accumulation_check(case)
    if not (wanted("two_runs_alike") or wanted("resume")):
        return
    with TemporaryDirectory(prefix="groundup-doctor-") as scratch:
        first = _straight(case, Path(scratch, "first"))
        if wanted("two_runs_alike"):
            yield alike_check(first, _straight(case, Path(scratch, "second")))
        if wanted("resume"):
            yield resume_check(first, _stopped(case, Path(scratch, "stopped")))


def measured_speed(case: Case) -> float:
    """Tokens per second of a short training."""
    with TemporaryDirectory(prefix="groundup-doctor-") as scratch:
        return _straight(case, Path(scratch, "run")).tokens_per_second


def loader_speed(case: Case) -> float:
    """Tokens per second of reading windows, without training: the quickest of many reads; other work only slows them."""
    samples, best, begun = case.training.course.samples, float("inf"), time.perf_counter()
    first = 0
    while best == float("inf") or time.perf_counter() - begun < LOADER_SECONDS:
        started = time.perf_counter()
        samples.read(np.arange(first, first + LOADER_WINDOWS, dtype=np.int64))
        best, first = min(best, time.perf_counter() - started), first + LOADER_WINDOWS
    return LOADER_WINDOWS * samples.length / best


def _straight(case: Case, folder: Path) -> Trial:
    with _again(case, folder) as training:
        return _trial(training, _steps(training, STEPS))


def _stopped(case: Case, folder: Path) -> Trial:
    with _again(case, folder) as training:
        before = _steps(training, STEPS // 2)
        training.save()
    with _again(case, folder) as training:
        return _trial(training, [*before, *_steps(training, STEPS - STEPS // 2)])


def _again(case: Case, folder: Path) -> AbstractContextManager[Training]:
    in_hand = InHand(case.corpus, case.training.teacher)
    return open_training([], folder, case.training.settings, lambda line: None, in_hand)


def _steps(training: Training, count: int) -> list[StepResult]:
    with closing(iter(training)) as steps:  # type: ignore[type-var]
        return list(itertools.islice(steps, count))


def _trial(training: Training, steps: Sequence[StepResult]) -> Trial:
    weights = tuple(parameter.detach().clone() for parameter in training.model.parameters())
    quickest = max(step.tokens / step.seconds for step in steps)
    return Trial(tuple(step.loss for step in steps), tuple(step.grad_norm for step in steps), weights, quickest)


def _equal(one: Trial, other: Trial) -> bool:
    return one.losses == other.losses and one.norms == other.norms and all(
        torch.equal(a, b) for a, b in zip(one.weights, other.weights, strict=True)
    )  # fmt: skip


def _difference(one: Trial, other: Trial) -> str:
    for step, (a, b) in enumerate(zip(one.losses, other.losses, strict=True), 1):
        if a != b:
            return f"losses differ from step {step} on, {a:.9g} and {b:.9g}"
    apart = max((a - b).abs().max().item() for a, b in zip(one.weights, other.weights, strict=True))
    return f"weights differ by up to {apart:.1e}"
