"""Pictures of measurements: readable without colour, and with what the seeds differ by."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from groundup.lab.experiment import Experiment, Results, Spread
from groundup.runtime.files import replace_durably
from groundup.tracking.schedule_picture import COLOURS, LINES, MARKERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH_INCHES, HEIGHT_INCHES, DOTS_PER_INCH = 9.6, 4.2, 100
EVEN_GUESS = math.log(257)
"""Loss of a model that gives every byte, and the end of a text, the same probability: ln 257."""


def draw(experiment: Experiment, results: Results, path: Path) -> None:
    """Write an experiment's picture, a PNG."""
    # Figure, not pyplot: no global state, no window, no import of a display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_INCHES, HEIGHT_INCHES), dpi=DOTS_PER_INCH, layout="constrained")
    experiment.draw(results, figure)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    replace_durably(path, content.getvalue())


def curves(
    axes: "Axes", results: Results, settings: Sequence[str], x: str = "eval_step", y: str = "eval_loss", top: float = math.inf
) -> None:
    """
    A line for each setting, the mean of its seeds, in a band from the lowest to the highest.

    Args:
        x: the list of a measurement that says where; ``y`` says what.
        top: what is above, or not finite, is drawn there.
    """
    for number, setting in enumerate(settings):
        runs = results.measured(setting)
        length = min(len(run[y]) for run in runs)
        at = runs[0][x][:length]
        rows = [[_capped(value, top) for value in run[y][:length]] for run in runs]
        spreads = [Spread(tuple(row[i] for row in rows)) for i in range(length)]
        colour = COLOURS[number % len(COLOURS)]
        axes.fill_between(
            at, [spread.low for spread in spreads], [spread.high for spread in spreads], color=colour, alpha=0.2, linewidth=0
        )
        axes.plot(
            at,
            [spread.mean for spread in spreads],
            color=colour,
            linestyle=LINES[number % len(LINES)],
            marker=MARKERS[number % len(MARKERS)],
            markersize=5,
            markevery=max(1, length // 8),
            linewidth=1.6,
            label=setting,
        )
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize="small", handlelength=4)


def lines(axes: "Axes", series: Mapping[str, Mapping[float, Spread]], top: float = math.inf) -> None:
    """A line for each series over a number, the mean of the seeds, with a bar from the lowest to the highest."""
    for number, (name, points) in enumerate(series.items()):
        means = [_capped(spread.mean, top) for spread in points.values()]
        low = [mean - min(mean, _capped(spread.low, top)) for mean, spread in zip(means, points.values(), strict=True)]
        high = [max(mean, _capped(spread.high, top)) - mean for mean, spread in zip(means, points.values(), strict=True)]
        axes.errorbar(
            list(points),
            means,
            yerr=[low, high],
            color=COLOURS[number % len(COLOURS)],
            linestyle=LINES[number % len(LINES)],
            marker=MARKERS[number % len(MARKERS)],
            markersize=6,
            capsize=4,
            linewidth=1.6,
            label=name,
        )
    axes.grid(alpha=0.25)
    if len(series) > 1:
        axes.legend(frameon=False, fontsize="small", handlelength=4)


def dots(axes: "Axes", spreads: Mapping[str, Spread], top: float = math.inf, digits: int = 3) -> None:
    """A row for each name, first on top: a hollow dot a seed, a line at their mean, and the mean as a number."""
    shown = {name: [_capped(value, top) for value in spread.values] for name, spread in spreads.items()}
    largest = max(max(values) for values in shown.values())
    least = min(min(values) for values in shown.values())
    room = (largest - least or abs(largest) or 1.0) * 0.35
    for row, (name, values) in enumerate(shown.items()):
        axes.plot(values, [row] * len(values), "o", markerfacecolor="none", color=COLOURS[0], markersize=7)
        axes.plot([_capped(spreads[name].mean, top)], [row], "|", color="black", markersize=16)
        text = f"{spreads[name].mean:.{digits}f}" if max(values) < top else f"{number_above(spreads[name].mean, top)}"
        axes.annotate(text, (max(values), row), textcoords="offset points", xytext=(9, 0), va="center", fontsize="small")
    axes.set_yticks(range(len(shown)), list(shown))
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlim(least - room * 0.3, largest + room)
    axes.grid(alpha=0.25, axis="x")


def number_above(mean: float, top: float) -> str:
    """The label of a value that does not fit into the picture."""
    return f"{mean:.3g}" if math.isfinite(mean) else f"above {top:g}, or diverged"


def guess_line(axes: "Axes") -> None:
    """Where a model is that guesses evenly."""
    axes.axhline(EVEN_GUESS, color="black", linewidth=0.8, linestyle=(0, (1, 3)))
    axes.annotate("guessing evenly", (1, EVEN_GUESS), xycoords=("axes fraction", "data"), textcoords="offset points",
                  xytext=(-4, 3), ha="right", fontsize="x-small")  # fmt: skip


def _capped(value: float | None, top: float) -> float:
    """What is drawn for a value; something that can be drawn."""
    limit = top if math.isfinite(top) else 1e6
    return limit if value is None or not value < limit else value
