"""Text from a model: the numbers of transformers, the cache, texts side by side, text character by character, the command."""

import itertools
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import groundup
from groundup.errors import ConfigError, DataError, DivergedError
from groundup.generation.generate import Drawn, generate_tokens, new_cache, window_start
from groundup.generation.inference import FewRowsLinear, for_inference
from groundup.generation.sampling import Sampler
from groundup.generation.text import TextStream
from groundup.interop.huggingface import config_to_hugging_face, save_model, to_hugging_face
from groundup.model.gpt2 import GPT2, GPT2Config
from groundup.model.initial import initialize
from groundup.model.kv_cache import KVCache
from groundup.tokenizer.tokenizer import byte_tokenizer
from tests.conftest import TINY
from tests.conftest import groundup as command
from tests.test_cli_errors import refused, refused_at_once

CONFIG = GPT2Config(vocab_size=31, n_positions=12, n_embd=16, n_layer=2, n_head=2)
NEVER = 99  # an end-of-text id that this vocabulary does not have
CPU = torch.device("cpu")
FEW = settings(max_examples=10, deadline=None)


def new_model(config: GPT2Config = CONFIG, seed: int = 0) -> GPT2:
    """In float64, so that the order of a sum decides nothing; weights so large that each token depends on all before it."""
    model = GPT2(config).double()
    initialize(model, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10.0 if parameter.dim() > 1 else 1.0)
    return model.eval()


def with_positions(n_positions: int, **others: Any) -> GPT2Config:
    return GPT2Config(**vars(CONFIG) | {"n_positions": n_positions} | others)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return torch.randint(CONFIG.vocab_size, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


GREEDY = Sampler(temperature=0)
WARM = Sampler(temperature=1.5, top_k=20, top_p=0.95, min_p=0.01, repetition_penalty=1.2)


def drawn(
    model: GPT2, prompts: list[list[int]], tokens: int = 10, *, sampler: Sampler = WARM, end: int = NEVER, **options: Any
) -> list[Drawn]:
    options = {"seeds": range(len(prompts))} | options
    return list(generate_tokens(model, prompts, sampler, max_new_tokens=tokens, end_of_text_id=end, **options))


def texts(model: GPT2, prompts: list[list[int]], tokens: int = 10, **options: Any) -> list[list[int]]:
    """The tokens of each prompt's continuation."""
    found: list[list[int]] = [[] for _ in prompts]
    for choice in drawn(model, prompts, tokens, **options):
        found[choice.prompt].append(choice.token)
    return found


# --- the numbers of transformers ---


def theirs_of(model: GPT2, end: int = 0) -> Any:
    """The same weights in transformers' model."""
    import transformers

    described = config_to_hugging_face(model.config, end)
    for name in ("architectures", "model_type", "dtype"):
        described.pop(name)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**described))
    missing, unexpected = theirs.load_state_dict(to_hugging_face(model.state_dict()), strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if model.config.tie_word_embeddings else set())
    theirs.tie_weights()
    return theirs.eval()


