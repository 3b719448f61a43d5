"""SIGTERM and Ctrl-C: the first asks the run to stop at the next step, the second ends it at once."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def stop_requests(announce: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """
    Catch SIGTERM and SIGINT while the block runs; yields a function that says whether one has come.

    Outside the main thread, where Python cannot catch signals, the function always answers False.
    """
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if received:
            os._exit(128 + number)
        received.append(number)
        announce(f"{signal.Signals(number).name}: saving at the next step, then stopping (again: stop at once)")

    try:
        before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:
        yield lambda: False
        return
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
