"""The few numbers that say how a run went, from all of its rows."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from groundup.evaluation.curves import never_better, turned
from groundup.reporting.rows import Metrics
from groundup.reporting.thin import Numbers, smoothed

END = 1 / 50
"""Of the rows, in the loss at the end; at least ``END_ROWS``."""
END_ROWS = 5
FALL = 0.01
"""Of the loss at the end: a run whose last quarter brought more was still learning."""
CLIMB = 0.1
"""Of the lowest training loss, and at least this many nats: a loss that climbed so far has not settled."""
CLIMB_ROWS = 50
"""Losses that say so without an evaluation, at least."""


def totals_of(metrics: Metrics, steps: Mapping[str, Numbers], events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """
    A run in a few numbers, None where there is none.

    Args:
        metrics: for its evaluations, spikes and skipped steps.
        steps: the columns, each (N,).
        events: what was unusual.
    """
    losses, evaluations = steps["loss"], [row for row in metrics.evaluations if not math.isnan(row.get("eval_loss", math.nan))]
    best = min(evaluations, key=lambda row: row["eval_loss"], default=None)
    speeds = steps["tokens_per_second"]
    kinds = [event["kind"] for event in events]
    return {
        "step": int(max([*steps["step"][-1:], *(row["step"] for row in metrics.evaluations[-1:])], default=0)),
        "epochs": _value(steps["epoch"][-1:]),
        "tokens": _value(steps["tokens"][-1:]),
        "seconds": _value(steps["seconds"][-1:]),
        "tokens_per_second": _value([np.nanmedian(speeds)] if not np.isnan(speeds).all() else []),
        "first_loss": _value(losses[~np.isnan(losses)][:1]),
        "loss": _mean(losses[-_end_rows(losses) :]),
        "evaluations": len(evaluations),
        "first_evaluation": _evaluation(evaluations[0] if evaluations else None),
        "last_evaluation": _evaluation(evaluations[-1] if evaluations else None),
        "best_evaluation": _evaluation(best),
        "overfitting": _overfitting(evaluations, steps["step"], losses),
        "never_better": never_better(np.array([row["eval_loss"] for row in evaluations])),
        "still_falling": still_falling([(row["step"], row["eval_loss"]) for row in evaluations]),
        "climbed": climbed(steps["step"], losses, [row["eval_loss"] for row in evaluations]),
        "ends_skipped": bool(metrics.skipped and metrics.skipped[-1] == steps["step"][-1]),
        "skipped": metrics.skipped_so_far,
        "spikes": len(metrics.spikes),
        "rollbacks": kinds.count("rollback"),
        "resumes": kinds.count("resume"),
    }


def still_falling(evaluations: Sequence[tuple[float, float]]) -> bool | None:
    """Whether the last quarter of a run lowered its validation loss by more than 1 %; None with fewer than four evaluations."""
    if len(evaluations) < 4:
        return None
    last_step, last = evaluations[-1]
    before = [loss for step, loss in evaluations if step <= 0.75 * last_step]
    return None if not before else bool(before[-1] - last > FALL * abs(last))


def climbed(steps: Numbers, losses: Numbers, evaluations: Sequence[float]) -> dict[str, Any] | None:
    """
    Where the training loss was lowest, if it ended far above that.

    Not by chance: validation loss must have climbed as well.

    Args:
        steps: of the losses, (N,).
        losses: as they were, (N,).
        evaluations: validation losses in order; where there are none, many losses must say it.

    Returns:
        step, loss, and the loss at its end; None where it did not climb.
    """
    half = _end_rows(losses) // 2
    # Means of as many losses each: at the ends of the curve there are fewer.
    means = smoothed(losses, 2 * half + 1)[half : len(losses) - half]
    if np.isnan(means).all() or (not evaluations and len(losses) < CLIMB_ROWS):
        return None
    lowest, end = int(np.nanargmin(means)), float(means[~np.isnan(means)][-1])
    far = max(CLIMB, CLIMB * abs(means[lowest]))
    if end - means[lowest] < far or (evaluations and evaluations[-1] - min(evaluations) < far):
        return None
    return {"step": int(steps[lowest + half]), "loss": float(means[lowest]), "end": end}


def _overfitting(evaluations: Sequence[Mapping[str, float]], steps: Numbers, losses: Numbers) -> dict[str, Any] | None:
    at, values = (np.array([row[name] for row in evaluations], dtype=np.float64) for name in ("step", "eval_loss"))
    there = ~np.isnan(losses)
    turn = turned(at, values, steps[there], losses[there])
    return None if turn is None else {"step": turn.step, "loss": turn.loss, "rose_to": turn.last}


def _end_rows(losses: Numbers) -> int:
    return max(END_ROWS, round(len(losses) * END))


def _evaluation(row: Mapping[str, float] | None) -> dict[str, Any] | None:
    if row is None:
        return None
    names = ("loss", "perplexity", "bits_per_byte", "token_accuracy")
    return {"step": int(row["step"]), **{name: _value([row.get(f"eval_{name}", math.nan)]) for name in names}}


def _mean(values: Numbers) -> float | None:
    there = values[~np.isnan(values)]
    return float(there.mean()) if len(there) else None


def _value(values: Sequence[float] | Numbers) -> float | None:
    """The one value, as JSON has it; None where there is none, or it is not finite."""
    return float(values[0]) if len(values) and math.isfinite(values[0]) else None