def logits_of(model: GPT2, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model.logits(model(ids))


def random_model(config: GPT2Config, seed: int = 0) -> GPT2:
    """Every parameter random, biases and norms too, at a scale like a trained model's."""
    model, generator = GPT2(config), torch.Generator().manual_seed(seed)
    initialize(model, generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return model.eval()


@st.composite
def shapes(draw: Any) -> GPT2Config:
    heads = draw(st.integers(1, 4))
    width = heads * draw(st.sampled_from([1, 3, 8, 16]))
    return GPT2Config(
        vocab_size=draw(st.integers(2, 70)),
        n_positions=draw(st.integers(1, 24)),
        n_embd=width,
        n_layer=draw(st.integers(1, 3)),
        n_head=heads,
        n_inner=draw(st.sampled_from([0, 1, width, 37])),
        layer_norm_epsilon=draw(st.sampled_from([1e-5, 1e-3])),
        tie_word_embeddings=draw(st.booleans()),
    )


@settings(max_examples=20, deadline=None)
@given(config=shapes(), seed=st.integers(0, 2**31), data=st.data())
def test_logits_are_those_of_transformers(config, seed, data):
    model, length = random_model(config, seed), data.draw(st.integers(1, config.n_positions))
    theirs, ids = theirs_of(model), torch.randint(config.vocab_size, (2, length))
    with torch.no_grad():
        expected = theirs(ids).logits
    torch.testing.assert_close(logits_of(model, ids), expected, atol=1e-4, rtol=0)
    cache = new_cache(model, 2)
    with torch.no_grad():
        cached = [model.logits(model(ids[:, place : place + 1], cache)) for place in range(length)]
    torch.testing.assert_close(torch.cat(cached, 1), expected, atol=1e-4, rtol=0)


@FEW
@given(config=shapes(), seed=st.integers(0, 2**31), data=st.data())
def test_logits_in_bf16_are_those_of_transformers_in_bf16(config, seed, data):
    model, length = random_model(config, seed), data.draw(st.integers(1, config.n_positions))
    theirs, ids = theirs_of(model).bfloat16(), torch.randint(config.vocab_size, (1, length))
    model = for_inference(model, CPU, torch.bfloat16)
    with torch.no_grad():
        expected = theirs(ids).logits
    found = logits_of(model, ids)
    assert found.dtype == torch.bfloat16
    # Two in a hundred of the scale: bf16 has 8 bits, and the products are summed in another order.
    torch.testing.assert_close(found, expected, atol=2e-2 * max(1.0, float(expected.abs().max())), rtol=0)


PUBLIC_SIZES = {"124M": (768, 12), "355M": (1024, 16), "774M": (1280, 20), "1558M": (1600, 25)}


def agrees_at_size(width: int, heads: int, layers: int, vocab_size: int) -> None:
    model = random_model(GPT2Config(vocab_size, n_embd=width, n_head=heads, n_layer=layers))
    ids = torch.randint(vocab_size, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs_of(model)(ids).logits
    torch.testing.assert_close(logits_of(model, ids), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.slow
def test_logits_at_the_full_shape_of_124m_are_those_of_transformers():
    agrees_at_size(*PUBLIC_SIZES["124M"], layers=12, vocab_size=50257)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["355M", "774M", "1558M"])
def test_logits_with_the_width_and_heads_of_a_public_size_two_layers_and_few_tokens_are_those_of_transformers(size):
    agrees_at_size(*PUBLIC_SIZES[size], layers=2, vocab_size=500)


@FEW
@given(config=shapes(), seed=st.integers(0, 2**31), data=st.data())
def test_greedy_writes_what_transformers_generates(config, seed, data):
    model = random_model(config, seed).double()
    theirs = theirs_of(model).double()
    length = data.draw(st.integers(1, config.n_positions))
    prompt = torch.randint(config.vocab_size, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    # transformers looks at no more than a context: one token past it is the last that both define.
    tokens = data.draw(st.integers(1, config.n_positions - length + 1))
    penalty, end = data.draw(st.sampled_from([1.0, 1.3])), config.vocab_size - 1
    with torch.no_grad():
        expected = theirs.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, length), do_sample=False, max_new_tokens=tokens,
            repetition_penalty=penalty, pad_token_id=end, eos_token_id=end, bos_token_id=end,
        )[0, length:].tolist()  # fmt: skip
    assert texts(model, [prompt], tokens, sampler=Sampler(0, repetition_penalty=penalty), end=end) == [expected]


@FEW
@given(
    wide=st.integers(1, 70), out=st.integers(1, 70), bias=st.booleans(), dtype=st.sampled_from([torch.float32, torch.bfloat16])
)
def test_a_linear_layer_for_one_row_is_a_linear_layer(wide, out, bias, dtype):
    generator = torch.Generator().manual_seed(wide * 100 + out)
    plain = torch.nn.Linear(wide, out, bias).to(dtype)
    fast = torch.nn.Linear(wide, out, bias).to(dtype)
    fast.load_state_dict(plain.state_dict())
    fast.__class__ = FewRowsLinear
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for shape in ((wide,), (1, wide), (1, 1, wide), (3, wide), (2, 3, wide), (0, wide)):
        x = torch.randn(shape, generator=generator).to(dtype)
        for given_x in (x, x.repeat_interleave(2, -1)[..., ::2]):  # also one that is not contiguous
            torch.testing.assert_close(fast(given_x), plain(given_x), atol=tolerance, rtol=tolerance)


def test_for_inference_turns_dropout_and_gradients_off_and_changes_the_type_in_place():
    model = GPT2(with_positions(12, resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5)).train()
    ready = for_inference(model, CPU, torch.bfloat16)
    assert ready is model
    assert {parameter.dtype for parameter in ready.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in ready.parameters())
    assert not any(type(module) is torch.nn.Linear for module in ready.modules()), "all have the fast product for one row"
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(logits_of(ready, ids), logits_of(ready, ids))


# --- the window and the cache ---


@given(tokens=st.integers(1, 5000), positions=st.integers(1, 300))
def test_the_window_holds_at_least_half_a_context_and_moves_seldom(tokens, positions):
    seen = tokens - window_start(tokens, positions)
    assert min(tokens, max(1, positions // 2)) <= seen <= positions
    assert window_start(tokens, positions) % max(1, positions // 2) == 0
    assert window_start(tokens + 1, positions) >= window_start(tokens, positions)


def test_within_the_context_every_token_is_seen():
    """By hand, without any window: the next token is chosen from the logits of all tokens so far."""
    model, ids = new_model(), prompt_of(3)
    for token in texts(model, [prompt_of(3)], CONFIG.n_positions - 3 + 1, sampler=GREEDY)[0]:
        assert token == int(logits_of(model, torch.tensor([ids]))[0, -1].argmax())
        ids.append(token)


@settings(max_examples=7, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=6), positions=st.integers(1, 12), seed=st.integers(0, 99))
def test_the_cache_changes_no_token(lengths, positions, seed):
    """Within the context and far beyond it, where the window moves."""
    model = new_model(with_positions(positions), seed)
    prompts = [prompt_of(length, seed + place) for place, length in enumerate(lengths)]
    for sampler in (GREEDY, WARM):
        plain = texts(model, prompts, 2 * positions + 3, sampler=sampler, use_cache=False)
        assert {len(text) for text in plain} == {2 * positions + 3}
        assert texts(model, prompts, 2 * positions + 3, sampler=sampler, batch_size=3) == plain


@FEW
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=7),
    positions=st.integers(1, 12),
    batch_size=st.integers(1, 8),
    end=st.sampled_from([NEVER, 3]),
    seed=st.integers(0, 99),
)
def test_a_text_does_not_depend_on_its_neighbours(lengths, positions, batch_size, end, seed):
    """Prompts of any lengths, more of them than rows, texts that end early, windows that move at different times."""
    model = new_model(with_positions(positions), seed)
    prompts = [prompt_of(length, seed + place) for place, length in enumerate(lengths)]
    alone = [texts(model, [prompt], 15, end=end, seeds=[number])[0] for number, prompt in enumerate(prompts)]
    assert texts(model, prompts, 15, end=end, batch_size=batch_size) == alone


def test_texts_do_end_early_in_the_test_above():
    lengths = {len(text) for text in texts(new_model(), [prompt_of(4, seed) for seed in range(30)], 15, end=3, batch_size=2)}
    assert len(lengths) > 2


@settings(max_examples=6, deadline=None)
@given(lengths=st.lists(st.integers(1, 20), min_size=2, max_size=6), batch_size=st.integers(1, 6), seed=st.integers(0, 20))
def test_in_float32_well_separated_texts_do_not_depend_on_their_neighbours_either(lengths, batch_size, seed):
    model = new_model(seed=seed).float()
    prompts = [prompt_of(length, seed + place) for place, length in enumerate(lengths)]
    alone = [texts(model, [prompt], 15, sampler=GREEDY)[0] for prompt in prompts]
    assert texts(model, prompts, 15, sampler=GREEDY, batch_size=batch_size) == alone


def test_equal_prompts_share_their_beginning_and_go_their_own_ways():
    model, prompt = new_model(), prompt_of(9)
    found = texts(model, [prompt] * 5, 20, batch_size=3)
    assert len({tuple(text) for text in found}) == 5
    assert found == [texts(model, [prompt], 20, seeds=[seed])[0] for seed in range(5)]


def test_one_seed_is_one_text_and_another_another():
    model, prompt = new_model(), prompt_of(4)
    first = texts(model, [prompt], seeds=[7])
    torch.rand(10)  # what others draw does not matter
    assert texts(model, [prompt], seeds=[7]) == first
    assert texts(model, [prompt], seeds=[8]) != first


def test_generating_leaves_the_random_state_alone():
    """A sample in the middle of training must not move what training draws."""
    model, before = new_model(), torch.random.get_rng_state()
    drawn(model, [prompt_of(4), prompt_of(2)])
    assert torch.equal(torch.random.get_rng_state(), before)


@settings(max_examples=6, deadline=None)
@given(length=st.integers(1, 15), seed=st.integers(0, 9))
def test_greedy_has_many_names(length, seed):
    model, prompt = new_model(seed=seed), prompt_of(length, seed)
    expected = texts(model, [prompt], sampler=GREEDY)
    for options in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}, {"temperature": 1e-6}):
        assert texts(model, [prompt], sampler=Sampler(**options)) == expected


