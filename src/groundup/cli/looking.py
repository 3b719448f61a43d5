"""The verbs that look at a run, or at training itself: doctor, report, watch, lab."""

from pathlib import Path
from typing import Any

import click

from groundup.cli.command import SOURCES, output_dir, verb
from groundup.config.load import Settings
from groundup.config.options import DOCTOR_GROUPS, LAB_GROUPS, REPORT_GROUPS, WATCH_GROUPS

RUN = click.Argument(["run"], metavar="RUN")


@verb(
    "doctor",
    "Say what is wrong, by measuring.\n\nWithout a SOURCE: this machine. With a run, a checkpoint, or text and the options of "
    "train: its data, its model, its gradients, its learning, and how a run went. Each check says what was measured and what a "
    "sound one has. Exit code 1 where one failed. Nothing is written into a run.",
    DOCTOR_GROUPS,
    [SOURCES],
)
def _doctor(own: dict[str, Any], settings: Settings) -> tuple[dict[str, Any], str]:
    from groundup.diagnostics.check import Check
    from groundup.recipes.doctor import doctor, line_of, summary_of
    from groundup.runtime.signals import orderly_end
    from groundup.tracking.progress import progress
    from groundup.tracking.surprise import harmless

    group = ""

    def show(check: Check) -> None:
        nonlocal group
        if not own["json"]:
            if check.group != group:
                print(check.group, flush=True)
            print(harmless(line_of(check)), flush=True)
        group = check.group

    with orderly_end(), progress() as shown:
        result = doctor(own["sources"], settings, shown.say, show)
    return result, summary_of(result)


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
    "Write a page about runs, and pictures.\n\nHow they went in words, curves, health, samples, what was unusual, what "
    "differs: one HTML file that needs no network. A run may be going on.",
    REPORT_GROUPS,
    [click.Argument(["runs"], nargs=-1, required=True, metavar="RUN…")],
)
def _report(own: dict[str, Any], settings: Settings) -> tuple[dict[str, Any], str]:
    from groundup.recipes.report import report
    from groundup.tracking.progress import progress

    with progress() as shown:
        result = report([Path(run) for run in own["runs"]], settings, shown.say)
    return result, "\n".join([f"page: {result['page']}", *(f"picture: {path}" for path in result["pictures"])])


@verb(
    "lab",
    "Put a claim about training to the test.\n\nSmall models, a minute or two: a picture, and a paragraph that says what was "
    "measured. NAME list shows the claims. What was measured already is kept, so the same command goes on after Ctrl-C.",
    LAB_GROUPS,
    [click.Argument(["name"], metavar="NAME"), output_dir("lab")],
)
def _lab(own: dict[str, Any], settings: Settings) -> tuple[dict[str, Any], str]:
    from groundup.config.options import LabOptions
    from groundup.lab.registry import EXPERIMENTS, experiment_named

    if own["name"] == "list":
        width = max(map(len, EXPERIMENTS))
        claims = [{"name": experiment.name, "claim": experiment.claim} for experiment in EXPERIMENTS.values()]
        return {"labs": claims}, "\n".join(f"{lab['name']:<{width}}  {lab['claim']}" for lab in claims)
    experiment = experiment_named(own["name"])
    from groundup.lab.carry_out import carry_out
    from groundup.runtime.signals import orderly_end
    from groundup.tracking.progress import progress

    with orderly_end(), progress() as shown:
        result = carry_out(experiment, Path(own["output_dir"]), settings[LabOptions].seeds, shown.say)
    return result, f"{result['text']}\npicture: {result['picture']}\npage: {result['page']}"
