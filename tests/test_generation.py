"""Text from a model: with and without the cache, by every filter, character by character."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import groundup
from groundup.generation.generate import generate_tokens, readable, window_start
from groundup.generation.sampling import greedy, keep_top_k, keep_top_p, sampler
from groundup.interop.huggingface import save_model
from groundup.model.gpt2 import GPT2, GPT2Config, initialize
from groundup.tokenizer.tokenizer import byte_tokenizer
from tests.conftest import TINY

CONFIG = GPT2Config(vocab_size=31, n_positions=12, n_embd=16, n_layer=2, n_head=2)
NEVER = 99  # an end-of-text id that this vocabulary does not have


def new_model(config: GPT2Config = CONFIG, seed: int = 0) -> GPT2:
    """Weights ten times GPT-2's initial ones: the most likely token is far ahead, and depends on all of the context."""
    model = GPT2(config)
    initialize(model, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10.0 if parameter.dim() > 1 else 1.0)
    return model


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return torch.randint(CONFIG.vocab_size, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def continue_(
    model: GPT2, prompt: list[int], tokens: int = 20, *, choose: Any = greedy, end: int = NEVER, **options: Any
) -> Any:
    return list(generate_tokens(model, prompt, choose, max_new_tokens=tokens, end_of_text_id=end, **options))


def warm(seed: int = 0, **options: Any) -> Any:
    return sampler(**{"temperature": 0.9, "top_k": 0, "top_p": 1.0, "seed": seed} | options)


@settings(max_examples=25, deadline=None)
@given(length=st.integers(1, 40), positions=st.integers(1, 12), seed=st.integers(0, 9))
def test_the_cache_changes_no_token(length, positions, seed):
    """Within the context and far beyond it, where the window moves; greedy and sampled."""
    model = new_model(GPT2Config(**vars(CONFIG) | {"n_positions": positions}), seed)
    prompt = prompt_of(length, seed)
    for chooser in (lambda: greedy, lambda: warm(seed)):
        plain = continue_(model, prompt, 2 * positions + 3, choose=chooser(), use_cache=False)
        assert len(plain) == 2 * positions + 3
        assert continue_(model, prompt, 2 * positions + 3, choose=chooser()) == plain


def test_within_the_context_every_token_is_seen():
    """By hand, without any window: the next token is chosen from the logits of all tokens so far."""
    model, ids = new_model(), prompt_of(3)
    for token in continue_(model, prompt_of(3), CONFIG.n_positions - 3 + 1):
        with torch.no_grad():
            assert token == int(model.logits(model.eval()(torch.tensor([ids])))[0, -1].argmax())
        ids.append(token)


@given(tokens=st.integers(1, 5000), positions=st.integers(1, 300))
def test_the_window_holds_at_least_half_a_context_and_moves_seldom(tokens, positions):
    seen = tokens - window_start(tokens, positions)
    assert min(tokens, max(1, positions // 2)) <= seen <= positions
    assert window_start(tokens, positions) % max(1, positions // 2) == 0
    assert window_start(tokens + 1, positions) >= window_start(tokens, positions)


def test_greedy_is_what_transformers_generates(tmp_path):
    import transformers

    model, prompt = new_model(), prompt_of(4)
    save_model(model, tmp_path, end_of_text_id=30)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = theirs.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=8, pad_token_id=0, eos_token_id=NEVER
        )  # fmt: skip
    assert continue_(model, prompt, 8) == expected[0, 4:].tolist()


def test_the_same_seed_gives_the_same_text_and_another_seed_another():
    model, prompt = new_model(), prompt_of(4)
    first = continue_(model, prompt, choose=warm(7, temperature=2.0))
    torch.rand(10)  # what others draw does not matter
    assert continue_(model, prompt, choose=warm(7, temperature=2.0)) == first
    assert continue_(model, prompt, choose=warm(8, temperature=2.0)) != first


@settings(max_examples=20, deadline=None)
@given(length=st.integers(1, 15), seed=st.integers(0, 9))
def test_top_k_1_and_temperature_0_are_greedy(length, seed):
    model, prompt = new_model(seed=seed), prompt_of(length, seed)
    expected = continue_(model, prompt)
    assert continue_(model, prompt, choose=warm(seed, top_k=1)) == expected
    assert continue_(model, prompt, choose=warm(seed, temperature=0)) == expected
    assert continue_(model, prompt, choose=warm(seed, top_p=1e-9)) == expected


def test_generating_leaves_the_random_state_alone():
    """A sample in the middle of training must not move what training draws."""
    model = new_model()
    before = torch.random.get_rng_state()
    continue_(model, prompt_of(4), choose=warm())
    assert torch.equal(torch.random.get_rng_state(), before)


def probabilities(*values: float) -> Tensor:
    return torch.tensor(values).log()


INFINITE = -math.inf


@pytest.mark.parametrize(
    ("k", "kept"), [(1, [1]), (2, [1, 3]), (3, [1, 2, 3]), (4, [0, 1, 2, 3]), (5, [0, 1, 2, 3]), (10**9, [0, 1, 2, 3])]
)
def test_top_k_by_hand(k, kept):
    scores = torch.tensor([0.0, 3.0, 1.0, 2.0])
    expected = torch.tensor([value if index in kept else INFINITE for index, value in enumerate(scores.tolist())])
    assert torch.equal(keep_top_k(scores, k), expected)


def test_top_k_keeps_k_of_equal_scores():
    assert int(keep_top_k(torch.zeros(10), 3).isfinite().sum()) == 3


@pytest.mark.parametrize(
    ("p", "kept"),
    [(0.01, [2]), (0.49, [2]), (0.51, [2, 0]), (0.79, [2, 0]), (0.81, [2, 0, 3]), (0.96, [2, 0, 3, 1]), (1.0, [2, 0, 3, 1])],
)
def test_top_p_by_hand(p, kept):
    """The fewest whose probabilities, 0.5 + 0.3 + 0.15 + 0.05, reach p."""
    scores = probabilities(0.3, 0.05, 0.5, 0.15)
    found = keep_top_p(scores, p)
    assert set(found.isfinite().nonzero().flatten().tolist()) == set(kept)
    assert torch.equal(found[kept], scores[kept])


@settings(max_examples=50, deadline=None)
@given(scores=st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=30), p=st.floats(1e-6, 1.0))
def test_top_p_is_the_smallest_set_that_reaches_p(scores, p):
    tensor = torch.tensor(scores)
    kept = keep_top_p(tensor, p).isfinite()
    share = tensor.double().softmax(-1)[kept]
    assert int(kept.sum()) >= 1
    assert float(share.sum()) >= min(p, 1.0) - 1e-5
    assert float(share.sum() - share.min()) < p + 1e-5, "one fewer would not reach it"
    assert int(tensor.argmax()) in kept.nonzero().flatten().tolist() or float(tensor.max()) in tensor[kept].tolist()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 99), k=st.integers(1, 12), p=st.floats(0.05, 0.99), temperature=st.floats(0.2, 3.0))
