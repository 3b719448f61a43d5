"""What curves of losses say: their noise, and where learning turned into learning by heart."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Series = npt.NDArray[np.float64]

MAD_TO_STANDARD_DEVIATION = 1.4826
"""Of a normal distribution: its standard deviation in median absolute deviations."""
RISE, RISE_AT_ONCE = 0.01, 0.03
"""Validation has turned where its last loss is by this share above its lowest: with two evaluations since then, or with one."""

LEAST_LOSS = 1e-6
"""Nats: a loss below it is none, and shares are of this."""


@dataclass(frozen=True)
class Turn:
    """Where validation loss was lowest before it rose, in nats per token."""

    step: int
    loss: float
    last: float
    """At the end."""


def turned(eval_steps: Series, eval_losses: Series, steps: Series, losses: Series) -> Turn | None:
    """
    Where a run began to learn its text by heart: validation loss rises, while training loss does not.

    A run whose lowest loss is its first has learned nothing, and one whose training loss rose too has diverged.

    Args:
        eval_steps: of the evaluations, (E,), in order; ``eval_losses`` theirs, finite.
        steps: of the training losses, (N,), in order; ``losses`` theirs, finite.
    """
    if len(eval_losses) < 3:
        return None
    best = int(np.argmin(eval_losses))
    after, share = len(eval_losses) - 1 - best, risen(eval_losses)
    if best == 0 or not ((after >= 2 and share > RISE) or (after == 1 and share > RISE_AT_ONCE)):
        return None
    before, since = losses[steps <= eval_steps[best]], losses[steps > eval_steps[best]]
    if len(before) and len(since) and np.median(since[-5:]) > np.median(before[-5:]) + 3 * noise(losses):
        return None
    return Turn(int(eval_steps[best]), float(eval_losses[best]), float(eval_losses[-1]))


def risen(losses: Series) -> float:
    """By what share of the lowest loss the last is above it; finite, also where the lowest is 0."""
    lowest = float(losses.min())
    return (float(losses[-1]) - lowest) / max(abs(lowest), LEAST_LOSS)


def never_better(eval_losses: Series) -> bool:
    """Whether validation was lowest at the first of three evaluations or more, and is above that now: nothing was learned."""
    return len(eval_losses) >= 3 and int(np.argmin(eval_losses)) == 0 and risen(eval_losses) > RISE


def noise(values: Series) -> float:
    """Standard deviation of what is not trend, from the differences of neighbours, robustly."""
    if len(values) < 3:
        return 0.0
    differences = np.diff(values)
    middle = np.median(differences)
    return float(MAD_TO_STANDARD_DEVIATION * np.median(np.abs(differences - middle)) / math.sqrt(2))
