"""SIGTERM and Ctrl-C: the first asks the run to stop at the next step, the second ends it at once."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def stop_requests(announce: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """
    Catch the first SIGTERM or SIGINT while the block runs; yields a function that says whether one has come.

    The second one meets the handlers that were there before: Ctrl-C raises KeyboardInterrupt, SIGTERM ends the process.
    Outside the main thread, where Python cannot catch signals, the function always answers False.
    """
    received: list[int] = []
    before: dict[signal.Signals, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        restore()
        announce(f"{signal.Signals(number).name}: saving at the next step, then stopping (again: stop at once)")

    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, handle)
    except ValueError:
        yield lambda: False
        return
    try:
        yield lambda: bool(received)
    finally:
        restore()
