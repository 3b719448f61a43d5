"""The same text in few large steps or in many small ones."""

from typing import TYPE_CHECKING

from groundup.lab.experiment import Experiment, Part, Results, against, is_lower
from groundup.lab.pictures import EVEN_GUESS, curves, guess_line, lines

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TOKENS = 2**17
BATCHES = (256, 1024, 4096, 16384)
RULES = ("one rate", "rate · √batch")
REFERENCE = 1024
"""The batch whose rate both rules share."""
RATE = 3e-3


def name(rule: str, batch: int) -> str:
    """Of a setting."""
    return f"{rule}, batch {batch}"


def rate(rule: str, batch: int) -> float:
    """The peak learning rate of a setting."""
    return RATE if rule == RULES[0] else RATE * (batch / REFERENCE) ** 0.5


def says(results: Results) -> list[Part]:
    """The largest batch against the best, with either rule."""
    ends = {(r, b): results.spread(name(r, b), "final_loss") for r in RULES for b in BATCHES}
    one, scaled = RULES
    best = min(BATCHES, key=lambda batch: ends[one, batch].mean)
    large = BATCHES[-1]
    costs = is_lower(ends[one, best], ends[one, large])
    helps = is_lower(ends[scaled, large], ends[one, large])
    enough = not is_lower(ends[one, best], ends[scaled, large])
    return [
        Part(
            f"With one rate for all, a batch of {best:,} bytes is best and ends at {ends[one, best]}; one of {large:,}, "
            f"which makes {TOKENS // large} steps of the same text, ends at {ends[one, large]} "
            f"({against(ends[one, large], ends[one, best])}).",
            costs,
        ),
        Part(
            f"A rate that grows with the root of the batch makes that {ends[scaled, large]} "
            f"({against(ends[scaled, large], ends[one, large])}): "
            + ("it gives back all that the large batch cost." if helps and enough
               else "it gives back a part of what the large batch cost." if helps
               else "it does not help."),
            helps,
        ),
    ]  # fmt: skip


def draw(results: Results, figure: "Figure") -> None:
    """Curves over the bytes that were read, and where each batch ends."""
    left, right = figure.subplots(1, 2)
    read = {
        f"batch {batch:,}": {
            seed: {**run, "bytes": [step * batch for step in run["eval_step"]]}
            for seed, run in results.runs[name(RULES[0], batch)].items()
        }
        for batch in BATCHES
    }
    curves(left, Results(read), list(read), "bytes", top=EVEN_GUESS * 1.25)
    left.set(xlabel="bytes read, at one rate", ylabel="validation loss (nats per byte)")
    series = {rule: {float(batch): results.spread(name(rule, batch), "final_loss") for batch in BATCHES} for rule in RULES}
    lines(right, series, top=EVEN_GUESS * 1.25)
    right.set(xlabel="bytes in a step", ylabel="validation loss at the end")
    right.set_xscale("log", base=2)
    right.set_xticks(BATCHES, [f"{batch:,}" for batch in BATCHES])
    guess_line(right)


EXPERIMENT = Experiment(
    name="batch-size",
    claim="At equal tokens a larger batch makes fewer steps and ends worse; a higher rate gives some of it back.",
    formula="The noise of a gradient falls with 1/√B, the number of steps with 1/B; a rate η ∝ √B keeps the noise of Adam's "
    "walk the same.",
    set_up="2 layers, 64 wide, 131,072 bytes of training in every run, 5% of the steps warmup.",
    settings={
        name(rule, batch): {"total_batch_tokens": batch, "max_steps": TOKENS // batch, "learning_rate": rate(rule, batch)}
        for batch in BATCHES
        for rule in RULES
    },
    base={"per_device_train_batch_size": 64},
    says=says,
    draw=draw,
)
