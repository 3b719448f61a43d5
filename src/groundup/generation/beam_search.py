"""
Beam search: the most likely continuations as wholes, not token by token.

The same rules as Hugging Face's ``generate(num_beams=…, do_sample=False)``, so that the same options give the same ids.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from groundup.generation.generate import new_cache, window_start
from groundup.generation.inference import few_rows_linear
from groundup.generation.sampling import penalize_repetition
from groundup.model.finite import require_finite
from groundup.model.gpt2 import GPT2
from groundup.model.kv_cache import KVCache

EarlyStopping = Literal["false", "true", "never"]


@dataclass(frozen=True)
class Hypothesis:
    """A finished continuation."""

    tokens: list[int]
    score: float
    """Sum of its log-probabilities, divided by its length to the power of ``length_penalty``."""


@dataclass
class _Beam:
    tokens: list[int]
    score: float
    """Sum of the log-probabilities."""


@torch.inference_mode()
def beam_search(
    model: GPT2,
    prompt: Sequence[int],
    *,
    num_beams: int,
    max_new_tokens: int,
    end_of_text_id: int,
    length_penalty: float = 1.0,
    early_stopping: EarlyStopping = "false",
    repetition_penalty: float = 1.0,
    usable_ids: int | None = None,
    ended: Callable[[list[int]], bool] = lambda tokens: False,
) -> list[Hypothesis]:
    """
    The ``num_beams`` best finished continuations of a prompt, best first.

    Each step extends every beam by every token and keeps the ``num_beams`` likeliest; a continuation that ends leaves the
    beams and competes as a whole, by its score.

    Args:
        prompt: at least one token id.
        length_penalty: above 0 favours longer continuations, below 0 shorter ones.
        early_stopping: when to stop before ``max_new_tokens``: ``true``, once ``num_beams`` have finished; ``false``, once
            the best beam could not do better if it ended now; ``never``, once it could not do better at any length.
        ended: asked whether a continuation is to end there, besides at the end-of-text token.

    Raises:
        DivergedError: the model's scores are not finite.
    """
    model.eval()
    beams = [_Beam([], 0.0)]
    finished: list[Hypothesis] = []
    cache: KVCache | None = None
    window = -1
    for length in range(1, max_new_tokens + 1):
        texts = [[*prompt, *beam.tokens] for beam in beams]
        start = window_start(len(texts[0]), model.config.n_positions)
        if cache is None or start != window:
            windows = [text[start:-1] for text in texts]
            cache, window = _filled(model, windows, len(prompt) + max_new_tokens), start
        last = torch.tensor([text[-1:] for text in texts], device=model.head_weight.device)
        logits = few_rows_linear(model(last, cache)[:, -1], model.head_weight)[:, :usable_ids].float()  # (beams, V)
        require_finite(logits)
        logprobs = logits.log_softmax(-1)
        if repetition_penalty != 1:
            logprobs = penalize_repetition(logprobs, torch.tensor(texts, device=logits.device), repetition_penalty)
        candidates = _extended(beams, _best(logprobs, beams, 2 * num_beams))
        last_step = length == max_new_tokens
        ends = [last_step or beam.tokens[-1] == end_of_text_id or ended(beam.tokens) for beam, _ in candidates]
        _finish(candidates, ends, finished, num_beams, length_penalty)
        going_on = [candidate for candidate, end in zip(candidates, ends, strict=True) if not end][:num_beams]
        beams, parents = [beam for beam, _ in going_on], [parent for _, parent in going_on]
        if not beams or _settled(beams[0].score, length, finished, num_beams, length_penalty, early_stopping, max_new_tokens):
            break
        if len(parents) == len(texts):
            cache.reorder(parents)
        else:
            cache = cache.select(parents)
    return finished


def _best(logprobs: Tensor, beams: list[_Beam], count: int) -> list[tuple[float, int, int]]:
    """The likeliest extensions as (summed log-probability, beam, token), best first."""
    sums = logprobs + torch.tensor([beam.score for beam in beams], device=logprobs.device)[:, None]  # (beams, V)
    best = sums.flatten().topk(min(count, sums.numel()))
    vocabulary = sums.size(1)
    pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
    return [(score, index // vocabulary, index % vocabulary) for score, index in pairs]


def _extended(beams: list[_Beam], best: list[tuple[float, int, int]]) -> list[tuple[_Beam, int]]:
    """The candidates as beams, each with the number of the beam that it goes on from."""
    return [(_Beam([*beams[parent].tokens, token], score), parent) for score, parent, token in best]


def _finish(
    candidates: list[tuple[_Beam, int]],
    ends: list[bool],
    finished: list[Hypothesis],
    num_beams: int,
    length_penalty: float,
) -> None:
    """Put the candidates that end among the finished hypotheses, of which the best ``num_beams`` stay, best first."""
    # An ending that is not among the best candidates is none: a beam that goes on is likelier.
    for (beam, _), end in zip(candidates[:num_beams], ends, strict=False):
        if end:
            finished.append(Hypothesis(beam.tokens, beam.score / len(beam.tokens) ** length_penalty))
    # The sort is stable: of equal scores the earlier stays in front.
    finished[:] = sorted(finished, key=lambda hypothesis: -hypothesis.score)[:num_beams]


def _settled(
    best: float,
    length: int,
    finished: list[Hypothesis],
    num_beams: int,
    length_penalty: float,
    early_stopping: EarlyStopping,
    max_new_tokens: int,
) -> bool:
    """Whether no running beam can get among the finished ones any more, as far as ``early_stopping`` looks ahead."""
    if len(finished) < num_beams:
        return False
    if early_stopping == "true":
        return True
    ahead = max_new_tokens if early_stopping == "never" and length_penalty > 0 else length
    reachable: float = best / math.pow(ahead, length_penalty)
    return reachable <= finished[-1].score


def _filled(model: GPT2, windows: list[list[int]], longest: int) -> KVCache:
    """A cache that holds the tokens of windows of one length; equal ones are computed once."""
    alike = all(window == windows[0] for window in windows)
    different = windows[:1] if alike else windows
    cache = new_cache(model, len(different), longest)
    if windows[0]:
        model(torch.tensor(different, device=cache.keys.device), cache)
    return cache.select([0] * len(windows)) if alike else cache
