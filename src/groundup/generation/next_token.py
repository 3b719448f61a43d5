"""What may come next, and what would be drawn: a generation one token at a time, forwards and backwards."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from groundup.generation.generate import window_start
from groundup.generation.sampling import Sampler
from groundup.model.finite import require_finite
from groundup.model.gpt2 import GPT2


@torch.inference_mode()
def next_logits(
    model: GPT2, ids: Sequence[int], *, first: int | None = None, usable_ids: int | None = None
) -> Iterator[Tensor]:
    """
    Logits (V,) of the token that follows the text's first n tokens, for n from ``first`` up to all, which is the default.

    They are what ``generate_tokens`` draws from, up to rounding: a text beyond the context is seen through the same windows.

    Args:
        ids: at least one token.
        usable_ids: of ids from this on there are no logits.

    Raises:
        DivergedError: the model's scores are not finite.
    """
    model.eval()
    length, count = model.config.n_positions, len(ids) if first is None else first
    while count <= len(ids):
        start = window_start(count, length)
        end = count
        while end < len(ids) and window_start(end + 1, length) == start:
            end += 1
        hidden = model(torch.tensor([ids[start:end]], device=model.head_weight.device))[0]  # (T, C)
        for place in range(count, end + 1):
            logits = model.logits(hidden[place - 1 - start])[:usable_ids]
            require_finite(logits)
            yield logits
        count = end + 1


def draw_next(
    model: GPT2, prompt: Sequence[int], written: Sequence[int], sampler: Sampler, seed: int, usable_ids: int | None = None
) -> int:
    """
    The token that ``generate_tokens`` draws after ``prompt`` and ``written`` with this seed.

    Of a text that was written otherwise, too: the n-th token after a prompt takes the random numbers that it would have taken.
    So a step back and a step forward give the same text, and nothing must be remembered between them.
    """
    generator = torch.Generator().manual_seed(seed)
    ids, token = [*prompt, *written], -1
    for count, logits in enumerate(next_logits(model, ids, first=len(prompt), usable_ids=usable_ids), start=len(prompt)):
        seen = torch.tensor(ids[:count], device=logits.device) if sampler.repetition_penalty != 1 else None
        token = sampler.draw(logits, generator, seen)
    return token