def test_end_of_text_stops_and_is_given():
    model, prompt = new_model(), prompt_of(4)
    tokens = texts(model, [prompt], 20, sampler=GREEDY)[0]
    end = tokens[5]
    assert texts(model, [prompt], 20, sampler=GREEDY, end=end)[0] == tokens[: tokens.index(end) + 1]


def test_who_asks_can_end_a_text_and_the_next_one_takes_its_row():
    model, prompts = new_model(), [prompt_of(4, seed) for seed in range(4)]
    full, counts = texts(model, prompts, 10), [0] * 4

    def ended(number: int) -> bool:
        counts[number] += 1
        return number % 2 == 0 and counts[number] == 3

    found = texts(model, prompts, 10, batch_size=2, ended=ended)
    assert found == [full[0][:3], full[1], full[2][:3], full[3]]


@FEW
@given(usable=st.integers(1, 30), seed=st.integers(0, 99))
def test_ids_without_a_token_are_never_chosen(usable, seed):
    """Vocabularies are often padded for speed (50,257 to 50,304)."""
    found = drawn(
        new_model(seed=seed), [[0], [0]], 12, sampler=Sampler(5.0), usable_ids=usable, top_logprobs=40, batch_size=2
    )  # fmt: skip
    assert {choice.token for choice in found} <= set(range(usable))
    assert all(len(choice.top) == usable for choice in found)
    assert all(sum(math.exp(value) for _, value in choice.top) == pytest.approx(1) for choice in found)


def test_generating_turns_dropout_off():
    model = new_model(with_positions(12, resid_pdrop=0.5)).train()
    assert texts(model, [prompt_of(4)]) == texts(new_model(), [prompt_of(4)])


def test_tokens_come_one_by_one(monkeypatch):
    """Nothing is computed that nobody asks for: streaming can be stopped."""
    model, calls = new_model(), []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *arguments: (calls.append(1), forward(*arguments))[1])
    tokens = generate_tokens(model, [prompt_of(1)], WARM, seeds=[0], max_new_tokens=10, end_of_text_id=NEVER)
    next(tokens)
    next(tokens)
    assert len(calls) == 2


def test_no_prompts_are_no_tokens():
    assert drawn(new_model(), []) == []


@FEW
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4), top=st.integers(0, 40), seed=st.integers(0, 99))
def test_logprobs_are_the_models_own_before_any_filter(lengths, top, seed):
    model, prompts = new_model(seed=seed), [prompt_of(length, place) for place, length in enumerate(lengths)]
    ids = [list(prompt) for prompt in prompts]
    for choice in drawn(model, prompts, 6, top_logprobs=top, batch_size=2):
        text = ids[choice.prompt]
        start = window_start(len(text), CONFIG.n_positions)
        expected = logits_of(model, torch.tensor([text[start:]]))[0, -1].log_softmax(-1)
        assert choice.logprob == pytest.approx(float(expected[choice.token]), abs=1e-4)
        assert len(choice.top) == min(top, CONFIG.vocab_size)
        assert [value for _, value in choice.top] == pytest.approx(
            expected.sort(descending=True).values[:top].tolist(), abs=1e-4
        )
        assert all(value == pytest.approx(float(expected[token]), abs=1e-4) for token, value in choice.top)
        text.append(choice.token)


