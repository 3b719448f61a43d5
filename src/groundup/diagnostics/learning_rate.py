"""Which learning rates a model bears, and whether the given one is among them."""

import math
from dataclasses import dataclass

from groundup.diagnostics.bench import Scores
from groundup.diagnostics.check import Check
from groundup.diagnostics.fitting import Curve, Exercise, Work, fit
from groundup.diagnostics.subject import Loss, Subject

LOWEST, HIGHEST = 1e-6, 10.0
"""Ends of the range test: Adam below moves nothing in a run of usual length, and SGD above is unheard of."""
HARDLY = 0.1
"""
Share of what there is to learn. A rate that learns less of one mini-batch by heart, where another learns 0.9 in as many steps,
is too small: for all of it a run would take ten times the steps at least, and it is about more than one mini-batch.
"""
LEARNED = 0.9
"""Share that counts as learned by heart: the loss is then a tenth of what it was."""
HALF = 0.5
"""A rate above the range that learns less than this is too large."""
RISES = 0.5
"""Nats above what the loss was: on one mini-batch it has no reason to rise, and an unlucky step costs a tenth of that."""


@dataclass(frozen=True)
class Range:
    """A learning-rate range test (Smith 2017, "Cyclical Learning Rates for Training Neural Networks", section 3.3)."""

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    """Smoothed; before the step of each rate."""
    low: float
    """From here on the loss falls."""
    high: float
    """A third of the rate at which it falls no more."""


def range_test(subject: Subject, scores: Scores, batch: Exercise, work: Work, loss_fn: Loss | None) -> Range:
    """Train on one mini-batch while the rate rises from step to step; end once the loss is far above its start."""
    ratio = (HIGHEST / LOWEST) ** (1 / (work.range_steps - 1))
    rates = [LOWEST * ratio**step for step in range(work.range_steps)]
    curve = fit(subject, scores, batch, rates, loss_fn=loss_fn, enough=2.0, give_up=3.0)
    return read_range(curve)


def read_range(curve: Curve) -> Range:
    """The rates between which the loss fell."""
    after = [
        loss if math.isfinite(loss) else max(filter(math.isfinite, curve.losses), default=0.0) + 3 for loss in curve.losses[1:]
    ]
    smooth: list[float] = []
    for loss in after:
        smooth.append(loss if not smooth else 0.5 * smooth[-1] + 0.5 * loss)
    if not smooth:
        return Range((), (), LOWEST, LOWEST)
    best = min(range(len(smooth)), key=smooth.__getitem__)
    fall = curve.losses[0] - smooth[best]
    first = next((i for i in range(best + 1) if curve.losses[0] - smooth[i] >= 0.1 * fall), best)
    high = curve.rates[best] / 3
    return Range(curve.rates[: len(smooth)], tuple(smooth), min(curve.rates[first], high / 10), high)


def range_check(found: Range, given: float | None, trustworthy: bool) -> Check:
    """The suggested range; numbers for a picture are in the details."""
    name, group = "learning_rate_range", "learning"
    expected = "a rate between those at which the loss starts to fall and no longer falls"
    details = {"learning_rates": list(found.rates), "losses": list(found.losses), "low": found.low, "high": found.high}
    if not found.rates or not trustworthy:
        why = "nothing was learned at any rate" if found.rates else "nothing can be trained"
        return Check(name, group, None, why, expected, details=details)
    theirs = "" if given is None else f"; given {given:.2g}"
    return Check(name, group, True, f"suggested {found.low:.1g} to {found.high:.1g}, on one mini-batch{theirs}", expected,
                 details=details)  # fmt: skip


def rate_fault(given: Curve, rate: float, best: Curve, tried: Range) -> str:
    """The name of what is wrong with a rate, by what it learned beside what can be learned; empty is nothing."""
    if best.progress < LEARNED:
        return ""
    if given.progress < HALF and rate > tried.high:
        return "learning_rate_too_large"
    if given.progress < HARDLY and rate < tried.high:
        return "learning_rate_too_small"
    return ""


def rate_check(given: Curve | None, rate: float | None, best: Curve, tried: Range, fault: str, blame: str) -> Check:
    """The verdict on the given rate."""
    name, group = "learning_rate", "learning"
    expected = f"some progress on one mini-batch; suggested {tried.low:.1g} to {tried.high:.1g}"
    if given is None or rate is None:
        return Check(name, group, None, "no learning rate was given", expected)
    measured = f"{rate:.2g}: {said(given)}; the best rate tried: {said(best)}"
    details = {"learning_rate": rate, "losses": list(given.losses), "grad_norms": list(given.grad_norms)}
    if blame or best.progress < LEARNED:
        return Check(name, group, None, f"{measured}; not judged, because something else is wrong", expected, details=details)
    if not fault:
        return Check(name, group, True, measured, expected, details=details)
    side = (
        "too large: what is learned is thrown over"
        if fault == "learning_rate_too_large"
        else "too small: hardly anything moves"
    )
    return Check(
        name, group, False, measured, expected, f"the learning rate is {side}; try {tried.high / 3:.1g}", fault, details
    )


def said(curve: Curve) -> str:
    """A training in words."""
    steps = len(curve.rates)
    end = f"{curve.losses[-1]:.3g}" if math.isfinite(curve.losses[-1]) else "no number"
    return f"loss {curve.losses[0]:.3g} to {end} in {steps} steps"
