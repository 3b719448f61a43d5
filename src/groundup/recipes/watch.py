"""groundup watch: a run's report, live, and its model's view of tokens, on a page of this machine."""

import getpass
import json
import os
import platform
import time
from collections.abc import Callable, Hashable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from groundup.config.load import Given, Settings, resolve
from groundup.config.options import MachineOptions, WatchOptions, WeightsOptions
from groundup.data.sources import is_run
from groundup.errors import ConfigError
from groundup.reporting.data import RunReader, page_data
from groundup.reporting.facts import LOCK, is_running, modified_at
from groundup.reporting.page import page
from groundup.serving.app import Pages, application
from groundup.serving.latest import Latest
from groundup.serving.server import LOOPBACK, listen, require_framework, serve
from groundup.serving.tokens import tokens_page
from groundup.tracking.labels import one_line
from groundup.tracking.metrics import METRICS

if TYPE_CHECKING:
    from groundup.recipes.token_view import TokenView

Say = Callable[[str], None]
GRACE_SECONDS = 30
"""For a run that is started at the same time to make its folder."""


def watch(run: Path, settings: Settings, say: Say) -> dict[str, Any]:
    """
    Serve the pages of a run on 127.0.0.1 until Ctrl-C; nothing is written anywhere.

    Returns:
        What ``watch --json`` prints at the end: address, run.

    Raises:
        ConfigError: the web framework is missing, the port is taken, or there is no run.
    """
    options = settings[WatchOptions]
    require_framework()
    with listen(options.port) as listening:
        port = listening.getsockname()[1]
        await_run(run, say)
        address = f"http://{LOOPBACK}:{port}"
        say(f"{one_line(str(run))}: {address} (Ctrl-C ends)")
        say(f"from another machine: ssh -N -L {port}:{LOOPBACK}:{port} {_user()}@{platform.node()}, then open the same address")
        serve(application(pages_of(run, settings, say)), listening)
    return {"address": address, "run": str(run)}


def pages_of(run: Path, settings: Settings, say: Say) -> Pages:
    """What is served of a run."""
    reader = RunReader(run)

    def data() -> str:
        return json.dumps(page_data([reader.data()]), allow_nan=False)

    view: TokenView | None = None

    def asked(kind: str) -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
        def answer(question: Mapping[str, Any]) -> Mapping[str, Any]:
            nonlocal view
            if view is None:  # made with the first question: without one, no torch is imported and no model opened
                view = _token_view(run, settings, say)
            return view.next(question) if kind == "next" else view.text(question)

        return answer

    return Pages(
        page=lambda text: page(json.loads(text), live=True),
        data=Latest(data, lambda: mark_of(run)),
        tokens=tokens_page(run.resolve().name),
        questions={"next": asked("next"), "text": asked("text")},
        say=say,
    )


def mark_of(run: Path) -> Hashable:
    """What changes when a run does: names, sizes and times in its folder, and whether somebody trains it."""
    found = []
    with suppress(FileNotFoundError), os.scandir(run) as entries:  # somebody may have moved it
        for entry in entries:
            try:
                facts = entry.stat()
            except OSError:
                continue  # it was deleted meanwhile
            found.append((entry.name, facts.st_mtime_ns, facts.st_size))
    return tuple(sorted(found)), is_running(run, modified_at(run / METRICS))


def await_run(run: Path, say: Say, seconds: float = GRACE_SECONDS) -> None:
    """
    Wait for the folder of a run that has only just been started.

    Raises:
        ConfigError: none comes, or the folder is no run's.
    """
    if not run.exists():
        say(f"{one_line(str(run))}: not there yet; waiting {seconds:.0f} seconds for a training to begin it")
    deadline = time.monotonic() + seconds
    while not run.exists():
        if time.monotonic() > deadline:
            raise ConfigError(f"run {run}: no such folder; give the --output-dir of a training, which may have only begun")
        time.sleep(0.2)
    # A run that prepares its data has its lock and no configuration yet.
    if not (is_run(run) or (run / LOCK).exists() or (run.is_dir() and not any(run.iterdir()))):
        raise ConfigError(f"run {run}: not the folder of a run; give the --output-dir of a training")


def _token_view(run: Path, settings: Settings, say: Say) -> "TokenView":
    from groundup.recipes.token_view import TokenView

    # On the processor, even where there is a GPU: a training may need all of that one's memory.
    given = {"weights": Given(settings[WeightsOptions].weights, "--weights"), "device": Given("cpu", "groundup watch")}
    return TokenView(run, resolve((WeightsOptions, MachineOptions), given), settings[WatchOptions].threads, say)


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return "USER"
