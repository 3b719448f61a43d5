"""Sources with names and weights, as somebody gives them: ``NAME=PATH:WEIGHT``."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from groundup.data.shards import SOURCE_NAME
from groundup.errors import ConfigError

EXAMPLE = "NAME=PATH:WEIGHT, for instance wiki=wiki.txt:0.7"
BLOCK = 2**16
"""Positions of a run in which the weights hold exactly."""


@dataclass(frozen=True)
class NamedSource:
    """A source with a name and a weight, as it was given."""

    name: str
    path: str
    weight: float


def parse_source(text: str, origin: str = "--source") -> NamedSource:
    """
    Read ``NAME=PATH:WEIGHT``; the path may hold further = and :.

    Args:
        origin: where the text is from, for the error.

    Raises:
        ConfigError: a part is missing or malformed.
    """

    def refused(reason: str) -> ConfigError:
        return ConfigError(f"source: {text!r} (from {origin}) {reason}; write {EXAMPLE}")

    name, equals, rest = text.partition("=")
    path, colon, number = rest.rpartition(":")
    if not equals:
        raise refused("has no =, so it has no name")
    if not re.fullmatch(SOURCE_NAME, name):
        raise refused(f"has the name {name!r}, which is not 1 to 64 letters (a-z, A-Z), digits, - and _")
    if not colon:
        raise refused("has no weight")
    if not path:
        raise refused("has no path")
    try:
        weight = float(number)
    except ValueError:
        raise refused(f"has the weight {number!r}, which is not a number") from None
    if not (math.isfinite(weight) and weight > 0):
        raise refused(f"has the weight {number!r}, which is not above 0 and finite")
    return NamedSource(name, path, weight)


def named_sources(texts: Sequence[str], origin: str = "--source") -> tuple[NamedSource, ...]:
    """
    Parse sources with weights; sorted by name, so that their order on a command line changes nothing.

    Raises:
        ConfigError: one is malformed, two have one name, or a weight is too small.
    """
    found = sorted((parse_source(text, origin) for text in texts), key=lambda source: source.name)
    seen: dict[str, str] = {}
    for source in found:
        # Files are called after sources, and some file systems see no difference between a and A.
        other = seen.get(source.name.lower())
        if other is not None:
            both = source.name if other == source.name else f"{other} and {source.name}"
            raise ConfigError(f"source: the name {both} (from {origin}) is given twice; give each source its own")
        seen[source.name.lower()] = source.name
    quotas({source.name: source.weight for source in found})
    return tuple(found)


def quotas(weights: Mapping[str, float]) -> dict[str, int]:
    """
    Positions of a block that each source has, in proportion to its weight: the largest remainders are rounded up.

    Raises:
        ConfigError: a weight is so small that it has none.
    """
    total = sum(map(Fraction, weights.values()))
    exact = {name: BLOCK * Fraction(weight) / total for name, weight in weights.items()}
    found = {name: math.floor(share) for name, share in exact.items()}
    by_remainder = sorted(exact, key=lambda name: (found[name] - exact[name], name))
    for name in by_remainder[: BLOCK - sum(found.values())]:
        found[name] += 1
    if none := [name for name, quota in found.items() if not quota]:
        share = float(exact[none[0]] / BLOCK)
        raise ConfigError(
            f"source: the weight {weights[none[0]]:g} of {none[0]} is {share:.1g} of all, less than 1/{BLOCK:,}; raise it, or "
            "leave the source out"
        )
    return found
