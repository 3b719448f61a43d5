"""The variants against their papers, in float64; what must hold for all of them, and what batch norm does not hold."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.func import functional_call
from torch.nn import functional as F

from groundup.errors import ConfigError
from groundup.generation.generate import generate_tokens
from groundup.generation.sampling import Sampler
from groundup.model.flops import parameter_count
from groundup.model.gpt2 import GPT2, GPT2Config
from groundup.model.initial import initialize
from groundup.model.kv_cache import KVCache
from groundup.model.loss import next_token_loss
from groundup.model.variants import NORM_POSITIONS, NORMS, build_gpt2, caveats

SMALL = GPT2Config(vocab_size=31, n_positions=12, n_embd=16, n_layer=2, n_head=4)
VARIANTS = [f"{norm}-{position}" for norm, position in itertools.product(NORMS, NORM_POSITIONS)]
CAUSAL = [name for name in VARIANTS if not name.startswith("batch")]


def config_for(variant: str, config: GPT2Config = SMALL, **changes) -> GPT2Config:
    norm, position = variant.split("-")
    return replace(config, norm=norm, norm_position=position, **changes)


def moved(config: GPT2Config, seed: int = 0) -> GPT2:
    """A model in float64 whose every number counts: weights large, biases, norms and running statistics not 0 and 1."""
    draw = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        model = build_gpt2(config)
    model.to_empty(device="cpu").double()
    initialize(model, draw)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(8.0 if parameter.dim() > 1 and not name.startswith("wte") else 1.0)
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype))
        for name, buffer in model.named_buffers():
            if buffer.is_floating_point():
                drawn = torch.randn(buffer.shape, generator=draw, dtype=buffer.dtype)
                buffer.copy_(drawn.abs() + 0.5 if name.endswith("var") else 0.3 * drawn)
    return model.eval()


def ids_for(config: GPT2Config, windows: int = 2, length: int = 0, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (windows, length or config.n_positions), generator=draw)


# ---- the papers' formulas ----


def normed(x: Tensor, state: Mapping[str, Tensor], name: str, config: GPT2Config, training: bool) -> Tensor:
    epsilon = config.layer_norm_epsilon
    if config.norm == "none":
        return x
    weight = state[f"{name}.weight"]
    if config.norm == "layer":  # Ba et al. 2016, equation 3
        mean, variance = x.mean(-1, keepdim=True), ((x - x.mean(-1, keepdim=True)) ** 2).mean(-1, keepdim=True)
    elif config.norm == "rms":  # Zhang and Sennrich 2019, equation 4
        return x / ((x**2).mean(-1, keepdim=True) + epsilon).sqrt() * weight
    elif training:  # Ioffe and Szegedy 2015, algorithm 1
        mean = x.mean((0, 1))
        variance = ((x - mean) ** 2).mean((0, 1))
    else:  # the same, algorithm 2
        mean, variance = state[f"{name}.running_mean"], state[f"{name}.running_var"]
    return (x - mean) / (variance + epsilon).sqrt() * weight + state[f"{name}.bias"]


def attended(x: Tensor, state: Mapping[str, Tensor], name: str, heads: int) -> Tensor:
    """Vaswani et al. 2017, section 3.2, a head and a query at a time."""
    q, k, v = (x @ state[f"{name}.c_attn.weight"].T + state[f"{name}.c_attn.bias"]).chunk(3, -1)
    joined = torch.zeros_like(x)
    D = x.size(-1) // heads
    for head in (slice(h * D, (h + 1) * D) for h in range(heads)):
        for t in range(x.size(1)):
            scores = (q[:, t, None, head] * k[:, : t + 1, head]).sum(-1) / math.sqrt(D)  # (B, t + 1)
            joined[:, t, head] = (torch.softmax(scores, -1)[..., None] * v[:, : t + 1, head]).sum(1)
    return joined @ state[f"{name}.c_proj.weight"].T + state[f"{name}.c_proj.bias"]


def gelu(x: Tensor, form: str) -> Tensor:
    """Hendrycks and Gimpel 2016, section 2."""
    if form == "gelu":
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def expected_hidden(model: GPT2, ids: Tensor, training: bool = False) -> Tensor:
    config, state = model.config, dict(model.state_dict())

    def mlp(x: Tensor, name: str) -> Tensor:
        inner = gelu(x @ state[f"{name}.c_fc.weight"].T + state[f"{name}.c_fc.bias"], config.activation_function)
        return inner @ state[f"{name}.c_proj.weight"].T + state[f"{name}.c_proj.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        return normed(x, state, name, config, training)

    x = state["wte.weight"][ids] + state["wpe.weight"][: ids.size(1)]
    for layer in range(config.n_layer):
        h = f"h.{layer}"
        if config.norm_position == "pre":
            x = x + attended(norm(x, f"{h}.ln_1"), state, f"{h}.attn", config.n_head)
            x = x + mlp(norm(x, f"{h}.ln_2"), f"{h}.mlp")
        else:
            x = norm(x + attended(x, state, f"{h}.attn", config.n_head), f"{h}.ln_1")
            x = norm(x + mlp(x, f"{h}.mlp"), f"{h}.ln_2")
    return norm(x, "ln_f") if config.norm_position == "pre" else x


@pytest.mark.parametrize("form", ["gelu_new", "gelu"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_hidden_states_are_those_of_the_papers(variant, form):
    model = moved(config_for(variant, activation_function=form))
    ids = ids_for(SMALL)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), expected_hidden(model, ids), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(model.train()(ids), expected_hidden(model, ids, training=True), rtol=1e-9, atol=1e-9)


def test_the_default_is_gpt2_bit_for_bit():
    """Values and gradients in float32, against the formula in torch's own operations."""
    model = build_gpt2(SMALL)
    initialize(model, torch.Generator().manual_seed(0))
    weights = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
    ids = ids_for(SMALL)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (SMALL.n_embd,), weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)

    x = F.embedding(ids, weights["wte.weight"]) + F.embedding(torch.arange(12), weights["wpe.weight"])
    for layer in range(SMALL.n_layer):
        h = f"h.{layer}"
        q, k, v = linear(norm(x, f"{h}.ln_1"), f"{h}.attn.c_attn").view(2, 12, 3, 4, 4).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(2, 12, 16)
        x = x + linear(y, f"{h}.attn.c_proj")
        x = x + linear(F.gelu(linear(norm(x, f"{h}.ln_2"), f"{h}.mlp.c_fc"), approximate="tanh"), f"{h}.mlp.c_proj")
    expected = norm(x, "ln_f")
    hidden = model(ids)
    assert torch.equal(hidden, expected)
    slope = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    hidden.backward(slope)
    expected.backward(slope)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, weights[name].grad), name
    assert type(build_gpt2(SMALL).h[0]) is type(GPT2(SMALL).h[0])


