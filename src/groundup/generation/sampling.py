"""
From the scores of the next token to a token: one ``Sampler``, whose filters compose in a fixed order.

The order is that of Hugging Face's ``generate``: repetition penalty, temperature, top-k, top-p, min-p; then one draw
from what is left (multinomial sampling). Temperature 0 takes the most likely token after the penalty (greedy).
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampler:
    """How the next token is chosen. The defaults draw from the model's own distribution."""

    temperature: float = 1.0
    """Divides the logits; 0 is greedy."""
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def scores(self, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        """
        What is drawn from: (V,) float32 scores from logits (V,), minus infinity where a filter removed a token.

        Args:
            seen: ids of the text so far, 1-D; what the repetition penalty acts on.
        """
        scores = logits.float()
        if self.repetition_penalty != 1 and seen is not None:
            scores = penalize_repetition(scores, seen, self.repetition_penalty)
        if self.temperature == 0:
            return scores
        temperature = max(self.temperature, torch.finfo(scores.dtype).tiny)
        scaled = scores / temperature
        # Near 0 that overflows; with the maximum taken off first it does not, and probabilities are the same.
        scores = (scores - scores.max()) / temperature if scaled.isinf().any() else scaled
        if self.top_k:
            scores = keep_top_k(scores, self.top_k)
        if self.top_p == 1 and self.min_p == 0:
            return scores
        # Sorting the candidates that are left is cheaper than sorting the vocabulary.
        left = (scores > -torch.inf).nonzero()[:, 0]
        candidates = scores[left]
        if self.top_p < 1:
            candidates = keep_top_p(candidates, self.top_p)
        if self.min_p:
            candidates = keep_min_p(candidates, self.min_p)
        return torch.full_like(scores, -torch.inf).scatter(0, left, candidates)

    def probabilities(self, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        """(V,) probabilities with which ``draw`` takes each token: 0 where a filter removed it, 1 for greedy's only one."""
        scores = self.scores(logits, seen)
        if self.temperature == 0:
            return torch.zeros_like(scores).scatter(0, scores.argmax()[None], 1.0)
        return scores.softmax(-1)

    def draw(self, logits: Tensor, generator: torch.Generator, seen: Tensor | None = None) -> int:
        """One token id from logits (V,); ``generator`` is a CPU generator, so that all devices draw alike."""
        scores = self.scores(logits, seen)
        if self.temperature == 0:
            return int(scores.argmax())
        left = (scores > -torch.inf).nonzero()[:, 0]
        probabilities = scores[left].softmax(-1).cpu()
        return int(left[int(torch.multinomial(probabilities, 1, generator=generator))])


def penalize_repetition(scores: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """
    Scores (…, V) with those of the tokens ``seen`` (…, T) divided by the penalty where positive, else multiplied.

    Source: Keskar et al. 2019 (CTRL), section 4.1, with the sign as in Hugging Face's ``generate``.
    """
    old = scores.gather(-1, seen)
    largest = torch.finfo(scores.dtype).max
    new = torch.where(old > 0, old / penalty, old * penalty).clamp(-largest, largest)
    return scores.scatter(-1, seen, new)


def keep_top_k(scores: Tensor, k: int) -> Tensor:
    """Scores (N,) with all but the k highest at minus infinity; ties with the k-th stay (Fan et al. 2018)."""
    if k >= scores.numel():
        return scores
    return scores.masked_fill(scores < scores.topk(k).values[-1], -torch.inf)


def keep_top_p(scores: Tensor, p: float) -> Tensor:
    """
    Scores (N,) with only the fewest most likely tokens whose probability exceeds or reaches p; always at least one.

    Source: Holtzman et al. 2020, section 3.1 (nucleus sampling).
    """
    ordered, indices = scores.sort()
    # The unlikely end goes as long as it holds at most 1 - p in all.
    removed = ordered.softmax(-1).cumsum(-1) <= 1 - p
    removed[-1] = False
    return scores.masked_fill(removed.new_empty(removed.shape).scatter(0, indices, removed), -torch.inf)


def keep_min_p(scores: Tensor, min_p: float) -> Tensor:
    """Scores (N,) with only the tokens at least ``min_p`` times as likely as the likeliest (Nguyen et al. 2024)."""
    probabilities = scores.softmax(-1)
    return scores.masked_fill(probabilities < min_p * probabilities.max(), -torch.inf)
