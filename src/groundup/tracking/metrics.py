"""metrics.jsonl: one object per logged step or evaluation, under Hugging Face's keys where it has them."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from groundup.runtime.files import replace_durably

METRICS = "metrics.jsonl"
LARGEST_STEP = 2**53
"""Steps are whole numbers below it, which a float holds exactly."""
LARGEST_NUMBER = 1e100
"""No measurement is so large: it may be squared, summed and drawn without becoming infinite."""


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add one row, whole, at the end. Numbers that are not finite become null, which is JSON."""
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(clean, ensure_ascii=False) + "\n")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a run, each with a step; other lines, as the last one that a killed process left torn, are passed over."""
    rows: list[dict[str, Any]] = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict) and is_step(row.get("step")):
                rows.append(row)
    return rows


def is_step(value: object) -> TypeGuard[int]:
    """Whether a value of a row can be a step."""
    return type(value) is int and 0 <= value < LARGEST_STEP


def number(value: Any) -> float:
    """A value of a row as a number; NaN where it is none, not finite, or too large to be a measurement."""
    # NaN is not below anything, and whole numbers of any length can be compared.
    return float(value) if type(value) in (int, float) and abs(value) < LARGEST_NUMBER else math.nan


def rewind(path: Path, step: int) -> None:
    """Drop the rows after a step: a run that goes on from there writes them again."""
    if path.is_file():
        kept = [row for row in read_rows(path) if row["step"] <= step]
        replace_durably(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept).encode())
