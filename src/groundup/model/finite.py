"""Whether a model's scores mean anything."""

import math

from torch import Tensor

from groundup.errors import DivergedError


def require_finite(logits: Tensor) -> None:
    """
    Refuse scores (…, V) from which nothing can be chosen or learned.

    Raises:
        DivergedError: one of them is not a finite number.
    """
    # One pass: a sum is finite unless an addend is not, or unless they are too large to be anything but diverged.
    if not math.isfinite(logits.float().sum()):
        raise DivergedError("the model's scores are not finite, so its training diverged; use an earlier checkpoint")