def test_scores_that_are_not_finite_are_refused():
    model = new_model()
    with torch.no_grad():
        model.ln_f.weight[0] = torch.nan
    with pytest.raises(DivergedError, match="not finite"):
        drawn(model, [prompt_of(3)])


# --- the cache itself ---


def passes(model: GPT2, rows: list[list[int]], cache: KVCache | None = None) -> tuple[KVCache, Tensor]:
    """A ragged cache that holds all rows, and the hidden state of each row's last token."""
    cache = cache or new_cache(model, len(rows))
    last = []
    with torch.no_grad():
        for number, row in enumerate(rows):
            last.append(model(torch.tensor([row]), cache.row(number))[0, -1])
            cache.lengths[number] = len(row)
    return cache, torch.stack(last)


def hidden_at_end(model: GPT2, ids: list[int], new: int) -> Tensor:
    """Hidden states (new, C) of the last tokens, from scratch."""
    with torch.no_grad():
        return model(torch.tensor([ids]))[0, -new:]


@FEW
@given(
    lengths=st.lists(st.integers(0, 8), min_size=1, max_size=5), new=st.integers(1, 4), poison=st.sampled_from([1e4, torch.nan])
)
def test_rows_of_different_lengths_see_only_their_own_tokens(lengths, new, poison):
    """Whatever unused memory holds: NaN beyond all rows, and large numbers where another row's tokens are."""
    model = new_model()
    rows = [prompt_of(length, place) for place, length in enumerate(lengths)]
    cache = new_cache(model, len(rows))
    for tensor in (cache.keys, cache.values):
        tensor.fill_(1e4)  # what a longer text may have left there
        tensor[:, :, :, max(lengths) + new :] = poison
    for number, row in enumerate(rows):
        if row:
            with torch.no_grad():
                model(torch.tensor([row]), cache.row(number))
        cache.lengths[number] = len(row)
    added = [prompt_of(new, 50 + place) for place in range(len(rows))]
    with torch.no_grad():
        found = model(torch.tensor(added), cache)
    assert cache.lengths == [length + new for length in lengths]
    for number, row in enumerate(rows):
        torch.testing.assert_close(found[number], hidden_at_end(model, row + added[number], new))


@FEW
@given(
    lengths=st.lists(st.integers(1, 8), min_size=1, max_size=4),
    picks=st.lists(st.integers(0, 3), min_size=1, max_size=6),
    in_place=st.booleans(),
)
def test_rows_can_be_chosen_repeated_and_put_in_another_order(lengths, picks, in_place):
    model = new_model()
    rows = [prompt_of(length, place) for place, length in enumerate(lengths)]
    picks = [pick % len(rows) for pick in picks]
    cache, _ = passes(model, rows)
    if in_place:
        picks = (picks * len(rows))[: len(rows)]
        before = cache.keys.data_ptr()
        cache.reorder(picks)
        chosen = cache
        assert chosen.keys.data_ptr() == before
    else:
        chosen = cache.select(picks)
        assert cache.lengths == lengths
    assert chosen.lengths == [lengths[pick] for pick in picks]
    added = [[place] for place in range(len(picks))]
    with torch.no_grad():
        found = model(torch.tensor(added), chosen)
    for number, pick in enumerate(picks):
        torch.testing.assert_close(found[number], hidden_at_end(model, rows[pick] + added[number], 1))


def test_a_selection_is_a_copy_and_a_row_is_not():
    model = new_model()
    cache, _ = passes(model, [prompt_of(3), prompt_of(5, 1)])
    copy, row = cache.select([1]), cache.row(1)
    cache.keys[:, 1].zero_()
    assert copy.keys[:, 0, :, :5].abs().sum() > 0
    assert row.keys.abs().sum() == 0
    assert row.lengths == [0]


@FEW
@given(length=st.integers(1, 12), cuts=st.sets(st.integers(1, 11)))
def test_a_text_may_come_in_pieces_of_any_lengths(length, cuts):
    model, ids = new_model(), prompt_of(length)
    edges = [0, *sorted(cut for cut in cuts if cut < length), length]
    cache, found = new_cache(model, 1), []
    with torch.no_grad():
        for begin, end in itertools.pairwise(edges):
            found.append(model(torch.tensor([ids[begin:end]]), cache))
    torch.testing.assert_close(torch.cat(found, 1)[0], hidden_at_end(model, ids, length))


# --- text as it comes ---

BYTES = byte_tokenizer()
SMALL = st.text(alphabet="ab�é日😀", max_size=14)


def split(content: bytes, cuts: set[int]) -> list[bytes]:
    edges = [0, *sorted(cut for cut in cuts if cut < len(content)), len(content)]
    return [content[begin:end] for begin, end in itertools.pairwise(edges)]


def expected_text(whole: str, stops: list[str]) -> tuple[str, str | None]:
    """Cut before the stop string that is complete first; of two that end together, the longer."""
    for end in range(1, len(whole) + 1):
        matching = [stop for stop in stops if whole[:end].endswith(stop)]
        if matching:
            longest = max(matching, key=len)
            return whole[: end - len(longest)], longest
    return whole, None


def streamed(tokens: list[bytes], stops: list[str]) -> tuple[TextStream, list[str]]:
    stream = TextStream(tokens, stops)
    pieces = [stream.add(token) for token in range(len(tokens))]
    return stream, [*pieces, stream.finish()]


