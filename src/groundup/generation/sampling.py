"""From the scores of the next token to a token: temperature, top-k, top-p, then one draw."""

from collections.abc import Callable

import torch
from torch import Tensor

Chooser = Callable[[Tensor], int]


def greedy(logits: Tensor) -> int:
    """The most likely token of (V,)."""
    return int(logits.argmax())


def sampler(*, temperature: float, top_k: int, top_p: float, seed: int) -> Chooser:
    """
    A function from logits (V,) to a token id; temperature 0 is greedy.

    The filters act in the order in which they are written here, as in Hugging Face's ``generate``: temperature, top-k
    (Fan et al. 2018), top-p (Holtzman et al. 2020); then one draw from what is left.
    """
    if temperature == 0:
        return greedy
    generator = torch.Generator().manual_seed(seed)

    def choose(logits: Tensor) -> int:
        # Drawn on the CPU: the same seed gives the same text on every device that computes the same logits.
        scores = logits.float().cpu()
        scores = (scores - scores.max()) / temperature
        if top_k:
            scores = keep_top_k(scores, top_k)
        if top_p < 1:
            scores = keep_top_p(scores, top_p)
        return int(torch.multinomial(scores.softmax(-1), 1, generator=generator))

    return choose


def keep_top_k(scores: Tensor, k: int) -> Tensor:
    """Scores (V,) with all but the k highest at minus infinity."""
    if k >= scores.numel():
        return scores
    kept = torch.full_like(scores, -torch.inf)
    top = scores.topk(k)
    return kept.scatter(0, top.indices, top.values)


def keep_top_p(scores: Tensor, p: float) -> Tensor:
    """Scores (V,) with only the fewest most likely tokens whose probability reaches p; always at least one."""
    ordered, indices = scores.sort(descending=True)
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    ordered = ordered.masked_fill(before >= p, -torch.inf)
    return torch.empty_like(scores).scatter(0, indices, ordered)
