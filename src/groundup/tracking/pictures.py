"""loss.png and perplexity.png: training and validation, over steps and over tokens."""

import io
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from groundup.runtime.files import replace_durably
from groundup.tracking.labels import one_line


def draw_curves(rows: Sequence[dict[str, Any]], run: Path, title: str) -> None:
    """Draw the run's curves from its metric rows."""
    _draw(rows, run / "loss.png", title, "loss (nats per token)", lambda loss: loss, logarithmic=False)
    _draw(rows, run / "perplexity.png", title, "perplexity", lambda loss: math.exp(min(loss, 50)), logarithmic=True)


def _draw(
    rows: Sequence[dict[str, Any]],
    path: Path,
    title: str,
    label: str,
    scale: Callable[[float], float],
    *,
    logarithmic: bool,
) -> None:
    # Figure, not pyplot: no global state, no window, no import of a display.
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(8, 4.8), dpi=120, layout="constrained")
    axes = figure.subplots()
    training = [(r["step"], scale(r["loss"])) for r in rows if r.get("loss") is not None]
    validation = [(r["step"], scale(r["eval_loss"])) for r in rows if r.get("eval_loss") is not None]
    if training:
        axes.plot(*zip(*training, strict=True), color="#9db7d5", linewidth=1, label="train")
    if validation:
        steps, values = zip(*validation, strict=True)
        axes.plot(steps, values, color="#c0392b", marker="o", markersize=4, linewidth=1.8, label="validation")
        axes.annotate(f"{values[-1]:.3g}", (steps[-1], values[-1]), textcoords="offset points", xytext=(-6, 9), ha="right")
    if logarithmic:
        axes.set_yscale("log")
    axes.set(xlabel="optimizer steps", ylabel=label)
    axes.set_title(one_line(title), parse_math=False)
    axes.grid(alpha=0.25)
    if training or validation:
        axes.legend(frameon=False)
    seen = dict(sorted((r["step"], r["num_input_tokens_seen"]) for r in rows if r["step"]))
    if seen:
        # A batch that grows makes it no straight line; beyond the ends it goes on as from the start.
        per_step = max(seen.values()) / max(seen)
        at, there = [0, *seen, 2 * max(seen)], [0, *seen.values(), 2 * max(seen) * per_step]
        top = axes.secondary_xaxis("top", functions=(partial(_between, at, there), partial(_between, there, at)))
        top.set_xlabel("tokens seen")
        top.xaxis.set_major_formatter(EngFormatter())
    content = io.BytesIO()
    figure.savefig(content, format="png")
    replace_durably(path, content.getvalue())


def _between(known: list[float], values: list[float], at: Any) -> Any:
    """Values between known ones, on straight lines."""
    return np.interp(at, known, values)