@settings(max_examples=200, deadline=None)
@given(
    text=SMALL,
    cuts=st.sets(st.integers(1, 50)),
    stops=st.lists(st.text(alphabet="ab�é日", min_size=1, max_size=4), max_size=4),
)
@example("ab", {1}, ["bc", "ab"])
@example("aab", {1, 2}, ["ab"])
@example("abab日", {1, 2, 3, 4, 5}, ["babb", "b日"])
def test_streamed_text_is_the_whole_text_up_to_the_first_stop_string(text, cuts, stops):
    expected, stop = expected_text(text, stops)
    stream, pieces = streamed(split(text.encode(), cuts), stops)
    assert (stream.text, stream.stopped_by) == (expected, stop)
    assert "".join(pieces) == expected


@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=20), cuts=st.sets(st.integers(1, 20)), stops=st.lists(SMALL.filter(bool), max_size=3))
def test_bytes_that_are_no_text_are_replaced_as_in_the_whole(content, cuts, stops):
    expected, stop = expected_text(content.decode(errors="replace"), stops)
    stream, pieces = streamed(split(content, cuts), stops)
    assert (stream.text, stream.stopped_by, "".join(pieces)) == (expected, stop, expected)


@settings(max_examples=40)
@given(text=st.text(min_size=1, max_size=20))
def test_a_character_comes_with_its_last_byte_and_in_one_piece(text):
    stream, given_out = TextStream([bytes([value]) for value in range(256)]), []
    for character in text:
        pieces = [stream.add(byte) for byte in character.encode()]
        assert pieces == [*[""] * (len(pieces) - 1), character]
        given_out += pieces
    assert stream.finish() == ""
    assert stream.text == text


def test_what_may_be_a_stop_string_waits_and_comes_when_it_is_none():
    stream = TextStream([b"a", b"b", b"c"], ["abc"])
    assert [stream.add(token) for token in (0, 1, 0, 1)] == ["", "", "ab", ""]
    assert stream.finish() == "ab"
    assert stream.stopped_by is None


def test_after_a_stop_string_nothing_comes_any_more():
    stream = TextStream([b"xSTOPy", b"z"], ["STOP"])
    assert [stream.add(0), stream.add(1), stream.finish(), stream.add(1)] == ["x", "", "", ""]
    assert (stream.text, stream.stopped_by) == ("x", "STOP")


def test_half_a_character_at_the_end_is_shown_as_missing_and_may_complete_a_stop_string():
    stream, pieces = streamed(["é".encode()[:1]], [])
    assert pieces == ["", "�"]
    stream, pieces = streamed([b"a", "é".encode()[:1]], ["�"])
    assert (pieces, stream.stopped_by) == (["a", "", ""], "�")


