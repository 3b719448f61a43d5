"""What the other files of a run's folder say: configuration, data, machine, samples, and what was unusual."""

import json
import math
import os
import time
import tomllib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from groundup.checkpoint.commit import checkpoints
from groundup.reporting.rows import Metrics, Tail
from groundup.reporting.thin import rounded
from groundup.tracking.metrics import LARGEST_STEP, is_step, number

CONFIG, SAMPLES, LEFT_OUT, STARTS, LOCK = "config.toml", "samples.jsonl", "left_out.jsonl", "starts.jsonl", ".lock"
TRAINER_STATE, DATASET = "trainer_state.json", "dataset.json"
SHOWN_SAMPLES = 30
SAMPLE_CHARACTERS = 2000
SHOWN_EVENTS = 200
FRESH_SECONDS = 60.0
"""Where nothing says who holds a lock: a run whose metrics are younger goes on."""
LINUX_LOCKS = Path("/proc/locks")


def read_config(run: Path) -> dict[str, Any]:
    """The options that took effect, flat, with ``sources``; none where the file cannot be read."""
    try:
        document = tomllib.loads((run / CONFIG).read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError, RecursionError):
        return {}
    flat: dict[str, Any] = {}
    for key, value in document.items():
        flat |= value if isinstance(value, dict) else {key: value}
    return {key: _plain(value) for key, value in flat.items()}


def _plain(value: Any) -> Any:
    """A TOML value as JSON has it."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if type(value) in (int, float):
        return None if math.isnan(number(value)) else value
    return value if isinstance(value, str | bool) else str(value)


def read_json(path: Path) -> dict[str, Any]:
    """An object from a file; an empty one where it cannot be read."""
    try:
        content = path.read_text(encoding="utf-8", errors="replace")
        found = json.loads(content, parse_constant=lambda name: None, parse_float=_finite, parse_int=_whole)
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _finite(digits: str) -> float | None:
    return rounded([float(digits)], 15)[0]


def _whole(digits: str) -> int | None:
    # As long as that of the largest step, and no count is longer.
    return int(digits) if len(digits) <= len(str(LARGEST_STEP)) else None


def data_summary(run: Path, config: dict[str, Any]) -> dict[str, Any]:
    """
    What the run learned from: documents, and tokens and bytes of each split; empty where no dataset.json is there.

    A dataset is in the run, or is the one source, as seen from here or from where the run is.
    """
    match config.get("sources"):
        case [str(source)]:
            named = [Path(source), run.parent / source]
        case _:
            named = []
    for folder in (run / "dataset", *named):
        manifest = read_json(folder / DATASET)
        splits = manifest.get("splits")
        if not isinstance(splits, dict):
            continue
        shown = {
            name: {key: split.get(key) for key in ("tokens", "documents", "bytes")}
            for name, split in splits.items()
            if isinstance(split, dict)
        }
        kept = {key: manifest.get(key) for key in ("vocab_size", "documents", "bytes", "skipped", "replaced_sequences")}
        request = manifest.get("request")
        sources = request.get("sources") if isinstance(request, dict) else None
        return {"folder": str(folder), "splits": shown, **kept, "sources": sources or config.get("sources")}
    return {}


def read_samples(tail: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Some of the samples, spread over the run, with the first and the last."""
    rows = [row for row in tail if isinstance(row.get("text"), str) and is_step(row.get("step"))]
    if len(rows) > SHOWN_SAMPLES:
        rows = [rows[round(i * (len(rows) - 1) / (SHOWN_SAMPLES - 1))] for i in range(SHOWN_SAMPLES)]
    return [
        {"step": row["step"], "prompt": str(row.get("prompt") or ""), "text": row["text"][:SAMPLE_CHARACTERS]} for row in rows
    ]


def read_machine(run: Path) -> dict[str, Any]:
    """The machine and the versions of the last start, as far as the run wrote them down."""
    starts = list(Tail(run / STARTS).rows()[1])
    last = starts[-1] if starts else {}
    saved = checkpoints(run)
    state = read_json(saved[-1] / TRAINER_STATE) if saved else {}
    versions = last.get("versions") or state.get("versions")
    return {
        "machine": str(last.get("machine") or ""),
        "versions": {key: str(value) for key, value in versions.items()} if isinstance(versions, dict) else {},
        "starts": [{"step": _step(row.get("step")), "time": str(row.get("time") or "")} for row in starts],
        "checkpoints": [path.name for path in saved],
        "planned_steps": state.get("max_steps") if type(state.get("max_steps")) is int else None,
    }


def is_running(run: Path, modified: float | None) -> bool:
    """
    Whether a process trains this run now; it holds the lock.

    The lock is looked up, not tried: trying it would for a moment keep the run from starting.

    Args:
        modified: when the metrics were written to, in seconds since 1970.
    """
    try:
        inode = f":{(run / LOCK).stat().st_ino} "
        return any(inode in line for line in LINUX_LOCKS.read_text().splitlines())
    except FileNotFoundError:
        fresh = modified is not None and time.time() - modified < FRESH_SECONDS
        return (run / LOCK).exists() and fresh
    except OSError:
        return False


def modified_at(path: Path) -> float | None:
    """When a file was written to, in seconds since 1970."""
    with suppress(OSError):
        return os.stat(path).st_mtime
    return None


def unusual(run: Path, metrics: Metrics, starts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a person should know of, in the order of steps: kind, step, and a line of text."""
    found = [_event("skipped", step, "loss or gradient was not finite: nothing was updated") for step in metrics.skipped]
    found += [_event("spike", step, _spike(run, step, spike)) for step, spike in metrics.spikes]
    for row in Tail(run / LEFT_OUT).rows()[1]:
        text = f"went back to the checkpoint before, to go on without {row.get('samples')} windows"
        text += f" (loss {number(row.get('loss')):.4g}, gradient norm {number(row.get('grad_norm')):.4g})"
        found.append(_event("rollback", row.get("step"), text))
    for start in starts[1:]:
        found.append(_event("resume", start["step"], f"went on from a checkpoint {start['time']}".rstrip()))
    for path in sorted(run.glob("checkpoint-*.corrupt-*")):
        step = path.name.removeprefix("checkpoint-").split(".")[0]
        found.append(_event("damaged", int(step) if step.isdecimal() else 0, f"{path.name} did not verify, and was set aside"))
    # Of many, the first and the last ones.
    found.sort(key=lambda event: event["step"])
    half = SHOWN_EVENTS // 2
    return found if len(found) <= SHOWN_EVENTS else [*found[:half], *found[-half:]]


def _event(kind: str, step: Any, text: str) -> dict[str, Any]:
    return {"kind": kind, "step": _step(step), "text": text}


def _step(value: Any) -> int:
    return value if is_step(value) else 0


def _spike(run: Path, step: int, spike: dict[str, Any]) -> str:
    parts = []
    for key, name in (("loss", "loss"), ("grad_norm", "gradient norm")):
        judged = spike.get(key)
        if isinstance(judged, dict) and number(judged.get("score")) > number(spike.get("threshold")):
            value, middle = number(judged.get("value")), number(judged.get("median"))
            parts.append(f"{name} {value:.4g}, usually {middle:.4g}")
    text = "; ".join(parts) or "stands out"
    report = Path("spikes") / f"step-{step:06}.txt"
    return f"{text}; its text is in {report}" if (run / report).is_file() else text
