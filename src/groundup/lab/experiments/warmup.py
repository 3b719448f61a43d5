"""A slow start."""

from typing import TYPE_CHECKING

from groundup.lab.experiment import Experiment, Part, Results, against, is_lower
from groundup.lab.pictures import EVEN_GUESS, curves, guess_line, lines

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RATES = (3e-3, 1e-2, 3e-2)
WARMUPS = {"no warmup": 0, "warmup 30": 30}


def name(warmup: str, rate: float) -> str:
    """Of a setting."""
    return f"{warmup}, rate {rate:g}"


def says(results: Results) -> list[Part]:
    """With and without warmup, at each rate."""
    without, with_it = WARMUPS
    ends = {(w, rate): results.spread(name(w, rate), "final_loss") for w in WARMUPS for rate in RATES}
    low, high = RATES[0], RATES[-1]
    helps_high = is_lower(ends[with_it, high], ends[without, high])
    gains = {rate: ends[without, rate].mean - ends[with_it, rate].mean for rate in RATES}
    best = {w: min(RATES, key=lambda rate: ends[w, rate].mean) for w in WARMUPS}
    grows = gains[high] > gains[low] and helps_high
    return [
        Part(
            f"At the highest peak rate, {high:g}, runs end at {ends[with_it, high]} with warmup and at {ends[without, high]} "
            f"without (with it {against(ends[with_it, high], ends[without, high])}).",
            helps_high,
        ),
        Part(
            f"At the lowest, {low:g}, they end at {ends[with_it, low]} and {ends[without, low]} (with it "
            f"{against(ends[with_it, low], ends[without, low])}). "
            + ("The higher the rate, the more warmup gains." if grows else "Warmup does not gain more at the higher rate."),
            grows,
        ),
        Part(
            f"The best rate with warmup is {best[with_it]:g} (loss {ends[with_it, best[with_it]].mean:.3f}), without "
            f"{best[without]:g} (loss {ends[without, best[without]].mean:.3f})."
        ),
    ]


def draw(results: Results, figure: "Figure") -> None:
    """Curves at the highest rate, and the ends at all."""
    left, right = figure.subplots(1, 2)
    curves(left, results, [name(warmup, RATES[-1]) for warmup in WARMUPS], "step", "loss", top=EVEN_GUESS * 1.5)
    left.set(xlabel="optimizer steps", ylabel="training loss (nats per byte)")
    guess_line(left)
    series = {w: {rate: results.spread(name(w, rate), "final_loss") for rate in RATES} for w in WARMUPS}
    lines(right, series, top=EVEN_GUESS * 1.5)
    right.set(xscale="log", xlabel="peak learning rate", ylabel="validation loss at the end")


EXPERIMENT = Experiment(
    name="warmup",
    claim="Raising the learning rate slowly at the start lets a run bear a higher rate; at a low rate it matters little.",
    formula="η(s) = η · s / w in the first w steps. Adam divides by √v, which after few steps is a guess from few gradients, "
    "so the first updates are large in directions that mean little.",
    set_up="4 layers, 64 wide, 150 steps of 512 bytes, then a cosine to a tenth; gradients are not clipped.",
    settings={
        name(warmup, rate): {"warmup_steps": steps, "learning_rate": rate}
        for rate in RATES
        for warmup, steps in WARMUPS.items()
    },
    base={"n_layer": 4, "max_steps": 150, "max_grad_norm": 0.0},
    says=says,
    draw=draw,
)
