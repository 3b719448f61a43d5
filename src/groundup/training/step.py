"""One optimizer step: accumulate, check, clip, update."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from groundup.data.batches import Batch
from groundup.model.gpt2 import GPT2
from groundup.model.loss import next_token_loss
from groundup.runtime.random import derive_seed

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Update:
    """What a step did: mean loss in nats per token, gradient norm before clipping, and whether it was skipped."""

    loss: float
    grad_norm: float
    skipped: bool


def train_step(
    model: GPT2,
    forward: Forward,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    micro_batches: tuple[tuple[int, int], ...],
    autocast: Callable[[], AbstractContextManager[object]],
    *,
    seed: int,
    step: int,
    learning_rate: float,
    max_grad_norm: float,
) -> Update:
    """
    Update the model on one global batch, in as many passes as it takes.

    Each pass adds its share of the exact token mean, so without dropout the result does not depend on how the batch is
    cut (with it, the masks do). A step
    whose loss or gradient is not finite changes neither weights nor optimizer state: clipping alone would spread it.

    Args:
        forward: the model, or its compiled form: token ids (B, T) to hidden states (B, T, C).
        batch: the windows of the step, (windows, T).
        micro_batches: (first window, windows) of each pass.
        autocast: the precision of the forward passes.
        learning_rate: of this step.
    """
    model.train()
    has_dropout = max(model.config.resid_pdrop, model.config.embd_pdrop, model.config.attn_pdrop) > 0
    tokens = batch.labels.numel()
    total = torch.zeros((), device=batch.labels.device, dtype=torch.float64 if batch.labels.device.type != "mps" else None)
    for first, count in micro_batches:
        part = batch.rows(first, count)
        if has_dropout:
            # Dropout is a function of (seed, step, first window of the pass): a resumed run draws the same masks.
            torch.manual_seed(derive_seed(seed, "dropout", step, first))
        with autocast():
            hidden = forward(part.input_ids)
            loss = next_token_loss(hidden, model.head_weight, part.labels) / tokens
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()

    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    loss_value, norm_value = total.item(), norm.item()
    finite = math.isfinite(loss_value) and math.isfinite(norm_value)
    if finite:
        if max_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return Update(loss_value, norm_value, skipped=not finite)
