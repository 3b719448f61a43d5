"""What an experiment is, and what its measurements say: words that follow the numbers, whichever way they fall."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from groundup.lab.bench import Bench

Measured = dict[str, Any]
"""One run's numbers, as JSON values. None stands for what is not finite."""
Options = Mapping[str, Any]


@dataclass(frozen=True)
class Spread:
    """One quantity over the seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the seeds; infinite where one of them is."""
        return sum(self.values) / len(self.values)

    @property
    def low(self) -> float:
        """The lowest seed's."""
        return min(self.values)

    @property
    def high(self) -> float:
        """The highest seed's."""
        return max(self.values)

    def __str__(self) -> str:
        if len(self.values) == 1 or self.low == self.high:
            return number(self.mean)
        return f"{number(self.mean)} ({number(self.low)} to {number(self.high)})"


@dataclass(frozen=True)
class Results:
    """What was measured: for each setting, one measurement a seed."""

    runs: Mapping[str, Mapping[int, Measured]]

    @property
    def settings(self) -> list[str]:
        """In the order in which they were declared."""
        return list(self.runs)

    @property
    def seeds(self) -> int:
        """How many each setting has."""
        return min(len(runs) for runs in self.runs.values())

    def measured(self, setting: str) -> list[Measured]:
        """One for each seed, in order."""
        return [run for _, run in sorted(self.runs[setting].items())]

    def spread(self, setting: str, key: str) -> Spread:
        """A number of a setting over the seeds; what is not finite counts as infinite."""
        return Spread(tuple(math.inf if run[key] is None else float(run[key]) for run in self.measured(setting)))

    def best(self, key: str, settings: Sequence[str] = ()) -> str:
        """The setting with the lowest mean."""
        return min(settings or self.settings, key=lambda setting: self.spread(setting, key).mean)


@dataclass(frozen=True)
class Part:
    """A sentence or two about the measurements."""

    text: str
    holds: bool | None = None
    """Whether the measurements show this part of the claim; None for a remark that the claim does not speak of."""


@dataclass(frozen=True)
class Experiment:
    """A claim, and how it is put to the test."""

    name: str
    claim: str
    """One line."""
    formula: str
    """What is behind it, as text."""
    set_up: str
    """What is trained on what, for a reader of the picture."""
    settings: Mapping[str, Options]
    """By the name in the picture: what each compared setting changes of ``base``."""
    says: Callable[[Results], list[Part]]
    draw: Callable[[Results, "Figure"], None]
    base: Options
    """Options of training, beside those of every experiment (``bench.BASE``)."""
    measure: "Callable[[Bench, Options, int], Measured] | None" = None
    """From options and seed to numbers; None trains and evaluates."""


def verdict(parts: Sequence[Part]) -> str:
    """What the parts say of the claim together: seen, not seen, or seen in part."""
    found = [part.holds for part in parts if part.holds is not None]
    return "seen" if all(found) else "seen in part" if any(found) else "not seen"


def is_lower(one: Spread, other: Spread) -> bool:
    """Every seed of the one below every seed of the other. A single seed shows no spread, so it shows nothing."""
    return len(one.values) > 1 and len(other.values) > 1 and one.high < other.low


def against(one: Spread, other: Spread, unit: str = "nats") -> str:
    """How the one compares with the other, in words: ``0.12 nats lower, beyond the seeds' spread``."""
    difference = one.mean - other.mean
    size = f"{number(abs(difference))} {unit} " if math.isfinite(difference) else "incomparably "
    for lower, higher, word in ((one, other, "lower"), (other, one, "higher")):
        if is_lower(lower, higher):
            return f"{size}{word}, beyond the seeds' spread"
    if min(len(one.values), len(other.values)) < 2:
        return "one seed shows no spread"
    return "no difference beyond the seeds' spread"


def number(value: float) -> str:
    """As people write it: three digits behind the point for losses, fewer for what is large, a power for what is tiny."""
    if not math.isfinite(value):
        return "not finite"
    size = abs(value)
    if size and size < 1e-3:
        return f"{value:.1e}"
    if size >= 1000:
        return f"{value:,.0f}" if size < 1e6 else f"{value:.1e}"
    return f"{value:.1f}" if size >= 100 else f"{value:.2f}" if size >= 10 else f"{value:.3f}"


def percent(share: Spread) -> str:
    """A share over the seeds: ``41.2% (40.9% to 41.6%)``."""
    if len(share.values) == 1 or share.low == share.high:
        return f"{share.mean:.1%}"
    return f"{share.mean:.1%} ({share.low:.1%} to {share.high:.1%})"
