"""
Next-token cross-entropy with the head inside, so that float32 logits of (B · T, V) are never kept.

The usual way keeps the logits, their float32 copy and their gradient: 3 × 4 × B · T · V bytes, a gigabyte for two
windows of 1,024 tokens. Here rows are taken in blocks, and a block's gradient is formed while its logits are at hand.
"""

from typing import Any

import torch
from torch import Tensor

BLOCK_LOGITS = 2**24
"""Logits formed at once: 64 MiB in float32."""


def next_token_loss(hidden: Tensor, head_weight: Tensor, labels: Tensor) -> Tensor:
    """
    Sum of the cross-entropy over all tokens, in nats; differentiable once.

    Divide by the number of tokens of the *global* batch for the exact mean, however it is cut into micro-batches.

    Args:
        hidden: (B, T, C) of the last layer.
        head_weight: (V, C).
        labels: (B, T) int64 ids of the tokens that come next.
    """
    rows = hidden.reshape(-1, hidden.size(-1))
    needs_gradient = torch.is_grad_enabled() and (hidden.requires_grad or head_weight.requires_grad)
    loss: Tensor = _LinearCrossEntropy.apply(rows, head_weight, labels.reshape(-1), needs_gradient)  # type: ignore[no-untyped-call]
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
        logits = torch.nn.functional.linear(rows[start : start + block], head_weight).float()  # (N, V)
        y = flat[start : start + block]
        losses.append(torch.nn.functional.cross_entropy(logits, y, reduction="none"))
        hits.append(logits.argmax(-1) == y)
    return torch.cat(losses), torch.cat(hits)


def _block_rows(vocab_size: int) -> int:
    """Rows of a block; a multiple of 64, which matrix units like, where there are that many."""
    rows = max(1, BLOCK_LOGITS // vocab_size)
    return rows - rows % 64 if rows >= 64 else rows


class _LinearCrossEntropy(torch.autograd.Function):
    """Cross-entropy of a linear layer's outputs, its gradients formed in the forward pass."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, labels: Tensor, needs_gradient: bool) -> Tensor:
        kind = rows.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else rows.dtype
        with torch.autocast(kind, enabled=False):
            matrix = weight.to(dtype)  # (V, C)
            total = torch.zeros((), device=rows.device, dtype=torch.float32 if dtype != torch.float64 else dtype)
            # Frozen weights below or in the head need no gradient.
            rows_gradient = torch.empty_like(rows) if needs_gradient and ctx.needs_input_grad[0] else None
            weight_gradient = torch.zeros_like(weight) if needs_gradient and ctx.needs_input_grad[1] else None
            block = _block_rows(weight.size(0))
            for start in range(0, rows.size(0), block):
                x = rows[start : start + block].to(dtype)  # (N, C)
                y = labels[start : start + block, None]  # (N, 1)
                logits = (x @ matrix.T).to(total.dtype)  # (N, V)
                log_total = logits.logsumexp(-1, keepdim=True)
                total += (log_total - logits.gather(1, y)).sum()
                if needs_gradient:
                    # d loss / d logits = softmax(logits) - one_hot(labels)
                    slope = logits.sub_(log_total).exp_()
                    slope.scatter_add_(1, y, torch.full_like(log_total, -1.0))
                    slope = slope.to(dtype)
                    if rows_gradient is not None:
                        rows_gradient[start : start + block] = slope @ matrix
                    if weight_gradient is not None:
                        weight_gradient += slope.T @ x
        ctx.gradients = (rows_gradient, weight_gradient) if needs_gradient else None
        return total

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError("this loss is differentiable once; a second derivative needs F.linear and F.cross_entropy")
        if ctx.gradients is None:
            raise RuntimeError("the gradients of this loss were used already; compute the loss again")
        rows_gradient, weight_gradient = (None if g is None else g.mul_(slopes[0]) for g in ctx.gradients)
        ctx.gradients = None
        return rows_gradient, weight_gradient, None, None
