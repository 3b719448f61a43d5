"""Which checkpoint is the best, and when to stop: functions of the rows of metrics.jsonl, so that no state must be kept."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from groundup.checkpoint.commit import checkpoints, step_of
from groundup.config.options import SelectionOptions

LESS_IS_BETTER = ("loss", "perplexity", "bits_per_byte")


@dataclass(frozen=True)
class Best:
    """The best evaluation of a run so far."""

    step: int
    value: float


def metric_of(options: SelectionOptions) -> str:
    """The key in metrics.jsonl of the metric that decides."""
    return f"eval_{options.metric_for_best_model.removeprefix('eval_')}"


def best_of(rows: Sequence[Mapping[str, Any]], options: SelectionOptions) -> Best | None:
    """The best evaluation after step 0; the earlier one of two equals. None where there is none."""
    best: Best | None = None
    for step, value in _measured(rows, options):
        if best is None or _is_better(value, best.value, options):
            best = Best(step, value)
    return best


def best_saved(run: Path, rows: Sequence[Mapping[str, Any]], options: SelectionOptions) -> Best | None:
    """The best evaluation whose checkpoint is there: a run may evaluate more often than it saves."""
    saved = {step_of(path) for path in checkpoints(run)}
    return best_of([row for row in rows if row["step"] in saved], options)


def out_of_patience(rows: Sequence[Mapping[str, Any]], options: SelectionOptions) -> bool:
    """
    Whether early stopping ends the run: so many evaluations in a row did not beat the best by the threshold.

    The rules of Hugging Face's EarlyStoppingCallback: the best is whatever was better, by however little.
    """
    best: float | None = None
    waited = 0
    for _, value in _measured(rows, options):
        better = best is None or _is_better(value, best, options)
        if best is None or (better and abs(value - best) > options.early_stopping_threshold):
            waited = 0
        else:
            waited += 1
        if better:
            best = value
    return 0 < options.early_stopping_patience <= waited


def kept(run: Path, limit: int, best: Best | None) -> set[Path]:
    """
    The checkpoints of a run that ``save_total_limit`` keeps: the newest, and the best where there is one to protect.

    With a limit of 1 that can be two: the last one, from which the run goes on, and the best.
    """
    saved = checkpoints(run)
    if not limit:
        return set(saved)
    protected = [path for path in saved if best is not None and step_of(path) == best.step]
    if protected and protected[0] not in saved[-limit:]:
        return {*protected, *saved[-max(1, limit - 1) :]}
    return set(saved[-limit:])


def _measured(rows: Sequence[Mapping[str, Any]], options: SelectionOptions) -> list[tuple[int, float]]:
    metric = metric_of(options)
    # A figure that is not finite is null in the file; at step 0 there is no checkpoint.
    return [(row["step"], row[metric]) for row in rows if row["step"] and row.get(metric) is not None]


def _is_better(value: float, than: float, options: SelectionOptions) -> bool:
    greater = options.greater_is_better
    if greater is None:
        greater = not metric_of(options).endswith(LESS_IS_BETTER)
    return value > than if greater else value < than
