"""AdamW with decoupled decay on matrices only."""

import torch
from torch import nn


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """
    Parameters in two groups: matrices, which decay, and biases and norms, which do not (GPT-3, appendix B).

    Every parameter that is trained is in exactly one group; frozen ones are in none.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.dim() >= 2]
    others = [p for p in trained if p.dim() < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def build_adamw(
    model: nn.Module, *, learning_rate: float, beta1: float, beta2: float, epsilon: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019), fused: w ← w − α (m̂ / (√v̂ + ε) + λ w)."""
    return torch.optim.AdamW(decay_groups(model, weight_decay), lr=learning_rate, betas=(beta1, beta2), eps=epsilon, fused=True)
