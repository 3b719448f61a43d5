"""Where the weights begin."""

import math
from typing import TYPE_CHECKING

from groundup.lab.experiment import Experiment, Part, Results, Spread, against, is_lower
from groundup.lab.pictures import EVEN_GUESS, curves, dots, guess_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GPT2, LOUD, ZERO = "gpt2, std 0.02", "gpt2, std 0.6", "all zero"
OTHERS = ("small", "xavier_normal", "he_normal", "orthogonal")


def says(results: Results) -> list[Part]:
    """The first loss against ln V, and what a bad start costs at the end."""
    first = {setting: results.spread(setting, "initial_loss") for setting in results.settings}
    ends = {setting: results.spread(setting, "final_loss") for setting in results.settings}
    near = abs(first[GPT2].mean - EVEN_GUESS) < 0.1  # nats
    learned = Spread(tuple(a - b for a, b in zip(first[ZERO].values, ends[ZERO].values, strict=True)))
    stuck = learned.mean < 0.5
    best = results.best("final_loss", (GPT2, *OTHERS))
    worst = max((GPT2, *OTHERS), key=lambda setting: ends[setting].mean)
    return [
        Part(
            f"GPT-2's small weights begin at a loss of {first[GPT2]}, where guessing evenly is ln 257 = {EVEN_GUESS:.3f} "
            f"({abs(first[GPT2].mean - EVEN_GUESS):.2f} {'above' if first[GPT2].mean > EVEN_GUESS else 'below'} it, "
            f"{'less' if near else 'more'} than 0.1 away), and end at {ends[GPT2]}.",
            near,
        ),
        Part(
            f"Thirty times larger weights begin at {first[LOUD]} and end at {ends[LOUD]} ({against(ends[LOUD], ends[GPT2])}).",
            is_lower(ends[GPT2], ends[LOUD]) and first[LOUD].mean > first[GPT2].mean,
        ),
        Part(
            f"All weights at zero begin at {first[ZERO]} and end at {ends[ZERO]}: "
            + ("next to nothing is learned, because no gradient says which weight is to differ from which."
               if stuck and math.isfinite(learned.mean) else f"{learned.mean:.3f} nats are learned all the same."),
            stuck,
        ),
        Part(
            f"Among the usual draws the best is {best} with {ends[best]}, the worst {worst} with {ends[worst]} "
            f"({against(ends[worst], ends[best])})."
        ),
    ]  # fmt: skip


def draw(results: Results, figure: "Figure") -> None:
    """First and last loss of each."""
    left, right = figure.subplots(1, 2)
    top = 12.0
    curves(left, results, [GPT2, "he_normal", LOUD, ZERO], "step", "loss", top=top)
    left.set(xlabel="optimizer steps", ylabel="training loss (nats per byte)")
    guess_line(left)
    dots(right, {setting: results.spread(setting, "final_loss") for setting in results.settings}, top=top)
    right.set(xlabel="validation loss at the end")


EXPERIMENT = Experiment(
    name="initialisation",
    claim="Small random weights begin at the loss of an even guess and learn; large ones begin worse and stay behind; zeros "
    "do not learn.",
    formula="A model that knows nothing should guess evenly: loss ln V. Matrices are drawn with a standard deviation of 0.02, "
    "those that end a residual branch with 0.02/√(2N) for N layers.",
    set_up="4 layers, 64 wide, 150 steps of 512 bytes, peak rate 3e-3; tied embeddings.",
    settings={
        GPT2: {"init": "gpt2"},
        **{name: {"init": name} for name in OTHERS},
        LOUD: {"initializer_range": 0.6},
        ZERO: {"initializer_range": 0.0},
    },
    base={"n_layer": 4, "max_steps": 150},
    says=says,
    draw=draw,
)