# --- the recipe and the command ---


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generation")
    (folder / "text.txt").write_text("the cat sat on the mat, naïve as 日本. " * 100, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("groundup.recipes.train.draw_curves", lambda *arguments: None)
        groundup.train(folder / "text.txt", folder / "run", **TINY | {"eval_steps": 0})
    return folder / "run"


def save_speaker(folder: Path, n_positions: int = 32, vocab_size: int = 257, end: float = -9.0) -> Path:
    """A model that writes lively printable ASCII; ``end`` is the score of the end of the text beside the others' 0."""
    config = GPT2Config(vocab_size, n_positions, n_embd=16, n_layer=2, n_head=2, tie_word_embeddings=False)
    model = new_model(config).float()
    with torch.no_grad():
        model.ln_f.bias[0] = 10.0
        liked = [0.0 if 32 <= token < 127 or token > 256 else -9.0 for token in range(vocab_size)]
        model.lm_head.weight[:, 0] = torch.tensor(liked)
        model.lm_head.weight[256, 0] = end
    save_model(model, folder, end_of_text_id=256)
    BYTES.save(folder)
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_speaker(tmp_path_factory.mktemp("model"))


def completions(path: Path, **options: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = groundup.generate(path, device="cpu", **options)["completions"]
    return found


def said(path: Path, **options: Any) -> tuple[str, list[str]]:
    """What the recipe streams, and the lines that it says."""
    from groundup.config.load import Given, resolve
    from groundup.config.options import GENERATE_GROUPS
    from groundup.recipes.generate import generate

    pieces: list[str] = []
    lines: list[str] = []
    resolved = resolve(GENERATE_GROUPS, {name: Given(value, f"argument {name}") for name, value in options.items()})
    generate(path, resolved, lines.append, pieces.append)
    return "".join(pieces), lines


def test_each_prompt_is_completed(run):
    found = completions(run, prompt=("the ", "cat"), max_new_tokens=9)
    assert [completion["prompt"] for completion in found] == ["the ", "cat"]
    for completion in found:
        assert 1 <= len(completion["token_ids"]) <= 9
        assert completion["finish_reason"] == ("stop" if completion["token_ids"][-1] == 256 else "length")
        assert completion["text"] == BYTES.decode(completion["token_ids"])
        assert len(completion["logprobs"]) == len(completion["token_ids"])
        assert completion["score"] is completion["stop_string"] is None


def test_a_prompt_completes_alike_alone_and_among_others(model_folder):
    """Whatever stands before it, and however many are written at once."""
    prompts = ["the ", "cat", "a much longer prompt than the others", ""]
    together = [completion["token_ids"] for completion in completions(model_folder, prompt=prompts, max_new_tokens=40)]
    for batch_size in (1, 3):
        again = completions(model_folder, prompt=prompts, max_new_tokens=40, batch_size=batch_size)
        assert [completion["token_ids"] for completion in again] == together
    for prompt, expected in zip(prompts, together, strict=True):
        assert completions(model_folder, prompt=prompt, max_new_tokens=40)[0]["token_ids"] == expected


def test_the_first_of_several_completions_is_the_only_one_of_a_single_run(model_folder):
    several = completions(model_folder, prompt=("the", "cat"), num_return_sequences=3, max_new_tokens=20)
    assert [completion["prompt"] for completion in several] == ["the"] * 3 + ["cat"] * 3
    assert len({completion["text"] for completion in several[:3]}) == 3
    single = completions(model_folder, prompt=("the", "cat"), max_new_tokens=20)
    for first, only in zip((several[0], several[3]), single, strict=True):
        assert first["token_ids"] == only["token_ids"]
        assert first["text"] == only["text"]


def test_another_seed_gives_another_text(model_folder):
    first, again, other = (
        completions(model_folder, prompt="the", seed=seed, max_new_tokens=20)[0]["text"] for seed in (1, 1, 2)
    )  # fmt: skip
    assert first == again != other


def test_an_empty_prompt_starts_a_document(model_folder):
    loaded = groundup.load(model_folder)
    expected = texts(loaded.model, [[256]], 5, sampler=GREEDY, end=256, usable_ids=257)[0]
    assert completions(model_folder, prompt="", max_new_tokens=5, temperature=0)[0]["token_ids"] == expected
    assert completions(model_folder, max_new_tokens=5, temperature=0)[0]["token_ids"] == expected


@pytest.mark.parametrize("options", [{"temperature": 3.0, "top_k": 0}, {"num_beams": 4, "num_return_sequences": 4}], ids=str)
def test_a_model_with_spare_ids_never_writes_them(tmp_path, options):
    """It would like them best."""
    path = save_speaker(tmp_path, vocab_size=300)
    found = completions(path, prompt=("the ", "cat"), max_new_tokens=10, top_logprobs=300, **options)
    assert all(token <= 256 for completion in found for token in completion["token_ids"])
    assert all(len(fact["top_logprobs"]) == 257 for completion in found for fact in completion["logprobs"])


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["sampled", "beams"])
def test_the_end_of_the_text_ends_it(tmp_path, options):
    found = completions(save_speaker(tmp_path, end=9.0), prompt="the", max_new_tokens=9, **options)[0]
    assert (found["text"], found["token_ids"], found["finish_reason"], found["stop_string"]) == ("", [256], "stop", None)
    assert found["logprobs"][0]["token"] == "<|endoftext|>"


def test_a_prompt_longer_than_the_context_says_so_and_its_end_is_what_counts(model_folder):
    long = "x" * 500 + "the cat sat on the mat, and then went away"
    shown, lines = said(model_folder, prompt=long, max_new_tokens=8, device="cpu", temperature=0)
    assert [line for line in lines if "542 tokens" in line and "the model's context is 32" in line and "last 32" in line]
    assert shown.startswith(long)
    seen = BYTES.encode(long).tolist()[-32:]
    expected = texts(groundup.load(model_folder).model, [seen], 8, sampler=GREEDY, end=256, usable_ids=257)[0]
    assert completions(model_folder, prompt=long, max_new_tokens=8, temperature=0)[0]["token_ids"] == expected
    assert said(model_folder, prompt="x" * 32, max_new_tokens=1, device="cpu")[1] == []


@pytest.mark.slow
def test_a_prompt_of_ten_megabytes_is_no_matter(model_folder, tmp_path):
    import time

    (tmp_path / "long.txt").write_text("the cat sat on the mat. " * 420_000, encoding="utf-8")
    started = time.perf_counter()
    found = completions(model_folder, prompt_file=str(tmp_path / "long.txt"), max_new_tokens=5)
    assert len(found[0]["token_ids"]) == 5
    assert time.perf_counter() - started < 20


def test_one_completion_is_shown_as_it_is(model_folder):
    shown, _ = said(model_folder, prompt="the", max_new_tokens=12, device="cpu")
    assert shown == "the" + completions(model_folder, prompt="the", max_new_tokens=12)[0]["text"] + "\n"


def test_what_waited_for_a_stop_string_that_did_not_come_is_shown_at_the_end(model_folder):
    text = completions(model_folder, prompt="the", max_new_tokens=12)[0]["text"]
    shown, _ = said(model_folder, prompt="the", max_new_tokens=12, device="cpu", stop_strings=text[-2:] + "never there")
    assert shown == f"the{text}\n"


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["sampled", "beams"])
def test_several_completions_are_shown_in_order_with_a_line_between(model_folder, batch_size, options):
    """Also when a later one ends first."""
    options = {"prompt": ("the", "cat"), "num_return_sequences": 2, "max_new_tokens": 12, "batch_size": batch_size} | options
    shown, _ = said(model_folder, device="cpu", stop_strings=("e", "a"), **options)
    found = completions(model_folder, stop_strings=("e", "a"), **options)
    parts = [f"--- {n + 1} of 4 ---\n{c['prompt']}{c['text']}\n" for n, c in enumerate(found)]
    assert shown == "".join(parts)


