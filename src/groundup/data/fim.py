"""
Fill in the middle: texts cut in three and put in an order in which the middle comes last.

A model learns by it to fill a hole between a prefix and a suffix; up to a rate of 0.9 at no cost to writing from left to
right (Bavarian et al. 2022, "Efficient Training of Language Models to Fill in the Middle", https://arxiv.org/abs/2207.14255,
section 4.2). The two orders, of which a text takes one (section 3):

    PSM  <|fim_prefix|> prefix <|fim_suffix|> suffix <|fim_middle|> middle <|endoftext|>
    SPM  <|fim_prefix|><|fim_suffix|> suffix <|fim_middle|> prefix middle <|endoftext|>

SPM is the paper's variant 2 (appendix D), which StarCoder's training takes too: its marks come in the order of PSM's, so
that a PSM hole with an empty prefix looks the same and each order learns from the other. Prefix and middle are tokenized
apart in both, as they are where a prompt ends at the hole. A text ends with end-of-text after its middle, also one that the
window cut: that is how a model learns to stop.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from groundup.data.batches import Samples
from groundup.errors import DataError
from groundup.runtime.random import derive_seed
from groundup.tokenizer.special import FimIds, fim_ids
from groundup.tokenizer.tokenizer import Tokenizer

MOST_TOKENS_OF_A_PIECE = 3
"""A UTF-8 character has four bytes at most, so a window's edge leaves three of its tokens at most."""
MARKS = 4
"""Tokens that a hole adds: prefix, suffix, middle, end-of-text."""


