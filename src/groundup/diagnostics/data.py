"""
Is this data right? Enough of it, of a vocabulary that it uses, without copies, and readable.

Everything is read from the tokens, which are what a model learns from, so that text, our datasets and other trainers' are one.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from groundup.diagnostics.check import Check
from groundup.tokenizer.tokenizer import Tokenizer

Tokens = npt.NDArray[Any]

READ_TOKENS, DECODED_TOKENS = 2**22, 2**20
"""Looked at from the start of a split, and of these turned back into text: a second or two."""
MOST_EPOCHS = 16
"""Text that is read more often brings hardly anything new: Muennighoff et al. 2023 (https://arxiv.org/abs/2305.16264)."""
LEAST_TOKENS_PER_WEIGHT = 0.05
"""
A model of 124 million weights on a book has a hundredth of that, and knows it by heart. Hoffmann et al. 2022 take 20 for the
best use of a machine; what is between is a matter of taste, and passes.
"""
BEST_TOKENS_PER_WEIGHT = 20
LARGE_VOCABULARY, LEAST_USED = 1024, 0.2
"""Of a vocabulary so large at least this share should occur: GPT-2's in tiny Shakespeare is 0.23. One of bytes is small."""
MOST_DUPLICATED = 0.05
"""Share of the tokens that stand in copies of documents; Lee et al. 2022 removed 3 to 19 % of web corpora, and gained by it."""
MOST_OVERLAP, MOST_DOCUMENTS_OVERLAP = 0.2, 0.01
"""
Of the windows sampled from the validation text, and of its documents, those that are in the training text too. Code repeats
itself honestly: licences, tables, signatures; of Python's standard library it is 0.06, of tiny Shakespeare nothing.
"""
WINDOW_TOKENS, WINDOW_BYTES, WINDOWS, TABLE_BITS = 32, 128, 4000, 22
"""A window is so many tokens, and more where they are shorter than four bytes."""
LONG_LINE_BYTES, MOST_IN_LONG_LINES = 10_000, 0.05
"""Lines longer than a page or two are data in disguise: base64, minified code, tables."""
MOST_UNREADABLE = 1e-3
"""Share of the bytes: a few are typing errors, or text about them; German in a wrong encoding has one in fifty."""


@dataclass(frozen=True)
class Text:
    """What of the data is looked at, and what is known of all of it."""

    train: Tokens
    """The first tokens of the training text, documents one after the other, each with an end, (N,)."""
    validation: Tokens
    """The same of the validation text, (M,)."""
    tokenizer: Tokenizer
    train_tokens: int
    """In all."""
    replaced_sequences: int | None = None
    """Of invalid UTF-8, when the text was read; None where that is not known."""


@dataclass(frozen=True)
class Use:
    """What a run will do with it."""

    weights: int
    """Parameters of the model."""
    epochs: float
    pretrained: bool = False
    """The weights know text already, so little of it is enough, and its vocabulary was another's choice."""


NAMES = (
    "enough_tokens",
    "vocabulary_used",
    "duplicated_documents",
    "train_validation_overlap",
    "longest_lines",
    "unreadable_bytes",
)


def examine_data(text: Text, use: Use) -> Iterator[Check]:
    """Everything about the data, as it is found."""
    yield enough_check(text.train_tokens, use)
    yield vocabulary_check(text, use)
    yield duplicates_check(text)
    yield overlap_check(text)
    sample = decoded(text.train[:DECODED_TOKENS], text.tokenizer)
    yield lines_check(sample)
    yield readable_check(sample, text.replaced_sequences)


def enough_check(tokens: int, use: Use) -> Check:
    """Tokens against weights, and how often they are read."""
    share = tokens / use.weights
    measured = f"{tokens:,} tokens for {use.weights:,} weights, {share:.3g} a weight; read {use.epochs:.3g} times"
    expected = f"{LEAST_TOKENS_PER_WEIGHT:g} a weight or more (best use of a machine: {BEST_TOKENS_PER_WEIGHT}), "
    expected += f"read at most {MOST_EPOCHS} times"
    advice = ""
    if share < LEAST_TOKENS_PER_WEIGHT and not use.pretrained:
        advice = "it will learn the text by heart: more text, a smaller --model, or trained weights to start from (--init-from)"
    elif use.epochs > MOST_EPOCHS:
        advice = f"lower --max-steps or --num-train-epochs to {MOST_EPOCHS} readings, or add text; watch for overfitting"
    details = {"tokens": tokens, "weights": use.weights, "epochs": use.epochs}
    return _check("enough_tokens", not advice, measured, expected, advice, "too_little_data" if advice else "", details)


def vocabulary_check(text: Text, use: Use) -> Check:
    """The share of the ids that occur in the training text: rows of the embedding that are never trained are dead weight."""
    size = text.tokenizer.vocab_size
    counts = np.bincount(text.train, minlength=size)
    used = int(np.count_nonzero(counts))
    measured = f"{used:,} of {size:,} ids occur ({used / size:.0%}){_seen(text)}"
    small = size < LARGE_VOCABULARY
    expected = f"{LEAST_USED:.0%} or more" + (f", of vocabularies from {LARGE_VOCABULARY:,} on" if small else "")
    passed = small or use.pretrained or used >= LEAST_USED * size
    advice = "" if passed else "train a tokenizer on this text, with a smaller --vocab-size"
    return _check("vocabulary_used", passed, measured, expected, advice, "" if passed else "vocabulary_too_large",
                  {"used": used, "vocab_size": size})  # fmt: skip


def duplicates_check(text: Text) -> Check:
    """The share of the training tokens in documents that were there before."""
    seen: set[bytes] = set()
    total = again = copies = count = 0
    for document in documents(text.train, text.tokenizer.end_of_text_id):
        digest, count, total = _digest(document), count + 1, total + len(document)
        if digest in seen:
            again, copies = again + len(document), copies + 1
        seen.add(digest)
    share = again / max(1, total)
    measured = f"{copies:,} of {count:,} documents are copies, {share:.1%} of the tokens{_seen(text)}"
    passed = share <= MOST_DUPLICATED
    return _check("duplicated_documents", passed, measured, f"at most {MOST_DUPLICATED:.0%} of the tokens",
                  "" if passed else "give each document once; what is repeated is learned by heart",
                  "" if passed else "duplicated_documents", {"copies": copies, "documents": count, "share": share})  # fmt: skip


def overlap_check(text: Text) -> Check:
    """The share of the validation text that the training text holds too: whole documents, and windows of some words."""
    name = "train_validation_overlap"
    if not len(text.validation):
        return _check(name, None, "there is no validation text", "validation text", "")
    end = text.tokenizer.end_of_text_id
    known = {_digest(document) for document in documents(text.train, end)}
    found = [(len(document), _digest(document) in known) for document in documents(text.validation, end)]
    shared = sum(size for size, there in found if there) / max(1, sum(size for size, _ in found))
    length = window_length(text)
    windows = window_overlap(text.train, text.validation, length)
    expected = f"documents {MOST_DOCUMENTS_OVERLAP:.0%} at most, windows {MOST_OVERLAP:.0%} at most"
    if windows is None:
        return _check(name, None, f"less than {length} tokens of one of them", expected, "")
    measured = (
        f"{shared:.1%} of the validation text in documents, and {windows:.1%} of its windows of {length} tokens, are in the "
    )
    measured += f"training text too{_seen(text)}"
    passed = shared <= MOST_DOCUMENTS_OVERLAP and windows <= MOST_OVERLAP
    advice = "the validation loss measures memory: take out what is in both, or give --validation-source with other text"
    return _check(name, passed, measured, expected, "" if passed else advice, "" if passed else "validation_in_training",
                  {"documents": shared, "windows": windows, "window_tokens": length})  # fmt: skip


def lines_check(sample: bytes) -> Check:
    """The longest line, and how much of the text is in lines that no person writes."""
    lengths = np.array([len(line) for line in sample.split(b"\n")])
    long = int(lengths[lengths > LONG_LINE_BYTES].sum())
    share = long / max(1, len(sample))
    measured = f"the longest line is {int(lengths.max()):,} bytes; {share:.1%} of the text is in lines over {LONG_LINE_BYTES:,}"
    passed = share <= MOST_IN_LONG_LINES
    return _check("longest_lines", passed, measured, f"at most {MOST_IN_LONG_LINES:.0%} of the text in such lines",
                  "" if passed else "leave minified files, tables and encoded data out",
                  "" if passed else "long_lines", {"longest": int(lengths.max()), "share": share})  # fmt: skip


def readable_check(sample: bytes, replaced: int | None) -> Check:
    """Bytes that no text has: what was no UTF-8, replacement characters, and control characters."""
    marks = sample.count("\N{REPLACEMENT CHARACTER}".encode())
    controls = sum(sample.count(bytes([byte])) for byte in (*range(9), *range(14, 32), 127) if byte != 27)
    share = (marks + controls) / max(1, len(sample))
    measured = f"{marks:,} replacement and {controls:,} control characters in {len(sample):,} bytes"
    measured += f"; {replaced:,} invalid sequences were replaced when it was read" if replaced else ""
    passed = share <= MOST_UNREADABLE
    return _check("unreadable_bytes", passed, measured, f"at most one in {1 / MOST_UNREADABLE:,.0f} bytes",
                  "" if passed else "leave binary files out, and convert text of another encoding to UTF-8 (iconv)",
                  "" if passed else "unreadable_text", {"share": share, "replaced": replaced})  # fmt: skip


def decoded(tokens: Tokens, tokenizer: Tokenizer) -> bytes:
    """The text of a stream of documents, (N,): each begins on a line of its own, as it stood in a row or a file of its own."""
    ends = np.flatnonzero(tokens == tokenizer.end_of_text_id)
    return b"\n".join(tokenizer.decode_bytes(document.tolist()) for document in np.split(tokens, ends + 1))


def documents(tokens: Tokens, end: int) -> Iterator[Tokens]:
    """The documents of a stream, without their ends; a last one that is cut off is left out unless it is the only one."""
    ends = np.flatnonzero(tokens == end)
    if not len(ends) and len(tokens):
        yield tokens
    start = 0
    for stop in ends.tolist():
        if stop > start:
            yield tokens[start:stop]
        start = stop + 1


def window_length(text: Text) -> int:
    """Tokens of a window: ``WINDOW_TOKENS``, doubled until it is ``WINDOW_BYTES`` of text."""
    counts = text.tokenizer.token_byte_counts
    usual = float(counts[text.train[: 2**16]].mean()) if len(text.train) else 1.0
    return WINDOW_TOKENS << max(0, math.ceil(math.log2(WINDOW_BYTES / WINDOW_TOKENS / max(usual, 0.25)) - 0.1))


def window_overlap(train: Tokens, validation: Tokens, length: int) -> float | None:
    """
    The share of windows, evenly spread over the validation tokens, that occur anywhere in the training tokens.

    Args:
        length: tokens of a window, a power of two.
    """
    if min(len(train), len(validation)) < length:
        return None
    starts = np.linspace(0, len(validation) - length, min(WINDOWS, len(validation) - length + 1)).astype(np.int64)
    sampled = window_hashes(validation, length)[starts]
    known, wanted = window_hashes(train, length), np.unique(sampled)
    # Sorting millions of hashes takes long: a table of their highest bits leaves a few candidates.
    table = np.zeros(2**TABLE_BITS, dtype=bool)
    shift = np.uint64(64 - TABLE_BITS)
    table[wanted >> shift] = True
    candidates = known[table[known >> shift]]
    return float(np.isin(sampled, candidates).mean())


def window_hashes(tokens: Tokens, length: int) -> npt.NDArray[np.uint64]:
    """
    A hash of each window of ``length`` tokens, (N - length + 1,): a polynomial modulo 2⁶⁴, built up by doubling.

    Two windows that differ have equal hashes by accident only; an odd base keeps all bits.
    """
    base = 0x9E3779B97F4A7C15
    # Small numbers are spread over all bits first, or a low bit of the sum would be a low bit of the tokens.
    hashes = (tokens.astype(np.uint64) + np.uint64(1)) * np.uint64(0xBF58476D1CE4E5B9)
    hashes ^= hashes >> np.uint64(31)
    size = 1
    while size < length:
        hashes = hashes[:-size] * np.uint64(pow(base, size, 2**64)) + hashes[size:]
        size *= 2
    return hashes


def _digest(document: Tokens) -> bytes:
    return hashlib.blake2b(document.tobytes(), digest_size=16).digest()


def _seen(text: Text) -> str:
    """What part of the training text was looked at, where it was not all."""
    return f", of the first {len(text.train):,} of {text.train_tokens:,} tokens" if len(text.train) < text.train_tokens else ""


def _check(name: str, passed: bool | None, measured: str, expected: str, advice: str, culprit: str = "",
           details: dict[str, Any] | None = None) -> Check:  # fmt: skip
    return Check(name, "data", passed, measured, expected, advice, culprit, details)
