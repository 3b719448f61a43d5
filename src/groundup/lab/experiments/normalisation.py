"""Batch, layer, root mean square, or nothing."""

from typing import TYPE_CHECKING

from groundup.lab.experiment import Experiment, Part, Results, against, is_lower
from groundup.lab.pictures import EVEN_GUESS, curves, dots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NORMS = {"layer": "layer norm", "rms": "RMS norm", "batch": "batch norm", "none": "none"}
RATES = (2e-3, 1e-2)


def name(norm: str, rate: float) -> str:
    """Of a setting."""
    return f"{NORMS[norm]}, rate {rate:g}"


def says(results: Results) -> list[Part]:
    """Each norm at its better rate."""
    rates = {n: min(RATES, key=lambda rate: results.spread(name(n, rate), "final_loss").mean) for n in NORMS}
    ends = {n: results.spread(name(n, rates[n]), "final_loss") for n in NORMS}
    training = {n: results.spread(name(n, rates[n]), "train_loss") for n in NORMS}
    gap = {n: ends[n].mean - training[n].mean for n in NORMS}
    high = {n: results.spread(name(n, RATES[-1]), "final_loss") for n in NORMS}
    return [
        Part(
            f"At the better of two rates, layer norm ends at {ends['layer']}, no norm at {ends['none']} "
            f"({against(ends['none'], ends['layer'])}).",
            is_lower(ends["layer"], ends["none"]),
        ),
        Part(
            f"At the higher rate, {RATES[-1]:g}, it is {high['layer']} against {high['none']} "
            f"({against(high['none'], high['layer'])})."
        ),
        Part(
            f"Batch norm ends at {ends['batch']} ({against(ends['batch'], ends['layer'])}); its training loss is "
            f"{abs(gap['batch']):.3f} nats {'below' if gap['batch'] > 0 else 'above'} its validation loss, where layer norm's "
            f"is {abs(gap['layer']):.3f} {'below' if gap['layer'] > 0 else 'above'}. In training its statistics let a position "
            "see later ones; in use they are fixed ones.",
            is_lower(ends["layer"], ends["batch"]),
        ),
        Part(f"RMS norm, which takes no mean off, ends at {ends['rms']} ({against(ends['rms'], ends['layer'])})."),
    ]


def draw(results: Results, figure: "Figure") -> None:
    """Curves at the higher rate, and the ends at both."""
    left, right = figure.subplots(1, 2)
    top = EVEN_GUESS * 1.25
    curves(left, results, [name(norm, RATES[-1]) for norm in NORMS], top=top)
    left.set(xlabel="optimizer steps", ylabel="validation loss (nats per byte)")
    dots(right, {setting: results.spread(setting, "final_loss") for setting in results.settings}, top=top)
    right.set(xlabel="validation loss at the end")


EXPERIMENT = Experiment(
    name="normalisation",
    claim="Layer norm in each block trains better than none; batch norm, made for pictures, is worse for text.",
    formula="y = γ · (x − mean(x)) / √(var(x) + ε) + β, with mean and variance over the width of one position (layer), over "
    "all positions of a batch (batch), or without the mean (RMS).",
    set_up="4 layers, 64 wide, 150 steps of 512 bytes, at two peak rates; the norm before each part of a block.",
    settings={name(norm, rate): {"norm": norm, "learning_rate": rate} for rate in RATES for norm in NORMS},
    base={"n_layer": 4, "max_steps": 150},
    says=says,
    draw=draw,
)
