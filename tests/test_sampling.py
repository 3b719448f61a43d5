"""From scores to a token: every filter against transformers', the draws against the probabilities they are from."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from groundup.generation.sampling import Sampler, keep_min_p, keep_top_k, keep_top_p, penalize_repetition

INFINITE = math.inf
MANY = settings(max_examples=100, deadline=None)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def probabilities(*values: float) -> Tensor:
    return torch.tensor(values).log()


def kept(scores: Tensor) -> list[int]:
    """Ids that may still be drawn."""
    return (scores > -INFINITE).nonzero().flatten().tolist()


@st.composite
def all_scores(draw: Any) -> Tensor:
    """Scores of a small vocabulary; half of the time so coarse that many are equal."""
    values = draw(st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=40))
    step = draw(st.sampled_from([0.0, 0.5, 2.0, 10.0]))
    return torch.tensor([round(value / step) * step if step else value for value in values])


def their_candidates(scores: Tensor, k: int = 0, p: float = 1.0, min_p: float = 0.0, temperature: float = 1.0) -> list[int]:
    """Ids that transformers' warpers leave, in its order."""
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warpers: list[Any] = [TemperatureLogitsWarper(float(temperature))]
    warpers += [TopKLogitsWarper(k)] if k else []
    warpers += [TopPLogitsWarper(p)] if p < 1 else []
    warpers += [MinPLogitsWarper(min_p)] if min_p else []
    warped = scores[None]
    for warper in warpers:
        warped = warper(None, warped)
    return kept(warped[0])


def near_an_edge(scores: Tensor, p: float) -> bool:
    """Whether a cut at p is so near to a token that the last bit of a sum decides."""
    tails = scores.double().softmax(-1).sort().values.cumsum(-1)
    return bool((tails - (1 - p)).abs().min() < 1e-6)


@MANY
@given(scores=all_scores(), k=st.integers(1, 60))
def test_top_k_keeps_the_candidates_of_transformers(scores, k):
    assert kept(keep_top_k(scores, k)) == their_candidates(scores, k)
    assert kept(Sampler(top_k=k).scores(scores)) == their_candidates(scores, k)


@MANY
@given(scores=all_scores(), p=st.floats(1e-6, 0.999999))
@example(torch.zeros(10), 0.5)
@example(torch.zeros(4), 0.75)
def test_top_p_keeps_the_candidates_of_transformers(scores, p):
    """The same operations in the same order: equal to the last bit, whichever of equal tokens goes."""
    assert kept(keep_top_p(scores, p)) == their_candidates(scores, p=p)


@MANY
@given(scores=all_scores(), min_p=st.floats(1e-6, 1.0))
@example(torch.zeros(4), 1.0)
def test_min_p_keeps_the_candidates_of_transformers(scores, min_p):
    assert kept(keep_min_p(scores, min_p)) == their_candidates(scores, min_p=min_p)


@MANY
@given(
    scores=all_scores(),
    k=st.integers(0, 45),
    p=st.one_of(st.just(1.0), st.floats(0.01, 0.999)),
    min_p=st.one_of(st.just(0.0), st.floats(0.001, 1.0)),
    temperature=st.floats(0.1, 5.0),
)
def test_all_filters_together_keep_the_candidates_of_transformers(scores, k, p, min_p, temperature):
    scores = (scores * 1024).round() / 1024  # equal ones stay equal whatever is taken off first
    found = Sampler(temperature, k, p, min_p).scores(scores)
    ours = kept(found)
    after_k = scores[their_candidates(scores, k, temperature=temperature)] / temperature
    after_p = scores[their_candidates(scores, k, p, temperature=temperature)] / temperature
    shares = after_p.double().softmax(-1)
    at_min_p = bool(((shares / shares.max() - min_p).abs() < 1e-5).any())
    if not (p < 1 and near_an_edge(after_k, p)) and not (min_p and at_min_p):
        # Of equal tokens at the edge of top-p any may go: sorting fewer of them may put them in another order.
        theirs = their_candidates(scores, k, p, min_p, temperature)
        assert scores[ours].sort().values.tolist() == scores[theirs].sort().values.tolist()
    assert ours, "something is always left"
    assert scores[ours].max() == scores.max()
    # Scores may be off by a constant: probabilities are the same.
    torch.testing.assert_close(found[ours] - found[ours].max(), (scores[ours] - scores.max()) / temperature)


