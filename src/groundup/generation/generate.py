"""Tokens one after the other, for many texts at once, with a cache of keys and values."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from groundup.generation.inference import few_rows_linear
from groundup.generation.sampling import Sampler
from groundup.model.finite import require_finite
from groundup.model.gpt2 import GPT2
from groundup.model.kv_cache import KVCache


@dataclass(frozen=True)
class Drawn:
    """One token, as soon as it is chosen."""

    prompt: int
    """Which of the prompts it continues."""
    token: int
    logprob: float = 0.0
    """Natural logarithm of its probability in the model's own distribution, before any filter."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens there with their log-probabilities, best first."""


@dataclass
class _Text:
    """A text that is being written: one row of the batch."""

    prompt: int
    ids: list[int]
    room: int
    """Tokens that may still be added."""
    generator: torch.Generator
    window: int = -1
    """Where the window begins that the cache holds; -1: nothing yet."""


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


def new_cache(model: GPT2, rows: int, longest: int | None = None) -> KVCache:
    """An empty cache for ``rows`` texts of a model, none of them longer than ``longest`` tokens, nor than the context."""
    config = model.config
    capacity = min(config.n_positions, longest or config.n_positions)
    return KVCache.empty(config.n_layer, rows, config.n_head, capacity, config.n_embd // config.n_head, model.head_weight)


def generate_tokens(
    model: GPT2,
    prompts: Sequence[Sequence[int]],
    sampler: Sampler,
    *,
    seeds: Sequence[int],
    max_new_tokens: int,
    end_of_text_id: int,
    usable_ids: int | None = None,
    batch_size: int = 8,
    top_logprobs: int | None = None,
    ended: Callable[[int], bool] = lambda prompt: False,
    use_cache: bool = True,
) -> Iterator[Drawn]:
    """
    Continue prompts of any lengths together; each ends after its end-of-text token, which is yielded too.

    A text depends on its prompt and its seed, not on its neighbours in the batch, up to the rounding of products of another
    size, which bf16 shows. When one ends, the next prompt takes its row.

    Args:
        prompts: token ids, at least one each.
        seeds: of each prompt's draws.
        usable_ids: only ids below this are chosen: a padded vocabulary has ids without a token.
        batch_size: texts that are written at the same time.
        top_logprobs: report log-probabilities, and those of so many of the likeliest tokens; None computes none.
        ended: asked after each token whether the text of that prompt is to end there.
        use_cache: False computes every step from scratch; the tokens are the same.

    Raises:
        DivergedError: the model's scores are not finite.
    """
    model.eval()
    waiting = deque(
        _Text(number, list(ids), max_new_tokens, torch.Generator().manual_seed(seed))
        for number, (ids, seed) in enumerate(zip(prompts, seeds, strict=True))
    )
    texts = [waiting.popleft() for _ in range(min(batch_size, len(waiting)))]
    longest = max((len(ids) for ids in prompts), default=0) + max_new_tokens
    cache = new_cache(model, len(texts), longest) if use_cache and texts else None
    while texts:
        with torch.inference_mode():
            logits = _next_logits(model, texts, cache)[:, :usable_ids]  # (B, V)
            require_finite(logits)
            drawn = [_draw(text, row, sampler, top_logprobs) for text, row in zip(texts, logits, strict=True)]
        staying = []
        for row, (text, choice) in enumerate(zip(texts, drawn, strict=True)):
            text.ids.append(choice.token)
            text.room -= 1
            yield choice
            if choice.token != end_of_text_id and text.room and not ended(text.prompt):
                staying.append((row, text))
            elif waiting:
                staying.append((row, waiting.popleft()))
        if cache is not None and 0 < len(staying) < len(texts):
            cache = cache.select([row for row, _ in staying])
        texts = [text for _, text in staying]


def _draw(text: _Text, logits: Tensor, sampler: Sampler, top_logprobs: int | None) -> Drawn:
    """Choose the next token of one text from logits (V,)."""
    seen = torch.tensor(text.ids, device=logits.device) if sampler.repetition_penalty != 1 else None
    token = sampler.draw(logits, text.generator, seen)
    if top_logprobs is None:
        return Drawn(text.prompt, token)
    logprobs = logits.float().log_softmax(-1)
    best = logprobs.topk(min(top_logprobs, len(logprobs)))
    top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return Drawn(text.prompt, token, float(logprobs[token]), top)


def _next_logits(model: GPT2, texts: list[_Text], cache: KVCache | None) -> Tensor:
    """Logits (B, V) of the token that follows each text."""
    device, length = model.head_weight.device, model.config.n_positions
    starts = [window_start(len(text.ids), length) for text in texts]
    if cache is None:
        windows = [torch.tensor([text.ids[start:]], device=device) for text, start in zip(texts, starts, strict=True)]
        return torch.cat([model.logits(model(window)[:, -1]) for window in windows])
    for row, (text, start) in enumerate(zip(texts, starts, strict=True)):
        if text.window != start:
            _fill(model, texts, row, start, cache)
    last = torch.tensor([[text.ids[-1]] for text in texts], device=device)  # (B, 1)
    return few_rows_linear(model(last, cache)[:, -1], model.head_weight)


def _fill(model: GPT2, texts: list[_Text], row: int, start: int, cache: KVCache) -> None:
    """Put all tokens of a window but the last into a text's row; the last one goes with the other rows' last ones."""
    text = texts[row]
    tokens = text.ids[start:-1]
    # Several completions of one prompt begin alike.
    twin = next((other for other in range(row) if texts[other].window == start and texts[other].ids == text.ids), None)
    own = cache.row(row)
    if twin is not None:
        own.keys[:, :, :, : len(tokens)] = cache.keys[:, twin : twin + 1, :, : len(tokens)]
        own.values[:, :, :, : len(tokens)] = cache.values[:, twin : twin + 1, :, : len(tokens)]
    elif tokens:
        model(torch.tensor([tokens], device=cache.keys.device), own)
    cache.lengths[row] = len(tokens)
    text.window = start
