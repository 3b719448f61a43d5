"""Activation checkpointing (Chen et al. 2016): less memory for a second forward pass."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from groundup.model.gpt2 import GPT2
from groundup.model.kv_cache import KVCache


class _Checkpointed:
    """Before a block's class: its forward keeps only its input (B, T, C), and computes the rest again when it is needed."""

    def forward(self, x: Tensor, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        forward: Any = super().forward  # type: ignore[misc]
        if cache is not None or not torch.is_grad_enabled():
            plain: Tensor = forward(x, cache, layer)
            return plain
        block: Any = self
        contexts: dict[str, Any] = {}
        if next(block.buffers(), None) is not None:  # only where it does something: torch.compile takes no contexts
            contexts["context_fn"] = lambda: (nullcontext(), _left_alone(block))
        again: Tensor = checkpoint(forward, x, use_reentrant=False, **contexts)
        return again


@contextmanager
def _left_alone(block: nn.Module) -> Iterator[None]:
    """Undo what happens to a block's buffers: batch norm would count a pass twice."""
    kept = [buffer.clone() for buffer in block.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(block.buffers(), kept, strict=True):
                buffer.copy_(value)


def checkpoint_activations(model: GPT2) -> None:
    """
    From now on keep one tensor (B, T, C) per block for the backward pass instead of all that it computes; changed in place.

    Names, values and gradients stay bit for bit what they were, with dropout too: the second pass draws the same masks. It
    costs about a third more arithmetic in a training step; evaluation and generation are not concerned. torch.compile takes it,
    but not with batch norm.
    """
    for block in model.h:
        kind = type(block)
        if not issubclass(kind, _Checkpointed):
            # The same parameters, another forward: a wrapper would change the names in the state dict.
            block.__class__ = type(f"Checkpointed{kind.__name__}", (_Checkpointed, kind), {})
