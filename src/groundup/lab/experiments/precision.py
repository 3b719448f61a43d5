"""Thirty-two bits, or sixteen."""

from typing import TYPE_CHECKING

from groundup.lab.experiment import Experiment, Part, Results, against, is_lower
from groundup.lab.pictures import curves, dots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FLOAT32, BF16, FP16 = "float32", "bf16", "fp16"
LEAST_NATS = 0.02
"""What counts as worse, even where the seeds' ranges overlap."""


def says(results: Results) -> list[Part]:
    """Loss and time of each against float32."""
    ends = {setting: results.spread(setting, "final_loss") for setting in results.settings}
    seconds = {setting: results.spread(setting, "seconds") for setting in results.settings}
    parts = [Part(f"Float32 ends at {ends[FLOAT32]} after {seconds[FLOAT32].mean:.1f} s of steps.")]
    for setting in (BF16, FP16):
        as_well = not is_lower(ends[FLOAT32], ends[setting]) and ends[setting].mean - ends[FLOAT32].mean < LEAST_NATS
        ratio = seconds[setting].mean / max(seconds[FLOAT32].mean, 1e-9)
        parts.append(
            Part(
                f"{setting} ends at {ends[setting]} ({against(ends[setting], ends[FLOAT32])}), and takes {ratio:.2f} times "
                "as long.",
                as_well,
            )
        )
    return parts


def draw(results: Results, figure: "Figure") -> None:
    """Curves, ends and seconds."""
    left, middle, right = figure.subplots(1, 3)
    curves(left, results, results.settings, "step", "loss")
    left.set(xlabel="optimizer steps", ylabel="training loss (nats per byte)")
    dots(middle, {setting: results.spread(setting, "final_loss") for setting in results.settings})
    middle.set(xlabel="validation loss at the end")
    dots(right, {setting: results.spread(setting, "seconds") for setting in results.settings}, digits=1)
    right.set(xlabel="seconds of training")


EXPERIMENT = Experiment(
    name="precision",
    claim="Products in 16 bits, with weights kept in 32, train as well as float32.",
    formula="bf16 keeps float32's 8 bits of exponent and 7 of 23 bits of fraction; fp16 keeps 10 and 5 bits of exponent, so "
    "the loss is multiplied by a scale that keeps small gradients above its least number, 6e-8. Micikevicius et al. 2018.",
    set_up="2 layers, 64 wide, 150 steps of 512 bytes, on one thread of the processor, which may emulate 16 bits: the times "
    "are of this machine and this size, where a large model on a GPU gains.",
    settings={FLOAT32: {"bf16": False}, BF16: {"bf16": True}, FP16: {"bf16": False, "fp16": True}},
    base={"max_steps": 150},
    says=says,
    draw=draw,
)
