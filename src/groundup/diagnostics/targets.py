"""
What a loss does with the scores, whatever the model: which token each position is compared with, and how it is averaged.

It is asked about scores of our own, all 0, which say that every token is equally likely. The cross-entropy is then ln V for
any labels, and its slope by the scores of a position is (1/V - one_hot) times the weight of the position: so the largest
entry points at the token that the position is compared with.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from groundup.diagnostics.bench import IGNORED, going_back, next_tokens, plural
from groundup.diagnostics.check import Check
from groundup.diagnostics.subject import Loss, Subject
from groundup.errors import ConfigError

SAME = 0.01
"""Relative tolerance of the loss at equal scores: z-loss and the like add some thousandths, and every fault a factor."""
AGREE = 0.9
"""
Share of positions that have to be compared with one same neighbour. It is 1 in text; a document that ends inside a window
may leave a few out. Labels that have nothing to do with the inputs agree as often as two tokens of the text are equal.
"""


@dataclass(frozen=True)
class LossFindings:
    """What was found out about a loss."""

    used: Tensor
    """(B, T) the token that each position is compared with; ``IGNORED`` where it has no part in the loss."""
    value: float
    """At equal scores; ln V is right."""
    columns: int
    """Scores of a position that have a part in the loss."""
    upside_down: bool
    """It falls as the right token gets less likely."""
    agreement: dict[int, float]
    """Share of the positions that are compared with the input so many positions on."""
    slope_error: float
    """Relative error of its slope at random scores, analytic against numeric; nan is not measured."""
    slope_limit: float
    """From which on the slope is wrong."""
    sees_labels: bool
    """Other labels give another value."""

    @property
    def ignores_labels(self) -> bool:
        """It does not look at them; but one that holds the next tokens itself needs none."""
        return not self.sees_labels and self.offset != 1

    @property
    def judged(self) -> bool:
        """Whether it makes sense to ask more of it than whether it is a loss at all."""
        return bool(self.rows) and math.isfinite(self.value) and not self.ignores_labels

    @property
    def rows(self) -> int:
        """Positions that have a part in the loss."""
        return int((self.used != IGNORED).sum())

    @property
    def offset(self) -> int | None:
        """Which neighbour the positions are compared with; None where it is none."""
        if self.agreement.get(1, 0.0) >= AGREE:
            return 1
        best = max(self.agreement, key=lambda k: self.agreement[k], default=None)
        return best if best is not None and self.agreement[best] >= AGREE else None

    @property
    def factor(self) -> float:
        """What the mean is multiplied by; 1 is right."""
        return abs(self.value) / math.log(self.columns) if self.columns > 1 else 1.0


def look_at_loss(subject: Subject, absent: Tensor) -> LossFindings:
    """
    Ask the loss about scores of our own.

    Args:
        absent: (V,) whether a column of the model's scores is -inf throughout, as padding may be; V counts the padding.
    """
    B, T = subject.inputs.shape
    scores = torch.zeros(B, T, absent.numel(), device=subject.inputs.device).masked_fill(absent, -math.inf).requires_grad_()
    value = subject.loss_fn(scores, subject.labels)
    slope = torch.zeros_like(scores)
    if value.requires_grad:
        with going_back("loss_fn"):
            (found,) = torch.autograd.grad(value, scores, allow_unused=True)
        slope = slope if found is None else found
    # The label's entry is as large as all others together; of two tokens, as large as the other, and the negative one.
    size, token = (slope.abs() - 1e-3 * slope).max(-1)  # each (B, T)
    counts = size > 0
    used = torch.where(counts, token, IGNORED)
    at_token = slope.gather(-1, token[..., None]).squeeze(-1)[counts]
    slope_error, slope_limit = _slope_error(subject.loss_fn, subject.labels[:1, :16], absent, subject.seed)
    return LossFindings(
        used=used,
        value=float(value.detach()),
        columns=int((slope.abs().amax((0, 1)) > 0).sum()),
        upside_down=bool(counts.any()) and float((at_token > 0).float().mean()) > 0.5,
        agreement=_agreement(used, subject.inputs),
        slope_error=slope_error,
        slope_limit=slope_limit,
        sees_labels=_sees_labels(subject, absent),
    )


def _agreement(used: Tensor, inputs: Tensor) -> dict[int, float]:
    found, T = {}, inputs.size(1)
    for k in (-1, 0, 1, 2, 3):
        first, last = max(0, -k), max(0, min(T, T - k))
        theirs = used[:, first:last]
        counts = theirs != IGNORED
        if counts.any():
            found[k] = float((theirs == inputs[:, first + k : last + k])[counts].float().mean())
    return found


def _sees_labels(subject: Subject, absent: Tensor) -> bool:
    """Whether the same labels in another order give another value, at random scores."""
    counts = subject.labels != IGNORED
    others = subject.labels.clone()
    others[counts] = subject.labels[counts].roll(1)
    if torch.equal(others, subject.labels):
        return True  # all the same, so nothing is known against it
    shape = (*subject.labels.shape, absent.numel())
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(subject.seed)).to(absent.device)
    scores = scores.masked_fill(absent, -math.inf)
    with torch.no_grad():
        return float(subject.loss_fn(scores, subject.labels)) != float(subject.loss_fn(scores, others))


def _slope_error(loss_fn: Loss, labels: Tensor, absent: Tensor, seed: int) -> tuple[float, float]:
    """Relative error in one random direction from random scores, nan where it cannot be had, and the most that is sound."""
    for dtype, h, limit in ((torch.float64, 1e-5, 1e-3), (torch.float32, 1e-2, 2e-2)):
        shape = (*labels.shape, absent.numel())
        draw = torch.Generator().manual_seed(seed)
        at, along = (torch.randn(shape, generator=draw).to(labels.device, dtype) for _ in range(2))
        scores, direction = at.masked_fill(absent, -math.inf), along.masked_fill(absent, 0.0)
        leaf = scores.requires_grad_()
        try:
            value = loss_fn(leaf, labels)
        except (RuntimeError, ConfigError):  # one with weights in float32 takes no float64
            continue
        if value.dtype != dtype:
            return math.nan, limit
        slope = torch.autograd.grad(value, leaf, allow_unused=True)[0] if value.requires_grad else None
        analytic = 0.0 if slope is None else float((slope * direction).sum())
        with torch.no_grad():
            above, below = (float(loss_fn(scores + sign * h * direction, labels)) for sign in (1, -1))
        numeric = (above - below) / (2 * h)
        return abs(analytic - numeric) / max(abs(analytic), abs(numeric), 1e-12), limit
    return math.nan, 0.0


def loss_culprit(findings: LossFindings, subject: Subject) -> str:
    """The first fault of the loss, for which a sound loss takes its place in the checks of the model; empty is none."""
    return next((check.culprit for check in loss_checks(findings, subject) if check.passed is False), "")


def loss_checks(findings: LossFindings, subject: Subject) -> list[Check]:
    """The verdicts on a loss, each by itself."""
    return [_sign(findings), _mean(findings, subject), _vocabulary(findings, subject), _targets(findings, subject)]


def true_targets(findings: LossFindings, subject: Subject) -> Tensor:
    """What the positions should be compared with: what the loss compares them with, if those are the next tokens."""
    return findings.used if findings.offset == 1 else next_tokens(subject.inputs)


def _sign(found: LossFindings) -> Check:
    expected = "the loss falls as the right token becomes more likely, and its slope by the scores is the numeric one"
    name, group = "loss_direction", "model"
    if not math.isfinite(found.value):
        return Check(
            name, group, False, f"{found.value:.4g} at equal scores, which is no number", expected,
            "look for a division by 0 or a logarithm of 0 in the loss; scores of -inf need a loss that bears them",
            "loss_not_finite",
        )  # fmt: skip
    if found.ignores_labels:
        return Check(
            name, group, False, f"{found.value:.4g} at equal scores, and the same value for other labels", expected,
            "let the loss compare the scores with the labels that it is given", "labels_ignored",
        )  # fmt: skip
    if not found.rows:
        return Check(
            name, group, False, f"{found.value:.4g} at equal scores, and no slope by the scores at all", expected,
            "let the loss be computed from the scores with torch, without .detach(), .item() or numpy", "loss_detached",
        )  # fmt: skip
    if found.upside_down or found.value < 0:
        return Check(
            name, group, False, f"{found.value:.4g} at equal scores, and it falls as the right token becomes LESS likely",
            expected, "turn the sign of the loss round: it is minus the log-probability of the label", "loss_sign_wrong",
        )  # fmt: skip
    if found.slope_error > found.slope_limit:  # a float64 difference quotient is exact to 1e-7 here
        return Check(
            name, group, False, f"slope by the scores off by {found.slope_error:.1%} of its numeric value", expected,
            "the backward pass of the loss is wrong: is a part of it detached, or a function of your own?", "loss_slope_wrong",
        )  # fmt: skip
    error = "" if math.isnan(found.slope_error) else f", relative error of the slope {found.slope_error:.0e}"
    return Check(name, group, True, f"it falls{error}", expected)


def _mean(found: LossFindings, subject: Subject) -> Check:
    B, T = subject.inputs.shape
    expected = f"ln {found.columns:,} = {math.log(max(1, found.columns)):.4f} at equal scores, the mean over tokens, in nats"
    measured = f"{found.value:.4f} at equal scores, {found.factor:.4g} times the mean"
    name, group = "loss_is_mean", "model"
    if not found.judged or abs(found.factor - 1) < SAME:
        return Check(name, group, True if found.judged else None, measured, expected)
    for count, what in ((found.rows, "all tokens"), (T, "the positions of a window"), (B, "the windows")):
        if count > 1 and abs(found.factor / count - 1) < SAME:
            return Check(
                name, group, False, f"{measured}: the sum over {what}, {count}", expected,
                "divide by the number of tokens: the gradient, and so clipping and the step, grow with the batch",
                "loss_summed",
            )  # fmt: skip
    bits = " (1.4427 would be bits instead of nats)" if abs(found.factor * math.log(2) - 1) < SAME else ""
    return Check(
        name, group, False, measured + bits, expected,
        "find the factor: a division by the accumulation steps, a weight, another logarithm", "loss_scaled",
    )  # fmt: skip


def _vocabulary(found: LossFindings, subject: Subject) -> Check:
    real, name, group = subject.vocab_size, "loss_vocabulary", "model"
    measured = f"{plural(found.columns, 'score')} of a position have a part in the loss"
    if real is None:
        return Check(name, group, True if found.judged else None, measured, "those of the tokens that there are")
    expected = f"the {real:,} tokens that there are"
    if found.columns <= real or not found.judged:
        return Check(name, group, True if found.judged else None, measured, expected)
    return Check(
        name, group, False, f"{measured}, {plural(found.columns - real, 'row')} of padding too", expected,
        f"cut the scores to [..., :{real}] before the loss, and before sampling", "loss_over_padded_vocabulary",
    )  # fmt: skip


def _targets(found: LossFindings, subject: Subject) -> Check:
    name, group, expected = "targets", "model", "position t is compared with token t + 1 of the inputs"
    if not found.judged or subject.inputs.size(1) < 4:
        return Check(name, group, None, "too few positions that have a part in the loss", expected)
    shares = ", ".join(f"t{k:+d}: {share:.0%}" if k else f"t: {share:.0%}" for k, share in found.agreement.items())
    details = {"agreement": {str(k): share for k, share in found.agreement.items()}, "offset": found.offset}
    measured = f"compared with the token at {shares}"
    if found.offset == 1:
        return Check(name, group, True, measured, expected, details=details)
    if found.offset is None:
        culprit, advice = "labels_unrelated", "the labels are of another text or shuffled: cut inputs and labels from one array"
    elif found.offset <= 0:
        culprit, advice = "target_not_shifted", "the model learns to copy: labels are tokens[1:], inputs tokens[:-1]"
    else:
        culprit, advice = "target_shifted_twice", "labels are shifted in the batch and once more in the loss: shift once"
    return Check(name, group, False, measured, expected, advice, culprit, details)
