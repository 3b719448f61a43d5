"""Text from tokens as they come: whole characters only, and nothing of a stop string."""

import codecs
from collections.abc import Sequence


class TextStream:
    """
    Turns the tokens of one completion into text, a piece at a time.

    Bytes wait until they are a character; text that may be the beginning of a stop string waits until it is decided. Bytes
    that are not UTF-8 become U+FFFD.
    """

    def __init__(self, token_bytes: Sequence[bytes], stop_strings: Sequence[str] = ()):
        """
        Args:
            token_bytes: the bytes of each token id.
            stop_strings: the text ends before the first of them to be complete; none is empty.
        """
        self._token_bytes, self._stop_strings = token_bytes, stop_strings
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.text = ""
        """What has been given out so far."""
        self.stopped_by: str | None = None
        """The stop string that ended the text."""

    def add(self, token: int) -> str:
        """Take one token; returns the text that is certain now, often none."""
        return self._take(self._decoder.decode(self._token_bytes[token]))

    def finish(self) -> str:
        """No token comes any more; returns the text that was held back."""
        if self.stopped_by is not None:
            return ""
        piece = self._take(self._decoder.decode(b"", final=True))
        if self.stopped_by is None:
            piece += self._give(self._held)
            self._held = ""
        return piece

    def _take(self, new: str) -> str:
        if self.stopped_by is not None:
            return ""
        self._held += new
        # The first to be complete wins, so that the cut does not depend on how tokens divide the text.
        found = [(self._held.find(stop) + len(stop), -len(stop), stop) for stop in self._stop_strings if stop in self._held]
        if found:
            end, _, self.stopped_by = min(found)
            return self._give(self._held[: end - len(self.stopped_by)])
        waiting = self._possible_beginning()
        piece, self._held = self._held[: len(self._held) - waiting], self._held[len(self._held) - waiting :]
        return self._give(piece)

    def _possible_beginning(self) -> int:
        """How many characters at the end of the held text may begin a stop string."""
        held = self._held
        beginnings = ((stop, n) for stop in self._stop_strings for n in range(1, min(len(stop), len(held) + 1)))
        return max((n for stop, n in beginnings if held.endswith(stop[:n])), default=0)

    def _give(self, piece: str) -> str:
        self.text += piece
        return piece
