"""The door for somebody else's model: what is needed of it is found out, and the checks become a report to print."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from groundup.diagnostics.check import Check, failed
from groundup.diagnostics.examine import culprits
from groundup.diagnostics.subject import Forward


@dataclass(frozen=True)
class Report:
    """All that was found; ``print`` shows it as a table."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return not failed(self.checks)

    @property
    def culprits(self) -> list[str]:
        """The faults that were named, each once."""
        return culprits(self.checks)


def check_any(
    model: nn.Module,
    batch: Any,
    loss_fn: Any,
    *,
    forward: Forward | None,
    optimizer: Any,
    learning_rate: float | None,
    only: Collection[str],
    known: Mapping[str, Any],
) -> Report:
    """As ``groundup.diagnostics.check``, which describes the arguments."""
    raise NotImplementedError
