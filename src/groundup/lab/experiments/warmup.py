"""A slow start."""

from typing import TYPE_CHECKING

from groundup.lab.experiment import Experiment, Part, Results, against, is_lower
from groundup.lab.pictures import EVEN_GUESS, curves, guess_line, lines

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RATES = (1e-3, 3e-3, 1e-2, 3e-2)
WITHOUT, WITH = "no warmup", "warmup 30"
STEPS = {WITHOUT: 0, WITH: 30}


def name(warmup: str, rate: float) -> str:
    """Of a setting."""
    return f"{warmup}, rate {rate:g}"


def best_rate(results: Results, warmup: str) -> float:
    """The rate with the lowest loss."""
    return min(RATES, key=lambda rate: results.spread(name(warmup, rate), "final_loss").mean)


def says(results: Results) -> list[Part]:
    """The best that each can do, the rate where it does, and both at every rate."""
    ends = {(w, rate): results.spread(name(w, rate), "final_loss") for w in STEPS for rate in RATES}
    slow, fast = best_rate(results, WITH), best_rate(results, WITHOUT)
    with_it, without, low = ends[WITH, slow], ends[WITHOUT, fast], RATES[0]
    helped = [rate for rate in RATES if is_lower(ends[WITH, rate], ends[WITHOUT, rate])]
    hurt = [rate for rate in RATES if is_lower(ends[WITHOUT, rate], ends[WITH, rate])]
    gains = {rate: ends[WITHOUT, rate].mean - ends[WITH, rate].mean for rate in RATES}
    least = abs(gains[low]) == min(abs(gain) for gain in gains.values())
    return [
        Part(
            f"With warmup the best of {len(RATES)} peak rates ends at {with_it}, without at {without} (with it "
            f"{against(with_it, without)}).",
            is_lower(with_it, without),
        ),
        Part(
            f"That is at a rate of {slow:g} with warmup and {fast:g} without: warmup "
            + ("bears the higher rate." if slow > fast else "does not move the best rate up."),
            slow > fast,
        ),
        Part(
            f"At the lowest rate, {low:g}, the runs end at {ends[WITH, low]} and {ends[WITHOUT, low]} (with it "
            f"{against(ends[WITH, low], ends[WITHOUT, low])}), "
            + ("the smallest difference of all rates." if least else "which is not the smallest difference of all rates."),
            least,
        ),
        Part(
            f"Beyond the seeds' spread warmup lowers the loss at {listed(helped)} of these rates and raises it at "
            f"{listed(hurt)}."
        ),
    ]


def listed(rates: list[float]) -> str:
    """Rates as words."""
    return ", ".join(f"{rate:g}" for rate in rates) or "none"


def draw(results: Results, figure: "Figure") -> None:
    """Curves at the rate that is best with warmup, and the ends at all."""
    left, right = figure.subplots(1, 2)
    rate = best_rate(results, WITH)
    curves(left, results, [name(warmup, rate) for warmup in STEPS], "step", "loss", top=EVEN_GUESS * 1.5)
    left.set(xlabel="optimizer steps", ylabel="training loss (nats per byte)")
    guess_line(left)
    series = {w: {rate: results.spread(name(w, rate), "final_loss") for rate in RATES} for w in STEPS}
    lines(right, series, top=EVEN_GUESS * 1.5)
    right.set(xscale="log", xlabel="peak learning rate", ylabel="validation loss at the end")


EXPERIMENT = Experiment(
    name="warmup",
    claim="Raising the learning rate slowly at the start gives a lower loss, at a higher rate; at a low rate it matters least.",
    formula="η(s) = η · s / w in the first w steps. Adam divides by √v, which after few steps is a guess from few gradients, "
    "so the first updates are large in directions that mean little.",
    set_up="4 layers, 64 wide, 150 steps of 512 bytes, then a cosine to a tenth; gradients are not clipped.",
    settings={
        name(warmup, rate): {"warmup_steps": steps, "learning_rate": rate} for rate in RATES for warmup, steps in STEPS.items()
    },
    base={"n_layer": 4, "max_steps": 150, "max_grad_norm": 0.0},
    says=says,
    draw=draw,
)
