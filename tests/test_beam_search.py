"""Beam search: the ids and scores of transformers, and of a reference that computes everything anew."""

import itertools
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import groundup
from groundup.errors import DivergedError
from groundup.evaluation.surprise import token_surprise
from groundup.generation.beam_search import Hypothesis, beam_search
from groundup.generation.generate import generate_tokens, window_start
from groundup.generation.sampling import Sampler
from groundup.interop.huggingface import config_to_hugging_face, save_model, to_hugging_face
from groundup.model.gpt2 import GPT2, GPT2Config
from groundup.model.initial import initialize
from groundup.tokenizer.tokenizer import byte_tokenizer

NEVER = 10**6


def new_model(vocab_size: int = 11, n_positions: int = 64, heads: int = 2, layers: int = 1, seed: int = 0, noise: float = 0.4):
    """In float64, so that the order of a sum decides nothing."""
    config = GPT2Config(vocab_size=vocab_size, n_positions=n_positions, n_embd=8 * heads, n_layer=layers, n_head=heads)
    model, generator = GPT2(config).double(), torch.Generator().manual_seed(seed)
    initialize(model, generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=noise)
    return model.eval()


def prompt_of(length: int, seed: int = 0, below: int = 10) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(below) for _ in range(length)]


def their_beams(model: GPT2, prompt: list[int], end: int, early_stopping: str, **options: Any) -> list[tuple[list[int], float]]:
    """What transformers finds: ids up to the end of the text, and scores."""
    import transformers

    described = config_to_hugging_face(model.config, end)
    described = {key: value for key, value in described.items() if key not in ("architectures", "model_type", "dtype")}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**described))
    theirs.load_state_dict(to_hugging_face(model.state_dict()), strict=False)
    theirs.tie_weights()
    with torch.no_grad():
        found = theirs.double().eval().generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
            num_return_sequences=options["num_beams"], pad_token_id=end,
            early_stopping={"true": True, "false": False, "never": "never"}[early_stopping],
            eos_token_id=end, bos_token_id=end, return_dict_in_generate=True, output_scores=True, **options,
        )  # fmt: skip
    results = []
    for row, score in zip(found.sequences.tolist(), found.sequences_scores.tolist(), strict=True):
        tokens = row[len(prompt) :]
        if score > -1e8:  # else it is one that could not be: fewer texts than beams are possible
            results.append((tokens[: tokens.index(end) + 1] if end in tokens else tokens, score))
    return results


def check_against_transformers(seed: int) -> None:
    draw = random.Random(seed)
    vocabulary = draw.choice([3, 5, 11, 40])
    model = new_model(
        vocabulary, heads=draw.choice([1, 2]), layers=draw.choice([1, 2]), seed=seed, noise=draw.choice([0.1, 0.5, 1.5])
    )
    prompt = prompt_of(draw.randint(1, 9), seed, vocabulary - 1)
    options: dict[str, Any] = {
        "num_beams": draw.randint(2, 5),
        "length_penalty": draw.choice([-1.0, 0.0, 0.5, 1.0, 2.0]),
        "early_stopping": draw.choice(["false", "true", "never"]),
        "repetition_penalty": draw.choice([1.0, 1.3]),
        "max_new_tokens": draw.randint(1, 20),
    }
    expected = their_beams(model, prompt, vocabulary - 1, **options)
    found = beam_search(model, prompt, end_of_text_id=vocabulary - 1, **options)
    assert [hypothesis.tokens for hypothesis in found] == [tokens for tokens, _ in expected], options
    assert [hypothesis.score for hypothesis in found] == pytest.approx([score for _, score in expected], rel=1e-5, abs=1e-4), (
        options
    )


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_beams_are_those_of_transformers(seed):
    check_against_transformers(seed)


