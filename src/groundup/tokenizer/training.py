"""Train a byte-level BPE on text, with the ``tokenizers`` library."""

import json
import re
from collections.abc import Iterable, Iterator

import tokenizers

from groundup.tokenizer.tokenizer import Tokenizer, byte_to_character, from_merges

LONG_RUN = re.compile(r"\S{1000}(?=\S)|\s{1000}(?=\s)")


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """
    Learn merges from text (Sennrich et al. 2016, on bytes as in GPT-2).

    Args:
        texts: pieces of the corpus; read once.
        vocab_size: 256 bytes + merges + end-of-text, at most; a small corpus yields fewer.
    """
    slow = tokenizers.Tokenizer(tokenizers.models.BPE())
    slow.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        show_progress=False,
        initial_alphabet=sorted(byte_to_character()),
        special_tokens=[],
    )
    slow.train_from_iterator((part for text in texts for part in _without_long_runs(text)), trainer)
    model = json.loads(slow.to_str())["model"]
    return from_merges(model["vocab"], [tuple(pair) for pair in model["merges"]])


def _without_long_runs(text: str) -> Iterator[str]:
    """Cut runs of 1,000 characters without a break: learning merges takes quadratic time in the length of a word."""
    start = 0
    for run in LONG_RUN.finditer(text):
        yield text[start : run.end()]
        start = run.end()
    yield text[start:]
