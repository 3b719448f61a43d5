"""One wild gradient, planted."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from groundup.lab.bench import Bench, measured_run, rounded
from groundup.lab.experiment import Experiment, Measured, Options, Part, Results, against, is_lower, number
from groundup.lab.pictures import EVEN_GUESS, curves, dots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from groundup.recipes.training import Training

FACTOR = 1000.0
"""What the gradient is multiplied by in one step."""
PLANTED_AT = 0.5
"""Of the run."""
OPTIMIZERS = {"SGD": {"optim": "sgd", "learning_rate": 0.1}, "AdamW": {"optim": "adamw_torch", "learning_rate": 3e-3}}
CLIPS = {"not clipped": 0.0, "clipped to 1": 1.0}


def name(optimizer: str, clip: str) -> str:
    """Of a setting."""
    return f"{optimizer}, {clip}"


def measure(bench: Bench, options: Options, seed: int) -> Measured:
    """As ``train``, and before, after: the training loss just before the planted step, and the mean of the five after it."""
    losses: list[float] = []
    with bench.training(options, seed) as training:
        at = max(1, round(training.plan.total_steps * PLANTED_AT))
        plant(training, at)
        found = measured_run(training, each=lambda step: losses.append(step.loss))
    # The losses around the step, one by one; a step's loss is from before its update.
    around = range(max(1, at - 20), min(len(losses), at + 40) + 1)
    after = losses[at : at + 5]
    return {
        **found,
        "planted_at": at,
        "around": [step - at for step in around],
        "around_loss": [rounded(losses[step - 1]) for step in around],
        "before": rounded(losses[min(at, len(losses)) - 1]),
        "after": rounded(sum(after) / len(after)) if after else None,
    }


def plant(training: "Training", at: int) -> None:
    """Multiply what flows back through the model in step ``at``."""
    forward = training.learner.forward

    def planted(ids: Any) -> Any:
        hidden = forward(ids)
        if training.state.step + 1 == at and hidden.requires_grad:
            hidden.register_hook(lambda gradient: gradient * FACTOR)  # type: ignore[no-untyped-call]
        return hidden

    training.learner = replace(training.learner, forward=planted)


def says(results: Results) -> list[Part]:
    """For each optimizer what the planted step does, with and without clipping."""
    without, with_it = CLIPS
    parts = []
    for optimizer in OPTIMIZERS:
        plain, clipped = name(optimizer, without), name(optimizer, with_it)
        jump = {s: results.spread(s, "after").mean - results.spread(s, "before").mean for s in (plain, clipped)}
        before = {s: results.spread(s, "before") for s in (plain, clipped)}
        ends = {s: results.spread(s, "final_loss") for s in (plain, clipped)}
        helps = is_lower(ends[clipped], ends[plain])
        parts.append(
            Part(
                f"{optimizer}: before the planted update the training loss is {before[plain]} without clipping and "
                f"{before[clipped]} with it; in the five steps after it, it is {number(abs(jump[plain]))} nats "
                f"{'above' if jump[plain] > 0 else 'below'} that without, {number(abs(jump[clipped]))} "
                f"{'above' if jump[clipped] > 0 else 'below'} with it; the runs end at {ends[plain]} and {ends[clipped]} "
                f"(clipped {against(ends[clipped], ends[plain])}).",
                helps,
            )
        )
    return parts


def draw(results: Results, figure: "Figure") -> None:
    """The losses around the step, and the ends."""
    left, right = figure.subplots(1, 2)
    top = EVEN_GUESS * 1.5
    curves(left, results, results.settings, "around", "around_loss", top=top)
    left.axvline(0, color="black", linewidth=0.8, linestyle=(0, (1, 3)))
    left.set(xlabel="optimizer steps after the planted one", ylabel="training loss (nats per byte)")
    dots(right, {setting: results.spread(setting, "final_loss") for setting in results.settings}, top=top)
    right.set(xlabel="validation loss at the end")


EXPERIMENT = Experiment(
    name="clipping",
    claim="Clipping the gradient's norm keeps one wild gradient from undoing the run.",
    formula="g ← g · min(1, c / ‖g‖), over all weights together: the direction stays, the length is at most c. Pascanu et al. "
    "2013.",
    set_up="2 layers, 64 wide, 200 steps of 512 bytes; in the middle of the run one step's gradient is made 1,000 times "
    "larger where it leaves the head. What is above the picture is drawn at its upper edge.",
    settings={
        name(optimizer, clip): {**options, "max_grad_norm": norm}
        for optimizer, options in OPTIMIZERS.items()
        for clip, norm in CLIPS.items()
    },
    base={},
    measure=measure,
    says=says,
    draw=draw,
)
