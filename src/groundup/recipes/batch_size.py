"""The micro-batch that fits: ``auto`` as a batch size, found by a dry run before the first step, and remembered."""

import contextlib
import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from groundup import __version__
from groundup.errors import ResourceError
from groundup.model.gpt2 import GPT2Config
from groundup.recipes.dry_run import Attempt, DryRun, room_in
from groundup.runtime.device import Machine
from groundup.runtime.files import replace_durably
from groundup.runtime.memory import available_bytes, process_limits, size_text

Say = Callable[[str], None]
NEARLY_AS_FAST = 0.95
"""A smaller size is taken where it has this share of the best speed: it leaves memory to others."""
COMMAND = ("-P", "-m", "groundup.recipes.dry_run")  # -P: a user's random.py in the current folder is not Python's
PATIENCE_SECONDS = 60.0
"""A dry run that has found a size is ended after this long."""
REMEMBERED = 200
"""Answers that are kept, the newest."""


@dataclass(frozen=True)
class BatchSizes:
    """Windows in a pass that fit, 0 where none was asked for."""

    train: int
    evaluation: int
    train_bytes: int = 0
    """What training took at its peak, weights and optimizer included; on CUDA of the device's memory."""
    evaluation_bytes: int = 0
    tokens_per_second: float = 0.0
    """Of training, as tried."""


def fitting_batch_sizes(
    config: GPT2Config,
    machine: Machine,
    *,
    train_windows: int,
    eval_windows: int,
    optimizer: Mapping[str, Any] | None,
    activation_checkpointing: bool = False,
    torch_compile: bool = False,
    ema: bool = False,
    freeze: Sequence[str] = (),
    say: Say,
) -> BatchSizes:
    """
    The sizes of a training pass and of an evaluation's: of those that fit the fastest, and of equals the smallest.

    They are tried in a process of its own, on random weights and tokens, so that one that does not fit ends nothing but
    its own trial. What was found is remembered for this machine and configuration, and taken again as long as there is
    room for it. Call it before the weights are made, or they count twice. With torch.compile the trial is of the model as
    it is, not compiled, which takes more memory and time than the compiled one; the answer is kept apart.

    Args:
        train_windows: windows in this process's share of the global batch, at its largest; 0 asks for no training size.
        eval_windows: windows in an evaluation; 0 asks for no evaluation size.
        optimizer: arguments of ``build_optimizer`` but the model; None where nothing is trained.
        ema: whether a moving average of the weights is kept.
        freeze: patterns of the parameters that are not trained.

    Raises:
        ResourceError: not one window fits, or the trial ended with an error of its own.
    """
    free, reason = available_bytes(machine.device.type)
    asked = DryRun(
        model=asdict(config),
        device=machine.device.type,
        dtype=str(machine.dtype).removeprefix("torch."),
        train_windows=train_windows,
        eval_windows=eval_windows,
        optimizer=None if optimizer is None else dict(optimizer),
        activation_checkpointing=activation_checkpointing,
        ema=ema,
        freeze=list(freeze),
        threads=torch.get_num_threads(),
        room_bytes=room_in(free, machine.device.type),
        process_room={name: room_in(limit.free_bytes, "cpu") for name, limit in process_limits().items()},
    )
    key = _key(asked, machine.name, free, reason, torch_compile)
    memory = _memory_file()
    place = _shown(memory)
    if (known := _remembered(memory, key, asked)) is not None:
        say(f"batch size: {_sizes_text(known)} (auto: remembered in {place})")
        return known
    found = _tried(asked)
    sizes = chosen(found, asked, f"{size_text(free)} {reason}")
    kept = _remember(memory, key, sizes)
    fitting = [a.size for a in found if a.fits and a.kind == ("train" if train_windows else "evaluate")]
    choice = f"the fastest of 1–{max(fitting)} that fit into" if max(fitting) > 1 else "fits into"
    say(
        f"batch size: {_sizes_text(sizes)} (auto: {choice} {size_text(free)} {reason}"
        + (f"; {sizes.tokens_per_second:,.0f} tokens/s" if train_windows else "")
        + f"){f'; remembered in {place}' if kept else ''}"
    )
    return sizes


def chosen(found: Sequence[Attempt], asked: DryRun, available: str) -> BatchSizes:
    """
    The sizes to take of what was tried. An evaluation that was not reached takes that of training, which needs more.

    Args:
        available: the memory and what says so, for the error.

    Raises:
        ResourceError: not one window fits.
    """
    train = _fastest([a for a in found if a.fits and a.kind == "train"])
    evaluation = _fastest([a for a in found if a.fits and a.kind == "evaluate"])
    if asked.train_windows and train is None:
        raise _nothing_fits("per_device_train_batch_size", found, asked, available)
    if asked.eval_windows and evaluation is None:
        if train is None:
            raise _nothing_fits("per_device_eval_batch_size", found, asked, available)
        evaluation = replace(train, size=min(train.size, asked.eval_windows))
    sizes = BatchSizes(0, 0)
    if train is not None:
        passes = asked.train_windows / train.size
        seconds = passes * train.seconds + train.update_seconds
        speed = asked.train_windows * asked.model["n_positions"] / seconds
        sizes = replace(sizes, train=train.size, train_bytes=train.need_bytes, tokens_per_second=speed)
    if evaluation is not None:
        sizes = replace(sizes, evaluation=evaluation.size, evaluation_bytes=evaluation.need_bytes)
    return sizes


