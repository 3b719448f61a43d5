"""All checks of a model, a batch and a loss, in the order in which one explains the next."""

from collections.abc import Collection, Iterator

from groundup.diagnostics.check import Check
from groundup.diagnostics.subject import Subject

GROUPS = ("model", "gradients", "learning")
"""The groups of checks, in their order."""


def examine(subject: Subject, only: Collection[str] = ()) -> Iterator[Check]:
    """
    Look for what is wrong with a model, a loss and an optimizer; each check is handed out as soon as it is made.

    The subject is left bit for bit as it was, and the state of the random generators too. A fault is named once it is
    proved, in ``Check.culprit``; checks that fail for the same reason name the same culprit.

    Args:
        only: groups of ``GROUPS``; empty is all of them.
    """
    raise NotImplementedError
    yield


def culprits(checks: Collection[Check]) -> list[str]:
    """The faults that were named, each once, in the order in which they were found."""
    return list(dict.fromkeys(check.culprit for check in checks if check.passed is False and check.culprit))
