"""Which parameters decay, and which ones Muon is for."""

from collections.abc import Iterable
from typing import Any

from torch import nn


def decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """
    Parameters in two groups: matrices, which decay, and biases and norms, which do not (GPT-3, appendix B).

    Every parameter that is trained is in exactly one group; frozen ones are in none.
    """
    trained = [p for p in parameters if p.requires_grad]
    matrices = [p for p in trained if p.dim() >= 2]
    others = [p for p in trained if p.dim() < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def block_matrices(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trained parameters, cut in two: the matrices of the blocks, and embeddings, head, biases and norms."""
    blocks: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (blocks if name.startswith("h.") and parameter.dim() == 2 else rest).append(parameter)
    return blocks, rest