def test_each_filter_of_a_sampler_takes_part_in_turn():
    """Top-p looks at what top-k left, min-p at what top-p left."""
    scores = probabilities(0.4, 0.3, 0.2, 0.06, 0.04)
    assert kept(Sampler(top_p=0.85).scores(scores)) == [0, 1, 2]
    assert kept(Sampler(top_k=3, top_p=0.7).scores(scores)) == [0, 1], "0.7 of the 0.9 that are left"
    assert kept(Sampler(top_k=4, min_p=0.45).scores(scores)) == [0, 1, 2]
    assert kept(Sampler(min_p=0.5, temperature=0.5).scores(scores)) == [0, 1], "temperature comes first"


@pytest.mark.parametrize(("k", "expected"), [(1, [1]), (2, [1, 3]), (3, [1, 2, 3]), (5, [0, 1, 2, 3]), (10**9, [0, 1, 2, 3])])
def test_top_k_by_hand(k, expected):
    scores = torch.tensor([0.0, 3.0, 1.0, 2.0])
    found = keep_top_k(scores, k)
    assert kept(found) == expected
    assert torch.equal(found[expected], scores[expected])


def test_tokens_as_likely_as_the_last_of_top_k_stay():
    assert kept(keep_top_k(torch.tensor([1.0, 2.0, 1.0, 0.0]), 2)) == [0, 1, 2]


@pytest.mark.parametrize(
    ("p", "expected"), [(1e-9, [2]), (0.49, [2]), (0.51, [0, 2]), (0.79, [0, 2]), (0.81, [0, 2, 3]), (0.96, [0, 1, 2, 3])]
)
def test_top_p_by_hand(p, expected):
    """The fewest whose probabilities, 0.5 + 0.3 + 0.15 + 0.05, reach p."""
    scores = probabilities(0.3, 0.05, 0.5, 0.15)
    assert kept(keep_top_p(scores, p)) == expected


@MANY
@given(scores=all_scores(), p=st.floats(1e-6, 0.9999))
def test_top_p_is_the_smallest_set_that_reaches_p(scores, p):
    share = scores.double().softmax(-1)[kept(keep_top_p(scores, p))]
    assert float(share.sum()) >= p - 1e-5
    assert float(share.sum() - share.min()) < p + 1e-5, "one fewer would not reach it"


@MANY
@given(scores=all_scores(), penalty=st.floats(0.1, 10.0), data=st.data())
def test_the_repetition_penalty_is_that_of_transformers(scores, penalty, data):
    from transformers import RepetitionPenaltyLogitsProcessor

    seen = torch.tensor(data.draw(st.lists(st.integers(0, len(scores) - 1), min_size=1, max_size=20)))
    expected = RepetitionPenaltyLogitsProcessor(penalty)(seen[None], scores[None].clone())[0]
    assert torch.equal(penalize_repetition(scores, seen, penalty), expected)
    rows = penalize_repetition(torch.stack([scores, -scores]), torch.stack([seen, seen.flip(0)]), penalty)
    assert torch.equal(rows[0], expected)
    assert torch.equal(rows[1], penalize_repetition(-scores, seen, penalty))


def test_the_repetition_penalty_comes_before_the_temperature_and_the_filters():
    scores, seen = torch.tensor([2.0, 1.5, 1.0, -1.0]), torch.tensor([0, 3, 3])
    assert kept(Sampler(top_k=1).scores(scores, seen)) == [0]
    assert kept(Sampler(top_k=1, repetition_penalty=2.0).scores(scores, seen)) == [1]
    assert Sampler(temperature=0, repetition_penalty=2.0).draw(scores, generator(), seen) == 1
    assert Sampler(temperature=0, repetition_penalty=2.0).scores(scores, seen).tolist() == [1.0, 1.5, 1.0, -2.0]


def test_temperature_0_takes_the_likeliest_whatever_the_filters():
    scores = torch.tensor([0.0, 3.0, 1.0, 2.0])
    assert {Sampler(0, top_k=3, top_p=0.9, min_p=0.1).draw(scores, generator(seed)) for seed in range(20)} == {1}


