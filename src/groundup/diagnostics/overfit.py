"""
One mini-batch learned by heart; and, where that fails, the five culprits one after the other.

A model that cannot learn a hundred tokens by heart will learn nothing else, and such a training takes seconds. The culprits
are tested by replacing one thing at a time by one that is known to be right: the loss, the backward pass, the learning rate,
the initial values. What remains, when none of these is to blame, is the model.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from torch import nn

from groundup.diagnostics.bench import Scores, start_anew
from groundup.diagnostics.check import Check
from groundup.diagnostics.fitting import Curve, Exercise, Work, fit, warm, warm_and_down
from groundup.diagnostics.learning_rate import LEARNED, RISES, Range, range_test, rate_fault, said
from groundup.diagnostics.subject import Subject

LADDER = (1.0, 0.1, 10.0, 0.01)
"""Further rates, as multiples of the suggested one."""


@dataclass(frozen=True)
class Suspect:
    """One of the five culprits, and what speaks for or against it."""

    name: str
    guilty: bool
    evidence: str


@dataclass(frozen=True)
class Practice:
    """What was learned by heart, and how."""

    tried: Range
    best: Curve
    """At the rate that learned most, with a sound loss."""
    best_rate: float
    given: Curve | None
    """At the given rate, with warmup and clipping as given."""
    as_is: Curve
    """All as given, the loss too."""
    suspects: tuple[Suspect, ...] = field(default=())
    culprit: str = ""

    @property
    def learned(self) -> bool:
        """All as given learned it, or is on its way at a rate that is slow but sound."""
        return not self.culprit


@dataclass(frozen=True)
class Known:
    """What the checks before have proved, each empty if nothing."""

    loss: str
    backward: str
    frozen: bool
    initial: str


def practise(subject: Subject, scores: Scores, batch: Exercise, work: Work, known: Known) -> Practice:
    """Learn one mini-batch by heart, as given and at the best rate; find out why, where that fails."""
    sound = None if known.loss else subject.loss_fn
    train = partial(fit, subject, scores, batch)
    tried = range_test(subject, scores, batch, work, sound)
    best_rate, best = _best(lambda rate: train(warm_and_down(rate, work.steps), loss_fn=sound), tried.high, LADDER)
    given, rate, clip = None, subject.learning_rate, subject.max_grad_norm or 0.0
    if rate is not None:
        plan = warm(rate, work.steps, min(subject.warmup_steps or 0, work.steps // 5))
        given = train(plan, loss_fn=sound, max_grad_norm=clip)
    as_is = given or best
    if known.loss:
        as_is = train(warm_and_down(best_rate, work.steps), loss_fn=subject.loss_fn)
    practice = Practice(tried, best, best_rate, given, as_is)
    fault = "" if given is None or rate is None else rate_fault(given, rate, best, tried)
    if best.progress >= LEARNED and not fault and (not known.loss or as_is.progress >= LEARNED):
        return practice
    return _accuse(practice, subject, scores, batch, work, known, fault)


def _best(train: Callable[[float], Curve], rate: float, ladder: tuple[float, ...]) -> tuple[float, Curve]:
    """The rate that learns most; the first that learns it all ends the search."""
    best: tuple[float, Curve] | None = None
    for factor in ladder:
        curve = train(rate * factor)
        if best is None or curve.progress > best[1].progress:
            best = (rate * factor, curve)
        if curve.progress >= LEARNED:
            break
    assert best is not None
    return best


def _accuse(
    practice: Practice, subject: Subject, scores: Scores, batch: Exercise, work: Work, known: Known, rate_fault: str
) -> Practice:
    """The five culprits in turn; the first that is proved guilty is named, and the model only if no other is."""
    suspects, culprit, best = list[Suspect](), "", practice.best
    train = partial(fit, subject, scores, batch, loss_fn=None)

    def hear(name: str, proved: str, evidence: str) -> None:
        nonlocal culprit
        suspects.append(Suspect(name, bool(proved) and not culprit, evidence))
        culprit = culprit or proved

    evidence = f"trained with it {said(practice.as_is)}; with cross-entropy {said(best)}" if known.loss else "sound by itself"
    hear("loss", known.loss if practice.as_is.progress < LEARNED else "", evidence)
    if not culprit and known.frozen and best.progress < LEARNED:
        _, free = _best(lambda rate: train(warm_and_down(rate, work.steps), prepare=_unfreeze), practice.best_rate, (1.0, 0.1))
        hear("backward", "parameters_frozen" if free.progress >= LEARNED else "", f"with all parameters trained {said(free)}")
    else:
        evidence = f"its gradients are wrong: {known.backward}" if known.backward else "gradients equal difference quotients"
        hear("backward", known.backward if best.progress < LEARNED else "", evidence)
    evidence = f"at none of several rates around {practice.tried.high:.1g} is it learned; at best {said(best)}"
    if rate_fault:
        evidence = f"at the given rate {said(practice.as_is)}; at {practice.best_rate:.1g} {said(best)}"
    hear("hyper-parameters", rate_fault, evidence)
    if not culprit:
        anew = partial(start_anew, seed=subject.seed)
        rates = practice.best_rate, 1e-3, 1e-2
        curves = [train(warm_and_down(rate, work.steps), prepare=anew) for rate in rates]
        fresh = max(curves, key=lambda curve: curve.progress)
        proved = (known.initial or "initial_weights_unsuited") if fresh.progress >= LEARNED else ""
        hear("initial values", proved, f"with GPT-2's initial weights {said(fresh)}")
    evidence = "another is to blame" if culprit else f"no other is to blame, and the loss stays at {best.losses[-1]:.3g}"
    hear("model", "" if culprit else "model_too_simple", evidence)
    return Practice(practice.tried, best, practice.best_rate, practice.given, practice.as_is, tuple(suspects), culprit)


def nothing_to_train(subject: Subject) -> Check:
    """Said in place of all trainings, where no parameter is trained."""
    meant = all(name.startswith(subject.frozen) for name, _ in subject.model.named_parameters())
    return Check(
        "overfit", "learning", None if meant else False, "no parameter has requires_grad True", "something that can be trained",
        "" if meant else "let the parameters be trained, or say that it is meant so: frozen=(the beginnings of their names)",
        "" if meant else "parameters_frozen",
    )  # fmt: skip


def _unfreeze(model: nn.Module) -> None:
    model.requires_grad_()


def overfit_check(found: Practice) -> Check:
    """One mini-batch is learned by heart."""
    expected = f"loss of one mini-batch near {found.best.floor:.2g} nats, the least that is possible"
    details = {
        "losses": list(found.as_is.losses), "best_losses": list(found.best.losses), "best_learning_rate": found.best_rate,
        "suspects": [{"name": s.name, "guilty": s.guilty, "evidence": s.evidence} for s in found.suspects],
    }  # fmt: skip
    if found.learned:
        measured = f"{said(found.best)} at {found.best_rate:.1g}"
        return Check("overfit", "learning", True, measured, expected, details=details)
    guilty = next(s for s in found.suspects if s.guilty)
    return Check(
        "overfit", "learning", False, said(found.as_is if found.as_is.progress < LEARNED else found.best), expected,
        f"the culprit is the {guilty.name}: {guilty.evidence}", found.culprit, details,
    )  # fmt: skip


def start_checks(subject: Subject, scores: Scores, batch: Exercise, work: Work, found: Practice, known: Known) -> list[Check]:
    """Whether this model needs warmup, and clipping, at its rate: measured in the first steps, with and without."""
    rate = subject.learning_rate if subject.learning_rate is not None else found.tried.high
    sound = None if known.loss else subject.loss_fn
    steps = max(10, work.steps // 4)
    if found.culprit or known.initial:
        return [
            Check(name, "learning", None, "not measured, because something else is wrong", "a loss that does not rise at first")
            for name in ("warmup", "clipping")
        ]
    train = partial(fit, subject, scores, batch, loss_fn=sound, enough=0.9)
    plain = train([rate] * steps)
    # Long enough to have been at the full rate too.
    warmed = train(warm(rate, 2 * steps, steps)) if plain.rise > RISES else plain
    clipped = train([rate] * steps, max_grad_norm=1.0) if plain.rise > RISES else plain
    return [
        _need("warmup", rate, plain, warmed, subject.warmup_steps, "set warmup_steps; 1 to 3% of the steps are usual"),
        _need("clipping", rate, plain, clipped, subject.max_grad_norm, "set max_grad_norm to 1"),
    ]


def _need(name: str, rate: float, without: Curve, with_it: Curve, has: float | None, advice: str) -> Check:
    expected = f"a loss that does not rise by more than {RISES:g} nats in the first steps"
    norms = sorted(without.grad_norms)
    jump = f"largest gradient norm {norms[-1]:.3g}, median {norms[len(norms) // 2]:.3g}" if norms else "no gradients"
    details = {"losses": list(without.losses), "losses_with_it": list(with_it.losses), "grad_norms": list(without.grad_norms)}
    if without.rise <= RISES:
        measured = f"not needed: at {rate:.2g} the loss rises by {max(0.0, without.rise):.2g}; {jump}"
        return Check(name, "learning", True, measured, expected, details=details)
    if with_it.rise > RISES:
        measured = f"makes no difference: at {rate:.2g} the loss rises by {without.rise:.2g}, with it by {with_it.rise:.2g}"
        return Check(name, "learning", True, measured, expected, details=details)
    measured = f"needed: at {rate:.2g} the loss rises by {without.rise:.2g}, with it by {max(0.0, with_it.rise):.2g}; {jump}"
    if has == 0:
        return Check(name, "learning", False, measured, expected, advice, details=details)
    return Check(name, "learning", True if has else None, measured, expected, details=details)
