"""Coupled, decoupled, none, against overfitting."""

from typing import TYPE_CHECKING

from groundup.lab.experiment import Experiment, Part, Results, against, is_lower
from groundup.lab.pictures import curves, dots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NONE = "none"
DECOUPLED = ("decoupled 0.1", "decoupled 1", "decoupled 3", "decoupled 10")
COUPLED = ("coupled 0.001", "coupled 0.01", "coupled 0.1")


def says(results: Results) -> list[Part]:
    """The best of each kind against none."""
    ends = {setting: results.spread(setting, "final_loss") for setting in results.settings}
    training = {setting: results.spread(setting, "train_loss") for setting in results.settings}
    lowest = {setting: results.spread(setting, "best_loss") for setting in results.settings}
    decoupled, coupled = results.best("final_loss", DECOUPLED), results.best("final_loss", COUPLED)
    overfits = is_lower(lowest[NONE], ends[NONE]) and ends[NONE].mean > lowest[NONE].mean + 0.02
    return [
        Part(
            f"Without decay the model ends at a training loss of {training[NONE]} and a validation loss of {ends[NONE]}, after "
            f"{lowest[NONE]} at its best: " + ("it overfits." if overfits else "it does not overfit.")
        ),
        Part(
            f"Of the decoupled decays {at(decoupled, DECOUPLED)} is best: {ends[decoupled]} "
            f"({against(ends[decoupled], ends[NONE])}).",
            is_lower(ends[decoupled], ends[NONE]),
        ),
        Part(
            f"Of the coupled ones {at(coupled, COUPLED)} is best: {ends[coupled]} (than none "
            f"{against(ends[coupled], ends[NONE])}; than decoupled {against(ends[coupled], ends[decoupled])}).",
            is_lower(ends[decoupled], ends[coupled]),
        ),
        Part(
            f"The usual 0.1 ends at {ends[DECOUPLED[0]]} decoupled ({against(ends[DECOUPLED[0]], ends[NONE])}), and at "
            f"{ends[COUPLED[-1]]} coupled ({against(ends[COUPLED[-1]], ends[NONE])})."
        ),
    ]


def at(best: str, tried: tuple[str, ...]) -> str:
    """The best decay, and whether a larger one might have been better still."""
    return best.split()[1] + (", the largest tried," if best == tried[-1] else "")


def draw(results: Results, figure: "Figure") -> None:
    """Validation curves, and the ends."""
    left, right = figure.subplots(1, 2)
    chosen = [NONE, results.best("final_loss", DECOUPLED), results.best("final_loss", COUPLED)]
    curves(left, results, chosen)
    left.set(xlabel="optimizer steps", ylabel="validation loss (nats per byte)", ylim=(None, 4.6))
    dots(right, {setting: results.spread(setting, "final_loss") for setting in results.settings})
    right.set(xlabel="validation loss at the end")


EXPERIMENT = Experiment(
    name="weight-decay",
    claim="Weight decay works against overfitting, and decoupled from the gradient it works better with Adam.",
    formula="Coupled (L2): g ← g + λθ, which Adam then divides by √v. Decoupled (AdamW): θ ← θ − η · u − η · λθ. Loshchilov "
    "and Hutter 2019.",
    set_up="2 layers, 64 wide, 300 steps of 512 bytes on a text of 6,000, so each byte is read about 25 times; validation "
    "on other files. The curves are those of no decay and of the best of each kind.",
    settings={
        NONE: {"weight_decay": 0.0},
        **{s: {"weight_decay": float(s.split()[1]), "weight_decay_type": s.split()[0]} for s in (*DECOUPLED, *COUPLED)},
    },
    base={"text": "little", "max_steps": 300, "learning_rate": 5e-3},
    says=says,
    draw=draw,
)