def test_the_filters_are_those_of_transformers(seed, k, p, temperature):
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores = torch.randn(12, generator=torch.Generator().manual_seed(seed))
    expected = scores[None]
    for warper in (TemperatureLogitsWarper(temperature), TopKLogitsWarper(k), TopPLogitsWarper(p)):
        expected = warper(None, expected)
    found = keep_top_p(keep_top_k(scores / temperature, k), p)
    assert torch.equal(found.isfinite(), expected[0].isfinite())


def test_draws_follow_the_probabilities():
    choose = sampler(temperature=1.0, top_k=0, top_p=1.0, seed=0)
    scores = probabilities(0.7, 0.2, 0.1)
    counts = torch.bincount(torch.tensor([choose(scores) for _ in range(4000)]), minlength=3) / 4000
    torch.testing.assert_close(counts, torch.tensor([0.7, 0.2, 0.1]), atol=0.03, rtol=0)


def test_temperature_divides_the_scores():
    """At temperature 2, odds of 9 : 1 become 3 : 1."""
    choose = sampler(temperature=2.0, top_k=0, top_p=1.0, seed=0)
    share = sum(choose(probabilities(0.9, 0.1)) == 0 for _ in range(4000)) / 4000
    assert share == pytest.approx(0.75, abs=0.03)


def test_filtered_tokens_are_never_drawn():
    choose = sampler(temperature=5.0, top_k=2, top_p=1.0, seed=0)
    assert {choose(torch.tensor([0.0, 3.0, 1.0, 2.0])) for _ in range(200)} == {1, 3}