def test_a_stop_string_ends_the_text_and_is_not_in_it(model_folder):
    plain = completions(model_folder, prompt="the", max_new_tokens=30, temperature=0)[0]
    stop = plain["text"][6:8]
    found = completions(model_folder, prompt="the", max_new_tokens=30, temperature=0, stop_strings=("never there", stop))[0]
    assert found["text"] == plain["text"][: plain["text"].index(stop)]
    assert (found["finish_reason"], found["stop_string"]) == ("stop", stop)
    assert found["token_ids"] == plain["token_ids"][: len(found["token_ids"])]
    assert BYTES.decode(found["token_ids"]).endswith(stop)
    assert len(found["logprobs"]) == len(found["token_ids"])


@pytest.mark.parametrize("tokens", [30, 90], ids=["within the context", "beyond it"])
def test_logprobs_say_what_score_says_of_the_same_text(model_folder, tokens):
    """From an empty prompt: both begin a document. Filters change what is drawn, not what is reported."""
    found = completions(model_folder, prompt="", max_new_tokens=tokens, temperature=1.3, top_k=40, top_logprobs=3)[0]
    scored = groundup.score(model_folder, text=found["text"], device="cpu", top_logprobs=3)["texts"][0]
    assert [token["id"] for token in scored["tokens"]] == found["token_ids"]
    assert len(found["token_ids"]) == tokens
    for ours, theirs in zip(found["logprobs"], scored["tokens"], strict=True):
        assert ours["token"] == theirs["token"]
        assert ours["logprob"] == pytest.approx(theirs["logprob"], abs=1e-4)
        assert [top["logprob"] for top in ours["top_logprobs"]] == (
            pytest.approx([top["logprob"] for top in theirs["top_logprobs"]], abs=1e-4)
        )
    assert sum(fact["logprob"] for fact in found["logprobs"]) == pytest.approx(-scored["loss"] * tokens, rel=1e-4)


def test_in_bf16_the_command_writes_what_the_same_model_writes_token_by_token(model_folder):
    """One text at a time, as the fast product for one row computes it."""
    found = completions(model_folder, prompt="the", max_new_tokens=12, temperature=0, bf16=True)[0]
    model = for_inference(groundup.load(model_folder).model, CPU, torch.bfloat16)
    prompt = BYTES.encode("the").tolist()
    assert [found["token_ids"]] == texts(model, [prompt], 12, sampler=GREEDY, end=256, usable_ids=257)
    exact = groundup.score(model_folder, text="the" + found["text"], device="cpu")["texts"][0]
    coarse = groundup.score(model_folder, text="the" + found["text"], device="cpu", bf16=True)["texts"][0]
    assert exact["loss"] == pytest.approx(coarse["loss"], rel=0.02)
    assert exact["loss"] != coarse["loss"]


def test_without_top_logprobs_the_lists_are_empty(model_folder):
    found = completions(model_folder, prompt="the", max_new_tokens=3, top_logprobs=0)[0]
    assert [fact["top_logprobs"] for fact in found["logprobs"]] == [[], [], []]


def test_prompts_come_from_files_after_those_given(model_folder, tmp_path):
    (tmp_path / "one.txt").write_bytes("naïve 日本\n".encode())
    (tmp_path / "two.txt").write_bytes(b"two lines\n\n")
    found = completions(
        model_folder, prompt="first", prompt_file=(str(tmp_path / "one.txt"), tmp_path / "two.txt"), max_new_tokens=1
    )  # fmt: skip
    assert [completion["prompt"] for completion in found] == ["first", "naïve 日本", "two lines\n"]


def test_one_file_may_be_given_as_a_path(model_folder, tmp_path):
    (tmp_path / "one.txt").write_text("the", encoding="utf-8")
    assert completions(model_folder, prompt_file=tmp_path / "one.txt", max_new_tokens=1)[0]["prompt"] == "the"


def test_a_line_break_of_windows_at_the_end_of_a_file_is_the_editors_too(model_folder, tmp_path):
    (tmp_path / "one.txt").write_bytes(b"the cat\r\n")
    assert completions(model_folder, prompt_file=str(tmp_path / "one.txt"), max_new_tokens=1)[0]["prompt"] == "the cat"


def test_a_mark_of_the_encoding_at_the_beginning_of_a_file_is_no_text(model_folder, tmp_path):
    """As where a source is read for training."""
    (tmp_path / "one.txt").write_bytes(b"\xef\xbb\xbfthe cat")
    assert completions(model_folder, prompt_file=str(tmp_path / "one.txt"), max_new_tokens=1)[0]["prompt"] == "the cat"


@pytest.mark.parametrize(
    ("content", "words"), [(None, "cannot be read"), (b"ab\xff", "is not UTF-8 (byte 2"), ("folder", "cannot be read")]
)
def test_a_prompt_file_that_cannot_be_used_is_named(model_folder, tmp_path, content, words):
    path = tmp_path / "prompt.txt"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        completions(model_folder, prompt_file=str(path))
    assert words in str(caught.value)
    assert "prompt_file" in str(caught.value)
    assert str(path) in str(caught.value)


