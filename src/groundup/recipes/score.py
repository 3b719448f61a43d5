"""groundup score: how surprised a model is by each token of a text."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from groundup.config.load import Settings
from groundup.config.options import ScoreOptions
from groundup.errors import ConfigError, DataError
from groundup.evaluation.surprise import token_surprise
from groundup.recipes.generate import load_for_generation, spelling
from groundup.recipes.loading import Loaded
from groundup.recipes.texts import given_texts
from groundup.runtime.device import explained_memory_errors

Say = Callable[[str], None]


def score(path: Path, settings: Settings, say: Say) -> dict[str, Any]:
    """
    Measure texts token by token with a run's newest checkpoint, or a checkpoint; each as the beginning of a document.

    Returns:
        What ``score --json`` prints: texts (text, tokens, loss, perplexity, bits_per_byte), checkpoint. A token has its text
        ``token``, bytes, id, logprob, bits (its surprise), rank (how many were likelier) and top_logprobs.

    Raises:
        ConfigError: no text was given.
        DataError: a text is empty.
    """
    options = settings[ScoreOptions]
    texts = given_texts(options.text, options.text_file, "text_file")
    if not texts:
        raise ConfigError("text: none given; give --text, or --text-file with a file or - for standard input")
    for number, text in enumerate(texts):
        if not text:
            raise DataError(f"text: number {number + 1} is empty; there is nothing to score in it")
    loaded = load_for_generation(path, settings, say)
    with explained_memory_errors():
        scored = [score_text(loaded, text, options.top_logprobs) for text in texts]
    return {"texts": scored, "checkpoint": str(loaded.checkpoint)}


def score_text(loaded: Loaded, text: str, top_logprobs: int) -> dict[str, Any]:
    """One text, not empty, as ``score`` reports it."""
    tokenizer = loaded.tokenizer
    found = token_surprise(
        loaded.model, [tokenizer.end_of_text_id], tokenizer.encode(text).tolist(),
        top_logprobs=top_logprobs, usable_ids=tokenizer.vocab_size,
    )  # fmt: skip
    nats = -sum(surprise.logprob for surprise in found)
    loss = nats / len(found)
    return {
        "text": text,
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "bits_per_byte": nats / math.log(2) / len(text.encode()),
        "tokens": [
            {
                **spelling(tokenizer, surprise.token),
                "logprob": surprise.logprob,
                "bits": -surprise.logprob / math.log(2),
                "rank": surprise.rank,
                "top_logprobs": [{**spelling(tokenizer, token), "logprob": value} for token, value in surprise.top],
            }
            for surprise in found
        ],
    }
