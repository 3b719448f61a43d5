"""Learning-rate schedules, drawn: a picture for a browser, a line of blocks each for a terminal."""

import io
import math
import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from groundup.runtime.files import replace_durably

BLOCKS = " ▁▂▃▄▅▆▇█"
WIDTH = 40
"""Characters of a curve in a terminal."""
# Okabe and Ito's colours, which most colour-blind people tell apart; lines and markers do it without any colour.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#7f7f7f")
LINES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v")
MARKER_DISTANCE = 0.12
"""Along a curve, as a fraction of the picture's diagonal."""


def draw_schedules(curves: Mapping[str, Sequence[tuple[int, float]]], path: Path) -> None:
    """
    Draw curves over one another into a PNG.

    Args:
        curves: by name, (step, learning rate) in order.
    """
    # Figure, not pyplot: no global state, no window, no import of a display.
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(8, 4.8), dpi=120, layout="constrained")
    axes = figure.subplots()
    lines = []
    for number, points in enumerate(curves.values()):
        steps, rates = zip(*points, strict=True)
        (line,) = axes.plot(
            steps,
            rates,
            color=COLOURS[number % len(COLOURS)],
            linestyle=LINES[number % len(LINES)],
            linewidth=1.8,
            marker=MARKERS[number % len(MARKERS)],
            markersize=5,
            # They start at different places, so that all show where curves lie on one another.
            markevery=(MARKER_DISTANCE * (number + 0.5) / len(curves), MARKER_DISTANCE),
        )
        lines.append(line)
    axes.set(xlabel="optimizer steps", ylabel="learning rate")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    axes.grid(alpha=0.25)
    # Given to the legend itself: a label of a line is left out where it starts with an underscore.
    names = [os.fsencode(name).decode(errors="replace") for name in curves]
    legend = figure.legend(lines, names, loc="outside upper center", ncols=min(3, len(names)), frameon=False, handlelength=4)
    for text in legend.get_texts():
        text.set_parse_math(False)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    replace_durably(path, content.getvalue())


def schedule_text(result: Mapping[str, Any]) -> str:
    """A line for each schedule of ``draw``'s result: its curve in blocks, all on one scale; its first, highest, last rate."""
    schedules = result["schedules"]
    top = max(drawn["peak"] for drawn in schedules)
    width = max(len(drawn["name"]) for drawn in schedules)
    lines = []
    for drawn in schedules:
        steps = [step for step, _ in drawn["points"]]
        columns = min(WIDTH, result["steps"])
        # Of each column the step in its middle, or the last point before it.
        middles = (math.ceil(result["steps"] * (column + 0.5) / columns) for column in range(columns))
        curve = bars([drawn["points"][bisect_right(steps, middle) - 1][1] for middle in middles], top)
        rates = f"{drawn['first']:.3g} → {drawn['peak']:.3g} at step {drawn['peak_step']:,} → {drawn['last']:.3g}"
        lines.append(f"{drawn['name']:<{width}}  │{curve}│  {rates}")
    return "\n".join(lines)


def bars(rates: Sequence[float], top: float) -> str:
    """A block for each rate, as high as it is against ``top``; nothing for 0, and something for anything above."""
    levels = len(BLOCKS) - 1
    return "".join(BLOCKS[min(levels, math.ceil(levels * rate / top - 1e-9))] if rate > 0 else BLOCKS[0] for rate in rates)
