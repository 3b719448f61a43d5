"""Tokens one after the other, with a cache of keys and values; text as it becomes readable."""

import codecs
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from groundup.errors import DivergedError
from groundup.generation.sampling import Chooser
from groundup.model.gpt2 import GPT2
from groundup.model.kv_cache import KVCache


def window_start(tokens: int, n_positions: int) -> int:
    """
    Where the window begins that predicts what follows ``tokens`` tokens.

    A text longer than the context is seen through a window that moves on by half a context at a time: positions are
    absolute, so each move computes the window anew, and moving by one would do that for every token.
    """
    if tokens <= n_positions:
        return 0
    half = max(1, n_positions // 2)
    return -(-(tokens - n_positions) // half) * half


def generate_tokens(
    model: GPT2,
    prompt: Sequence[int],
    choose: Chooser,
    *,
    max_new_tokens: int,
    end_of_text_id: int,
    usable_ids: int | None = None,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    use_cache: bool = True,
) -> Iterator[int]:
    """
    Continue a prompt, one token at a time; ends after the end-of-text token, which is yielded too.

    Args:
        prompt: at least one token id.
        choose: from logits (V,) to a token id.
        usable_ids: only ids below this are chosen: a padded vocabulary has ids without a token.
        use_cache: False computes every step from scratch; the tokens are the same.
    """
    config = model.config
    ids = list(prompt)
    model.eval()
    cache: KVCache | None = None
    if use_cache:
        cache = KVCache.empty(
            config.n_layer, 1, config.n_head, config.n_positions, config.n_embd // config.n_head, model.head_weight
        )
    cached_from = 0
    for _ in range(max_new_tokens):
        start = window_start(len(ids), config.n_positions)
        new = ids[start:]
        if cache is not None:
            if start != cached_from:
                cache.clear()
                cached_from = start
            new = ids[start + cache.length :]
        with torch.inference_mode(), autocast():
            hidden = model(torch.tensor([new], device=model.head_weight.device), cache)
            logits = model.logits(hidden[0, -1])[:usable_ids]
        if not torch.isfinite(logits).all():
            raise DivergedError("the model's scores are not finite, so its training diverged; use an earlier checkpoint")
        token = choose(logits)
        yield token
        if token == end_of_text_id:
            return
        ids.append(token)


def readable(tokens: Iterable[int], token_bytes: Sequence[bytes]) -> Iterator[str]:
    """Text of tokens as they come, whole characters only; bytes that are not UTF-8 become U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        if text := decoder.decode(token_bytes[token]):
            yield text
    if text := decoder.decode(b"", final=True):
        yield text
