"""A value that costs something to make: made anew when what it is made of has changed, and not too often."""

import hashlib
import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass

SHORTEST_PAUSE = 2.0
"""Seconds between two makings."""
SHARE = 0.02
"""Of one core's time that making may take: a training runs beside it."""


@dataclass(frozen=True)
class Text:
    """A text and what tells it from others."""

    text: str
    etag: str


class Latest:
    """The newest text, for any number of threads that ask."""

    def __init__(self, make: Callable[[], str], mark: Callable[[], Hashable], clock: Callable[[], float] = time.monotonic):
        """
        Args:
            make: makes the text.
            mark: equal as long as the text would be; cheap.
        """
        self._make, self._mark, self._clock = make, mark, clock
        self._lock = threading.Lock()
        self._text: Text | None = None
        self._seen: Hashable = None
        self._not_before = -float("inf")

    def now(self) -> Text:
        """The text as it is now, or was a moment ago; whoever asks while it is being made anew gets the old one."""
        if self._lock.acquire(blocking=self._text is None):
            try:
                self._renew()
            finally:
                self._lock.release()
        assert self._text is not None
        return self._text

    def _renew(self) -> None:
        started = self._clock()
        if self._text is not None and started < self._not_before:
            return
        try:
            # Looked at first: what changes while the text is made is made again.
            mark = self._mark()
            if self._text is None or mark != self._seen:
                text = self._make()
                self._text, self._seen = Text(text, f'"{hashlib.sha256(text.encode()).hexdigest()[:32]}"'), mark
        finally:
            self._not_before = started + max(SHORTEST_PAUSE, (self._clock() - started) / SHARE)