# ---- gradients ----


@pytest.mark.parametrize("form", ["gelu_new", "gelu"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_of_a_block_are_those_of_differences(variant, form):
    """Of the block's input, of all its parameters and of the last norm's; in training mode, where batch norm's are harder."""
    config = GPT2Config(
        vocab_size=5, n_positions=3, n_embd=4, n_layer=1, n_head=2, n_inner=3, activation_function=form,
        norm=variant.split("-")[0], norm_position=variant.split("-")[1],
    )  # fmt: skip
    model = moved(config).train()
    rest = torch.nn.Sequential(model.h[0], model.ln_f)
    names = [name for name, _ in rest.named_parameters()]
    x = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    parameters = [parameter.detach().clone().requires_grad_() for parameter in rest.parameters()]
    assert gradcheck(lambda x, *given: functional_call(rest, dict(zip(names, given, strict=True)), (x,)), (x, *parameters))


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_reach_every_parameter(variant):
    model = moved(config_for(variant, tie_word_embeddings=False)).train()
    ids = ids_for(SMALL)
    next_token_loss(model(ids), model.head_weight, ids.roll(-1, 1)).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)] == []


# ---- what a language model must not do, and what batch norm does ----


@torch.no_grad()
def change_of_the_past(model: GPT2, changed: int) -> Tensor:
    """How much each position before and after moves, (T,), when the token at one place is another."""
    ids = ids_for(SMALL)
    other = ids.clone()
    other[:, changed] = (other[:, changed] + 1) % SMALL.vocab_size
    return (model(other) - model(ids)).abs().amax((0, 2))


@pytest.mark.parametrize("changed", [0, 5, 11])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_past_does_not_know_the_future(variant, changed):
    """In both modes; batch norm in evaluation only."""
    for training in (False, True) if variant in CAUSAL else (False,):
        change = change_of_the_past(moved(config_for(variant)).train(training), changed)
        assert bool((change[:changed] == 0).all())
        assert bool((change[changed:] > 1e-6).all())


@pytest.mark.parametrize("position", NORM_POSITIONS)
def test_batch_norm_in_training_tells_the_past_of_the_future(position):
    change = change_of_the_past(moved(config_for(f"batch-{position}")).train(), 11)
    assert bool((change[:11] > 1e-6).all())


def gradient(model: GPT2, ids: Tensor, windows_per_pass: int) -> Tensor:
    for part in ids.split(windows_per_pass):
        next_token_loss(model(part), model.head_weight, part.roll(-1, 1)).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("variant", VARIANTS)
