"""
What a run's folder says, as one JSON value: what a report shows, and what a live page asks for again and again.

``page_data`` makes the whole page's value from those of its runs; ``groundup.reporting.page.page`` makes HTML of that.
"""

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from groundup.reporting.compare import differences, verdict
from groundup.reporting.facts import (
    SAMPLES,
    data_summary,
    is_running,
    modified_at,
    read_config,
    read_machine,
    read_samples,
    unusual,
)
from groundup.reporting.rows import CURVES, PLACES, Metrics, Tail
from groundup.reporting.thin import Numbers, chosen, rounded, smoothed
from groundup.reporting.totals import totals_of
from groundup.reporting.words import story
from groundup.tracking.metrics import METRICS, number

POINTS = 1500
"""Of a curve, at most."""
EXTREMES_OF = ("loss", "grad_norm", "tokens_per_second")
"""The curves whose lowest and highest values must be seen."""
SMOOTHING = 1 / 50
"""Of the run, in a mean of the smoothed loss; at least ``SMOOTHED_ROWS`` rows."""
SMOOTHED_ROWS = 5
HEALTH_COLUMNS = 240
HEALTH_CELLS = 8000
"""Of a heat map, at most."""
HEALTH_MEASURES, HEALTH_BLOCKS = 12, 256
"""Shown, at most: a run has six measures, and GPT-3 96 layers. Of more blocks some are shown, evenly spread."""


class RunReader:
    """Reads one run, again and again; what was read of its metrics is not read twice."""

    def __init__(self, run: Path):
        self.run = run
        self._metrics = Metrics(run / METRICS)
        self._samples = Tail(run / SAMPLES)
        self._sample_rows: list[dict[str, Any]] = []

    def data(self, points: int = POINTS) -> dict[str, Any]:
        """
        The run as it is now, as JSON values: numbers that are not finite are None.

        Args:
            points: of a curve, at most.
        """
        run, metrics = self.run, self._metrics
        metrics.read()
        anew, rows = self._samples.rows()
        self._sample_rows = [*([] if anew else self._sample_rows), *rows]
        config, machine, modified = read_config(run), read_machine(run), modified_at(run / METRICS)
        data = data_summary(run, config)
        steps = {name: np.array(column) for name, column in metrics.steps.items()}
        smooth = smoothed(steps["loss"], max(SMOOTHED_ROWS, round(len(steps["loss"]) * SMOOTHING)))
        events = unusual(run, metrics, machine["starts"])
        state = {
            "running": is_running(run, modified),
            "planned_steps": _planned(config, machine["planned_steps"], steps["step"]),
            "updated": None if modified is None else datetime.fromtimestamp(modified, UTC).isoformat(timespec="seconds"),
        }
        summary: dict[str, Any] = {
            "name": run.resolve().name,
            "path": str(run),
            "rows": len(steps["step"]),
            "state": state,
            "totals": totals_of(metrics, steps, events),
            "train": _curves(steps, smooth, points),
            "evaluations": _evaluations(metrics.evaluations, points),
            "health": _health(metrics.health),
            "samples": read_samples(self._sample_rows),
            "events": events,
            "config": config,
            "data": data,
            "machine": machine,
            "tokens_per_byte": _tokens_per_byte(data),
        }
        return {**summary, "story": story(summary)}


def run_data(run: Path, points: int = POINTS) -> dict[str, Any]:
    """One run as it is now, as JSON values: numbers that are not finite are None."""
    return RunReader(run).data(points)


def page_data(
    runs: Sequence[Mapping[str, Any]], findings: Mapping[str, Sequence[Mapping[str, Any]]] | None = None
) -> dict[str, Any]:
    """
    What ``page`` shows, of one run or several.

    Args:
        runs: each from ``run_data``.
        findings: by a run's path, what a doctor found in it, each as ``Check.as_json`` says it.
    """
    labels = labels_of([run["path"] for run in runs])
    shown = [{**run, "label": label, "findings": [*(findings or {}).get(run["path"], ())]}
             for run, label in zip(runs, labels, strict=True)]  # fmt: skip
    if len(shown) < 2:
        return {"runs": shown, "differences": None, "verdict": ""}
    return {"runs": shown, "differences": differences(shown), "verdict": verdict(shown)}


