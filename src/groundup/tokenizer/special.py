"""
The special tokens of models that write code: a file's name, and a text with a hole.

StarCoder's set (Li et al. 2023, https://arxiv.org/abs/2305.06161) in the spelling of Qwen2.5-Coder (Hui et al. 2024,
https://arxiv.org/abs/2409.12186), whose end-of-text is GPT-2's.
"""

from dataclasses import dataclass

from groundup.tokenizer.tokenizer import Tokenizer

FILE_SEPARATOR = "<|file_sep|>"
# The separator is first, because data with paths adds it alone: with the others its id stays.
FIM_TOKENS = (FILE_SEPARATOR, "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>")
"""All that training to fill in the middle adds to a tokenizer, in the order of their ids."""


@dataclass(frozen=True)
class FimIds:
    """The ids of ``FIM_TOKENS`` in a tokenizer."""

    file_separator: int
    prefix: int
    middle: int
    suffix: int
    pad: int


def fim_ids(tokenizer: Tokenizer) -> FimIds | None:
    """The ids of ``FIM_TOKENS``; None for a tokenizer that lacks one."""
    ids = tokenizer.special_ids
    return FimIds(*(ids[name] for name in FIM_TOKENS)) if all(name in ids for name in FIM_TOKENS) else None


def usable_ids(tokenizer: Tokenizer) -> int:
    """
    Ids below this may be chosen when text is written; all, for a tokenizer without ``FIM_TOKENS``.

    A model that learned to fill holes expects one in half of all new documents, but the marks of a hole are no text: they
    come last, and are left out.
    """
    ids = fim_ids(tokenizer)
    first = min(ids.prefix, ids.middle, ids.suffix, ids.pad) if ids else tokenizer.vocab_size
    only_marks = tokenizer.end_of_text_id < first and not any(tokenizer.token_bytes[first:])
    return first if only_marks else tokenizer.vocab_size


def never_written(tokenizer: Tokenizer) -> list[int]:
    """Ids that no generation chooses: the marks of a hole."""
    return list(range(usable_ids(tokenizer), tokenizer.vocab_size))
