"""The loop, as a generator of values: whoever iterates decides when to log, evaluate and save."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass

import torch

from groundup.config.options import OptimizerOptions
from groundup.config.plan import Plan
from groundup.data.batches import Windows, global_batches
from groundup.errors import DivergedError
from groundup.model.gpt2 import GPT2
from groundup.optim.schedule import learning_rate_at
from groundup.training.state import TrainState
from groundup.training.step import Forward, train_step


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
    """The loss or gradient was not finite, and nothing was updated."""
    batch_digest: str
    """Hash of the tokens of the global batch."""


def training_steps(
    model: GPT2,
    forward: Forward,
    optimizer: torch.optim.Optimizer,
    state: TrainState,
    windows: Windows,
    plan: Plan,
    options: OptimizerOptions,
    *,
    seed: int,
    max_skipped_steps: int,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[object]],
) -> Iterator[StepResult]:
    """
    Train from ``state`` to the planned end, one value per step; ``state`` is up to date when a value is yielded.

    Raises:
        DivergedError: too many steps in a row were not finite.
    """
    batches = global_batches(
        windows, seed=seed, first_sample=state.samples_seen, windows_per_step=plan.windows_per_step, device=device
    )
    with closing(batches):  # type: ignore[type-var]
        while state.step < plan.total_steps:
            started = time.perf_counter()
            step = state.step + 1
            learning_rate = learning_rate_at(
                step,
                kind=options.lr_scheduler_type,
                peak=options.learning_rate,
                warmup_steps=plan.warmup_steps,
                total_steps=plan.total_steps,
                min_rate=options.min_lr_rate,
            )
            item = next(batches)
            update = train_step(
                model, forward, optimizer, item.batch, plan.micro_batches, autocast,
                seed=seed, step=step, learning_rate=learning_rate, max_grad_norm=options.max_grad_norm,
            )  # fmt: skip
            state.step = step
            state.samples_seen += plan.windows_per_step
            state.tokens_seen += plan.tokens_per_step
            state.skipped_steps += update.skipped
            state.skipped_in_a_row = state.skipped_in_a_row + 1 if update.skipped else 0
            yield StepResult(
                step=step,
                loss=update.loss,
                grad_norm=update.grad_norm,
                learning_rate=learning_rate,
                tokens=plan.tokens_per_step,
                seconds=time.perf_counter() - started,
                epoch=state.samples_seen / plan.windows,
                skipped=update.skipped,
                batch_digest=item.digest,
            )
            if state.skipped_in_a_row >= max_skipped_steps:
                raise DivergedError(
                    f"diverged: {state.skipped_in_a_row} steps in a row up to step {step} had a loss or gradient that is "
                    f"not finite (last loss {update.loss}, norm {update.grad_norm}); checkpoints up to step "
                    f"{step - state.skipped_in_a_row} were kept; lower --learning-rate (now "
                    f"{options.learning_rate:g}), lengthen --warmup-steps or set --max-grad-norm 1"
                )