def labels_of(paths: Sequence[str]) -> list[str]:
    """A short name for each run: its folder's, with as many of those above as tell it from the others."""
    parts = [Path(path).resolve().parts for path in paths]
    labels = []
    for place, own in enumerate(parts):
        others = [other for index, other in enumerate(parts) if index != place and other != own]
        depth = 1
        while depth < len(own) and any(other[-depth:] == own[-depth:] for other in others):
            depth += 1
        labels.append("/".join(own[-depth:]))
    return labels


def _curves(steps: dict[str, Numbers], smooth: Numbers, points: int) -> dict[str, list[float | int | None]]:
    rows = chosen([steps[name] for name in EXTREMES_OF], points)
    columns = {name: steps[name][rows] for name in (*PLACES, *CURVES)} | {"smooth": smooth[rows]}
    return {
        name: rounded(column)
        for name, column in columns.items()
        if name in PLACES or name == "loss" or not np.isnan(column).all()
    }


def _evaluations(rows: Sequence[Mapping[str, float]], points: int) -> dict[str, list[float | int | None]]:
    """A column by key without its ``eval_``, those of sources and averaged weights among them."""
    keys = [*PLACES, *sorted({key for row in rows for key in row if key.startswith("eval_")})]
    columns = {key: np.array([row.get(key, math.nan) for row in rows], dtype=np.float64) for key in keys}
    extremes = [columns[key] for key in ("eval_loss",) if key in columns] or [columns["step"]]
    kept = chosen(extremes, points)
    return {key.removeprefix("eval_"): rounded(column[kept]) for key, column in columns.items()}


def _health(rows: Sequence[tuple[int, Mapping[str, Any]]]) -> dict[str, Any]:
    """Steps, and by measure its blocks and their values: [block][step]."""
    seen: dict[str, dict[str, None]] = {}
    for _, health in rows:
        for name, blocks in health.items():
            if isinstance(blocks, dict) and blocks:
                seen.setdefault(name, {}).update(dict.fromkeys(blocks))
    measures = {name: _spread([*blocks], HEALTH_BLOCKS) for name, blocks in [*seen.items()][:HEALTH_MEASURES]}
    most = max((len(blocks) for blocks in measures.values()), default=1)
    columns = max(2, min(HEALTH_COLUMNS, HEALTH_CELLS // max(1, most)))
    kept = _spread(rows, columns)
    values = {
        name: {"blocks": blocks, "values": [rounded((_cell(health, name, block) for _, health in kept), 4) for block in blocks]}
        for name, blocks in measures.items()
    }
    return {"steps": [step for step, _ in kept], "measures": values}


def _cell(health: Mapping[str, Any], name: str, block: str) -> float:
    found = health.get(name)
    value = found.get(block) if isinstance(found, dict) else None
    return number(value)


def _spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many of them, evenly spread, the first and the last among them."""
    return [items[index] for index in np.unique(np.linspace(0, len(items) - 1, min(most, len(items))).astype(int))]


def _planned(config: Mapping[str, Any], saved: int | None, steps: Numbers) -> int | None:
    """The steps that the run is to have: the configuration says it, or else a checkpoint; never fewer than there are."""
    given = config.get("max_steps")
    planned = given if type(given) is int and given > 0 else saved
    return planned if planned is None or not len(steps) else max(planned, int(steps[-1]))


def _tokens_per_byte(data: Mapping[str, Any]) -> float | None:
    """Tokens to a byte of the training text, which makes bits per byte of a loss; None where no dataset says it."""
    splits = [split for name, split in data.get("splits", {}).items() if name.startswith("train")]
    tokens = sum(split["tokens"] for split in splits if type(split["tokens"]) is int)
    size = sum(split["bytes"] for split in splits if type(split["bytes"]) is int)
    return float(f"{tokens / size:.6g}") if tokens and size else None
