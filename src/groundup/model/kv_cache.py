"""Keys and values of the tokens that a model has seen: an argument of the model, never its hidden state."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class KVCache:
    """
    Preallocated keys and values of every layer, (layers, B, H, capacity, D).

    Rows may hold different numbers of tokens, each from its own position 0: texts of different lengths in one batch.
    """

    keys: Tensor
    values: Tensor
    lengths: list[int]
    """Tokens that each row holds, B of them."""
    mask: Tensor | None = None
    """Which keys the tokens of the pass under way may see, (B or 1, 1, T, length); None where causality alone says so."""

    @staticmethod
    def empty(layers: int, batch: int, heads: int, capacity: int, head_width: int, like: Tensor) -> "KVCache":
        """Room for ``capacity`` tokens in each row, with the device and type of ``like``."""
        shape = (layers, batch, heads, capacity, head_width)
        # Zeros, not whatever the memory held: a masked key has weight 0, and 0 times NaN would be NaN.
        return KVCache(torch.zeros(shape, device=like.device, dtype=like.dtype),
                       torch.zeros(shape, device=like.device, dtype=like.dtype), [0] * batch)  # fmt: skip

    def begin(self, tokens: int) -> Tensor:
        """Start a pass over T new tokens in every row; returns their positions, (T,) or, where rows differ, (B, T)."""
        device, longest = self.keys.device, max(self.lengths)
        new = torch.arange(tokens, device=device)
        if min(self.lengths) == longest:
            positions = longest + new  # (T,)
            # One token sees all that is there; from an empty cache the triangle is the usual one.
            self.mask = None if tokens == 1 or longest == 0 else self._visible(positions[None], longest + tokens)
        else:
            positions = torch.tensor(self.lengths, device=device)[:, None] + new  # (B, T)
            self.mask = self._visible(positions, longest + tokens)
        return positions

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add new keys and values (B, H, T, D) of one layer; returns all of them, (B, H, longest + T, D)."""
        tokens, longest = keys.size(2), max(self.lengths)
        if min(self.lengths) == longest:
            self.keys[layer, :, :, longest : longest + tokens] = keys
            self.values[layer, :, :, longest : longest + tokens] = values
        else:
            for row, length in enumerate(self.lengths):
                self.keys[layer, row, :, length : length + tokens] = keys[row]
                self.values[layer, row, :, length : length + tokens] = values[row]
        end = longest + tokens
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, tokens: int) -> None:
        """Count tokens as seen, once all layers have added them."""
        self.lengths = [length + tokens for length in self.lengths]

    def row(self, index: int) -> "KVCache":
        """One row, emptied, as a cache of its own on the same memory; its length is told back by the caller."""
        return KVCache(self.keys[:, index : index + 1], self.values[:, index : index + 1], [0])

    def select(self, rows: Sequence[int]) -> "KVCache":
        """A copy of some rows, in the order given; a row may come more than once."""
        index = torch.tensor(rows, device=self.keys.device)
        return KVCache(self.keys[:, index], self.values[:, index], [self.lengths[row] for row in rows])

    def reorder(self, rows: Sequence[int]) -> None:
        """Row i becomes what row ``rows[i]`` was: beams that go on from others. Only rows that change are copied."""
        changed = [row for row, source in enumerate(rows) if source != row]
        if changed:
            sources, longest = [rows[row] for row in changed], max(self.lengths)
            self.keys[:, changed, :, :longest] = self.keys[:, sources, :, :longest]
            self.values[:, changed, :, :longest] = self.values[:, sources, :, :longest]
            self.lengths = [self.lengths[row] for row in rows]

    def _visible(self, positions: Tensor, longest: int) -> Tensor:
        """Each new token sees its row's keys up to its own: (B, 1, T, longest) from positions (B, T)."""
        return (torch.arange(longest, device=positions.device) <= positions[..., None])[:, None]