def test_end_of_text_stops_and_is_yielded():
    model, prompt = new_model(), prompt_of(4)
    tokens = continue_(model, prompt)
    end = tokens[5]
    assert continue_(model, prompt, end=end) == tokens[: tokens.index(end) + 1]
    assert continue_(model, prompt, tokens=3) == tokens[:3]


def test_generating_turns_dropout_off():
    model = new_model(GPT2Config(**vars(CONFIG) | {"resid_pdrop": 0.5})).train()
    prompt = prompt_of(4)
    assert continue_(model, prompt) == continue_(new_model(), prompt)


def test_tokens_come_one_by_one():
    """Nothing is computed that nobody asks for: streaming can be stopped."""
    calls: list[int] = []

    def counting(logits: Tensor) -> int:
        calls.append(1)
        return greedy(logits)

    tokens = generate_tokens(new_model(), prompt_of(4), counting, max_new_tokens=10, end_of_text_id=NEVER)
    next(tokens)
    next(tokens)
    assert len(calls) == 2


BYTES = byte_tokenizer()


@given(text=st.text(max_size=40))
def test_readable_gives_whole_characters_that_add_up_to_the_text(text):
    parts = list(readable(text.encode("utf-8", "surrogatepass"), BYTES.token_bytes))
    assert "".join(parts) == BYTES.decode(text.encode("utf-8", "surrogatepass"))
    assert all(parts), "no empty pieces"


@given(text=st.text(min_size=1, max_size=20))
def test_a_character_comes_with_its_last_byte(text):
    """One byte a token: no piece is a part of a character, and none waits for the next."""
    encoded = text.encode()
    parts = readable(iter(encoded), BYTES.token_bytes)
    assert list(parts) == list(text)


@given(ids=st.lists(st.integers(0, 256), max_size=40))
def test_bytes_that_are_no_text_are_replaced_as_decode_does(ids):
    assert "".join(readable(ids, BYTES.token_bytes)) == BYTES.decode(ids)


def test_half_a_character_at_the_end_is_shown_as_missing():
    assert list(readable("é".encode()[:1], BYTES.token_bytes)) == ["�"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generation")
    (folder / "text.txt").write_text("the cat sat on the mat. " * 100, encoding="utf-8")
    groundup.train(folder / "text.txt", folder / "run", **TINY | {"eval_steps": 0})
    return folder / "run"


def completions(run: Path, **options: Any) -> list[SimpleNamespace]:
    found = groundup.generate(run, device="cpu", **options)["completions"]
    return [SimpleNamespace(**completion) for completion in found]


def test_the_command_completes_each_prompt(run):
    found = completions(run, prompt=("the ", "cat"), max_new_tokens=9)
    assert [c.prompt for c in found] == ["the ", "cat"]
    for completion in found:
        assert 1 <= len(completion.token_ids) <= 9
        assert completion.finish_reason == ("stop" if completion.token_ids[-1] == 256 else "length")
        assert completion.text == BYTES.decode(completion.token_ids)


def test_a_prompt_completes_alike_alone_and_among_others(run):
    """Each prompt has draws of its own."""
    both = completions(run, prompt=("the ", "cat"), max_new_tokens=9)
    assert completions(run, prompt="cat", max_new_tokens=9)[0].token_ids == both[1].token_ids


def test_an_empty_prompt_starts_a_document(run):
    model, tokenizer = groundup.load(run).model, groundup.load(run).tokenizer
    expected = continue_(model, [tokenizer.end_of_text_id], 5, end=tokenizer.end_of_text_id)
    assert completions(run, prompt="", max_new_tokens=5, temperature=0)[0].token_ids == expected


def test_a_prompt_longer_than_the_context_works(run):
    assert len(completions(run, prompt="the cat sat on the mat. " * 5, max_new_tokens=20, temperature=0)[0].token_ids) == 20


def test_a_model_with_spare_ids_never_writes_them(tmp_path):
    """Vocabularies are often padded for speed (50,257 to 50,304): ids without a token have no text to show."""
    model = new_model(GPT2Config(vocab_size=400, n_positions=12, n_embd=16, n_layer=1, n_head=2))
    save_model(model, tmp_path, end_of_text_id=256)
    BYTES.save(tmp_path)
    found = completions(tmp_path, prompt=("the ", "cat", "mat"), max_new_tokens=30, temperature=3.0, top_k=0)
    assert all(token <= 256 for completion in found for token in completion.token_ids)