BAD_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"top_p": 0}, "top_p: 0"),
    ({"top_p": 1.5}, "top_p: 1.5"),
    ({"temperature": -0.1}, "temperature: -0.1"),
    ({"temperature": "nan"}, "temperature: 'nan'"),
    ({"top_k": -1}, "top_k: -1"),
    ({"min_p": 1.01}, "min_p: 1.01"),
    ({"repetition_penalty": 0}, "repetition_penalty: 0"),
    ({"max_new_tokens": 0}, "max_new_tokens: 0"),
    ({"num_return_sequences": 0}, "num_return_sequences: 0"),
    ({"batch_size": 0}, "batch_size: 0"),
    ({"num_beams": 0}, "num_beams: 0"),
    ({"num_beams": 2, "temperature": 0.5}, "temperature: 0.5"),
    ({"num_beams": 2, "top_k": 5}, "top_k: 5"),
    ({"num_beams": 2, "top_p": 0.5}, "top_p: 0.5"),
    ({"num_beams": 2, "min_p": 0.5}, "min_p: 0.5"),
    ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences: 3"),
    ({"num_beams": 2, "early_stopping": "sometimes"}, "early_stopping: 'sometimes'"),
    ({"length_penalty": 0.5}, "length_penalty: 0.5"),
    ({"early_stopping": "never"}, "early_stopping: 'never'"),
    ({"stop_strings": ("a", "")}, "stop_strings: ''"),
    ({"prompt_file": ("-", "-")}, "given twice"),
    ({"prompt": "\udcff"}, "is not UTF-8"),
]


@pytest.mark.parametrize(("options", "words"), BAD_OPTIONS, ids=str)
def test_a_wrong_setting_is_named_in_one_line(tmp_path, options, words):
    with pytest.raises(ConfigError) as caught:
        completions(tmp_path, **{"prompt": "the"} | options)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_beams_take_sampling_settings_that_are_off(model_folder):
    assert completions(model_folder, prompt="the", num_beams=2, temperature=0, top_k=0, top_p=1, min_p=0, max_new_tokens=2)


@pytest.mark.slow
def test_the_command_prints_what_the_function_returns(model_folder, tmp_path):
    (tmp_path / "prompt.txt").write_text("from a file\n", encoding="utf-8")
    flags = [
        "--max-new-tokens",
        12,
        "--device",
        "cpu",
        "--num-return-sequences",
        2,
        "--stop-strings",
        "q",
        "--stop_strings",
        "zz",
    ]
    done = command(
        "generate", model_folder, "--prompt", "the", "--prompt-file", tmp_path / "prompt.txt", "--prompt-file", "-", "--json",
        *flags, stdin="from a pipe é\n".encode(),
    )  # fmt: skip
    assert done.code == 0, done.err
    assert len(done.out.splitlines()) == 1
    expected = groundup.generate(
        model_folder, prompt=("the", "from a file", "from a pipe é"), max_new_tokens=12, device="cpu", num_return_sequences=2,
        stop_strings=("q", "zz"),
    )  # fmt: skip
    for result in (expected, done.json):
        assert result.pop("tokens_per_second") > 0
    assert done.json["completions"] == json.loads(json.dumps(expected["completions"]))
    assert set(done.json) == set(expected) | {"tokens_per_second"}
    assert set(done.json["completions"][0]) == {
        "prompt", "suffix", "text", "token_ids", "finish_reason", "stop_string", "logprobs", "score",
    }  # fmt: skip
    assert set(done.json["completions"][0]["logprobs"][0]) == {"token", "bytes", "id", "logprob", "top_logprobs"}


@pytest.mark.slow
def test_the_command_streams_the_text_and_nothing_else_to_standard_output(model_folder):
    done = command("generate", model_folder, "--prompt", "the", "--max-new-tokens", 12, "--device", "cpu")
    assert done.code == 0
    assert done.out == "the" + completions(model_folder, prompt="the", max_new_tokens=12)[0]["text"] + "\n"
    assert done.err.splitlines()[-1].startswith("(12 tokens, ")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--prompt", "a", "--top-p", "0"], 2, ["top_p: '0'", "--top-p", "above 0"]),
        (["--prompt", "a", "--num-beams", "2", "--temperature", "0.5"], 2, ["temperature", "num_beams 2"]),
        (["--prompt", "a", "--stop-strings", ""], 2, ["stop_strings: ''"]),
        (["--prompt-file", "absent.txt"], 3, ["prompt_file: absent.txt", "cannot be read"]),
        (["--prompt-file", "-", "--prompt-file", "-"], 2, ["standard input", "twice"]),
        (["--prompt-file", "-"], 3, ["standard input is not UTF-8"]),
    ],
    ids=str,
)
def test_the_command_refuses_in_one_line(model_folder, tmp_path, flags, code, words):
    refused_at_once(command("generate", model_folder, *flags, cwd=tmp_path, stdin=b"\xff"), code, *words)


def test_a_missing_run_is_named(tmp_path):
    with pytest.raises(groundup.GroundupError, match="not found"):
        completions(tmp_path / "absent", prompt="a")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="closes a descriptor as a Unix shell does")
@pytest.mark.parametrize("flags", [[], ["--prompt-file", "-"]], ids=["no prompt", "a prompt from it"])
def test_a_closed_standard_input_is_no_internal_error(model_folder, flags):
    import subprocess

    done = subprocess.run(
        [sys.executable, "-m", "groundup", "generate", str(model_folder), "--max-new-tokens", "2", *flags],
        preexec_fn=lambda: os.close(0), capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert "internal error" not in done.stderr
    assert done.returncode == (3 if flags else 0)


@pytest.mark.slow
def test_a_diverged_model_is_refused(tmp_path):
    model = new_model(GPT2Config(vocab_size=257, n_positions=12, n_embd=16, n_layer=1, n_head=2)).float()
    with torch.no_grad():
        model.wte.weight.mul_(3e38)  # finite, but what they give is not
    save_model(model, tmp_path, end_of_text_id=256)
    BYTES.save(tmp_path)
    refused(command("generate", tmp_path, "--prompt", "a", "--device", "cpu"), 5, "not finite")
