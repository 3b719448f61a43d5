"""Too small, right, too large."""

from typing import TYPE_CHECKING

from groundup.lab.experiment import Experiment, Part, Results, against, is_lower, number
from groundup.lab.pictures import EVEN_GUESS, curves, guess_line, lines

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RATES = (1e-5, 1e-4, 1e-3, 5e-3, 2e-2, 1e-1, 1.0)


def says(results: Results) -> list[Part]:
    """The best rate against the smallest and the largest."""
    ends = {rate: results.spread(f"{rate:g}", "final_loss") for rate in RATES}
    best = min(RATES, key=lambda rate: ends[rate].mean)
    small, large, right = ends[RATES[0]], ends[RATES[-1]], ends[best]
    parts = [
        Part(f"The lowest loss, {right}, is at a peak rate of {best:g}."),
        Part(
            f"At {RATES[0]:g} the loss ends at {small} ({against(small, right)}): "
            + ("too small, the run is over before it has learned." if is_lower(right, small) else "not too small."),
            is_lower(right, small),
        ),
        Part(
            f"At {RATES[-1]:g} it ends at {large} ({against(large, right)}): "
            + ("too large, steps overshoot." if is_lower(right, large) else "not too large."),
            is_lower(right, large),
        ),
    ]
    good = [rate for rate in RATES if not is_lower(right, ends[rate]) or ends[rate].mean - right.mean < 0.1]
    widest = max(good) / min(good)
    parts.append(Part(f"Within 0.1 nats of the best, or not told apart from it, are rates over a factor of {number(widest)}."))
    return parts


def draw(results: Results, figure: "Figure") -> None:
    """Curves of all rates, and where they end."""
    left, right = figure.subplots(1, 2)
    top = EVEN_GUESS * 1.25
    curves(left, results, results.settings, top=top)
    left.legend(frameon=False, fontsize="x-small", handlelength=4, title="peak learning rate", ncols=2)
    left.set(xlabel="optimizer steps", ylabel="validation loss (nats per byte)", ylim=(None, top))
    lines(right, {"": {rate: results.spread(f"{rate:g}", "final_loss") for rate in RATES}}, top=top)
    right.set(xscale="log", xlabel="peak learning rate", ylabel="validation loss at the end", ylim=(None, top))
    guess_line(left)
    guess_line(right)


EXPERIMENT = Experiment(
    name="learning-rate",
    claim="A learning rate too small learns too slowly, one too large overshoots; between them is a valley.",
    formula="θ ← θ − η · u, where u is AdamW's update, about 1 in each weight, so that η is how far a weight moves in a step.",
    set_up="2 layers, 64 wide, 200 steps of 512 bytes, 20 of them warmup, then a cosine to a tenth. What is above the "
    "picture is drawn at its upper edge.",
    settings={f"{rate:g}": {"learning_rate": rate} for rate in RATES},
    base={"warmup_steps": 20},
    says=says,
    draw=draw,
)
