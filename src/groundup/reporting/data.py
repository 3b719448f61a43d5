"""
What a run's folder says, as one JSON value: what a report shows, and what a live page asks for again and again.

``page_data`` makes the whole page's value from those of its runs; ``groundup.reporting.page.page`` makes HTML of that.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class RunReader:
    """Reads one run, again and again; what was read before is not read twice."""

    def __init__(self, run: Path):
        self.run = run

    def data(self) -> dict[str, Any]:
        """The run as it is now, as ``run_data`` returns it."""
        return {"name": self.run.name}


def run_data(run: Path) -> dict[str, Any]:
    """One run as it is now, as JSON values: numbers that are not finite are None."""
    return RunReader(run).data()


def page_data(
    runs: Sequence[Mapping[str, Any]], findings: Mapping[str, Sequence[Mapping[str, Any]]] | None = None
) -> dict[str, Any]:
    """
    What ``page`` shows, of one run or several.

    Args:
        runs: each from ``run_data``.
        findings: by a run's path, what a doctor found in it, each as ``Check.as_json`` says it.
    """
    return {"runs": [dict(run) for run in runs], "findings": dict(findings or {})}
