"""Targets that are not quite certain."""

from typing import TYPE_CHECKING

from groundup.lab.bench import Bench, measured_run, rounded, validation_windows
from groundup.lab.experiment import Experiment, Measured, Options, Part, Results, against, is_lower, percent
from groundup.lab.pictures import dots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WINDOWS = 256
"""Of validation text, in which confidence is measured."""
SHARES = (0.0, 0.1, 0.3)
TEXTS = {"little": "6 KB, read 25 times", "train": "1.2 MB, read once"}


def name(text: str, share: float) -> str:
    """Of a setting."""
    return f"ε {share:g}, {TEXTS[text].split(',')[0]}"


def measure(bench: Bench, options: Options, seed: int) -> Measured:
    """As ``train``, and confidence: the mean probability of the likeliest token on validation text."""
    import torch

    options = dict(options)
    with bench.training(options, seed, options.pop("text")) as training:
        found = measured_run(training)
        model, ids = training.model.eval(), torch.from_numpy(validation_windows(training, WINDOWS))
        with torch.no_grad():
            sure = model.logits(model(ids[:, :-1])).softmax(-1).amax(-1).mean().item()
    return {**found, "confidence": rounded(sure)}


def says(results: Results) -> list[Part]:
    """The usual 0.1 against none, on either text."""
    parts = []
    for text, described in TEXTS.items():
        none, some = name(text, SHARES[0]), name(text, SHARES[1])
        sure = {s: results.spread(s, "confidence") for s in (none, some)}
        loss = {s: results.spread(s, "final_loss") for s in (none, some)}
        right = {s: results.spread(s, "accuracy") for s in (none, some)}
        parts += [
            Part(
                f"On {described}: the mean probability of the likeliest byte goes from {percent(sure[none])} to "
                f"{percent(sure[some])} with ε = {SHARES[1]:g}, while {percent(right[none])} and {percent(right[some])} of "
                "these bytes are right.",
                is_lower(sure[some], sure[none]),
            ),
            Part(
                f"The validation loss, measured on plain targets, goes from {loss[none]} to {loss[some]} "
                f"({against(loss[some], loss[none])})."
            ),
        ]
    plain, smoothed = (results.spread(name("little", share), "final_loss") for share in SHARES[:2])
    helps = is_lower(smoothed, plain)
    parts.append(
        Part("So it " + ("lowers" if helps else "does not lower") + " the loss where the text is little and overfitted.", helps)
    )
    return parts


def draw(results: Results, figure: "Figure") -> None:
    """Loss, and confidence beside accuracy."""
    left, middle, right = figure.subplots(1, 3, sharey=True)
    for axes, key, label in (
        (left, "final_loss", "validation loss"),
        (middle, "confidence", "probability of the likeliest"),
        (right, "accuracy", "share where it is right"),
    ):
        dots(axes, {setting: results.spread(setting, key) for setting in results.settings})
        axes.set(xlabel=label)


EXPERIMENT = Experiment(
    name="label-smoothing",
    claim="Label smoothing makes a model less sure of itself, and lowers the loss where it would overfit.",
    formula="Target (1 − ε) · onehot + ε/V. The loss is least where the right byte has 1 − ε + ε/V, not 1. Szegedy et al. "
    "2016.",
    set_up="2 layers, 64 wide, 300 steps of 512 bytes, on a little text again and again, and on much of it.",
    settings={name(text, share): {"label_smoothing_factor": share, "text": text} for text in TEXTS for share in SHARES},
    base={"max_steps": 300},
    measure=measure,
    says=says,
    draw=draw,
)
