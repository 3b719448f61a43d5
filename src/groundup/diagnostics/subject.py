"""What is examined: a model, a batch and a loss, and what is known about them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from groundup.errors import ConfigError
from groundup.model.gpt2 import GPT2
from groundup.model.loss import next_token_loss
from groundup.optim.optimizers import Optimizers

Forward = Callable[[nn.Module, Tensor], Any]
"""A model and token ids (B, T) int64, to scores of the next token (B, T, V), or something that holds them."""
Loss = Callable[[Tensor, Tensor], Tensor]
"""Scores (B, T, V) and labels (B, T) to a scalar: the mean over the tokens, in nats."""
MakeOptimizer = Callable[[nn.Module, float], "torch.optim.Optimizer | Optimizers"]
"""A model and a learning rate to the optimizer of its parameters."""


@dataclass(frozen=True)
class Subject:
    """
    What is examined. Nothing in it is changed: every check works on a copy of the model.

    ``forward`` gets the model as an argument, because it is a copy that is run. Only the first four are needed; what is not
    known of somebody's model stays as it is, and the checks that need it say that they were not made.
    """

    model: nn.Module
    forward: Forward
    loss_fn: Loss
    inputs: Tensor
    """(B, T) int64 token ids, on the model's device; a part of a training batch is enough, 4 × 64 tokens."""
    labels: Tensor
    """(B, T) int64, as training hands them to ``loss_fn``."""
    make_optimizer: MakeOptimizer | None = None
    """None is AdamW without weight decay, with β of 0.9 and 0.95."""
    learning_rate: float | None = None
    """The highest of the schedule; None is not known."""
    warmup_steps: int | None = None
    max_grad_norm: float | None = None
    """0 does not clip; None is not known."""
    vocab_size: int | None = None
    """Tokens that there are, where the head has rows for more; None is all rows of the head."""
    trained: bool | None = None
    """Whether the weights have been trained; None finds out from the loss."""
    tied: tuple[tuple[str, str], ...] = ()
    """Names of parameters, pairwise, that have to be one parameter."""
    frozen: tuple[str, ...] = ()
    """Names, or their beginnings, of parameters that are not trained on purpose."""
    seed: int = 0
    """Of everything that is drawn here."""

    def __post_init__(self) -> None:
        """Refuse what cannot be, here once, so that no check has to ask."""
        for name, least in (("vocab_size", 1), ("warmup_steps", 0), ("seed", 0)):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if value is not None and not (whole and least <= value < 2**63):
                raise ConfigError(f"{name}: {value!r} is no whole number of {least} or more; give one")
        for name, most in (("learning_rate", math.inf), ("max_grad_norm", None)):
            value = getattr(self, name)
            number = isinstance(value, Real) and float(value) >= 0 and (most is None or float(value) < most)
            if value is not None and not number:
                raise ConfigError(f"{name}: {value!r} is no number of 0 or more; give one, or leave it out")
        if self.trained not in (None, True, False):
            raise ConfigError(f"trained: {self.trained!r} is neither True nor False; None finds out from the loss")
        if not isinstance(self.tied, tuple) or not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in self.tied):
            raise ConfigError(f"tied: {self.tied!r} is no tuple of pairs of names; for one pair write ((name, other name),)")
        if not isinstance(self.frozen, tuple) or not all(isinstance(name, str) for name in self.frozen):
            raise ConfigError(f'frozen: {self.frozen!r} is no tuple of names; for one name write ("embed",)')


def gpt2_subject(model: GPT2, inputs: Tensor, labels: Tensor, *, label_smoothing: float = 0.0, **known: Any) -> Subject:
    """
    A subject of groundup's own model with groundup's own loss.

    Args:
        inputs: (B, T) token ids; labels: (B, T), the tokens after them. Both are moved to the model's device.
        known: further fields of ``Subject``.
    """
    device = next(model.parameters()).device

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        """The loss of training, asked about scores instead of hidden states: with hidden states I the head is the scores."""
        rows = logits.reshape(-1, logits.size(-1))  # (N, V)
        eye = torch.eye(rows.size(0), dtype=rows.dtype, device=rows.device)
        return next_token_loss(eye, rows.T, targets, label_smoothing=label_smoothing) / targets.numel()

    return Subject(model, gpt2_scores, loss, inputs.to(device), labels.to(device), **known)


def gpt2_scores(model: nn.Module, inputs: Tensor) -> Tensor:
    """Scores (B, T, V) of a GPT-2, whose forward gives hidden states."""
    assert isinstance(model, GPT2)
    scores: Tensor = model.logits(model(inputs))
    return scores
