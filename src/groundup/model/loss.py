"""
Next-token cross-entropy with the head inside, so that float32 logits of (B · T, V) are never kept.

The usual way keeps the logits, their float32 copy and their gradient: 3 × 4 × B · T · V bytes, a gigabyte for two
windows of 1,024 tokens. Here rows are taken in blocks, and a block's gradient is formed while its logits are at hand.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK_LOGITS = 2**24
"""Logits formed at once: 64 MiB in float32."""


@dataclass(frozen=True)
class SoftTargets:
    """What a teacher predicts, as hidden states and head, so that its logits need not be held whole either."""

    hidden: Tensor
    """(B, T, C) of the teacher's last layer, whose width C is its own; a constant, no gradient reaches it."""
    head_weight: Tensor
    """(V, C); V is the student's."""
    temperature: float
    """Divides the logits of both, above 0."""
    weight: float
    """Share of the teacher's part in the loss, from 0 to 1; the rest is the labels'."""


@dataclass(frozen=True)
class _Targets:
    """What the rows of a loss are compared with: labels (N,), and what they are softened by."""

    labels: Tensor
    label_smoothing: float
    teacher: SoftTargets | None
    """With hidden states (N, C)."""


def next_token_loss(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    teacher: SoftTargets | None = None,
    loss_scale: float = 2.0**16,
) -> Tensor:
    """
    Sum of the cross-entropy over all tokens, in nats; differentiable once.

    Divide by the number of tokens of the *global* batch for the exact mean, however it is cut into micro-batches.

    With a teacher of share m and temperature τ it is (1 - m) · cross-entropy + m · τ² · KL(teacher_τ ‖ student_τ), where _τ
    has its logits divided by τ (Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", section 2).

    Args:
        hidden: (B, T, C) of the last layer.
        head_weight: (V, C).
        labels: (B, T) int64 ids of the tokens that come next.
        label_smoothing: ε of the targets (1 - ε) · one_hot + ε / V (Szegedy et al. 2016, "Rethinking the Inception
            Architecture", section 7).
        teacher: its predictions of the same tokens.
        loss_scale: for float16 alone: what the loss will be multiplied by before the backward pass. Where that had to fall,
            what is multiplied here falls with it.
    """
    rows = hidden.reshape(-1, hidden.size(-1))
    needs_gradient = torch.is_grad_enabled() and (hidden.requires_grad or head_weight.requires_grad)
    if teacher is not None:
        flat = teacher.hidden.detach().reshape(-1, teacher.hidden.size(-1))
        teacher = SoftTargets(flat, teacher.head_weight.detach(), teacher.temperature, teacher.weight)
    targets = _Targets(labels.reshape(-1), label_smoothing, teacher)
    loss: Tensor = _LinearCrossEntropy.apply(rows, head_weight, targets, needs_gradient, loss_scale)  # type: ignore[no-untyped-call]
    return loss


