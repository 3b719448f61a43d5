"""Carry an experiment out, or the rest of it: every run's numbers are kept as soon as they are there."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from groundup.errors import ConfigError
from groundup.lab.bench import BASE, Bench, opened_bench, train
from groundup.lab.experiment import Experiment, Measured, Options, Results, verdict
from groundup.lab.pictures import draw
from groundup.runtime.files import exclusive, explained_os_errors, make_directory, replace_durably

Say = Callable[[str], None]
FORMAT = "groundup-lab 1"


@dataclass(frozen=True)
class Run:
    """A measurement, and what it is of."""

    setting: str
    seed: int
    digest: str
    """Of everything that the numbers depend on: what has another one is not compared with it."""
    measured: Measured


def carry_out(experiment: Experiment, folder: Path, seeds: int, say: Say, overrides: Options | None = None) -> dict[str, Any]:
    """
    Do the runs of an experiment that are not done yet; write NAME.json after each, NAME.png and NAME.md at the end.

    Args:
        seeds: how many runs each setting has, with the seeds 0, 1, ….
        overrides: options that win over the experiment's, where it has them: tests make everything smaller.

    Returns:
        What ``lab --json`` prints: lab, claim, verdict, text, seeds, runs (setting, seed, digest, measured), picture, page,
        results.

    Raises:
        ConfigError: the folder cannot be written, is in use, or its NAME.json is not an experiment's.
        DataError: there is no text to train on.
    """
    make_directory(folder)
    name = experiment.name
    # A lock of its own: other experiments may write into the same folder meanwhile. It stays, as a run's does: where its file
    # goes while somebody waits for it, a third one makes another, and both go on.
    with explained_os_errors(folder, "lab"), exclusive(folder / f".{name}.lock", f"lab {name} in {folder}"):
        runs = do_runs(experiment, folder / f"{name}.json", seeds, say, overrides or {})
        results = results_of(experiment, runs, seeds)
        text, found = paragraph(experiment, results)
        draw(experiment, results, folder / f"{name}.png")
        shown = described(experiment, text, f"{name}.png")
        replace_durably(folder / f"{name}.md", f"# {name}\n\n{shown}".encode())
    return {
        "lab": name,
        "claim": experiment.claim,
        "verdict": found,
        "text": text,
        "seeds": seeds,
        "picture": str(folder / f"{name}.png"),
        "page": str(folder / f"{name}.md"),
        "results": str(folder / f"{name}.json"),
        "runs": [vars(run) for run in runs if run.seed < seeds],
    }


def do_runs(experiment: Experiment, path: Path, seeds: int, say: Say, overrides: Options) -> list[Run]:
    """All runs: those that a file holds already, and the others, which it holds afterwards."""
    kept = read_runs(path, experiment.name)
    options = {setting: options_of(experiment, setting, overrides) for setting in experiment.settings}
    with opened_bench() as bench:
        digests = {setting: digest_of(experiment, setting, options[setting], bench) for setting in options}
        runs = [run for run in kept if digests.get(run.setting) == run.digest]
        if len(runs) < len(kept):
            say(f"{path}: {len(kept) - len(runs)} runs of other settings, texts or another torch are measured again")
        done = {(run.setting, run.seed) for run in runs}
        # Seed by seed, so that all settings can be compared as early as possible.
        wanted = [(setting, seed) for seed in range(seeds) for setting in experiment.settings]
        if there := len(done & set(wanted)):
            say(f"{there} of {len(wanted)} runs are done already")
        for number, (setting, seed) in enumerate(wanted, start=1):
            if (setting, seed) in done:
                continue
            measured = (experiment.measure or train)(bench, options[setting], seed)
            runs.append(Run(setting, seed, digests[setting], measured))
            replace_durably(path, as_json(experiment, runs))
            say(f"run {number}/{len(wanted)}: {setting}, seed {seed}" + summary(measured))
    return runs


def summary(measured: Measured) -> str:
    """A run in a few words, while others go on."""
    loss = measured.get("final_loss")
    return "" if loss is None else f": validation loss {loss:.4f}"


def results_of(experiment: Experiment, runs: list[Run], seeds: int) -> Results:
    """The measurements of the first ``seeds`` seeds, by setting in the order of the experiment."""
    return Results(
        {
            setting: {run.seed: run.measured for run in runs if run.setting == setting and run.seed < seeds}
            for setting in experiment.settings
        }
    )


def paragraph(experiment: Experiment, results: Results) -> tuple[str, str]:
    """What was measured, in words, and the verdict on the claim."""
    parts = experiment.says(results)
    found = verdict(parts)
    seeds = f"{results.seeds} seed{'' if results.seeds == 1 else 's'}"
    return f"The claim is {found} ({seeds}). " + " ".join(part.text for part in parts), found


def described(experiment: Experiment, text: str, picture: str) -> str:
    """Claim, formula, picture and what was measured, as Markdown."""
    return (
        f"**{experiment.claim}**\n\n{experiment.formula}\n\n![{experiment.claim}]({picture})\n\n{experiment.set_up} Bands and "
        f"dots are the seeds.\n\n{text}\n"
    )


def options_of(experiment: Experiment, setting: str, overrides: Options) -> Options:
    """All options of a setting."""
    options = {**BASE, **experiment.base, **experiment.settings[setting]}
    return {**options, **{name: value for name, value in overrides.items() if name in options}}


def digest_of(experiment: Experiment, setting: str, options: Options, bench: Bench) -> str:
    """A hash of what the numbers of a setting depend on."""
    import torch

    from groundup import __version__

    depends = [FORMAT, experiment.name, setting, options, bench.digest, __version__, torch.__version__]
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:16]


def as_json(experiment: Experiment, runs: list[Run]) -> bytes:
    """NAME.json: what the experiment is, and its runs, one on each line."""
    head: Mapping[str, Any] = {"format": FORMAT, "lab": experiment.name, "claim": experiment.claim}
    lines = ",\n".join(json.dumps(vars(run), allow_nan=False) for run in runs)
    return (json.dumps(head)[:-1] + ', "runs": [\n' + lines + "\n]}\n").encode()


def read_runs(path: Path, name: str) -> list[Run]:
    """
    The runs in a file that ``as_json`` wrote; none where there is no file.

    Raises:
        ConfigError: it is something else, or damaged.
    """
    try:
        content = json.loads(path.read_bytes())
        if content["format"] != FORMAT or content["lab"] != name:
            raise ConfigError(f"--output-dir: {path} is not of lab {name}; name another folder, or delete it")
        return [Run(**run) for run in content["runs"]]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"--output-dir: {path} is no results of lab {name} ({problem}); name another folder, or delete it"
        ) from None
