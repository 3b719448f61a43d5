"""A moving average of the weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """
    An exponential moving average of a model's weights: a ← d a + (1 − d) w after each update.

    The decay d grows to its final value as min(decay, (1 + t) / (10 + t)) after t updates, so that the random initial
    weights are soon forgotten (https://www.tensorflow.org/api_docs/python/tf/train/ExponentialMovingAverage). What is
    no weight (a batch norm's statistics) is copied.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.tensors: dict[str, Tensor] = {name: value.detach().clone() for name, value in _own(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module, updates: int) -> None:
        """Take the weights in after ``updates`` updates, this one included."""
        decay = min(self.decay, (1 + updates) / (10 + updates))
        current = _own(model)
        averaged = [name for name, _ in model.named_parameters()]
        torch._foreach_lerp_([self.tensors[n] for n in averaged], [current[n].detach() for n in averaged], 1 - decay)
        for name in current.keys() - set(averaged):
            self.tensors[name].copy_(current[name])

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The model with the averaged weights, while the block runs."""
        current = _own(model)
        try:
            self._swap(current)
            yield
        finally:
            self._swap(current)

    @torch.no_grad()
    def _swap(self, current: dict[str, Tensor]) -> None:
        for name, value in current.items():
            held = value.detach().clone()
            value.copy_(self.tensors[name])
            self.tensors[name].copy_(held)


def _own(model: nn.Module) -> dict[str, Tensor]:
    """Weights and statistics by name, each once: the very tensors of the model."""
    return dict(model.named_parameters()) | dict(model.named_buffers())
