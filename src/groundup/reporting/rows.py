"""A file of JSON lines that grows, read on from where it was left; and the rows of metrics.jsonl in columns."""

import json
import math
import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from groundup.tracking.metrics import is_step, number

CURVES = ("loss", "grad_norm", "learning_rate", "tokens_per_second", "mfu", "loss_scale")
"""Of a row that says how a step went."""
PLACES = ("step", "epoch", "tokens", "seconds")
"""What a curve can be drawn against."""
MEMORY_BYTES = 64
"""Of what was read last: where they have changed, the file is another one."""
KEPT_HEALTH = 2000
"""Rows with health that are kept; beyond them every second one goes."""


class Tail:
    """The objects in a file of JSON lines. Lines that are torn or no objects are passed over."""

    def __init__(self, path: Path):
        self.path = path
        self._file = self._read = 0
        self._last = b""

    def rows(self) -> tuple[bool, Iterator[dict[str, Any]]]:
        """
        The objects that have come since the last call.

        Returns:
            Whether the file is another one than it was, so that what was read before does not count; and the objects.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(max(0, self._read - len(self._last)))
                inode = os.fstat(file.fileno()).st_ino
                # Another file, or the same with another content.
                anew = self._file not in (0, inode) or file.read(len(self._last)) != self._last
                self._file = inode
                if anew:
                    self._read, self._last = 0, b""
                file.seek(self._read)
                content = file.read()
        except OSError:
            anew, content = self._read > 0, b""
            self._file, self._read, self._last = 0, 0, b""
        whole = content.rfind(b"\n") + 1
        # A last line without its end may be still being written, but not where it is an object already.
        if _object(content[whole:]) is not None:
            whole = len(content)
        self._read += whole
        self._last = (self._last + content[:whole])[-MEMORY_BYTES:]
        lines = content[:whole].split(b"\n")
        return anew, (row for row in map(_object, lines) if row is not None)


def _object(line: bytes) -> dict[str, Any] | None:
    if not line.strip():
        return None
    try:
        found = json.loads(line.decode("utf-8", errors="replace"))
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


class Metrics:
    """
    The rows of metrics.jsonl, in columns: a long run has hundreds of thousands.

    ``steps`` and ``evaluations`` hold a column by name, all of one length. Time is the time of training alone, and follows
    from tokens and tokens a second, because the rows have no clock.
    """

    def __init__(self, path: Path):
        self._tail = Tail(path)
        self._clear()

    def _clear(self) -> None:
        self.steps = {name: array("d") for name in (*PLACES, *CURVES)}
        self.evaluations: list[dict[str, float]] = []
        self.health: list[tuple[int, dict[str, Any]]] = []
        self.spikes: list[tuple[int, dict[str, Any]]] = []
        self.skipped: list[int] = []
        self.skipped_so_far = 0
        self._health_stride, self._health_seen = 1, 0

    def read(self) -> None:
        """Read what has come since the last call."""
        anew, rows = self._tail.rows()
        if anew:
            self._clear()
        for row in rows:
            if not is_step(step := row.get("step")):
                continue
            if "loss" in row:
                self._step(step, row)
            elif any(key.startswith("eval_") for key in row):
                self._evaluation(step, row)

    def _step(self, step: int, row: dict[str, Any]) -> None:
        self._go_back_before(step)
        columns = self.steps
        _, epoch, tokens, seconds = (columns[name][-1] if columns[name] else 0.0 for name in PLACES)
        read, speed = number(row.get("num_input_tokens_seen")), number(row.get("tokens_per_second"))
        if speed > 0 and read > tokens:
            seconds += (read - tokens) / speed
        passed = number(row.get("epoch"))
        # Where a row does not say its place, it has that of the row before.
        columns["step"].append(step)
        columns["epoch"].append(epoch if math.isnan(passed) else passed)
        columns["tokens"].append(tokens if math.isnan(read) else read)
        columns["seconds"].append(seconds)
        for name in CURVES:
            columns[name].append(number(row.get(name)))
        # A loss or gradient that is not finite is null in the file. Spikes that were not learned from are counted, too.
        if row["loss"] is None or row.get("grad_norm", 0) is None:
            self.skipped.append(step)
        counted = number(row.get("skipped_steps"))
        self.skipped_so_far = len(self.skipped) if math.isnan(counted) else int(counted)
        if isinstance(row.get("spike"), dict):
            self.spikes.append((step, row["spike"]))
        if isinstance(row.get("health"), dict):
            self._health(step, row["health"])

    def _health(self, step: int, health: dict[str, Any]) -> None:
        self._health_seen += 1
        if self._health_seen % self._health_stride == 0:
            self.health.append((step, health))
        if len(self.health) > KEPT_HEALTH:
            del self.health[::2]
            self._health_stride *= 2

    def _evaluation(self, step: int, row: dict[str, Any]) -> None:
        while self.evaluations and self.evaluations[-1]["step"] >= step:
            self.evaluations.pop()
        seconds = self.steps["seconds"]
        found = {key: number(value) for key, value in row.items() if key.startswith("eval_")}
        places = {"epoch": number(row.get("epoch")), "tokens": number(row.get("num_input_tokens_seen"))}
        self.evaluations.append({"step": step, **places, "seconds": seconds[-1] if seconds else 0.0, **found})

    def _go_back_before(self, step: int) -> None:
        """A run that went back writes its steps again: what was there of them does not count."""
        steps = self.steps["step"]
        if not steps or steps[-1] < step:
            return
        kept = len(steps)
        while kept and steps[kept - 1] >= step:
            kept -= 1
        for column in self.steps.values():
            del column[kept:]
        self.evaluations = [row for row in self.evaluations if row["step"] < step]
        self.health = [found for found in self.health if found[0] < step]
        self.spikes = [found for found in self.spikes if found[0] < step]
        self.skipped = [skipped for skipped in self.skipped if skipped < step]
