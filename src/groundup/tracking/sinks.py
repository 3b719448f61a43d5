"""
Other places for a run's numbers, Hugging Face's ``report_to``: TensorBoard, Weights & Biases, Trackio.

What they write lies in the run's directory; accounts, projects and whether to be online are set as each of them says
(``wandb login``, WANDB_MODE, TRACKIO_SPACE_ID …). metrics.jsonl remains the record: a service that fails is given up with one
warning, and training goes on.

Names are those of Hugging Face's Trainer, so that curves of both lie in one picture: ``loss`` is ``train/loss``, ``eval_loss``
is ``eval/loss``; nested values are joined by /, for instance ``health/grad_norm/h.0``.
"""

import json
import os
import random
import secrets
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from importlib import import_module, util
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from groundup.errors import ConfigError, Stopped
from groundup.runtime.files import replace_durably

PROJECT = "groundup"
RUN_ID = ".tracking-id"
"""File in a run's directory: the name that services know the run by."""
Say = Callable[[str], None]


class Sink(Protocol):
    """One place for numbers."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of a step; a step may come more than once, with other names."""

    def close(self, failed: bool) -> None:
        """Finish writing; ``failed`` where the run ended by an error."""


def require_installed(names: Sequence[str], origin: str) -> None:
    """
    Ask, without importing anything, whether the libraries are there that ``report_to`` names: before a run begins.

    Args:
        origin: where the names came from.

    Raises:
        ConfigError: they are not.
    """
    if missing := [name for name in dict.fromkeys(names) if name in OPENERS and not _is_installed(name)]:
        raise ConfigError(
            f"report_to: {', '.join(missing)} (from {origin}) {'are' if missing[1:] else 'is'} not installed; "
            f"pip install 'groundup[{','.join(missing)}]', or leave it out"
        )


def open_sinks(
    names: Sequence[str], run: Path, *, run_name: str, config: Mapping[str, Any], resumed_step: int, say: Say | None = None
) -> "Sinks":
    """
    Open what ``report_to`` names, each once; ``none`` is nothing. Libraries are imported here, and not before.

    Args:
        run: the run's directory.
        run_name: for people.
        config: the run's options, JSON values.
        resumed_step: rows up to this step were logged before and stay; 0 starts anew.
        say: told once when a service fails; by default it is written to standard error.

    Raises:
        ConfigError: a name that is none of them; a library that cannot be imported, or cannot start.
    """
    sinks = Sinks(say=say or (lambda line: print(line, file=sys.stderr)))
    wanted = dict.fromkeys(name for name in names if name != "none")
    run_id = _run_id(run, resumed_step) if wanted else ""
    try:
        for name in wanted:
            if name not in OPENERS:
                raise ConfigError(f"report_to: {name!r} is none of {', '.join(OPENERS)}, none; choose one of them")
            try:
                with _undisturbed():
                    sinks.opened[name] = OPENERS[name](
                        run, run_name, run_id, json.loads(json.dumps(config, default=str)), resumed_step
                    )
            except ImportError as error:
                raise ConfigError(
                    f"report_to: {name} cannot be imported ({_one_line(error)}); pip install 'groundup[{name}]', "
                    "or leave --report-to out"
                ) from error
            except Exception as error:  # whatever a library raises
                hint = "; run `wandb login`, or set WANDB_MODE=offline" if name == "wandb" else ""
                raise ConfigError(
                    f"report_to: {name} cannot start ({_one_line(error)}){hint}; or leave --report-to out"
                ) from error
    except BaseException:
        sinks.close(failed=True)
        raise
    return sinks


class Sinks:
    """Several places for numbers, or none; a context that closes them."""

    def __init__(self, opened: Mapping[str, Sink] | None = None, say: Say = lambda line: None):
        self.opened = dict(opened or {})
        self._say = say

    def log(self, row: Mapping[str, Any]) -> None:
        """Send one row of metrics.jsonl, its numbers only; ``step`` says where they belong."""
        values = _named(row) if self.opened else {}
        for name, sink in list(self.opened.items()):
            self._attempt(name, lambda sink=sink: sink.log(int(row["step"]), values))  # type: ignore[misc]

    def close(self, failed: bool = False) -> None:
        """Finish writing; a second call does nothing."""
        while self.opened:
            name, sink = self.opened.popitem()
            self._attempt(name, lambda sink=sink: sink.close(failed))  # type: ignore[misc]

    def __enter__(self) -> "Sinks":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(failed=error is not None and not isinstance(error, Stopped))

    def _attempt(self, name: str, act: Callable[[], None]) -> None:
        """Do it; a service that fails is given up, once and for all."""
        try:
            with redirect_stdout(sys.stderr):  # standard output is for results
                act()
        except Exception as error:  # whatever a library raises
            if sink := self.opened.pop(name, None):
                with suppress(Exception), redirect_stdout(sys.stderr):
                    sink.close(failed=True)
            self._say(f"report_to: {name} failed ({_one_line(error)}); no more is sent there, metrics.jsonl has everything")