@dataclass(frozen=True)
class FillInTheMiddle:
    """
    Samples whose texts are rearranged at a rate, each by itself; itself ``Samples``, of the same length.

    A window is cut at end-of-text into texts, and each is rearranged or not ("context-level", the paper's section 3.2). The
    cuts lie between characters, not tokens (section 4.5). What is drawn is a function of the seed, the position in the run
    and the text's number in its window, of nothing else. A window in which no text is chosen stays as it is.

    Marks and cut tokens make a text longer, so tokens at the end of the window give way, before a text is cut in three: a
    text that is there is there as a whole. Room that is left is filled with ``<|fim_pad|>``. A character that the window's
    edge cut is left out (appendix C). A text that begins with ``<|file_sep|>`` keeps its first line, the path, in front.
    Texts that cannot be rearranged stay: no characters, bytes that are no UTF-8, special tokens inside.
    """

    samples: Samples
    tokenizer: Tokenizer
    """With ``FIM_TOKENS``."""
    rate: float
    """Probability that a text is rearranged."""
    spm_rate: float
    """Probability that a rearranged text is in the order SPM."""
    seed: int

    @property
    def length(self) -> int:
        """Tokens in a window, its last target not counted."""
        return self.samples.length

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The tokens of the samples at these positions of the run, (N, length + 1)."""
        windows = np.array(self.samples.read(positions), dtype=np.int64)
        for row, position in enumerate(positions.tolist()):
            if (changed := self._rearranged(windows[row].tolist(), position)) is not None:
                windows[row] = changed
        return windows

    @cached_property
    def _ids(self) -> FimIds:
        if (ids := fim_ids(self.tokenizer)) is None:
            raise DataError("tokenizer: has no tokens for a hole (<|fim_prefix|> and others), so no text can be cut in three")
        return ids

    def _rearranged(self, window: list[int], position: int) -> list[int] | None:
        """The tokens of a window, changed, as many as before; None where they stay."""
        made: list[int] = []
        changed = False
        for number, (text, ended) in enumerate(_texts(window, self.tokenizer.end_of_text_id)):
            room = len(window) - len(made)
            chosen = self._draw(position, number, "text") < self.rate
            hole = self._with_hole(text, ended, room, position, number) if chosen else None
            if hole is None:
                made += [*text, self.tokenizer.end_of_text_id] if ended else text
                whole = len(made) <= len(window)
            else:
                changed = True
                made += hole.tokens
                whole = hole.whole
            if not whole or len(made) >= len(window):
                break
        if not changed:
            return None
        return made[: len(window)] + [self._ids.pad] * (len(window) - len(made))

    def _with_hole(self, tokens: list[int], ended: bool, room: int, position: int, number: int) -> "_Hole | None":
        """A text rearranged, as much of it as fits into ``room`` tokens; None where it cannot be."""
        if self._text_of(tokens, cut_before=number == 0, cut_after=not ended) is None:
            return None
        kept = tokens if len(tokens) + MARKS <= room else tokens[: max(0, room - MARKS)]
        while True:
            whole = len(kept) == len(tokens)
            text = self._text_of(kept, cut_before=number == 0, cut_after=not (ended and whole))
            if text is None:
                return _Hole([], whole=False)
            hole = self._cut(text, position, number)
            if len(hole) <= room:
                return _Hole(hole, whole)
            kept = kept[: max(0, len(kept) - (len(hole) - room))]

    def _text_of(self, tokens: list[int], *, cut_before: bool, cut_after: bool) -> "_Text | None":
        """
        The characters of a text's tokens; None where there is nothing to cut.

        Args:
            cut_before: it may begin with the rest of a character, which is left out.
            cut_after: it may end with the beginning of one.
        """
        table = self.tokenizer.token_bytes
        named = tokens[:1] == [self._ids.file_separator]
        pieces = [table[token] for token in (tokens[1:] if named else tokens)]
        if not all(pieces):
            return None
        most_before, most_after = MOST_TOKENS_OF_A_PIECE * cut_before, MOST_TOKENS_OF_A_PIECE * cut_after
        first = 0
        while first < min(most_before, len(pieces)) and pieces[first][0] & 0xC0 == 0x80:
            first += 1
        for end in range(len(pieces), max(first, len(pieces) - most_after) - 1, -1):
            try:
                characters = b"".join(pieces[first:end]).decode()
            except UnicodeDecodeError:
                continue
            header = characters[: characters.find("\n") + 1] if named else ""
            body = characters[len(header) :]
            return _Text(header, body) if body and (header or not named) else None
        return None

    def _cut(self, text: "_Text", position: int, number: int) -> list[int]:
        """The tokens of a text that is cut at two places, end-of-text included."""
        ids, encode = self._ids, self.tokenizer.encode
        places = len(text.body) + 1
        first, second = sorted(int(self._draw(position, number, cut) * places) for cut in ("one cut", "other cut"))
        prefix, middle, suffix = (
            encode(part).tolist() for part in (text.body[:first], text.body[first:second], text.body[second:])
        )
        header = [ids.file_separator, *encode(text.header).tolist()] if text.header else []
        if self._draw(position, number, "order") < self.spm_rate:
            parts = [ids.prefix, ids.suffix, *suffix, ids.middle, *prefix, *middle]
        else:
            parts = [ids.prefix, *prefix, ids.suffix, *suffix, ids.middle, *middle]
        return [*header, *parts, self.tokenizer.end_of_text_id]

    def _draw(self, position: int, number: int, purpose: str) -> float:
        """A number in [0, 1), always the same for the same place and purpose."""
        return (derive_seed(self.seed, "fill in the middle", position, number, purpose) >> 10) * 2.0**-53


@dataclass(frozen=True)
class _Text:
    """A text's first line, where it is a path, with its line break; and the rest."""

    header: str
    body: str


@dataclass(frozen=True)
class _Hole:
    """A rearranged text, and whether none of its tokens had to give way."""

    tokens: list[int]
    whole: bool


def invert(tokens: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """The texts of one sample in their order, put together again: what a person reads, and what tests compare."""
    ids = fim_ids(tokenizer)
    texts = []
    for text, _ in _texts(list(tokens), tokenizer.end_of_text_id):
        if ids and ids.prefix in text:
            start, end, hole = (text.index(mark) for mark in (ids.prefix, ids.suffix, ids.middle))
            # Marks have no bytes, and what SPM writes after the last one is prefix and middle.
            text = [*text[:end], *text[hole:], *text[end:hole]]
        texts.append(text)
    if texts and ids and texts[-1][:1] == [ids.pad]:
        texts.pop()
    return [tokenizer.decode(text) for text in texts]


def _texts(tokens: list[int], end_of_text_id: int) -> list[tuple[list[int], bool]]:
    """The texts of a token list, without end-of-text, each with whether one followed; an empty one at the end is none."""
    texts: list[tuple[list[int], bool]] = []
    start = 0
    while start < len(tokens):
        try:
            end = tokens.index(end_of_text_id, start)
        except ValueError:
            return [*texts, (tokens[start:], False)]
        texts.append((tokens[start:end], True))
        start = end + 1
    return texts
