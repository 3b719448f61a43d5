"""What the token view of groundup watch asks: what may come next, and how surprising a text is."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from groundup.checkpoint.commit import MANIFEST, checkpoints, step_of
from groundup.config.load import Given, Settings, resolve
from groundup.config.options import GENERATE_GROUPS, GenerationOptions
from groundup.errors import CheckpointError, ConfigError
from groundup.generation.next_token import draw_next, next_logits
from groundup.generation.sampling import Sampler
from groundup.recipes.generate import load_for_generation
from groundup.recipes.loading import Loaded
from groundup.recipes.score import score_text
from groundup.runtime.device import explained_memory_errors
from groundup.runtime.random import derive_seed
from groundup.tokenizer.special import usable_ids
from groundup.tokenizer.tokenizer import Tokenizer
from groundup.tracking.labels import token_label, visible
from groundup.tracking.surprise import whole_characters

BARS = 30
"""The likeliest tokens, which have a bar each."""
ALTERNATIVES = 5
"""Likelier tokens that are named beside each token of a text."""
LONGEST_TEXT = 10_000
"""Characters of a prompt, or of a text to look at: seconds of work on one thread."""
MOST_WRITTEN = 500
"""Tokens after the prompt."""
SAMPLER = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class TokenView:
    """Answers questions with the run's newest good checkpoint, which is opened once, and again when there is a newer one."""

    def __init__(self, run: Path, settings: Settings, threads: int, say: Callable[[str], None]):
        """
        Args:
            settings: which weights, and where they compute.
            threads: of torch.
        """
        self._run, self._settings, self._threads, self._say = run, settings, threads, say
        self._loaded: Loaded | None = None
        self._opened: tuple[Path, int] | None = None
        self._refused: dict[tuple[Path, int], CheckpointError] = {}
        self._last: tuple[Path, list[int], Tensor] | None = None

    def next(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """
        What may follow a prompt and the tokens that were written after it.

        Args:
            asked: prompt (text), written (token ids), draw (also write the token that the seed draws), seed, and the options of
                ``groundup generate`` that say how a token is chosen.

        Returns:
            likeliest: the tokens that the model finds likeliest, each with ``probability``, the model's own, and ``drawn``, the
            one that it is drawn with; the rest of them together; the tokens written; facts of the model. Or waiting: why
            there is no model yet.

        Raises:
            ConfigError: a value that cannot be used.
            CheckpointError: there are checkpoints, and none is good.
        """
        prompt, written = _text(asked, "prompt"), _tokens(asked)
        options = _generation(asked)
        loaded = self._newest()
        if loaded is None:
            return {"waiting": "the run has no checkpoint yet; this begins with its first"}
        tokenizer, room = loaded.tokenizer, loaded.model.config.n_positions
        usable = usable_ids(tokenizer)
        if any(token >= usable for token in written):
            raise ConfigError(f"written: a token id is {usable:,} or more, which this model never writes; begin again")
        ids: list[int] = tokenizer.encode(prompt).tolist()
        cut = max(0, len(ids) - room)  # as `groundup generate` does
        ids = ids[cut:] or [tokenizer.end_of_text_id]
        sampler = Sampler(*(getattr(options, name) for name in SAMPLER))
        with explained_memory_errors():
            if asked.get("draw") is True and len(written) < MOST_WRITTEN:
                written.append(draw_next(loaded.model, ids, written, sampler, derive_seed(options.seed, "sample", 0), usable))
            logits = self._logits(loaded, [*ids, *written], usable)
        seen = torch.tensor([*ids, *written]) if sampler.repetition_penalty != 1 else None
        return {
            **_facts(loaded),
            "prompt_tokens": len(ids),
            "prompt_tokens_cut": cut,
            "written": [_named(tokenizer, token) for token in written],
            "text": visible(tokenizer.decode(written)),
            "ended": written[-1:] == [tokenizer.end_of_text_id],
            "full": len(written) >= MOST_WRITTEN,
            **_probabilities(tokenizer, logits.float().softmax(-1), sampler.probabilities(logits, seen)),
        }

    def text(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """
        How surprising each token of a text is, as ``groundup score`` measures it.

        Args:
            asked: text.

        Returns:
            tokens, with label, bits, rank, probability and the likeliest in its place; pieces: whole characters, each with how
            many tokens it is from; loss, perplexity, bits_per_byte; facts of the model. Or waiting: why there is no model yet.

        Raises:
            ConfigError: a value that cannot be used.
            CheckpointError: there are checkpoints, and none is good.
        """
        text = _text(asked, "text")
        if not text:
            raise ConfigError("text: empty; there is nothing to look at in it")
        loaded = self._newest()
        if loaded is None:
            return {"waiting": "the run has no checkpoint yet; this begins with its first"}
        with explained_memory_errors():
            scored = score_text(loaded, text, ALTERNATIVES)
        tokens = scored["tokens"]
        pieces = whole_characters(tokens)
        return {
            **_facts(loaded),
            "loss": scored["loss"],
            "perplexity": scored["perplexity"] if math.isfinite(scored["perplexity"]) else None,
            "bits_per_byte": scored["bits_per_byte"],
            "pieces": [{"text": visible(characters), "tokens": len(parts)} for characters, parts in pieces],
            "tokens": [
                {**_token(token), "bits": token["bits"], "rank": token["rank"], "top": [*map(_token, token["top_logprobs"])]}
                for token in tokens
            ],
        }

    def _newest(self) -> Loaded | None:
        """The newest good checkpoint, opened; None while there is none at all."""
        torch.set_num_threads(self._threads)
        for path in reversed(checkpoints(self._run)):
            try:
                mark = path, (path / MANIFEST).stat().st_mtime_ns
            except OSError:
                continue  # it was deleted meanwhile
            if mark == self._opened:
                break
            if mark in self._refused:
                continue
            try:
                self._loaded, self._opened, self._last = load_for_generation(path, self._settings, self._say), mark, None
                break
            except CheckpointError as error:
                if path.is_dir():  # else its run deleted it, as it does with old ones
                    self._refused[mark] = error
                    self._say(f"WARNING: {error}; trying an older one")
        if self._loaded is None and self._refused:
            raise next(iter(self._refused.values()))
        return self._loaded

    def _logits(self, loaded: Loaded, ids: list[int], usable: int) -> Tensor:
        """Of the token after ``ids``; kept, because moving a slider asks for the same again."""
        if self._last is None or self._last[:2] != (loaded.checkpoint, ids):
            [logits] = next_logits(loaded.model, ids, usable_ids=usable)
            self._last = loaded.checkpoint, ids, logits
        return self._last[2]


def _facts(loaded: Loaded) -> dict[str, Any]:
    return {
        "checkpoint": visible(loaded.checkpoint.name),
        "step": step_of(loaded.checkpoint),
        "vocab_size": usable_ids(loaded.tokenizer),
        "n_positions": loaded.model.config.n_positions,
    }


def _probabilities(tokenizer: Tokenizer, own: Tensor, drawn: Tensor) -> dict[str, Any]:
    """The likeliest tokens and the rest, from the model's probabilities (V,) and those that are drawn from (V,)."""
    best = own.topk(min(BARS, len(own))).indices
    shown = torch.zeros(len(own), dtype=torch.bool).index_fill(0, best, True)
    return {
        "likeliest": [
            {**_named(tokenizer, token), "probability": float(own[token]), "drawn": float(drawn[token])}
            for token in best.tolist()
        ],
        "rest": {
            "tokens": int((~shown).sum()),
            "probability": float(own[~shown].sum()),
            "drawn": float(drawn[~shown].sum()),
            "left": int((drawn[~shown] > 0).sum()),
        },
        "left": int((drawn > 0).sum()),
        "entropy_bits": _entropy_bits(own),
        "entropy_bits_drawn": _entropy_bits(drawn),
    }


def _entropy_bits(probabilities: Tensor) -> float:
    return abs(float(torch.special.entr(probabilities.double()).sum() / math.log(2)))  # abs: no "-0"


def _named(tokenizer: Tokenizer, token: int) -> dict[str, Any]:
    return {"id": token, "label": token_label(tokenizer.token_bytes[token], tokenizer.spelled(token))}


def _token(found: Mapping[str, Any]) -> dict[str, Any]:
    """A token of ``groundup score``, for the page."""
    label = token_label(bytes(found["bytes"]), found["token"])
    return {"id": found["id"], "label": label, "probability": math.exp(found["logprob"])}


def _text(asked: Mapping[str, Any], name: str) -> str:
    text = asked.get(name, "")
    if not isinstance(text, str):
        raise ConfigError(f"{name}: is not text")
    if len(text) > LONGEST_TEXT:
        raise ConfigError(f"{name}: {len(text):,} characters; give at most {LONGEST_TEXT:,}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{name}: holds half a character (a surrogate); leave it out") from None
    return text


def _tokens(asked: Mapping[str, Any]) -> list[int]:
    written = asked.get("written", [])
    if not isinstance(written, list) or not all(type(token) is int and token >= 0 for token in written):
        raise ConfigError("written: is not a list of token ids")
    if len(written) > MOST_WRITTEN:
        raise ConfigError(f"written: {len(written):,} tokens; give at most {MOST_WRITTEN}")
    return list(written)


def _generation(asked: Mapping[str, Any]) -> GenerationOptions:
    """Checked as the flags of ``groundup generate`` are."""
    given = {name: Given(asked[name], "the page") for name in (*SAMPLER, "seed") if name in asked}
    return resolve(GENERATE_GROUPS, given)[GenerationOptions]