class _TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, run: Path, run_name: str, run_id: str, config: dict[str, Any], resumed_step: int):
        # TensorBoard hides what earlier files hold from purge_step on.
        self._writer = import_module("torch.utils.tensorboard").SummaryWriter(
            str(run / "tensorboard"), purge_step=resumed_step + 1 if resumed_step else 0
        )
        text = "\n".join("    " + line for line in json.dumps(config, indent=2, ensure_ascii=False).split("\n"))
        self._writer.add_text("config", text, resumed_step)
        self._writer.flush()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, failed: bool) -> None:
        self._writer.close()


class _WeightsAndBiases:
    """
    A run on wandb, its files in RUN/wandb. A resumed run goes on in the same one.

    wandb takes nothing back: steps that it has already are not sent again. A run that is resumed would send the same numbers.
    Offline it does not know what it has, and `wandb sync` gets them twice.
    """

    def __init__(self, run: Path, run_name: str, run_id: str, config: dict[str, Any], resumed_step: int):
        wandb = import_module("wandb")
        self._run = wandb.init(
            project=wandb.setup().settings.project or PROJECT,  # WANDB_PROJECT, or what `wandb init` has set
            name=run_name,
            id=run_id,
            resume="allow",
            dir=str(run),
            config=config,
            settings=wandb.Settings(console="off"),  # the streams stay as they are
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if step >= self._run.step:
            self._run.log(dict(values), step=step)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class _Trackio:
    """A run in Trackio's database, RUN/trackio unless TRACKIO_DIR names another; a resumed run goes on in the same one."""

    def __init__(self, run: Path, run_name: str, run_id: str, config: dict[str, Any], resumed_step: int):
        with _default_environment("TRACKIO_DIR", str((run / "trackio").absolute())):  # read once, when it is imported
            self._trackio = import_module("trackio")
        self._run = self._trackio.init(
            project=PROJECT,
            name=f"{run_name}-{run_id}",  # a database that runs share knows them by name
            config=config,
            resume="allow" if resumed_step else "never",
        )
        self._resumed_step, self._next_step = resumed_step, getattr(self._run, "_next_step", 0)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        # Rows after the step from which the run goes on may be there already, and would be there twice.
        if not self._resumed_step < step < self._next_step:
            self._run.log(dict(values), step=step)

    def close(self, failed: bool) -> None:
        self._trackio.finish()


OPENERS: dict[str, Callable[[Path, str, str, dict[str, Any], int], Sink]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WeightsAndBiases,
    "trackio": _Trackio,
}


def _named(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row under Hugging Face's names, nested ones joined by /."""
    values: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            values |= {f"{key}/{inner}": number for inner, number in _flat(value)}
        elif isinstance(value, int | float) and key != "step":
            values[f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}"] = value
    return values


def _flat(nested: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in nested.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}/{inner}", number) for inner, number in _flat(value))
        elif isinstance(value, int | float):
            yield key, value


def _run_id(run: Path, resumed_step: int) -> str:
    """Eight letters that name this run to the services, kept in its directory; other ones when it starts anew."""
    path = run / RUN_ID
    with suppress(OSError, UnicodeDecodeError):
        kept = path.read_text(encoding="utf-8").strip()
        if resumed_step and kept.isalnum():
            return kept
    new = secrets.token_hex(4)
    replace_durably(path, new.encode())
    return new


def _is_installed(library: str) -> bool:
    spec = util.find_spec(library)
    # A folder of that name where the command is given is no library, and services make such folders.
    return spec is not None and spec.origin is not None


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


@contextmanager
def _default_environment(name: str, value: str) -> Iterator[None]:
    """An environment variable for a block, where it is not set."""
    given = name in os.environ
    os.environ.setdefault(name, value)
    try:
        yield
    finally:
        if not given:
            del os.environ[name]


@contextmanager
def _undisturbed() -> Iterator[None]:
    """
    Let libraries start without a trace: what they draw, catch and print is put back.

    Importing some draws from the shared random streams; wandb replaces sys.exit and sys.excepthook.
    """
    import numpy as np
    import torch

    drawn, drawn_numpy, drawn_torch = random.getstate(), np.random.get_state(), torch.get_rng_state()
    exits = sys.exit, sys.excepthook
    caught = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with redirect_stdout(sys.stderr):  # standard output is for results
            yield
    finally:
        random.setstate(drawn)
        np.random.set_state(drawn_numpy)
        torch.set_rng_state(drawn_torch)
        sys.exit, sys.excepthook = exits
        if threading.current_thread() is threading.main_thread():
            for number, handler in caught.items():
                if handler is not None and signal.getsignal(number) is not handler:
                    signal.signal(number, handler)
