"""The verbs that look at a run: report, watch."""

from pathlib import Path
from typing import Any

import click

from groundup.cli.command import verb
from groundup.config.load import Settings
from groundup.config.options import REPORT_GROUPS, WATCH_GROUPS

RUN = click.Argument(["run"], metavar="RUN")


@verb(
    "watch",
    "Show a run in the browser while it goes on.\n\nIts report, live, and its model's view of tokens: what may come next, and "
    "how surprising a text is. On this machine alone; Ctrl-C ends.",
    WATCH_GROUPS,
    [RUN],
)
def _watch(own: dict[str, Any], settings: Settings) -> tuple[dict[str, Any], str]:
    from groundup.recipes.watch import watch
    from groundup.tracking.progress import progress

    with progress() as shown:
        result = watch(Path(own["run"]), settings, shown.say)
    return result, ""


@verb(
    "report",
    "Write a page about runs, and pictures.\n\nHow they went in words, curves, health, samples, what was unusual, what differs: one "
    "HTML file that needs no network. A run may be going on.",
    REPORT_GROUPS,
    [click.Argument(["runs"], nargs=-1, required=True, metavar="RUN…")],
)
def _report(own: dict[str, Any], settings: Settings) -> tuple[dict[str, Any], str]:
    from groundup.recipes.report import report
    from groundup.tracking.progress import progress

    with progress() as shown:
        result = report([Path(run) for run in own["runs"]], settings, shown.say)
    return result, "\n".join([f"page: {result['page']}", *(f"picture: {path}" for path in result["pictures"])])
