"""A learning-rate range test, drawn."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from groundup.runtime.files import replace_durably


def draw_range(found: Mapping[str, Any], path: Path) -> bool:
    """
    Draw loss over learning rate into a PNG, with the suggested range shaded.

    Args:
        found: ``learning_rates`` and ``losses``, of equal length, and the suggestion from ``low`` to ``high``.

    Returns:
        Whether there was anything to draw.
    """
    rates, losses = found.get("learning_rates") or [], found.get("losses") or []
    if not rates:
        return False
    # Figure, not pyplot: no global state, no window, no import of a display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.plot(rates, losses, color="#0072b2", linewidth=1.8, marker="o", markersize=4)
    axes.axvspan(found["low"], found["high"], color="#009e73", alpha=0.2)
    axes.annotate(
        f"suggested\n{found['low']:.1g} to {found['high']:.1g}", ((found["low"] * found["high"]) ** 0.5, 0.98),
        xycoords=("data", "axes fraction"), ha="center", va="top",
    )  # fmt: skip
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss on one mini-batch, smoothed (nats per token)")
    axes.grid(alpha=0.25)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    replace_durably(path, content.getvalue())
    return True
