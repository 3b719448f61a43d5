"""What one check says."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Check:
    """One thing that was looked at, and the verdict. What it says is one line each, for a person."""

    name: str
    """Stable and in snake case, e.g. ``initial_loss``."""
    group: str
    """What it is about: machine, data, model, gradients, learning, equivalence or run."""
    passed: bool | None
    """None where nothing could be measured here; ``measured`` says why."""
    measured: str
    """The value with its unit, and where it was seen."""
    expected: str
    """The value that a sound set-up has, with its tolerance."""
    advice: str = ""
    """What to do; empty where the check passed."""
    culprit: str = ""
    """Where the check failed because of a fault that it knows by name: the name, e.g. ``target_not_shifted``."""
    details: dict[str, Any] | None = None
    """The numbers behind it, for ``--json`` and pictures."""

    def as_json(self) -> dict[str, Any]:
        """As ``groundup doctor --json`` prints it: numbers that are not finite are None, which is JSON's null."""
        return {key: _finite(value) for key, value in asdict(self).items() if value is not None or key == "passed"}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def failed(checks: Iterable[Check]) -> list[Check]:
    """Those that did not pass."""
    return [check for check in checks if check.passed is False]
