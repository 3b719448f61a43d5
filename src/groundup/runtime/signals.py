"""
SIGTERM and Ctrl-C.

For a run the first asks it to stop at the next step, and the second ends it at once; what has nothing to save ends in order.
"""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

TERMINATED = 128 + signal.SIGTERM
"""The exit code that a shell gives a process that SIGTERM ended."""


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


@contextmanager
def orderly_end() -> Iterator[None]:
    """
    Let SIGTERM end the process through every ``finally``, as Ctrl-C does, so that temporary folders go; exit code 143.

    Outside the main thread, where Python cannot catch signals, nothing is changed.
    """

    def end(number: int, frame: FrameType | None) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not cut the tidying short
        sys.exit(TERMINATED)

    try:
        before = signal.signal(signal.SIGTERM, end)
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