@pytest.mark.parametrize("power", [-1.0, 0.0, 1.0])
def test_never_looks_ahead_only_where_longer_texts_are_favoured(power):
    """A very sure model, in which the one or the other limit decides."""
    for seed in (128, 138, 139):
        for vocabulary, num_beams in ((3, 2), (5, 3)):
            model, prompt = new_model(vocabulary, seed=seed, noise=1.5), prompt_of(4, seed, vocabulary - 1)
            options = {"num_beams": num_beams, "length_penalty": power, "early_stopping": "never", "max_new_tokens": 14}
            expected = their_beams(model, prompt, vocabulary - 1, **options)
            found = beam_search(model, prompt, end_of_text_id=vocabulary - 1, **options)
            assert [hypothesis.tokens for hypothesis in found] == [tokens for tokens, _ in expected]


@pytest.mark.slow
@pytest.mark.parametrize("early_stopping", ["false", "true", "never"])
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("num_beams", [2, 3, 4, 5])
def test_every_setting_of_beams_is_that_of_transformers(num_beams, length_penalty, early_stopping):
    for seed, penalty in itertools.product(range(2), (1.0, 1.4)):
        model, prompt = new_model(9, seed=seed, noise=0.4 + seed), prompt_of(4, seed, 8)
        options = {
            "num_beams": num_beams, "length_penalty": length_penalty, "early_stopping": early_stopping,
            "repetition_penalty": penalty, "max_new_tokens": 14,
        }  # fmt: skip
        expected = their_beams(model, prompt, 8, **options)
        found = beam_search(model, prompt, end_of_text_id=8, **options)
        assert [hypothesis.tokens for hypothesis in found] == [tokens for tokens, _ in expected]
        assert [hypothesis.score for hypothesis in found] == pytest.approx([score for _, score in expected], rel=1e-5, abs=1e-4)


# --- a reference: no cache, no tensors of beams ---


def next_logprobs(model: GPT2, ids: list[int], usable: int | None = None) -> Tensor:
    start = window_start(len(ids), model.config.n_positions)
    with torch.no_grad():
        logits = model.logits(model(torch.tensor([ids[start:]])))[0, -1, :usable]
    return logits.float().log_softmax(-1)


def reference(
    model: GPT2,
    prompt: list[int],
    num_beams: int,
    tokens: int,
    *,
    end: int = NEVER,
    usable: int | None = None,
    ended: Callable[[list[int]], bool] = lambda tokens: False,
) -> list[tuple[list[int], float]]:
    """
    The definition with the default settings, without a cache: all beams are computed anew at every step.

    Where two texts are equally likely, any of them may be kept; such examples are passed over.
    """
    beams: list[tuple[list[int], float]] = [([], 0.0)]
    finished: list[tuple[list[int], float]] = []
    for length in range(1, tokens + 1):
        extended = [
            ([*text, token], total + float(logprob))
            for text, total in beams
            for token, logprob in enumerate(next_logprobs(model, [*prompt, *text], usable))
        ]
        extended = sorted(extended, key=lambda pair: -pair[1])[: 2 * num_beams + 1]
        assume(all(better[1] - worse[1] > 1e-5 for better, worse in itertools.pairwise(extended)))
        extended = extended[: 2 * num_beams]
        beams = []
        for rank, (text, total) in enumerate(extended):
            if text[-1] == end or length == tokens or ended(text):
                finished += [(text, total / length)] if rank < num_beams else []
            elif len(beams) < num_beams:
                beams.append((text, total))
        finished = sorted(finished, key=lambda pair: -pair[1])
        assume(all(better[1] - worse[1] > 1e-5 for better, worse in itertools.pairwise(finished)))
        finished = finished[:num_beams]
        if not beams or (len(finished) == num_beams and beams[0][1] / length <= finished[-1][1]):
            break
    return finished


def same(found: list[Hypothesis], expected: list[tuple[list[int], float]]) -> None:
    assert [hypothesis.tokens for hypothesis in found] == [tokens for tokens, _ in expected]
    assert [hypothesis.score for hypothesis in found] == pytest.approx([score for _, score in expected], rel=1e-5, abs=1e-4)


