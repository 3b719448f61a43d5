"""Work that must not be done twice at the same time, nor on the thread that answers everybody."""

import asyncio
import atexit
import contextlib
import os
import sys
import threading
from collections.abc import Callable
from queue import Full, Queue
from typing import Any

Work = Callable[[], Any]


class BusyError(Exception):
    """Too much is waiting already."""


class OneAtATime:
    """
    Does work in the order in which it comes, on one thread of its own.

    The thread does not keep the process from ending: who presses Ctrl-C does not wait for a long answer.
    """

    def __init__(self, waiting: int):
        """
        Args:
            waiting: pieces of work that may wait while one is done.
        """
        self._waiting: Queue[tuple[Work, asyncio.Future[Any]]] = Queue(waiting)
        self._thread: threading.Thread | None = None
        self._working = False

    async def do(self, work: Work) -> Any:
        """
        What the work returns or raises.

        Raises:
            BusyError: it was not taken on.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._go_on, name="one at a time", daemon=True)
            self._thread.start()
            atexit.register(self._leave)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        try:
            self._waiting.put_nowait((work, future))
        except Full:
            raise BusyError from None
        return await future

    def _go_on(self) -> None:
        while True:
            work, future = self._waiting.get()
            self._working = True
            try:
                result, error = work(), None
            except BaseException as problem:
                result, error = None, problem
            self._working = False
            with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits any more
                future.get_loop().call_soon_threadsafe(_settle, future, result, error)

    def _leave(self) -> None:
        """At the end of the process, with work under way: a library that is taken down in the middle of it would abort."""
        if self._working:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError, AttributeError):
                    stream.flush()
            os._exit(0)


def _settle(future: "asyncio.Future[Any]", result: Any, error: BaseException | None) -> None:
    if future.done():
        return  # who asked has gone
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