@torch.no_grad()
def next_token_scores(hidden: Tensor, head_weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """
    Per token: cross-entropy in nats, and whether the most likely token is the label; both (B · T,).

    The same mathematics as ``next_token_loss`` without gradients, in blocks too.
    """
    rows, flat = hidden.reshape(-1, hidden.size(-1)), labels.reshape(-1)
    losses, hits = [], []
    block = _block_rows(head_weight.size(0))
    for start in range(0, rows.size(0), block):
        logits = F.linear(rows[start : start + block], head_weight).float()  # (N, V)
        y = flat[start : start + block]
        losses.append(F.cross_entropy(logits, y, reduction="none"))
        hits.append(logits.argmax(-1) == y)
    return torch.cat(losses), torch.cat(hits)


def _block_rows(vocab_size: int) -> int:
    """Rows of a block; a multiple of 64, which matrix units like, where there are that many."""
    rows = max(1, BLOCK_LOGITS // vocab_size)
    return rows - rows % 64 if rows >= 64 else rows


def _float16_multiplier(rows: int, loss_scale: float) -> float:
    """
    What slopes of a block of N rows are multiplied by before they are rounded to float16, a power of two.

    Float16 has nothing below 6e-8: of 50,257 tokens a quarter and more are less likely than that, and the embeddings of
    tokens that a block does not hold learn from nothing else. It has nothing above 65,504 either, and a product adds N
    slopes times hidden states. So this is what loss scaling (Micikevicius et al. 2018, section 3.2) would make of a mean over
    the block, with room for an average of 8; a smaller loss scale, after overflows, makes more room.
    """
    return float(2.0 ** math.floor(math.log2(min(loss_scale, 2.0**16) / (8 * max(1, rows)))))


def _loss_and_slope(
    logits: Tensor, theirs: Tensor | None, labels: Tensor, targets: _Targets, needs_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """
    Loss of a block, summed, and its slope by the logits, which takes their place.

    Args:
        logits: (N, V).
        theirs: (N, V) of the teacher.
        labels: (N, 1).
    """
    smoothing, teacher = targets.label_smoothing, targets.teacher
    log_total = logits.logsumexp(-1, keepdim=True)
    score = logits.gather(1, labels)
    if smoothing:
        score = (1 - smoothing) * score + smoothing * logits.mean(-1, keepdim=True)
    loss, soft_slope = (log_total - score).sum(), None
    if teacher is not None and theirs is not None:
        soft_loss, soft_slope = _distillation(logits, theirs, teacher.temperature, needs_gradient)
        loss = (1 - teacher.weight) * loss + teacher.weight * soft_loss
    if not needs_gradient:
        return loss, None
    # d loss / d logits = softmax(logits) - targets
    slope = logits.sub_(log_total).exp_()
    if smoothing:
        slope.sub_(smoothing / logits.size(-1))
    slope.scatter_add_(1, labels, torch.full_like(log_total, smoothing - 1.0))
    if teacher is not None and soft_slope is not None:
        slope.lerp_(soft_slope, teacher.weight)
    return loss, slope


def _distillation(logits: Tensor, theirs: Tensor, temperature: float, needs_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """
    τ² · KL(teacher_τ ‖ student_τ), summed, and its slope by the student's logits; both logits are (N, V).

    The factor keeps the slope, τ · (student_τ - teacher_τ), in proportion to that of labels, whatever the temperature.
    """
    student = torch.log_softmax(logits / temperature, -1)
    target = torch.log_softmax(theirs / temperature, -1)
    loss = F.kl_div(student, target, reduction="sum", log_target=True) * temperature**2
    return loss, student.exp_().sub_(target.exp_()).mul_(temperature) if needs_gradient else None


class _LinearCrossEntropy(torch.autograd.Function):
    """Cross-entropy of a linear layer's outputs, its gradients formed in the forward pass."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, targets: _Targets, needs_gradient: bool, loss_scale: float) -> Tensor:
        kind = rows.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else rows.dtype
        teacher = targets.teacher
        with torch.autocast(kind, enabled=False):
            matrix = weight.to(dtype)  # (V, C)
            teacher_matrix = None if teacher is None else teacher.head_weight.to(dtype)
            total = torch.zeros((), device=rows.device, dtype=torch.float32 if dtype != torch.float64 else dtype)
            # Frozen weights below or in the head need no gradient.
            rows_gradient = torch.empty_like(rows) if needs_gradient and ctx.needs_input_grad[0] else None
            weight_gradient = torch.zeros_like(weight) if needs_gradient and ctx.needs_input_grad[1] else None
            block = _block_rows(weight.size(0))
            multiplier = _float16_multiplier(min(block, rows.size(0)), loss_scale) if dtype == torch.float16 else 1.0
            for start in range(0, rows.size(0), block):
                x = rows[start : start + block].to(dtype)  # (N, C)
                y = targets.labels[start : start + block, None]  # (N, 1)
                logits, theirs = (x @ matrix.T).to(total.dtype), None  # (N, V)
                if teacher is not None and teacher_matrix is not None:
                    theirs = (teacher.hidden[start : start + block].to(dtype) @ teacher_matrix.T).to(total.dtype)  # (N, V)
                loss, slope = _loss_and_slope(logits, theirs, y, targets, needs_gradient)
                total += loss
                if slope is not None:
                    if multiplier != 1:
                        slope.mul_(multiplier)
                    slope = slope.to(dtype)
                    if rows_gradient is not None:
                        rows_gradient[start : start + block] = slope @ matrix
                    if weight_gradient is not None:
                        weight_gradient += slope.T @ x
        ctx.gradients, ctx.multiplier = (rows_gradient, weight_gradient) if needs_gradient else None, multiplier
        return total

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("this loss is differentiable once; a second derivative needs F.linear and F.cross_entropy")
        if ctx.gradients is None:
            raise RuntimeError("the gradients of this loss were used already; compute the loss again")
        slope = slopes[0] if ctx.multiplier == 1 else slopes[0] / ctx.multiplier
        rows_gradient, weight_gradient = (None if g is None else g.mul_(slope) for g in ctx.gradients)
        ctx.gradients = None
        return rows_gradient, weight_gradient, None, None, None