@settings(max_examples=10, deadline=None)
@given(
    length=st.integers(1, 25),
    positions=st.integers(1, 10),
    num_beams=st.integers(2, 5),
    end=st.sampled_from([NEVER, 3]),
    seed=st.integers(0, 999),
)
def test_beams_go_on_beyond_the_context(length, positions, num_beams, end, seed):
    """Prompts longer than it, and windows that move while beams change places."""
    model, prompt = new_model(n_positions=positions, seed=seed), prompt_of(length, seed)
    tokens = positions + 4
    found = beam_search(model, prompt, num_beams=num_beams, max_new_tokens=tokens, end_of_text_id=end)
    same(found, reference(model, prompt, num_beams, tokens, end=end))


@settings(max_examples=10, deadline=None)
@given(usable=st.integers(1, 10), num_beams=st.integers(2, 5), seed=st.integers(0, 999))
def test_ids_without_a_token_are_in_no_beam(usable, num_beams, seed):
    """Also where there are fewer ids than beams."""
    model = new_model(seed=seed)
    found = beam_search(model, [0], num_beams=num_beams, max_new_tokens=5, end_of_text_id=NEVER, usable_ids=usable)
    assert all(token < usable for hypothesis in found for token in hypothesis.tokens)
    same(found, reference(model, [0], num_beams, 5, usable=usable))


@settings(max_examples=10, deadline=None)
@given(num_beams=st.integers(2, 5), modulus=st.integers(1, 4), seed=st.integers(0, 999))
def test_who_asks_can_end_a_beam(num_beams, modulus, seed):
    """Also where so many end at once that fewer beams are left, or none."""
    model, prompt = new_model(seed=seed), prompt_of(5, seed)

    def ended(tokens: list[int]) -> bool:
        return tokens[-1] % modulus == 0 or len(tokens) == 6

    found = beam_search(model, prompt, num_beams=num_beams, max_new_tokens=9, end_of_text_id=3, ended=ended)
    same(found, reference(model, prompt, num_beams, 9, end=3, ended=ended))
    for hypothesis in found:
        assert ended(hypothesis.tokens) or hypothesis.tokens[-1] == 3
        assert not any(ended(hypothesis.tokens[:n]) or hypothesis.tokens[n - 1] == 3 for n in range(1, len(hypothesis.tokens)))


@settings(max_examples=8, deadline=None)
@given(length=st.integers(1, 3), vocabulary=st.integers(2, 4), seed=st.integers(0, 999))
def test_enough_beams_find_the_likeliest_texts_of_all(length, vocabulary, seed):
    """By trying every text."""
    model, prompt = new_model(vocabulary, seed=seed), [0, 1]
    totals = {}
    for tokens in itertools.product(range(vocabulary), repeat=length):
        totals[tokens] = sum(float(next_logprobs(model, [*prompt, *tokens[:n]])[tokens[n]]) for n in range(length))
    best = sorted(totals, key=lambda tokens: -totals[tokens])
    found = beam_search(model, prompt, num_beams=vocabulary**length, max_new_tokens=length, end_of_text_id=NEVER)
    assert [tuple(hypothesis.tokens) for hypothesis in found] == best
    assert [hypothesis.score for hypothesis in found] == pytest.approx([totals[tokens] / length for tokens in best], abs=1e-4)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 999), power=st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0]))
def test_a_score_is_the_models_logprob_divided_by_length_to_the_power(seed, power):
    model, prompt = new_model(seed=seed), prompt_of(4, seed)
    found = beam_search(model, prompt, num_beams=3, max_new_tokens=10, end_of_text_id=3, length_penalty=power)
    assert len(found) == 3
    for hypothesis in found:
        total = sum(place.logprob for place in token_surprise(model, prompt, hypothesis.tokens))
        assert hypothesis.score == pytest.approx(total / len(hypothesis.tokens) ** power, abs=1e-4)
    assert [hypothesis.score for hypothesis in found] == sorted((hypothesis.score for hypothesis in found), reverse=True)


