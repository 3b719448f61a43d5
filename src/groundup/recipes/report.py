"""groundup report: runs as a page that a person can read, and as pictures."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from groundup.config.load import Settings
from groundup.config.options import ReportOptions
from groundup.data.sources import is_run
from groundup.diagnostics.run import RunFacts, examine_run
from groundup.errors import ConfigError
from groundup.reporting.data import POINTS, RunReader, page_data
from groundup.reporting.page import page
from groundup.reporting.pictures import draw_pictures
from groundup.runtime.files import explained_os_errors, make_directory, replace_durably
from groundup.tracking.labels import one_line
from groundup.tracking.metrics import METRICS, number, read_rows

Say = Callable[[str], None]
PAGE = "report.html"
ALL_POINTS = 12_000
"""Of each curve, all runs together: twenty runs still are a page of 3 MB."""
EXAMINED_ROWS = 5000
"""Of a run's steps, evenly spread; more would take longer and say the same."""


def report(runs: Sequence[Path], settings: Settings, say: Say) -> dict[str, Any]:
    """
    Write one HTML page about runs, and pictures beside it; the runs may be going on.

    Returns:
        What ``report --json`` prints: page, pictures, and of each run its path, state, story and totals.

    Raises:
        ConfigError: something is no run, or the page cannot be written.
    """
    runs = list(dict.fromkeys(runs))
    for run in runs:
        require_run(run)
    output = output_of(runs, settings)
    points = min(POINTS, ALL_POINTS // len(runs))
    read = [RunReader(run).data(points) for run in runs]
    data = page_data(read, {found["path"]: findings(run, found) for run, found in zip(runs, read, strict=True)})
    with explained_os_errors(output, "report"):
        make_directory(output.parent, "--output")
        replace_durably(output, page(data).encode())
        pictures = draw_pictures(data["runs"], output, say)
    for run in data["runs"]:
        say(f"{one_line(run['label'])}: {run['story'][0]['text']}")
    return {
        "page": str(output),
        "pictures": [str(path) for path in pictures],
        "runs": [{key: run[key] for key in ("path", "label", "state", "story", "totals")} for run in data["runs"]],
    }


def require_run(run: Path) -> None:
    """
    Refuse what no training wrote.

    Raises:
        ConfigError: there is no such folder, or it is no run.
    """
    if not run.is_dir():
        what = "is a file" if run.exists() else "does not exist"
        raise ConfigError(f"run: {run} (given as RUN) {what}; give the --output-dir of a training")
    if not (is_run(run) or (run / METRICS).is_file()):
        raise ConfigError(
            f"run: {run} (given as RUN) is no run: it has neither the config.toml nor the {METRICS} of one; give "
            "the --output-dir of a training"
        )


def output_of(runs: Sequence[Path], settings: Settings) -> Path:
    """
    Where the page goes: into the run, or where there are several into the current folder, if nothing else is said.

    Raises:
        ConfigError: the name is not that of a page.
    """
    given = settings[ReportOptions].output
    if not given:
        return runs[0] / PAGE if len(runs) == 1 else Path(PAGE)
    if not given.endswith((".html", ".htm")):
        raise ConfigError(f"output: {given} (from {settings.origins['output']}) is no .html; name a file that ends so")
    return Path(given)


def findings(run: Path, data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the doctor says about the rows of a run; nothing where its vocabulary is not known."""
    vocabulary, config = data["data"].get("vocab_size"), data["config"]
    if type(vocabulary) is not int or vocabulary < 2:
        return []
    rows = read_rows(run / METRICS)
    steps = [row for row in rows if "loss" in row]
    stride = -(-len(steps) // EXAMINED_ROWS) or 1
    kept = {id(row) for row in steps[::stride]}
    width, norm = config.get("n_embd"), config.get("max_grad_norm")
    facts = RunFacts(
        vocab_size=vocabulary,
        total_steps=data["state"]["planned_steps"] or 0,
        max_grad_norm=0.0 if math.isnan(found := number(norm)) else found,
        n_embd=width if isinstance(width, int) else 0,
        fp16=config.get("fp16") is True,
    )
    chosen = [row for row in rows if "loss" not in row or id(row) in kept or row.get("spike")]
    return [check.as_json() for check in examine_run(chosen, facts)]