def chi_square(counts: Counter[int], expected: Tensor, draws: int) -> float:
    """Pearson's statistic; tokens that cannot be drawn must not be."""
    possible = (expected > 0).nonzero().flatten().tolist()
    assert set(counts) <= set(possible)
    return sum((counts[i] - draws * float(expected[i])) ** 2 / (draws * float(expected[i])) for i in possible)


def critical(freedom: int) -> float:
    """The value that a true fit exceeds once in 10,000 times (Wilson and Hilferty 1931)."""
    return freedom * (1 - 2 / (9 * freedom) + 3.719 * math.sqrt(2 / (9 * freedom))) ** 3


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 2.0},
        {"temperature": 0.5},
        {"top_k": 4},
        {"top_p": 0.8},
        {"min_p": 0.2},
        {"temperature": 1.5, "top_k": 6, "top_p": 0.95, "min_p": 0.1, "repetition_penalty": 1.5},
    ],
    ids=str,
)
def test_draws_follow_the_filtered_probabilities(options):
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    scores, seen, draws = torch.tensor([1.0, 0.2, -0.5, 2.0, 0.9, 1.4, -1.0, 0.0]), torch.tensor([3, 6]), 3000
    makers: dict[str, Any] = {
        "repetition_penalty": RepetitionPenaltyLogitsProcessor,
        "temperature": TemperatureLogitsWarper,
        "top_k": TopKLogitsWarper,
        "top_p": TopPLogitsWarper,
        "min_p": MinPLogitsWarper,
    }
    warp = LogitsProcessorList(make(options[name]) for name, make in makers.items() if name in options)
    expected = warp(seen[None], scores[None].clone())[0].softmax(-1)
    sampler, stream = Sampler(**options), generator(1)
    counts = Counter(sampler.draw(scores, stream, seen) for _ in range(draws))
    freedom = int((expected > 0).sum()) - 1
    assert chi_square(counts, expected, draws) < critical(freedom)
    # The test can tell: the same counts do not fit other probabilities.
    other = torch.where(expected > 0, expected * torch.linspace(1, 3, 8), 0)
    assert chi_square(counts, other / other.sum(), draws) > critical(freedom)


def test_the_same_stream_draws_the_same_and_another_another():
    scores = torch.zeros(50)
    first, second, third = (
        [Sampler().draw(scores, stream) for _ in range(20)] for stream in map(generator, (5, 5, 6))
    )  # fmt: skip
    assert first == second != third


def test_scores_in_bf16_are_filtered_in_float32():
    scores = torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16)
    found = Sampler(temperature=0.7, top_p=0.9).scores(scores)
    assert found.dtype == torch.float32
    assert torch.equal(found, Sampler(temperature=0.7, top_p=0.9).scores(scores.float()))


@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-39, 1e-45, 1e-50, 5e-324])
def test_any_temperature_near_0_takes_the_likeliest(temperature):
    assert Sampler(temperature).draw(torch.tensor([-500.0, 80.0, 79.0, 500.0]), generator()) == 3


@pytest.mark.parametrize("temperature", [1e3, 1e38, 1e300])
def test_any_high_temperature_draws_evenly(temperature):
    stream = generator()
    counts = Counter(Sampler(temperature).draw(torch.tensor([-5.0, 0.0, 5.0]), stream) for _ in range(900))
    assert chi_square(counts, torch.full((3,), 1 / 3), 900) < critical(2)


@pytest.mark.parametrize("penalty", [1e-300, 1e-40, 1e40, 1e300])
@pytest.mark.parametrize("seen", [[0], [0, 1, 2]])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_absurd_penalty_still_draws_something(penalty, seen, temperature):
    scores = torch.tensor([1.0, -1.0, 0.5])
    assert Sampler(temperature, repetition_penalty=penalty).draw(scores, generator(), torch.tensor(seen)) in (0, 1, 2)


@settings(max_examples=60, deadline=None)
@given(scores=all_scores(), k=st.integers(1, 45), seed=st.integers(0, 2**31))
def test_what_a_filter_removed_is_never_drawn(scores, k, seed):
    sampler, stream = Sampler(temperature=3.0, top_k=k, top_p=0.9, min_p=0.01), generator(seed)
    allowed = kept(sampler.scores(scores))
    assert all(sampler.draw(scores, stream) in allowed for _ in range(10))
