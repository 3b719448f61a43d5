"""Fewer points that look the same: extremes stay, because they are what one looks for."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]


def chosen(columns: Sequence[Numbers], points: int) -> npt.NDArray[np.int64]:
    """
    Which rows to draw: all, or of each stretch the first row and those where a column is lowest and highest; and the last.

    Args:
        columns: each (N,); NaN is no extreme.
        points: rows to choose at most.

    Returns:
        Indices in order, at most ``points``.
    """
    count = len(columns[0])
    if count <= points:
        return np.arange(count)
    stretches = max(1, (points - 1) // (2 * len(columns) + 1))
    edges = np.linspace(0, count, stretches + 1).astype(np.int64)
    found = {count - 1}
    low = [np.where(np.isnan(column), np.inf, column) for column in columns]
    high = [np.where(np.isnan(column), -np.inf, column) for column in columns]
    for start, end in zip(edges[:-1], edges[1:], strict=True):
        found.add(int(start))
        found.update(int(start + column[start:end].argmin()) for column in low)
        found.update(int(start + column[start:end].argmax()) for column in high)
    return np.array(sorted(found))


def smoothed(values: Numbers, window: int) -> Numbers:
    """
    The mean around each value; numbers that are NaN do not count.

    Args:
        values: (N,).
        window: values in a mean; fewer, and still as many on both sides, towards the ends.
    """
    there = ~np.isnan(values)
    sums = np.concatenate(([0.0], np.cumsum(np.where(there, values, 0.0))))
    counts = np.concatenate(([0], np.cumsum(there)))
    place = np.arange(len(values))
    reach = np.minimum(window // 2, np.minimum(place, len(values) - 1 - place))
    first, last = place - reach, place + reach + 1
    with np.errstate(invalid="ignore", divide="ignore"):
        means: Numbers = (sums[last] - sums[first]) / (counts[last] - counts[first])
    return means


def rounded(values: Any, digits: int = 6) -> list[float | int | None]:
    """Numbers as JSON values with so many significant digits; None where one is not finite, whole numbers whole."""
    return [_rounded(float(value), digits) for value in values]


def _rounded(value: float, digits: int) -> float | int | None:
    if not np.isfinite(value):
        return None
    if value == int(value) and abs(value) < 2**53:
        return int(value)
    return float(f"{value:.{digits}g}")
