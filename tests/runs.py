"""Runs that tests start, kill and compare, as processes of their own or in this one; and a dataset for them."""

import hashlib
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerProcess as Process
from pathlib import Path
from typing import Any

import pytest

import groundup
from groundup.checkpoint.commit import checkpoints, verify
from groundup.tracking.metrics import read_rows
from tests.conftest import Finished, flags, make_text

# The columns of metrics.jsonl that do not depend on the speed of the machine.
EXACT = ("step", "epoch", "loss", "grad_norm", "learning_rate", "batch_digest", "num_input_tokens_seen", "eval_loss")


class Killed(BaseException):
    """Ends a run where it is, as a signal that cannot be caught would."""


def prepared(tmp_path_factory: pytest.TempPathFactory, words: int) -> Path:
    """A dataset of bytes, for the fixtures of modules."""
    folder = tmp_path_factory.mktemp("source")
    (folder / "text.txt").write_text(make_text(words), encoding="utf-8")
    groundup.prepare(folder / "text.txt", folder / "data", tokenizer="byte")
    return folder / "data"


def ledger(run: Path) -> list[tuple[Any, ...]]:
    return [tuple(row.get(name) for name in EXACT) for row in read_rows(run / "metrics.jsonl")]


def last_state(run: Path) -> dict[str, str]:
    """Hash of each file of the last checkpoint; all of them are functions of the run."""
    last = checkpoints(run)[-1]
    verify(last)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(last.iterdir())}


def assert_same_end(run: Path, straight: Path) -> None:
    assert checkpoints(run)[-1].name == checkpoints(straight)[-1].name
    found, expected = last_state(run), last_state(straight)
    for name in ("model.safetensors", "optimizer.safetensors", "trainer_state.json"):
        assert found[name] == expected[name], f"{name} differs from the uninterrupted run's"
    assert ledger(run) == ledger(straight)


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file below a folder, except the lock, which names whoever held it last."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def train_command(text: Path | None, run: Path, options: dict[str, Any]) -> list[str]:
    sources = [] if text is None else [str(text)]
    return [sys.executable, "-m", "groundup", "train", *sources, "--output-dir", str(run), *flags(options), "--json"]


def start(
    text: Path | None, run: Path, options: dict[str, Any], *before: str, more: Sequence[str] = ()
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*before, *train_command(text, run, options), *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def fork(arguments: Sequence[str], log: Path) -> Process:
    """
    A command as a process of its own, like ``start``, in a tenth of the time: it is forked from one that has imported torch.

    Args:
        arguments: of ``groundup``.
        log: where its output goes.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["groundup.recipes.train", "groundup.cli.main"])
    process = context.Process(target=_run_command, args=(list(arguments), str(log)))
    process.start()
    return process


def _run_command(arguments: list[str], log: str) -> None:
    # Opened before anything is said; the exit code is the command's.
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    from groundup.cli.main import run

    sys.exit(run(arguments))


def wait_until(process: subprocess.Popen[bytes], happened: Callable[[], bool]) -> bool:
    """True once it has happened; False when the process ended first."""
    deadline = time.monotonic() + 60
    while process.poll() is None:
        if happened():
            return True
        assert time.monotonic() < deadline, "waited for a minute"
        time.sleep(0.001)
    return False


def logged_step(run: Path) -> int:
    return max((row["step"] for row in read_rows(run / "metrics.jsonl")), default=0)


def end(process: subprocess.Popen[bytes], number: int | None = None) -> Finished:
    """Send a signal, if one is given, and wait for the end."""
    if number is not None:
        process.send_signal(number)
    out, err = process.communicate(timeout=60)
    return Finished(process.returncode, out.decode(), err.decode())
