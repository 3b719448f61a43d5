"""groundup doctor: this machine; or data, model, learning and the course of a run, each as checks with a verdict."""

import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from groundup.config.load import Settings
from groundup.config.options import DataOptions, DoctorOptions, MachineOptions, ModelOptions, SpeedOptions
from groundup.diagnostics import data as data_checks
from groundup.diagnostics import machine as machine_checks
from groundup.diagnostics import run as run_checks
from groundup.diagnostics.check import Check, failed
from groundup.diagnostics.data import examine_data
from groundup.diagnostics.examination import culprits, examine
from groundup.diagnostics.machine import examine_machine
from groundup.diagnostics.references import Standing, baseline_check, reference_check
from groundup.diagnostics.run import RunFacts, examine_run, loader_check, series
from groundup.errors import ConfigError
from groundup.evaluation.measure import byte_frequency_baseline
from groundup.recipes.doctor_alike import examine_alike, loader_speed, measured_speed
from groundup.recipes.doctor_case import Case, open_case
from groundup.recipes.machine import machine_for
from groundup.runtime.device import explained_memory_errors

Say = Callable[[str], None]
Show = Callable[[Check], None]
BASELINE_TOKENS = 2**22
NAMES: dict[str, tuple[str, ...]] = {
    "machine": machine_checks.NAMES,
    "data": data_checks.NAMES,
    "model": (
        "shapes", "finite", "loss_direction", "loss_is_mean", "loss_vocabulary", "targets", "initial_loss", "causal_leak",
        "sees_context", "windows_apart", "tied_weights", "decay_groups",
    ),
    "gradients": ("gradients_reach", "gradient_check", "initial_values", "gradient_depth"),
    "learning": ("learning_rate_range", "overfit", "learning_rate", "warmup", "clipping"),
    "equivalence": ("accumulation", "two_runs_alike", "resume"),
    "run": (*run_checks.NAMES, "run_loader", "run_baseline", "run_reference"),
}  # fmt: skip
"""Every check by its group, in the order in which they are made."""


@dataclass(frozen=True)
class Chosen:
    """Which checks are made."""

    names: frozenset[str]
    verify_resume: bool

    def has(self, name: str) -> bool:
        """Whether a check is made."""
        if name == "resume":
            return self.verify_resume or name in self.names
        group = next((group for group, names in NAMES.items() if name in names), "")
        return not self.names or name in self.names or group in self.names

    def any_of(self, group: str) -> bool:
        """Whether any check of a group is made."""
        return any(self.has(name) for name in NAMES[group])


def doctor(sources: Sequence[str], settings: Settings, say: Say, show: Show = lambda check: None) -> dict[str, Any]:
    """
    Examine a run, a checkpoint or what a training would start with; without sources this machine.

    Args:
        settings: ``DoctorOptions`` and those of training; for a run, what was given on top of its own.
        show: told each check as soon as it is made.

    Returns:
        What ``doctor --json`` prints: checks, passed, failed, culprits.

    Raises:
        ConfigError: a check of a name that there is not; options that contradict each other or the data.
        DataError: sources or shards that cannot be used.
        CheckpointError: checkpoints, but no good one.
    """
    options = settings[DoctorOptions]
    chosen = chosen_of(options, settings.origins)
    if options.picture and not options.picture.endswith(".png"):
        raise ConfigError(
            f"picture: {options.picture} (from {settings.origins['picture']}) is no .png; name a file that ends so"
        )
    found: list[Check] = []
    with explained_memory_errors():
        for check in _checks(sources, settings, chosen, say):
            found.append(check)
            show(check)
            if check.name == "learning_rate_range" and options.picture:
                from groundup.tracking.learning_rate_picture import draw_range

                if draw_range(check.details or {}, Path(options.picture)):
                    say(f"picture: {options.picture}")
    if not found:
        raise ConfigError(
            f"checks: {', '.join(options.checks)} (from {settings.origins['checks']}) need a run or text; name one"
        )
    return {
        "checks": [check.as_json() for check in found],
        "passed": not failed(found),
        "failed": [check.name for check in failed(found)],
        "culprits": culprits(found),
    }


def chosen_of(options: DoctorOptions, origins: Any) -> Chosen:
    """
    The checks that were asked for.

    Raises:
        ConfigError: there is no check or group of a name; lists them.
    """
    known = [*NAMES, *(name for names in NAMES.values() for name in names)]
    for name in options.checks:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            groups = ", ".join(NAMES)
            raise ConfigError(
                f"checks: {name!r} (from {origins['checks']}) is no check and no group{hint}; the groups are {groups}, and the "
                "names of the checks are what `groundup doctor` prints, with _ for spaces"
            )
    return Chosen(frozenset(options.checks), options.verify_resume)


