"""Many small passes for one large batch."""

from typing import TYPE_CHECKING

from groundup.lab.bench import Bench, measured_run
from groundup.lab.experiment import Experiment, Measured, Options, Part, Results, Spread, against, number
from groundup.lab.pictures import curves

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WHOLE, SMALL = "1 pass of 64", "no accumulation: 4"
CUT = ("4 passes of 16", "16 passes of 4")
SAME_NATS = 0.01
"""Less than seeds differ by, and more than the rounding of sums grows to in so few steps."""


def measure(bench: Bench, options: Options, seed: int) -> Measured:
    """As ``train``, and every_loss: the loss of each step with all its digits."""
    losses: list[float] = []
    with bench.training(options, seed) as training:
        found = measured_run(training, each=lambda step: losses.append(step.loss))
    return {**found, "every_step": list(range(1, len(losses) + 1)), "every_loss": losses}


def difference(results: Results, setting: str) -> list[list[float]]:
    """For each seed and step how far the loss is from that of the whole batch."""
    pairs = zip(results.measured(setting), results.measured(WHOLE), strict=True)
    return [[abs(a - b) for a, b in zip(one["every_loss"], other["every_loss"], strict=True)] for one, other in pairs]


def says(results: Results) -> list[Part]:
    """The largest difference of a step's loss; and a small batch, for comparison."""
    parts = []
    for setting in CUT:
        found = difference(results, setting)
        largest = Spread(tuple(max(seed) for seed in found))
        parts.append(
            Part(
                f"{setting} windows: the loss of a step differs from the whole batch's by at most {largest.high:.1e} nats, by "
                f"{max(seed[0] for seed in found):.1e} in the first.",
                largest.high < SAME_NATS,
            )
        )
    ends = {setting: results.spread(setting, "final_loss") for setting in results.settings}
    seeds = ends[WHOLE].high - ends[WHOLE].low
    seconds = {setting: results.spread(setting, "seconds").mean for setting in results.settings}
    parts += [
        Part(
            f"For comparison: the whole batch ends at {ends[WHOLE]}, {number(seeds)} nats between the seeds, and steps of only "
            f"4 windows end at {ends[SMALL]} ({against(ends[SMALL], ends[WHOLE])})."
        ),
        Part(
            f"Time per run: {seconds[WHOLE]:.1f} s in one pass, {seconds[CUT[0]]:.1f} s in four, {seconds[CUT[1]]:.1f} s in "
            "sixteen."
        ),
    ]
    return parts


def draw(results: Results, figure: "Figure") -> None:
    """Curves, and how far they are apart."""
    left, right = figure.subplots(1, 2)
    curves(left, results, results.settings, "step", "loss")
    left.set(xlabel="optimizer steps", ylabel="training loss (nats per byte)")
    apart = {}
    for setting in (*CUT, SMALL):
        # Nothing below what a logarithm can show; exact zeros are drawn there.
        seeds = [[max(value, 1e-9) for value in seed] for seed in difference(results, setting)]
        steps = list(range(1, len(seeds[0]) + 1))
        apart[setting] = {number: {"every_step": steps, "apart": values} for number, values in enumerate(seeds)}
    curves(right, Results(apart), list(apart), "every_step", "apart")
    right.set(xlabel="optimizer steps", ylabel="distance of the loss from 1 pass of 64", yscale="log")


EXPERIMENT = Experiment(
    name="accumulation",
    claim="A batch cut into passes, whose gradients are added, trains as the whole batch does.",
    formula="∇ (1/N) Σ ℓᵢ = Σ over passes of (1/N) Σ ∇ℓᵢ: the mean is linear, and N is that of the whole batch.",
    set_up="2 layers, 64 wide, 60 steps of 64 windows of 64 bytes, float32 without dropout.",
    settings={
        WHOLE: {"per_device_train_batch_size": 64, "total_batch_tokens": 4096},
        "4 passes of 16": {"per_device_train_batch_size": 16, "total_batch_tokens": 4096},
        "16 passes of 4": {"per_device_train_batch_size": 4, "total_batch_tokens": 4096},
        SMALL: {"per_device_train_batch_size": 4, "total_batch_tokens": 256},
    },
    base={"max_steps": 60},
    measure=measure,
    says=says,
    draw=draw,
)
