"""What tests share: text made on the spot, a model small enough to train in a second, and the command line."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# Models this small wait for their own threads: on a busy machine two threads are a hundred times slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A background job of a shell ignores Ctrl-C, and so would every process that the tests start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

# On a busy machine an example may take seconds.
settings.register_profile("groundup", deadline=None)
settings.load_profile("groundup")

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"

# A model that trains 100 steps in about a second, in float32 so that sums compare.
TINY: dict[str, Any] = {
    "tokenizer": "byte",
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 16,
    "n_positions": 16,
    "total_batch_tokens": 128,
    "per_device_train_batch_size": 8,
    "max_steps": 12,
    "eval_steps": 6,
    "save_steps": 4,
    "logging_steps": 1,
    "sample_tokens": 8,
    "learning_rate": 1e-3,
    "bf16": False,
    "device": "cpu",
    "peak_tflops": 1.0,
}


def make_text(words: int = 2000, seed: int = 0) -> str:
    """Text with a little structure, the same on every machine."""
    draw = random.Random(seed)
    vocabulary = ["the", "model", "learns", "a", "token", "from", "text", "and", "then", "it", "writes", "naïve", "日本"]
    lines = [" ".join(draw.choice(vocabulary) for _ in range(draw.randint(3, 12))) for _ in range(words // 8)]
    return ".\n".join(lines) + "\n"


def flags(options: dict[str, Any]) -> list[str]:
    """Options as command-line flags."""
    found = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        found += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return found


@dataclass(frozen=True)
class Finished:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def error_lines(self) -> list[str]:
        """The lines that report an error."""
        return [line for line in self.err.splitlines() if line.startswith("groundup:")]


def groundup(*arguments: Any, cwd: Path | None = None, timeout: float = 120, env: dict[str, str] | None = None,
             stdin: bytes | None = None) -> Finished:  # fmt: skip
    """Run the command in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "groundup", *map(str, arguments)],
        cwd=cwd, timeout=timeout, env={**os.environ, **(env or {})}, input=stdin, capture_output=True, check=False,
    )  # fmt: skip
    return Finished(done.returncode, done.stdout.decode(), done.stderr.decode())


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """A source: one file of text."""
    path = tmp_path / "text.txt"
    path.write_text(make_text(), encoding="utf-8")
    return path


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than training here, and is tested elsewhere."""
    monkeypatch.setattr("groundup.recipes.train.draw_curves", lambda *arguments: None)


@pytest.fixture
def quick(without_pictures: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for the disk takes longer than training here, too, and is tested elsewhere."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


@pytest.fixture
def shared_data() -> Path:
    """Data beside the repository; the test skips where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no {SHARED_DATA}")
    return SHARED_DATA
