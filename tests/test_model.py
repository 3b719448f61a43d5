"""GPT-2 against its paper, its released sizes and Hugging Face's implementation."""

import json
import math
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from groundup.config.presets import PRESETS
from groundup.interop.huggingface import load_model, save_model
from groundup.model.flops import parameter_count, training_flops_per_token
from groundup.model.gpt2 import GPT2, GPT2Config
from groundup.model.initial import initialize
from groundup.model.kv_cache import KVCache
from groundup.model.loss import next_token_loss

SMALL = GPT2Config(vocab_size=97, n_positions=24, n_embd=16, n_layer=2, n_head=4)


def new_model(config: GPT2Config = SMALL, seed: int = 0, *, scale: float = 1.0) -> GPT2:
    """A model with GPT-2's initial weights, larger by ``scale``; biases and norms are moved too, so that they count."""
    draw = torch.Generator().manual_seed(seed)
    model = GPT2(config)
    initialize(model, draw)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale if parameter.dim() > 1 else 1.0)
            if parameter.dim() == 1 and scale != 1.0:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    return model.eval()


def ids_for(config: GPT2Config, windows: int = 2, length: int = 0, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (windows, length or config.n_positions), generator=draw)


@torch.no_grad()
def logits_of(model: GPT2, ids: Tensor) -> Tensor:
    return model.logits(model(ids))


# https://huggingface.co/openai-community/gpt2 and -medium, -large, -xl: elements of their weights, the head counted once.
@pytest.mark.parametrize(
    ("preset", "parameters"),
    [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)],
)
def test_published_sizes(preset, parameters):
    shape = {name: int(PRESETS[preset][name]) for name in ("n_layer", "n_head", "n_embd", "n_positions")}
    with torch.device("meta"):
        model = GPT2(GPT2Config(vocab_size=50257, **shape))
    assert parameter_count(model) == parameters


def test_flops_per_token_counts_every_product():
    """By hand: 6 per weight in a product, and 12 · layers · width · context for attention."""
    config = GPT2Config(vocab_size=50, n_positions=8, n_embd=4, n_layer=2, n_head=2)
    weights = 2 * (4 * 12 + 4 * 4 + 4 * 16 + 16 * 4) + 50 * 4
    assert training_flops_per_token(config) == 6 * weights + 12 * 2 * 4 * 8
    wide = GPT2Config(vocab_size=50, n_positions=8, n_embd=4, n_layer=2, n_head=2, n_inner=20)
    assert training_flops_per_token(wide) - training_flops_per_token(config) == 6 * 2 * 2 * 4 * (20 - 16)


configs = st.builds(
    lambda heads, width, layers, inner, **rest: GPT2Config(
        n_head=heads, n_embd=heads * width, n_layer=layers, n_inner=inner, **rest
    ),
    heads=st.integers(1, 4),
    width=st.integers(1, 8),
    layers=st.integers(1, 3),
    inner=st.sampled_from([0, 7]),
    vocab_size=st.integers(2, 80),
    n_positions=st.integers(1, 20),
    layer_norm_epsilon=st.sampled_from([1e-5, 1e-3]),
)


@settings(max_examples=20, deadline=None)
@given(config=configs, seed=st.integers(0, 99))
def test_logits_are_those_of_transformers(config, seed):
    """Through the files: what we save, transformers opens, and computes the same."""
    from transformers import GPT2LMHeadModel

    model = new_model(config, seed, scale=8.0)
    ids = ids_for(config, seed=seed)
    with TemporaryDirectory() as folder:
        save_model(model, Path(folder), end_of_text_id=0)
        theirs = GPT2LMHeadModel.from_pretrained(folder).eval()
        with torch.no_grad():
            expected = theirs(ids).logits
    torch.testing.assert_close(logits_of(model, ids), expected, rtol=1e-5, atol=3e-5)


@settings(max_examples=10, deadline=None)
@given(config=configs, seed=st.integers(0, 99))
def test_logits_of_a_model_that_transformers_saved(config, seed):
    """And the other way round."""
    import transformers

    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**vars(config) | {"n_inner": config.n_inner or None, "bos_token_id": 0, "eos_token_id": 0})
    ).eval()
    ids = ids_for(config, seed=seed)
    with TemporaryDirectory() as folder, torch.no_grad():
        theirs.save_pretrained(folder)
        torch.testing.assert_close(logits_of(load_model(Path(folder)), ids), theirs(ids).logits, rtol=1e-5, atol=1e-5)


