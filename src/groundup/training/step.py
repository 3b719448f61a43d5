"""One optimizer step: accumulate, check, clip, update."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from groundup.data.batches import Batch
from groundup.model.gpt2 import GPT2
from groundup.model.loss import SoftTargets, next_token_loss
from groundup.optim.optimizers import Optimizers
from groundup.runtime.random import derive_seed
from groundup.training.health import HealthProbe

Forward = Callable[[Tensor], Tensor]
"""The model, or its compiled form: token ids (B, T) to hidden states (B, T, C)."""
Passes = tuple[tuple[int, int], ...]
"""The passes of a step, each as (first window, windows) within the global batch."""


@dataclass(frozen=True)
class Learner:
    """A model, and what it learns with."""

    model: GPT2
    forward: Forward
    optimizers: Optimizers
    autocast: Callable[[], AbstractContextManager[object]]
    """The precision of the forward passes."""
    label_smoothing: float = 0.0
    teacher: Callable[[Tensor], SoftTargets] | None = None
    """From token ids (B, T) to a teacher's predictions."""


@dataclass(frozen=True)
class Update:
    """What a step did: mean loss in nats per token, gradient norm before clipping, and whether it was skipped."""

    loss: float
    grad_norm: float
    skipped: bool

    @property
    def overflowed(self) -> bool:
        """The gradient was not finite, though the loss was: in float16 perhaps only the loss scale was too large."""
        return math.isfinite(self.loss) and not math.isfinite(self.grad_norm)


def train_step(
    learner: Learner,
    batch: Batch,
    passes: Passes,
    *,
    seed: int,
    step: int,
    learning_rate: float,
    max_grad_norm: float,
    sequence_length: int = 0,
    loss_scale: float = 1.0,
    may_update: Callable[[float, float], bool] | None = None,
    probe: HealthProbe | None = None,
) -> Update:
    """
    Update the model on one global batch, in as many passes as it takes.

    Each pass adds its share of the exact token mean, so without dropout and batch norm the result does not depend on how the
    batch is cut. A step whose loss or gradient is not finite changes neither weights nor optimizer state: clipping alone would
    spread it.

    Args:
        batch: the windows of the step, (windows, T).
        learning_rate: of this step.
        sequence_length: cut the windows into pieces of so many tokens, a divisor of T; 0 is whole.
        loss_scale: multiply the loss by it before the backward pass, and divide the gradient afterwards.
        may_update: asked, with loss and gradient norm, before the update of a finite step; one that it refuses is skipped.
        probe: shown the gradients before clipping, the first pass, and the update.
    """
    model, optimizers = learner.model, learner.optimizers
    statistics = [buffer.clone() for buffer in model.buffers()]  # of batch norm; GPT-2 has none
    total = _accumulate(learner, batch, passes, seed, step, sequence_length, loss_scale)
    parameters = [p for p in model.parameters() if p.grad is not None]
    gradients = [p.grad for p in parameters if p.grad is not None]
    if loss_scale != 1:
        torch._foreach_mul_(gradients, 1 / loss_scale)
    norm = torch.nn.utils.get_total_norm(gradients)
    loss_value, norm_value = total.item(), norm.item()
    finite = math.isfinite(loss_value) and math.isfinite(norm_value)
    updating = finite and (may_update is None or may_update(loss_value, norm_value))
    if updating:
        if probe is not None:
            probe.gradients()
            probe.activations(batch.rows(*passes[0]).input_ids, learner.autocast)
        if max_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
        optimizers.set_learning_rate(learning_rate)
        optimizers.step()
        if probe is not None:
            probe.updates()
    else:
        for buffer, before in zip(model.buffers(), statistics, strict=True):
            buffer.copy_(before)
    optimizers.zero_grad()
    return Update(loss_value, norm_value, skipped=not updating)


def _accumulate(
    learner: Learner, batch: Batch, passes: Passes, seed: int, step: int, sequence_length: int, loss_scale: float
) -> Tensor:
    """Add the gradients of all passes; returns the mean loss over the global batch, a scalar."""
    model = learner.model
    model.train()
    has_dropout = max(model.config.resid_pdrop, model.config.embd_pdrop, model.config.attn_pdrop) > 0
    tokens, device = batch.labels.numel(), batch.labels.device
    total = torch.zeros((), device=device, dtype=torch.float64 if device.type != "mps" else None)
    for first, count in passes:
        part = batch.rows(first, count)
        if sequence_length:
            part = Batch(part.input_ids.reshape(-1, sequence_length), part.labels.reshape(-1, sequence_length))
        if has_dropout:
            # Dropout is a function of (seed, step, first window of the pass): a resumed run draws the same masks.
            torch.manual_seed(derive_seed(seed, "dropout", step, first))
        with learner.autocast():
            soft = None if learner.teacher is None else learner.teacher(part.input_ids)
            hidden = learner.forward(part.input_ids)
            summed = next_token_loss(
                hidden,
                model.head_weight,
                part.labels,
                label_smoothing=learner.label_smoothing,
                teacher=soft,
                loss_scale=loss_scale,
            )
            loss = summed / tokens
        (loss if loss_scale == 1 else loss * loss_scale).backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    return total