def test_a_higher_length_penalty_finds_longer_texts():
    def mean_length(power: float) -> float:
        lengths = []
        for seed in range(12):
            found = beam_search(
                new_model(seed=seed), prompt_of(3, seed), num_beams=4, max_new_tokens=12, end_of_text_id=3,
                length_penalty=power, early_stopping="never",
            )  # fmt: skip
            lengths.append(len(found[0].tokens))
        return sum(lengths) / len(lengths)

    assert mean_length(-2.0) < mean_length(0.0) < mean_length(3.0)


def test_one_beam_is_greedy():
    model, prompt = new_model(), prompt_of(4)
    found = beam_search(model, prompt, num_beams=1, max_new_tokens=12, end_of_text_id=NEVER)
    drawn = generate_tokens(model, [prompt], Sampler(0), seeds=[0], max_new_tokens=12, end_of_text_id=NEVER)
    assert [hypothesis.tokens for hypothesis in found] == [[choice.token for choice in drawn]]


def test_searching_leaves_the_random_state_alone_and_turns_dropout_off():
    model = new_model()
    expected = beam_search(model, [1, 2], num_beams=3, max_new_tokens=8, end_of_text_id=NEVER)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    before = torch.random.get_rng_state()
    assert beam_search(model.train(), [1, 2], num_beams=3, max_new_tokens=8, end_of_text_id=NEVER) == expected
    assert torch.equal(torch.random.get_rng_state(), before)


def test_scores_that_are_not_finite_are_refused():
    model = new_model()
    with torch.no_grad():
        model.ln_f.weight[0] = torch.nan
    with pytest.raises(DivergedError, match="not finite"):
        beam_search(model, [1], num_beams=2, max_new_tokens=3, end_of_text_id=NEVER)


# --- the recipe ---


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("beams")
    save_model(new_model(300, 32, noise=0.3).float(), folder, end_of_text_id=256)
    byte_tokenizer().save(folder)
    return folder


def test_the_best_beams_come_in_order_with_scores_and_logprobs(model_folder):
    options: dict[str, Any] = {"device": "cpu", "num_beams": 4, "max_new_tokens": 8, "length_penalty": 0.5}
    four = groundup.generate(model_folder, prompt=("the", ""), num_return_sequences=4, **options)["completions"]
    one = groundup.generate(model_folder, prompt=("the", ""), **options)["completions"]
    assert [four[0], four[4]] == one
    assert [completion["prompt"] for completion in four] == ["the"] * 4 + [""] * 4
    assert [c["score"] for c in four[:4]] == sorted((c["score"] for c in four[:4]), reverse=True)
    for completion in four:
        total = sum(fact["logprob"] for fact in completion["logprobs"])
        assert completion["score"] == pytest.approx(total / math.sqrt(len(completion["token_ids"])), abs=1e-4)
        assert [fact["id"] for fact in completion["logprobs"]] == completion["token_ids"]
        assert [len(fact["top_logprobs"]) for fact in completion["logprobs"]] == [5] * len(completion["token_ids"])


def test_a_stop_string_ends_a_beam(model_folder):
    options: dict[str, Any] = {"device": "cpu", "num_beams": 3, "max_new_tokens": 8, "num_return_sequences": 3}
    plain = groundup.generate(model_folder, prompt="the", **options)["completions"]
    stop = next(text[2] for text in (completion["text"] for completion in plain) if text[2] not in text[:2])
    found = groundup.generate(model_folder, prompt="the", stop_strings=stop, **options)["completions"]
    assert any(completion["stop_string"] == stop for completion in found)
    for completion in found:
        assert stop not in completion["text"]
        assert completion["finish_reason"] == ("stop" if completion["stop_string"] else "length")
