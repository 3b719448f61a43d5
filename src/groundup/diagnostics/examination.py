"""All checks of a model, a batch and a loss, in the order in which one explains the next."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from groundup.diagnostics import depth, gradients, learning_rate, model, overfit, sight, targets
from groundup.diagnostics.bench import IGNORED, Scores, copied, next_tokens, undisturbed
from groundup.diagnostics.check import Check, failed
from groundup.diagnostics.fitting import Exercise, Stepper, Work, exercise
from groundup.diagnostics.subject import Subject
from groundup.errors import ConfigError

GROUPS = ("model", "gradients", "learning")
"""The groups of checks, in their order."""
WINDOWS, TOKENS = 4, 64
"""What is looked at of a batch, at most: enough tokens for a mean, few enough for a processor."""


def examine(subject: Subject, only: str | Collection[str] = ()) -> Iterator[Check]:
    """
    Look for what is wrong with a model, a loss and an optimizer; each check is handed out as soon as it is made.

    The subject is left bit for bit as it was, and the state of the random generators too. A fault is named once it is
    proved, in ``Check.culprit``; checks that fail for the same reason name the same culprit.

    Args:
        only: groups of ``GROUPS``, or the name of one; empty is all of them.

    Raises:
        ConfigError: the model, the batch or the loss cannot be run; or a group that there is not.
    """
    only = (only,) if isinstance(only, str) else only
    unknown = sorted(set(only) - set(GROUPS))
    if unknown:
        raise ConfigError(f"only: no group {', '.join(unknown)}; there are {', '.join(GROUPS)}")
    looking = Examination(_narrowed(subject))
    with undisturbed(subject):
        unfit = looking.unfit()
    if unfit and only and "model" not in only:
        raise ConfigError(f"{unfit[0].name}: {unfit[0].measured}; {unfit[0].advice}")
    yield from unfit
    if unfit:
        return
    for group in GROUPS:
        if only and group not in only:
            continue
        for make in looking.plan(group):
            with undisturbed(subject):
                checks = make()
            yield from checks
            # What follows would only say that nan is nan.
            if any(check.name == "finite" and check.passed is False for check in checks):
                return


def culprits(checks: Collection[Check]) -> list[str]:
    """The faults that were named, each once, in the order in which they were found."""
    return list(dict.fromkeys(check.culprit for check in checks if check.passed is False and check.culprit))


def _narrowed(subject: Subject) -> Subject:
    """
    With a part of the batch.

    Raises:
        ConfigError: the batch is no batch of token ids and labels.
    """
    inputs, labels = subject.inputs, subject.labels
    if inputs.dim() != 2 or inputs.shape != labels.shape or inputs.is_floating_point() or not inputs.numel():
        raise ConfigError(
            f"batch: token ids {tuple(inputs.shape)} {inputs.dtype} and labels {tuple(labels.shape)}; both have to be "
            "(windows, tokens) of whole numbers"
        )
    if inputs.size(1) < 2:
        raise ConfigError("batch: windows of one token have no past; give windows of two tokens or more")
    if next(subject.model.parameters(), None) is None:
        raise ConfigError(f"model: {type(subject.model).__name__} has no parameters, so there is nothing to train")
    inputs, labels = (part[:WINDOWS, :TOKENS].long().clone() for part in (inputs, labels))
    if bool((labels == IGNORED).all()):
        raise ConfigError(
            f"batch: all labels of the first {inputs.size(0)} windows of {inputs.size(1)} tokens are {IGNORED}, which no loss "
            "is computed for; give windows that begin with tokens that count"
        )
    # Prompts are often masked. What is examined is a part of a part, which then might hold nothing that counts.
    following = next_tokens(inputs)
    masked = labels == IGNORED
    if bool((masked | (labels == following))[:, :-1].all()):
        labels = torch.where(masked, following, labels)
    return replace(subject, inputs=inputs, labels=labels)


class Examination:
    """What was found out so far; each finding is made when it is first asked for."""

    def __init__(self, subject: Subject):
        self.subject, self.run = subject, Scores(subject)

    def unfit(self) -> list[Check]:
        """What fails of that without which no other check means anything; the first of it."""
        if failures := failed([model.shape_checks(self.subject, self.scores)[0], model.probability_check(self.scores)]):
            return failures
        twin = copied(self.subject.model)
        with torch.no_grad():
            again = [self.run(twin, self.subject.inputs) for _ in range(2)]
        if failures := failed([model.repeat_check(*again)]):
            return failures
        return [check for check in (self._decay_groups(),) if check.culprit == "optimizer_of_another_model"]

    def plan(self, group: str) -> list[Callable[[], list[Check]]]:
        """What makes the checks of a group, in their order."""
        plans: dict[str, list[Callable[[], list[Check]]]] = {
            "model": [
                lambda: model.shape_checks(self.subject, self.scores),
                lambda: targets.loss_checks(self.loss, self.subject),
                lambda: [model.initial_loss(self.start)],
                lambda: sight.sight_checks(self.subject, self.run),
                lambda: [model.tied_weights(self.subject)],
                lambda: [self._decay_groups()],
            ],
            "gradients": [
                lambda: [gradients.reach_check(self.backward)],
                lambda: [gradients.gradient_check(self.backward)],
                lambda: [depth.stuck_check(self.across, self.backward)],
                lambda: [depth.depth_check(self.across, self.known.initial or self.known.backward)],
            ],
            "learning": [
                lambda: [self._range()],
                lambda: [overfit.overfit_check(self.practice)],
                lambda: [self._rate()],
                lambda: overfit.start_checks(self.subject, self.run, self.exercise, self.work, self.practice, self.known),
            ],
        }
        if group == "learning" and not any(p.requires_grad for p in self.subject.model.parameters()):
            return [lambda: [overfit.nothing_to_train(self.subject)]]
        return plans[group]

    @cached_property
    def scores(self) -> Tensor:
        """(B, T, rows of the head) of the batch, with the weights as they are."""
        with torch.no_grad():
            return self.run(copied(self.subject.model), self.subject.inputs)

    @cached_property
    def loss(self) -> targets.LossFindings:
        """Of the loss by itself."""
        return targets.look_at_loss(self.subject, model.absent_columns(self.scores))

    @cached_property
    def next_tokens(self) -> Tensor:
        """(B, T) what has to be predicted."""
        return targets.true_targets(self.loss, self.subject)

    @cached_property
    def start(self) -> model.Start:
        """The loss of the weights as they are."""
        return model.look_at_start(self.subject, self.scores, self.next_tokens)

    @cached_property
    def backward(self) -> gradients.Backward:
        """Of the backward pass."""
        return gradients.look_at_backward(self.subject, self.run, self.next_tokens)

    @cached_property
    def across(self) -> depth.Depth:
        """Of the gradients of the weights as they are."""
        return depth.look_at_depth(self.subject, self.run, self.next_tokens)

    @cached_property
    def known(self) -> overfit.Known:
        """What has been proved before anything is trained."""
        stuck = depth.stuck_check(self.across, self.backward)
        return overfit.Known(
            loss=targets.loss_culprit(self.loss, self.subject),
            backward=self.backward.culprit,
            frozen=bool(self.backward.frozen),
            initial=stuck.culprit or ("initial_weights_too_large" if self.start.too_large else ""),
        )

    @cached_property
    def work(self) -> Work:
        """How much training this model takes."""
        return Work.for_parameters(sum(p.numel() for p in self.subject.model.parameters()))

    @cached_property
    def exercise(self) -> Exercise:
        """What is learned by heart."""
        return exercise(self.subject, self.next_tokens, self.work.tokens)

    @cached_property
    def practice(self) -> overfit.Practice:
        """What was learned by heart."""
        return overfit.practise(self.subject, self.run, self.exercise, self.work, self.known)

    def _range(self) -> Check:
        found = self.practice
        return learning_rate.range_check(found.tried, self.subject.learning_rate, found.best.progress >= learning_rate.HALF)

    def _rate(self) -> Check:
        found, rate = self.practice, self.subject.learning_rate
        fault = found.culprit if found.culprit.startswith("learning_rate") else ""
        blame = "" if fault else found.culprit or self.known.initial
        return learning_rate.rate_check(found.given, rate, found.best, found.tried, fault, blame)

    def _decay_groups(self) -> Check:
        twin = copied(self.subject.model)
        if self.subject.make_optimizer is None:
            return model.decay_groups_check(self.subject, None, twin)
        groups = Stepper(self.subject, twin, self.subject.learning_rate or 1e-3).groups
        return model.decay_groups_check(self.subject, groups, twin)