def test_how_a_batch_is_cut_changes_the_gradient_of_batch_norm_alone(variant):
    ids = ids_for(SMALL, windows=4)
    whole, cut = (gradient(moved(config_for(variant)).train(), ids, count) for count in (4, 2))
    apart = float((whole - cut).norm() / whole.norm())
    assert apart > 1e-3 if variant.startswith("batch") else apart < 1e-12


def test_who_chooses_batch_norm_is_told():
    for variant in VARIANTS:
        told = caveats(config_for(variant))
        assert bool(told) == variant.startswith("batch")
        assert all("\n" not in line and line.startswith("norm batch: ") for line in told)


def test_batch_norm_keeps_running_averages():
    """After a pass: a tenth of its mean and of its unbiased variance (Ioffe and Szegedy 2015, algorithm 2, line 10)."""
    config = config_for("batch-pre")
    model = build_gpt2(config).double()
    initialize(model, torch.Generator().manual_seed(0))
    ids = ids_for(config)
    with torch.no_grad():
        embedded = (model.wte(ids) + model.wpe.weight).flatten(0, 1)  # (B · T, C)
        model.train()(ids)
    ln_1 = model.h[0].ln_1
    torch.testing.assert_close(ln_1.running_mean, 0.1 * embedded.mean(0))
    torch.testing.assert_close(ln_1.running_var, 0.9 + 0.1 * embedded.var(0, correction=1))
    assert ln_1.num_batches_tracked == 1
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.eval()(ids)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


# ---- generation ----


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_cache_changes_nothing_however_the_tokens_come(variant):
    model = moved(config_for(variant))
    ids = ids_for(SMALL)
    for cuts in ([1, 2, 3], [5], [11], list(range(1, 12))):
        cache = KVCache.empty(SMALL.n_layer, 2, SMALL.n_head, SMALL.n_positions, 4, model.head_weight)
        with torch.no_grad():
            parts = [model(ids[:, a:b], cache) for a, b in itertools.pairwise([0, *cuts, 12])]
            torch.testing.assert_close(torch.cat(parts, 1), model(ids), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_generation_with_a_cache_is_generation_without(variant):
    """Prompts of several lengths together, past the context; the model comes in training mode."""
    model = moved(config_for(variant)).train()
    with_cache, without = (
        list(
            generate_tokens(
                model, [[3], [1, 2, 3, 4], [7] * 9], Sampler(temperature=1.0), seeds=[0, 1, 2], max_new_tokens=12,
                end_of_text_id=-1, top_logprobs=1, use_cache=use_cache,
            )
        )
        for use_cache in (True, False)
    )  # fmt: skip
    assert [choice.token for choice in with_cache] == [choice.token for choice in without]
    logprobs = [[choice.logprob for choice in choices] for choices in (with_cache, without)]
    assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-5)  # reported in float32
    assert len(with_cache) == 36


# ---- names, counts, refusals ----


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_by_hand(variant):
    """And names: those of GPT-2, without what a variant has not."""
    config = config_for(variant)
    model = build_gpt2(config)
    norm, position = variant.split("-")
    inside = [f"h.{layer}.ln_{number}" for layer in range(2) for number in (1, 2)]
    norms = [] if norm == "none" else [*inside, "ln_f"] if position == "pre" else inside
    kinds = {"layer": ["weight", "bias"], "rms": ["weight"], "batch": ["weight", "bias"], "none": []}[norm]
    others = {name for name, _ in GPT2(SMALL).named_parameters() if "ln_" not in name}
    assert {name for name, _ in model.named_parameters()} == others | {f"{n}.{kind}" for n in norms for kind in kinds}
    statistics = ("running_mean", "running_var", "num_batches_tracked") if norm == "batch" else ()
    assert {name for name, _ in model.named_buffers()} == {f"{n}.{kind}" for n in norms for kind in statistics}
    matrices = 31 * 16 + 12 * 16 + 2 * (16 * 48 + 48 + 16 * 16 + 16 + 16 * 64 + 64 + 64 * 16 + 16)
    assert parameter_count(model) == matrices + 16 * len(norms) * len(kinds)


def test_without_norms_the_positions_are_one_model():
    pre, post = (moved(config_for(f"none-{position}")) for position in NORM_POSITIONS)
    assert torch.equal(pre(ids_for(SMALL)), post(ids_for(SMALL)))


@pytest.mark.parametrize(("name", "value"), [("norm", "group"), ("norm_position", "sandwich")])
def test_a_norm_that_there_is_not_is_refused(name, value):
    with pytest.raises(ConfigError, match=f"{name}: '{value}' is none of"):
        build_gpt2(replace(SMALL, **{name: value}))


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "layer-pre"])
def test_a_variant_without_its_parts_is_refused(variant):
    """Or it would be a GPT-2 that says it is none."""
    with pytest.raises(ConfigError, match="build_gpt2"):
        GPT2(config_for(variant))