def _fastest(fitting: Sequence[Attempt]) -> Attempt | None:
    """The smallest of the attempts that are nearly as fast as the fastest."""
    best = max((a.windows_per_second for a in fitting), default=0.0)
    nearly = [a for a in fitting if a.windows_per_second >= NEARLY_AS_FAST * best]
    return min(nearly, key=lambda a: a.size, default=None)


def _nothing_fits(option: str, found: Sequence[Attempt], asked: DryRun, available: str) -> ResourceError:
    needed = max((a.need_bytes for a in found if not a.fits), default=0)
    amount = f"needs more than {size_text(needed)}" if needed else "does not fit"
    advice = ["take a smaller --model", "a shorter --n-positions"]
    if asked.train_windows and not asked.activation_checkpointing:
        advice.append("--activation-checkpointing")
    return ResourceError(
        f"{option}: auto found no size: one window of {asked.model['n_positions']:,} tokens {amount}, and of {available} a "
        f"run may take {size_text(asked.room_bytes)}; {', '.join(advice[:-1])} or {advice[-1]}, or free some memory"
    )


def _tried(asked: DryRun) -> list[Attempt]:
    """
    What a dry run in a process of its own reports until it ends, or is ended.

    Raises:
        ResourceError: it failed by itself, and not by a signal, before it had reported anything.
    """
    found: list[Attempt] = []
    last_words = ""
    child = subprocess.Popen(
        [sys.executable, *COMMAND], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        encoding="utf-8", errors="replace",
    )  # fmt: skip
    # Without an answer it may take as long as it takes: training would not be faster.
    enough = threading.Timer(PATIENCE_SECONDS, child.kill)
    try:
        assert child.stdin is not None
        assert child.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            child.stdin.write(json.dumps(asdict(asked)))
            child.stdin.close()
        for line in child.stdout:
            try:
                found.append(Attempt(**json.loads(line)))
            except (ValueError, TypeError):
                last_words = line.strip() or last_words
            if found and enough.ident is None:
                enough.start()
    finally:
        enough.cancel()
        child.kill()
        child.wait()
        if child.stdout:
            child.stdout.close()
    if not found and child.returncode > 0:
        raise ResourceError(
            f"batch size: the dry run for auto ended with exit code {child.returncode} ({last_words[:200]}); give "
            "--per-device-train-batch-size and --per-device-eval-batch-size as numbers"
        )
    return found


def _key(asked: DryRun, name: str, free: int, reason: str, torch_compile: bool) -> str:
    """A hash of what the answer depends on: the machine, its limits and, coarsely, its free memory; and the configuration."""
    configuration = asdict(asked)
    del configuration["room_bytes"], configuration["process_room"]
    limits = sorted(limit.reason for limit in process_limits().values())
    document = {
        "machine": [platform.machine(), platform.processor(), os.cpu_count(), name],
        "memory": [reason, int(math.log2(max(1, free))), limits],
        "versions": [torch.__version__, __version__],
        "configuration": configuration,
        "torch_compile": torch_compile,
    }
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _memory_file() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache, "groundup", "batch_sizes.json")


def _answers(memory: Path) -> dict[str, Any]:
    """What is remembered; nothing where the file is absent, damaged or another version's."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        document = json.loads(memory.read_text(encoding="utf-8"))
        if isinstance(document, dict) and document.get("version") == 1 and isinstance(document.get("answers"), dict):
            return dict(document["answers"])
    return {}


def _remembered(memory: Path, key: str, asked: DryRun) -> BatchSizes | None:
    """The sizes found before, where they are whole and there is room for them now."""
    try:
        known = BatchSizes(**_answers(memory)[key])
        whole = all(type(size) is int for size in (known.train, known.evaluation, known.train_bytes, known.evaluation_bytes))
    except (KeyError, TypeError):
        return None
    in_range = all(
        min(1, most) <= size <= most
        for size, most in ((known.train, asked.train_windows), (known.evaluation, asked.eval_windows))
        if whole
    )
    fits = whole and max(known.train_bytes, known.evaluation_bytes) <= asked.room_bytes
    return known if whole and in_range and fits else None


def _remember(memory: Path, key: str, sizes: BatchSizes) -> bool:
    """Keep an answer, and say whether that could be done: a cache that cannot be written is no error."""
    answers = _answers(memory)
    answers.pop(key, None)
    answers[key] = asdict(sizes)
    newest = dict(list(answers.items())[-REMEMBERED:])
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        replace_durably(memory, (json.dumps({"version": 1, "answers": newest}, indent=1) + "\n").encode())
    except OSError:
        return False
    return True


def _sizes_text(sizes: BatchSizes) -> str:
    parts = [f"{sizes.train} window{'s' if sizes.train > 1 else ''} a pass"] if sizes.train else []
    parts += [f"evaluation {sizes.evaluation}"] if sizes.evaluation else []
    return ", ".join(parts)


def _shown(path: Path) -> str:
    """A path with the home folder as ~."""
    home = os.path.expanduser("~")
    return f"~{os.sep}{path.relative_to(home)}" if path.is_relative_to(home) else str(path)
