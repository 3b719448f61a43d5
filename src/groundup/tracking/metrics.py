"""metrics.jsonl: one object per logged step or evaluation, under Hugging Face's keys where it has them."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from groundup.runtime.files import replace_durably

METRICS = "metrics.jsonl"


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add one row, whole, at the end. Numbers that are not finite become null, which is JSON."""
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(clean, ensure_ascii=False) + "\n")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a run; a last line that a killed process left torn is not one."""
    rows: list[dict[str, Any]] = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and "step" in row:
                rows.append(row)
    return rows


def rewind(path: Path, step: int) -> None:
    """Drop the rows after a step: a run that goes on from there writes them again."""
    if path.is_file():
        kept = [row for row in read_rows(path) if row["step"] <= step]
        replace_durably(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept).encode())
