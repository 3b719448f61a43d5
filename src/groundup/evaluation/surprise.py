"""How surprised a model is by each token of a text."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from groundup.model.finite import require_finite
from groundup.model.gpt2 import GPT2

ROWS = 128
"""Places whose logits are formed at once: 25 MiB in float32 with GPT-2's vocabulary."""


@dataclass(frozen=True)
class Surprise:
    """One token, as the model expected it or not."""

    token: int
    logprob: float
    """Natural logarithm of the probability that the model gave it; minus this is its surprise in nats."""
    rank: int
    """How many tokens the model thought likelier."""
    top: tuple[tuple[int, float], ...]
    """The likeliest tokens there with their log-probabilities, best first."""


@torch.inference_mode()
def token_surprise(
    model: GPT2, context: Sequence[int], tokens: Sequence[int], *, top_logprobs: int = 0, usable_ids: int | None = None
) -> list[Surprise]:
    """
    The model's probability of each token, given the context and the tokens before it.

    A text longer than the model's context is seen through windows that overlap by half, so that each token is predicted
    from at least half a context where there is that much.

    Args:
        context: at least one token id, itself not scored.
        usable_ids: probabilities are among the ids below this: a padded vocabulary has ids without a token.

    Raises:
        DivergedError: the model's scores are not finite.
    """
    model.eval()
    length = model.config.n_positions
    # Of a context longer than the model's only the end is seen.
    ids = [*context[-length:], *tokens]
    first = len(ids) - len(tokens)
    found: list[Surprise] = []
    start = 0
    while first < len(ids):
        window = torch.tensor([ids[start : start + length]], device=model.head_weight.device)
        hidden = model(window)[0]  # (T, C)
        end = min(start + length + 1, len(ids))
        for begin in range(first, end, ROWS):
            stop = min(begin + ROWS, end)
            rows = hidden[begin - 1 - start : stop - 1 - start]  # the place before a token predicts it
            found += _surprises(model.logits(rows)[:, :usable_ids].float(), ids[begin:stop], top_logprobs)
        first = end
        start = max(0, end - 1 - length + max(1, length // 2))
    return found


def _surprises(logits: torch.Tensor, tokens: list[int], top_logprobs: int) -> list[Surprise]:
    """Surprises of N tokens from the logits (N, V) of their places."""
    require_finite(logits)
    logprobs = logits.log_softmax(-1)
    own = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])  # (N, 1)
    ranks = (logprobs > own).sum(1).tolist()
    best = logprobs.topk(min(top_logprobs, logprobs.size(1)))
    tops = [tuple(zip(i, v, strict=True)) for i, v in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
    return [Surprise(*facts) for facts in zip(tokens, own[:, 0].tolist(), ranks, tops, strict=True)]
