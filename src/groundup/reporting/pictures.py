"""What a report shows and a run does not draw by itself, as PNGs: rates, norms, speed, health, and losses of several runs."""

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from groundup.runtime.files import replace_durably
from groundup.tracking.labels import visible
from groundup.tracking.schedule_picture import COLOURS, LINES, MARKERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Runs = Sequence[Mapping[str, Any]]
MARKER_DISTANCE = 0.12
LONGEST_NAME = 80
"""Characters."""
NAMED_ROWS = 64
"""Of a heat map: there is no room for the names of more."""
LOGARITHMIC_FROM = 20.0
"""Times the lowest value: a heat map with a higher one is logarithmic."""


def draw_pictures(runs: Runs, page: Path, say: Callable[[str], None]) -> list[Path]:
    """
    Draw the pictures beside a page, named after it: ``report-learning-rate.png`` beside ``report.html``.

    Args:
        runs: each as ``page_data`` has it.
        say: told of a picture that these numbers do not allow; the others are drawn.

    Returns:
        The pictures, those that have something to show.

    Raises:
        OSError: one cannot be written.
    """
    kinds: list[tuple[str, Callable[[Runs, Path], bool]]] = [
        ("learning-rate", draw_learning_rate),
        ("gradient-norm", draw_gradient_norm),
        ("speed", draw_speed),
    ]
    if len(runs) > 1:
        kinds.insert(0, ("loss", draw_losses))
    wanted = [(_beside(page, name), partial(draw, runs)) for name, draw in kinds]
    for number, run in enumerate(runs, 1):
        wanted.append((_beside(page, f"health-{number}" if len(runs) > 1 else "health"), partial(draw_health, run)))
    drawn = []
    for path, draw_it in wanted:
        try:
            if draw_it(path):
                drawn.append(path)
        except (ValueError, ArithmeticError) as error:  # matplotlib's words for numbers that it has no room for
            say(f"{path.name}: not drawn ({type(error).__name__}: {error}); the page has its numbers")
    return drawn


def draw_learning_rate(runs: Runs, path: Path) -> bool:
    """Draw the learning rates over steps; False where there is none."""
    return _draw_curves(runs, path, "learning_rate", "learning rate", logarithmic=False)


def draw_gradient_norm(runs: Runs, path: Path) -> bool:
    """Draw the gradient norms over steps; False where there is none."""
    return _draw_curves(runs, path, "grad_norm", "gradient norm before clipping", logarithmic=True)


def draw_speed(runs: Runs, path: Path) -> bool:
    """Draw the tokens a second over steps; False where there are none."""
    return _draw_curves(runs, path, "tokens_per_second", "tokens per second", logarithmic=False)


def draw_losses(runs: Runs, path: Path) -> bool:
    """Draw the validation losses of runs, or where there are none their smoothed training losses; False without either."""
    validated = all(any(value is not None for value in run["evaluations"].get("loss", ())) for run in runs)
    part, name = ("evaluations", "loss") if validated else ("train", "smooth")
    label = "validation loss (nats per token)" if validated else "training loss, smoothed (nats per token)"
    return _draw_curves(runs, path, name, label, logarithmic=False, part=part)


def draw_health(run: Mapping[str, Any], path: Path) -> bool:
    """Draw a run's health as heat maps, a row for each layer; False where none was measured."""
    steps, measures = run["health"]["steps"], run["health"]["measures"]
    if not measures:
        return False
    rows = min(NAMED_ROWS, max(len(measure["blocks"]) for measure in measures.values()))
    figure = _figure(11, 1.2 + (1.4 + 0.16 * rows) * -(-len(measures) // 2))
    places = figure.subplots(-(-len(measures) // 2), 2, squeeze=False).ravel()
    for place, (name, measure) in zip(places, measures.items(), strict=False):
        _heat_map(place, name, measure, steps)
    for place in places[len(measures) :]:
        place.set_axis_off()
    figure.suptitle(_text(run["label"]), parse_math=False)
    _save(figure, path)
    return True


def _heat_map(axes: "Axes", name: str, measure: Mapping[str, Any], steps: Sequence[int]) -> None:
    from matplotlib.colors import LogNorm, Normalize

    values = np.array(measure["values"], dtype=np.float64)
    there = values[np.isfinite(values)]
    low, high = (float(there.min()), float(there.max())) if len(there) else (0.0, 1.0)
    scale = LogNorm(low, high) if low > 0 and high > LOGARITHMIC_FROM * low else Normalize(low, high)
    # viridis: its lightness grows all along, so it reads the same without colour.
    image = axes.imshow(values, aspect="auto", interpolation="nearest", cmap="viridis", norm=scale)
    axes.set_title(f"{_text(name.replace('_', ' '))}: {low:.3g} to {high:.3g}", fontsize=10, parse_math=False)
    blocks = measure["blocks"]
    named = range(0, len(blocks), -(-len(blocks) // NAMED_ROWS))
    for label in axes.set_yticks(named, [_text(blocks[row]) for row in named], fontsize=7):
        label.label1.set_parse_math(False)
    shown = sorted({0, len(steps) // 2, len(steps) - 1})
    axes.set_xticks(shown, [f"{steps[index]:,}" for index in shown], fontsize=8)
    axes.figure.colorbar(image, ax=axes)


def _draw_curves(runs: Runs, path: Path, name: str, label: str, *, logarithmic: bool, part: str = "train") -> bool:
    curves = []
    for run in runs:
        found = [(x, y) for x, y in zip(run[part]["step"], run[part].get(name, ()), strict=False) if y is not None]
        if points := [(x, y) for x, y in found if y > 0 or not logarithmic]:
            curves.append((run["label"], points))
    if not curves:
        return False
    figure = _figure(8, 4.8)
    axes = figure.subplots()
    lines = []
    for number, (_, points) in enumerate(curves):
        (line,) = axes.plot(
            *zip(*points, strict=True),
            color=COLOURS[number % len(COLOURS)],
            linestyle=LINES[number % len(LINES)],
            linewidth=1.4,
            marker=MARKERS[number % len(MARKERS)] if len(curves) > 1 or len(points) == 1 else None,
            markersize=4,
            markevery=(MARKER_DISTANCE * (number + 0.5) / len(curves), MARKER_DISTANCE) if len(points) > 1 else None,
        )
        lines.append(line)
    if logarithmic:
        axes.set_yscale("log")
    axes.set(xlabel="optimizer steps", ylabel=label)
    axes.grid(alpha=0.25)
    # Given to the legend itself: a label of a line is left out where it starts with an underscore.
    names = [_text(name) for name, _ in curves]
    legend = figure.legend(lines, names, loc="outside upper center", ncols=min(3, len(names)), frameon=False, handlelength=4)
    for text in legend.get_texts():
        text.set_parse_math(False)
    _save(figure, path)
    return True


def _figure(width: float, height: float) -> "Figure":
    # Figure, not pyplot: no global state, no window, no import of a display.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def _save(figure: "Figure", path: Path) -> None:
    content = io.BytesIO()
    with warnings.catch_warnings():
        # A name may be in a script that matplotlib's font does not have: it shows a box then, which says enough.
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .*missing from")
        figure.savefig(content, format="png")
    replace_durably(path, content.getvalue())


def _beside(page: Path, name: str) -> Path:
    return page.with_name(f"{page.stem}-{name}.png")


def _text(text: str) -> str:
    """A name as a picture can show it: on one line, and every character of it to be seen."""
    short = text if len(text) <= LONGEST_NAME else text[:LONGEST_NAME] + "…"
    return visible(" ".join(short.split()))
