"""Keys and values of the tokens that a model has seen: an argument of the model, never its hidden state."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class KVCache:
    """Preallocated keys and values of every layer, (layers, B, H, capacity, D); ``length`` tokens are filled."""

    keys: Tensor
    values: Tensor
    length: int = 0

    @staticmethod
    def empty(layers: int, batch: int, heads: int, capacity: int, head_width: int, like: Tensor) -> "KVCache":
        """Room for ``capacity`` tokens, with the device and type of ``like``."""
        shape = (layers, batch, heads, capacity, head_width)
        return KVCache(torch.empty(shape, device=like.device, dtype=like.dtype),
                       torch.empty(shape, device=like.device, dtype=like.dtype))  # fmt: skip

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add new keys and values (B, H, T, D) of one layer; returns all of them, (B, H, length + T, D)."""
        end = self.length + keys.size(2)
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :end].to(keys.dtype), self.values[layer, :, :, :end].to(values.dtype)

    def advance(self, tokens: int) -> None:
        """Count tokens as seen, once all layers have added them."""
        self.length += tokens

    def clear(self) -> None:
        """Forget everything; the memory stays."""
        self.length = 0
