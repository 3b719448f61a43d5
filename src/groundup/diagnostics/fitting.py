"""Short trainings on one mini-batch, each on a copy of its own."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from groundup.diagnostics.bench import IGNORED, Scores, first_line, going_back, learner, reference_loss
from groundup.diagnostics.subject import Loss, Subject
from groundup.errors import ConfigError, GroundupError
from groundup.optim.optimizers import Optimizers


@dataclass(frozen=True)
class Work:
    """How much of it: by the size of the model, so that small models take seconds and large ones a few minutes."""

    tokens: int
    steps: int
    range_steps: int

    @classmethod
    def for_parameters(cls, count: int) -> "Work":
        """
        The work for a model of so many parameters.

        A large model learns fewer tokens by heart in fewer steps: every parameter moves by the learning rate in a step.
        """
        if count < 2**20:
            return cls(128, 150, 60)
        if count < 2**25:
            return cls(64, 100, 50)
        return cls(32, 50, 30)


@dataclass(frozen=True)
class Exercise:
    """One mini-batch to learn by heart."""

    inputs: Tensor
    labels: Tensor
    """As the loss wants them."""
    targets: Tensor
    """The tokens that come next; ``IGNORED`` where there is none."""
    floor: float
    """Nats that no causal model can go below, because the same beginning goes on in two ways."""


def exercise(subject: Subject, targets: Tensor, tokens: int) -> Exercise:
    """A part of the batch: few windows, of so many tokens together."""
    length = min(subject.inputs.size(1), max(8, tokens // 2))
    rows = max(1, tokens // length)
    part = Exercise(subject.inputs[:rows, :length], subject.labels[:rows, :length], targets[:rows, :length].clone(), 0.0)
    return replace(part, floor=entropy_of_continuations(part.inputs, part.targets))


def entropy_of_continuations(inputs: Tensor, targets: Tensor) -> float:
    """The least mean loss on these windows (B, T), in nats: the entropy of the targets that follow equal beginnings."""
    following: dict[tuple[int, ...], list[int]] = {}
    for window, theirs in zip(inputs.tolist(), targets.tolist(), strict=True):
        for t, target in enumerate(theirs):
            if target != IGNORED:
                following.setdefault(tuple(window[: t + 1]), []).append(target)
    total = sum(map(len, following.values()))
    nats = 0.0
    for seen in following.values():
        nats -= sum(math.log(seen.count(target) / len(seen)) for target in seen)
    return nats / max(1, total)


@dataclass(frozen=True)
class Curve:
    """One training."""

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    """Before each step, and after the last; nats per token by the loss that is right; inf once it is no number."""
    grad_norms: tuple[float, ...]
    floor: float

    @property
    def progress(self) -> float:
        """Share of what there was to learn, start to floor, that the end has; below 0 where it got worse."""
        first = self.losses[0] - self.floor
        tail = sorted(self.losses[-3:])
        last = tail[len(tail) // 2]
        return (
            (self.losses[0] - last) / first
            if first > 0 and math.isfinite(last)
            else (0.0 if math.isfinite(last) else -math.inf)
        )

    @property
    def rise(self) -> float:
        """Nats above what it had already been down to, at the worst."""
        return max(loss - low for loss, low in zip(self.losses, accumulate(self.losses, min), strict=True))


class Stepper:
    """The subject's optimizer for a copy of the model."""

    def __init__(self, subject: Subject, model: nn.Module, rate: float):
        make = subject.make_optimizer or adamw
        try:
            made = make(model, rate)
        except GroundupError:
            raise
        except Exception as error:  # somebody else's function
            raise ConfigError(
                f"optimizer: it cannot be made for a copy of the model: {type(error).__name__}: {first_line(error)}; give "
                "a function of (model, learning rate) that makes it"
            ) from error
        self._parts = made.parts if isinstance(made, Optimizers) else (made,)
        if not all(hasattr(part, "param_groups") for part in self._parts):
            raise ConfigError(
                f"optimizer: the function returned {type(made).__name__}, no torch optimizer; let it return what it makes"
            )
        # Groups that have a learning rate of their own keep their proportion.
        self._shares = [[float(group["lr"]) / rate if rate else 1.0 for group in part.param_groups] for part in self._parts]

    @property
    def groups(self) -> list[dict[str, Any]]:
        """Of parameters, as torch keeps them."""
        return [group for part in self._parts for group in part.param_groups]

    def step(self, rate: float) -> None:
        """Update with this learning rate."""
        for part, shares in zip(self._parts, self._shares, strict=True):
            for group, share in zip(part.param_groups, shares, strict=True):
                group["lr"] = rate * share
            try:
                part.step()
            except Exception as error:
                raise ConfigError(
                    f"optimizer: {type(part).__name__} fails in a step: {type(error).__name__}: {first_line(error)}; one whose "
                    "step() takes no argument and dense gradients can be examined"
                ) from error


def adamw(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """AdamW with what GPT-2's reproductions use, without weight decay, which is there against learning by heart."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, betas=(0.9, 0.95), weight_decay=0.0)


def fit(
    subject: Subject,
    scores: Scores,
    batch: Exercise,
    rates: Sequence[float],
    *,
    loss_fn: Loss | None,
    max_grad_norm: float = 0.0,
    enough: float = 0.98,
    give_up: float = math.inf,
    prepare: Callable[[nn.Module], object] | None = None,
) -> Curve:
    """
    Train a copy on one mini-batch, a step for each learning rate.

    Args:
        loss_fn: what is minimized; None is the loss that is right.
        max_grad_norm: clip the gradient's norm to it; 0 does not.
        enough: end once this share of what there is to learn is learned.
        give_up: end once the loss is so many nats above the start.
        prepare: done to the copy first.
    """
    model = learner(subject.model)
    if prepare is not None:
        prepare(model)
    stepper = Stepper(subject, model, max(rates))
    parameters = [p for p in model.parameters() if p.requires_grad]
    losses: list[float] = []
    norms: list[float] = []
    for rate in [*rates, None]:
        with torch.set_grad_enabled(rate is not None):
            predicted = scores(model, batch.inputs)
            right = reference_loss(predicted, batch.targets, subject.vocab_size)
        value = float(right.detach())
        losses.append(value if math.isfinite(value) else math.inf)
        first = losses[0] - batch.floor
        if (
            rate is None
            or value - losses[0] > give_up
            or not math.isfinite(value)
            or value - batch.floor < (1 - enough) * first
        ):
            break
        loss = right if loss_fn is None else loss_fn(predicted, batch.labels)
        if not loss.requires_grad:
            break
        for parameter in parameters:
            parameter.grad = None
        with going_back("model"):
            loss.backward()  # type: ignore[no-untyped-call]
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        norms.append(float(norm))
        if max_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
        stepper.step(rate)
    return Curve(tuple(rates[: len(norms)]), tuple(losses), tuple(norms), batch.floor)


def warm(rate: float, steps: int, warmup: int) -> list[float]:
    """A rate that rises in so many steps, then stays."""
    return [rate * min(1.0, (step + 1) / max(1, warmup)) for step in range(steps)]


def warm_and_down(rate: float, steps: int) -> list[float]:
    """A rate that rises over a tenth of the steps and falls to 0 over the last half, so that the end settles."""
    rise, fall = max(1, steps // 10), max(1, steps // 2)
    return [rate * min(1.0, (step + 1) / rise, (steps - step) / fall) for step in range(steps)]
