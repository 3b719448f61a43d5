"""The loop, as a generator of values: whoever iterates decides when to log, evaluate and save."""

import math
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import torch

from groundup.config.options import SpikeOptions
from groundup.config.plan import Plan
from groundup.data.batches import Samples, global_batches
from groundup.errors import DivergedError
from groundup.optim.schedule import Schedule
from groundup.training.average import WeightAverage
from groundup.training.health import Health, HealthProbe
from groundup.training.loss_scale import LossScale
from groundup.training.spikes import Spike, judge
from groundup.training.state import TrainState
from groundup.training.step import Learner, Update, train_step

Range = tuple[int, int]
"""Consecutive positions in the order of the data: the first, and how many."""


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, done."""

    step: int
    loss: float
    """Mean over the global batch, nats per token."""
    grad_norm: float
    """Before clipping."""
    learning_rate: float
    tokens: int
    """Tokens in this step."""
    seconds: float
    epoch: float
    skipped: bool
    """Nothing was updated: the loss or gradient was not finite, or a spike that is not to be learned from."""
    batch_digest: str
    """Hash of the tokens of the global batch."""
    positions: Range
    """Where the batch is in the order of the data."""
    spike: Spike | None = None
    """Loss or gradient norm far above those of the last steps."""
    health: Health | None = None
    """Layer by layer, where this step was to measure it."""


@dataclass(frozen=True)
class Course:
    """What a loop follows; fixed over the run."""

    samples: Samples
    plan: Plan
    schedule: Schedule
    max_grad_norm: float
    spikes: SpikeOptions
    seed: int
    device: torch.device
    loss_scaling: bool = False
    """Scale the loss, for float16."""
    left_out: tuple[Range, ...] = ()
    """Positions that are passed over: data from before which the run went back."""
    health_steps: int = 0


def training_steps(
    learner: Learner, state: TrainState, course: Course, average: WeightAverage | None = None
) -> Iterator[StepResult]:
    """
    Train from ``state`` to the planned end, one value per step; ``state`` is up to date when a value is yielded.

    Args:
        average: of the weights; kept up to date.

    Raises:
        DivergedError: too many steps in a row were skipped.
    """
    plan = course.plan
    ranges = partial(position_ranges, plan, state.step, state.samples_seen, course.left_out)
    with closing(global_batches(course.samples, ranges(), course.device)) as batches:  # type: ignore[type-var]
        started = time.perf_counter()
        for positions, item in zip(ranges(), batches, strict=True):
            step = state.step + 1
            learning_rate = course.schedule.learning_rate_at(step)
            spike: Spike | None = None

            def may_update(loss: float, grad_norm: float) -> bool:
                nonlocal spike
                spike = judge(state.recent_losses, state.recent_norms, loss, grad_norm, course.spikes.spike_threshold)
                return spike is None or course.spikes.spike_action == "report"

            measuring = course.health_steps and step % course.health_steps == 0
            probe = HealthProbe(learner.model) if measuring else None
            scale = LossScale(state.loss_scale, state.loss_scale_good_steps) if state.loss_scale else LossScale()
            length = plan.sequence_length_at(step)
            update = train_step(
                learner, item.batch, plan.micro_batches_at(step), seed=course.seed, step=step, learning_rate=learning_rate,
                max_grad_norm=course.max_grad_norm, sequence_length=length if length < plan.n_positions else 0,
                loss_scale=scale.scale if course.loss_scaling else 1.0, may_update=may_update, probe=probe,
            )  # fmt: skip
            _account(state, course, update, positions, scale)
            if average is not None and not update.skipped:
                average.update(learner.model, state.updates)
            yield StepResult(
                step=step,
                loss=update.loss,
                grad_norm=update.grad_norm,
                learning_rate=learning_rate,
                tokens=plan.tokens_at(step),
                seconds=time.perf_counter() - started,
                epoch=state.samples_seen / plan.windows,
                skipped=update.skipped,
                batch_digest=item.digest,
                positions=positions,
                spike=spike,
                health=probe.measured() if probe is not None and not update.skipped else None,
            )
            started = time.perf_counter()  # waiting for the next batch is part of its step
            if state.skipped_in_a_row >= course.spikes.max_skipped_steps:
                raise DivergedError(
                    f"diverged: {state.skipped_in_a_row} steps in a row up to step {step} had a loss or gradient that is "
                    f"not finite, or far above those before (last loss {update.loss}, norm {update.grad_norm}); checkpoints up "
                    f"to step {step - state.skipped_in_a_row} were kept; lower --learning-rate (now "
                    f"{course.schedule.peak:g}), lengthen --warmup-steps or set --max-grad-norm 1"
                )


def position_ranges(plan: Plan, step: int, position: int, left_out: tuple[Range, ...] = ()) -> Iterator[Range]:
    """
    Where the batches of the steps after ``step`` are in the order of the data, from ``position`` on.

    A batch that would touch positions that are left out begins behind them.
    """
    for following in range(step + 1, plan.total_steps + 1):
        count = plan.windows_at(following)
        for first, length in sorted(left_out):
            if first < position + count and position < first + length:
                position = first + length
        yield position, count
        position += count


def _account(state: TrainState, course: Course, update: Update, positions: Range, scale: LossScale) -> None:
    """Bring the state up to date with a step that was done."""
    first, count = positions
    state.step += 1
    state.samples_seen = first + count
    state.tokens_seen += count * course.plan.n_positions
    state.skipped_steps += update.skipped
    # While the scale can still be lowered, an overflow says nothing of the model.
    excused = course.loss_scaling and update.overflowed and scale.scale > 1
    if not excused:
        state.skipped_in_a_row = state.skipped_in_a_row + 1 if update.skipped else 0
    if course.loss_scaling:
        after = scale.after(math.isfinite(update.grad_norm))
        state.loss_scale, state.loss_scale_good_steps = after.scale, after.good_steps
    if not update.skipped:
        # Spikes that were learned from are remembered too: a loss that stays at another level is the new normal.
        window = course.spikes.spike_window
        state.recent_losses = [*state.recent_losses, update.loss][-window:]
        state.recent_norms = [*state.recent_norms, update.grad_norm][-window:]