def _checks(sources: Sequence[str], settings: Settings, chosen: Chosen, say: Say) -> Iterator[Check]:
    """Every check that was asked for, as it is made."""
    if not sources and not settings[DataOptions].source:
        machine = machine_for(settings[MachineOptions], training=True, speed=settings[SpeedOptions])
        yield from examine_machine(machine, Path.cwd(), chosen.has)
        return
    if "machine" in chosen.names or chosen.names & set(NAMES["machine"]):
        machine = machine_for(settings[MachineOptions], training=True, speed=settings[SpeedOptions])
        yield from examine_machine(machine, Path.cwd(), chosen.has)
    if not any(chosen.any_of(group) for group in NAMES if group != "machine"):
        return
    with open_case(sources, settings, say) as case:
        yield from _of_case(case, chosen)


def _of_case(case: Case, chosen: Chosen) -> Iterator[Check]:
    # What a run says of itself is there at once, and what a person asks first.
    if case.rows is not None and chosen.any_of("run"):
        yield from (check for check in _of_run(case, case.rows, chosen) if chosen.has(check.name))
    if chosen.any_of("data"):
        yield from (check for check in examine_data(case.text(), case.use()) if chosen.has(check.name))
    if groups := [group for group in ("model", "gradients", "learning") if chosen.any_of(group)]:
        yield from (check for check in examine(case.subject, groups) if chosen.has(check.name))
    if chosen.any_of("equivalence"):
        yield from examine_alike(case, chosen.has)
    if case.rows is None and chosen.has("run_loader"):
        yield loader_check(loader_speed(case), measured_speed(case))


def _of_run(case: Case, rows: list[dict[str, Any]], chosen: Chosen) -> Iterator[Check]:
    """What the rows of a run say."""
    config, plan = case.training.model.config, case.plan
    facts = RunFacts(
        vocab_size=config.vocab_size, total_steps=plan.total_steps, max_grad_norm=case.subject.max_grad_norm or 0.0,
        n_embd=case.settings[ModelOptions].n_embd, device=case.training.machine.device.type,
        fp16=case.settings[SpeedOptions].fp16,
    )  # fmt: skip
    yield from examine_run(rows, facts)
    _, speeds = series(rows, "tokens_per_second")
    if chosen.has("run_loader") and len(speeds):
        yield loader_check(loader_speed(case), float(np.median(speeds)))
    if chosen.has("run_baseline") or chosen.has("run_reference"):
        standing = _standing(case)
        yield baseline_check(rows, standing)
        yield reference_check(rows, standing)


def _standing(case: Case) -> Standing:
    """What a run's loss is compared by."""
    corpus, config = case.corpus, case.training.model.config
    one = len(corpus.parts) == 1 and not corpus.mixed
    digest = str(corpus.parts[0].dataset.manifest.get("content_sha256", "")) if one else ""
    baseline = byte_frequency_baseline(
        corpus.first_tokens("train", BASELINE_TOKENS), corpus.first_tokens("validation", BASELINE_TOKENS),
        corpus.tokenizer.token_bytes,
    )  # fmt: skip
    return Standing(digest, config.n_layer, config.n_embd, config.vocab_size, baseline, case.pretrained)


def line_of(check: Check) -> str:
    """A check for a person: one line, and one of advice where it failed."""
    mark = {True: "✓", False: "✗", None: "–"}[check.passed]
    text = f"  {mark} {check.name.replace('_', ' '):<26} {check.measured}"
    if check.passed is False:
        text += f"\n      expected {check.expected}" + (f"\n      → {check.advice}" if check.advice else "")
    return text


def summary_of(result: dict[str, Any]) -> str:
    """The last line: how many passed, and who is to blame."""
    verdicts = [check["passed"] for check in result["checks"]]
    passed, open_ones = verdicts.count(True), verdicts.count(None)
    text = f"{passed} of {len(verdicts)} checks passed" + (f", {open_ones} without a verdict" if open_ones else "")
    if result["failed"]:
        text += f"; failed: {', '.join(result['failed'])}"
    if result["culprits"]:
        text += f"; culprit{'s' if len(result['culprits']) > 1 else ''}: {', '.join(result['culprits'])}"
    return text