def test_initial_weights_have_the_papers_spread():
    """Normal with 0.02; layers that write into the residual stream 0.02 / √(2 · layers); positions half; biases 0; norms 1."""
    config = GPT2Config(vocab_size=2000, n_positions=512, n_embd=128, n_layer=8, n_head=4)
    model = GPT2(config)
    initialize(model, torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert bool((parameter == (1.0 if "ln_" in name and name.endswith("weight") else 0.0)).all()), name
            continue
        expected = 0.02 / math.sqrt(16) if name.endswith("c_proj.weight") else 0.01 if name == "wpe.weight" else 0.02
        tolerance = 5 / math.sqrt(2 * parameter.numel())  # five standard errors
        assert float(parameter.detach().std()) == pytest.approx(expected, rel=tolerance), name
        assert abs(float(parameter.detach().mean())) < 5 * expected / math.sqrt(parameter.numel()), name


def test_initial_weights_are_a_function_of_the_seed():
    model, again, other = new_model(seed=3), new_model(seed=3), new_model(seed=4)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert not torch.equal(model.wte.weight, other.wte.weight)


def test_a_new_model_guesses_evenly():
    """The first loss is that of knowing nothing: ln V."""
    config = GPT2Config(vocab_size=1000, n_positions=64, n_embd=64, n_layer=4, n_head=4)
    ids = ids_for(config, windows=8, length=64)
    model = new_model(config)
    with torch.no_grad():
        loss = float(next_token_loss(model(ids), model.head_weight, ids.roll(-1, 1))) / ids.numel()
    assert loss == pytest.approx(math.log(1000), abs=0.1)


@pytest.mark.parametrize("changed", [0, 1, 11, 23])
def test_the_past_does_not_know_the_future(changed):
    model = new_model(scale=8.0)
    ids = ids_for(SMALL)
    other = ids.clone()
    other[:, changed] = (other[:, changed] + 1) % SMALL.vocab_size
    before, after = logits_of(model, ids), logits_of(model, other)
    torch.testing.assert_close(after[:, :changed], before[:, :changed], rtol=0, atol=0)
    moved = (after - before).abs().amax(-1)  # (B, T)
    assert bool((moved[:, changed:] > 1e-4).all()), "every later token attends to it"


def test_windows_do_not_see_each_other():
    model = new_model(scale=8.0)
    ids = ids_for(SMALL, windows=3)
    alone = torch.cat([logits_of(model, ids[row : row + 1]) for row in range(3)])
    torch.testing.assert_close(logits_of(model, ids), alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["resid_pdrop", "embd_pdrop", "attn_pdrop"])
def test_dropout_is_there_in_training_only(kind):
    model = new_model(GPT2Config(**vars(SMALL) | {kind: 0.5}), scale=8.0)
    ids = ids_for(SMALL)
    assert torch.equal(logits_of(model.eval(), ids), logits_of(new_model(scale=8.0), ids))
    torch.manual_seed(0)
    first, second = logits_of(model.train(), ids), logits_of(model, ids)
    assert not torch.allclose(first, second, atol=1e-3)


def test_without_dropout_training_and_evaluation_compute_the_same():
    model = new_model(scale=8.0)
    ids = ids_for(SMALL)
    assert torch.equal(logits_of(model.train(), ids), logits_of(model.eval(), ids))


def cache_for(model: GPT2, batch: int) -> KVCache:
    config = model.config
    width = config.n_embd // config.n_head
    return KVCache.empty(config.n_layer, batch, config.n_head, config.n_positions, width, model.head_weight)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_cache_changes_nothing_however_the_tokens_come(data):
    model = new_model(scale=8.0)
    length = data.draw(st.integers(1, SMALL.n_positions))
    cuts = sorted(data.draw(st.sets(st.integers(1, length - 1))) if length > 1 else [])
    ids = ids_for(SMALL, length=length)
    cache = cache_for(model, 2)
    parts = [logits_of_part(model, ids[:, a:b], cache) for a, b in zip([0, *cuts], [*cuts, length], strict=True)]
    assert cache.lengths == [length, length]
    torch.testing.assert_close(torch.cat(parts, 1), logits_of(model, ids), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def logits_of_part(model: GPT2, ids: Tensor, cache: KVCache) -> Tensor:
    return model.logits(model(ids, cache))


def test_a_cleared_cache_is_like_a_new_one():
    model = new_model(scale=8.0)
    cache = cache_for(model, 2)
    logits_of_part(model, ids_for(SMALL, seed=1), cache)
    cache.lengths = [0, 0]
    ids = ids_for(SMALL, seed=2)
    torch.testing.assert_close(logits_of_part(model, ids, cache), logits_of(model, ids), rtol=1e-4, atol=1e-4)


def test_the_head_is_the_embedding():
    model = new_model()
    assert model.head_weight is model.wte.weight
    assert not any("lm_head" in name for name, _ in model.named_parameters())
    before = logits_of(model, ids_for(SMALL))
    with torch.no_grad():
        model.wte.weight[5] = 0.0
    after = logits_of(model, ids_for(SMALL))
    assert bool((after[..., 5] == 0).all())
    assert not bool((before[..., 5] == 0).all())


def test_gradients_reach_every_parameter():
    model = new_model(scale=8.0).train()
    ids = ids_for(SMALL)
    next_token_loss(model(ids), model.head_weight, ids.roll(-1, 1)).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)] == []


def test_more_tokens_than_positions_are_refused():
    model = new_model()
    with pytest.raises((IndexError, RuntimeError)):
        logits_of(model, ids_for(SMALL, length=SMALL.n_positions + 1))


def test_modules_have_hugging_faces_names(tmp_path):
    """State dicts compare by eye: the names differ by one prefix only."""
    import transformers

    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**vars(SMALL) | {"n_inner": None}))
    names = {name.removeprefix("transformer.") for name, _ in theirs.named_parameters()}
    assert {name for name, _ in new_model().named_parameters()} == names
    save_model(new_model(), tmp_path, end_of_text_id=0)
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["model_type"] == "gpt2"
