"""Initial weights against their papers' formulas."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from groundup.errors import ConfigError
from groundup.model.gpt2 import GPT2, GPT2Config
from groundup.model.initial import INITS, initialize
from groundup.model.loss import next_token_loss
from groundup.model.variants import NORMS, build_gpt2

C, INNER, V, L = 96, 160, 500, 3
CONFIG = GPT2Config(
    vocab_size=V, n_positions=64, n_embd=C, n_layer=L, n_head=4, n_inner=INNER, initializer_range=0.03,
    tie_word_embeddings=False,
)  # fmt: skip
# (in, out) of each matrix.
SIDES = {
    "attn.c_attn": (C, 3 * C),
    "attn.c_proj": (C, C),
    "mlp.c_fc": (C, INNER),
    "mlp.c_proj": (INNER, C),
    "lm_head": (C, V),
}


def drawn(init: str = "gpt2", config: GPT2Config = CONFIG, seed: int = 0) -> GPT2:
    with torch.device("meta"):
        model = build_gpt2(config)
    model.to_empty(device="cpu")
    initialize(model, torch.Generator().manual_seed(seed), init)
    return model


def matrices(model: GPT2) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.dim() == 2 and name[:3] not in ("wte", "wpe")}


def kind_of(name: str) -> str:
    return next(kind for kind in SIDES if f"{kind}.weight" in name)


def test_gpt2s_draws_are_what_they_were_bit_for_bit():
    """In the order of the parameters, from one generator: runs that were started before other inits existed go on."""
    draw = torch.Generator().manual_seed(7)
    std = {"wpe": 0.015, "c_proj": 0.03 / math.sqrt(2 * L)}
    for name, parameter in drawn(seed=7).named_parameters():
        if parameter.dim() == 2:
            scale = next((value for part, value in std.items() if part in name), 0.03)
            assert torch.equal(parameter, torch.empty(parameter.shape).normal_(0.0, scale, generator=draw)), name


# Glorot and Bengio 2010, equation 12: 2 / (in + out). He et al. 2015, equations 7 and 10: 1 / in, and 2 / in after the
# activation. GPT-2, section 2.3.
VARIANCES = {
    "gpt2": lambda kind: 0.03**2 / (2 * L if "c_proj" in kind else 1),
    "xavier": lambda kind: 2 / sum(SIDES[kind]),
    "he": lambda kind: (2 if kind == "mlp.c_proj" else 1) / SIDES[kind][0],
}


@pytest.mark.parametrize("init", ["gpt2", "xavier_uniform", "xavier_normal", "he_uniform", "he_normal"])
def test_variances_are_the_papers(init):
    for name, weight in matrices(drawn(init)).items():
        variance = VARIANCES[init.split("_")[0]](kind_of(name))
        assert weight.shape == SIDES[kind_of(name)][::-1]
        assert abs(float(weight.mean())) < 5 * math.sqrt(variance / weight.numel()), name
        # Five standard errors of a variance: of normal numbers √(2/n), of uniform ones √(0.8/n).
        spread = math.sqrt((0.8 if init.endswith("uniform") else 2) / weight.numel())
        assert float(weight.var()) == pytest.approx(variance, rel=5 * spread), name
        largest, bound = float(weight.abs().max()), math.sqrt(3 * variance)
        if init.endswith("uniform"):
            assert 0.99 * bound < largest <= bound, name
        else:
            assert largest > 1.5 * bound, "normal numbers have tails"


def test_he_keeps_an_mlps_output_as_large_as_its_input():
    """GELU's second moment of a standard normal is 0.4252, by quadrature; 2 × 0.4252 is what √2 makes of it."""
    wide = replace(CONFIG, n_embd=512, n_inner=2048, n_layer=1, vocab_size=2)
    x = torch.randn(2, 64, 512, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert float(drawn("he_normal", wide).h[0].mlp(x).square().mean()) == pytest.approx(0.8504, rel=0.03)


def test_orthogonal_matrices_are():
    """Their columns, or where there are fewer rows, their rows; query, key and value each by itself."""
    for name, weight in matrices(drawn("orthogonal")).items():
        for part in weight.split(C) if "c_attn" in name else (weight,):
            wide = part.double() if part.size(0) < part.size(1) else part.double().T
            torch.testing.assert_close(wide @ wide.T, torch.eye(wide.size(0), dtype=torch.float64), rtol=0, atol=1e-5)
            assert float(part.std()) == pytest.approx(1 / math.sqrt(max(part.shape)), rel=0.05), "spread over all of it"
    q, k, v = matrices(drawn("orthogonal"))["h.0.attn.c_attn.weight"].split(C)
    assert not torch.equal(q, k)
    assert not torch.equal(k, v)


def test_small_is_gpt2_with_blocks_that_do_nothing_yet():
    small, usual = drawn("small"), drawn("gpt2")
    for (name, a), (_, b) in zip(small.named_parameters(), usual.named_parameters(), strict=True):
        assert torch.equal(a, torch.zeros_like(a) if name.endswith("c_proj.weight") else b), name
    ids = torch.randint(V, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(small(ids), small.ln_f(small.wte(ids) + small.wpe.weight))


def test_blocks_that_do_nothing_yet_learn():
    """The gradient of the zero matrices is not zero."""
    model, ids = drawn("small"), torch.arange(64)[None]
    next_token_loss(model(ids), model.head_weight, ids.roll(-1, 1)).backward()
    assert all(bool(p.grad.abs().sum() > 0) for name, p in model.named_parameters() if name.endswith("c_proj.weight"))


@pytest.mark.parametrize("norm", list(NORMS))
@pytest.mark.parametrize("init", list(INITS))
def test_what_is_no_matrix_is_the_same_for_all(init, norm):
    """Embeddings bit for bit, for the same seed; biases 0, norms 1, running statistics those of nothing seen."""
    model, usual = drawn(init, replace(CONFIG, norm=norm)), drawn("gpt2")
    assert torch.equal(model.wte.weight, usual.wte.weight)
    assert torch.equal(model.wpe.weight, usual.wpe.weight)
    for name, tensor in model.state_dict().items():
        if tensor.dim() < 2:
            ones = "ln_" in name and name.endswith(("weight", "running_var"))
            assert bool((tensor == (1 if ones else 0)).all()), name
    assert sorted(SIDES) == sorted({kind_of(name) for name in matrices(model)})


@pytest.mark.parametrize("init", list(INITS))
def test_weights_are_a_function_of_the_generator_alone(init):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = drawn(init, seed=3)
    assert torch.equal(torch.get_rng_state(), before), "the global generator is not touched"
    torch.manual_seed(2)
    again, other = drawn(init, seed=3), drawn(init, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    for name, weight in matrices(other).items():
        assert torch.equal(weight, matrices(first)[name]) == (init == "small" and "c_proj" in name), name


@pytest.mark.parametrize("init", list(INITS))
def test_a_new_model_guesses_evenly(init):
    """The first loss is ln V, whatever the blocks start as: the head is the embedding."""
    model = drawn(init, replace(CONFIG, tie_word_embeddings=True, initializer_range=0.02))
    ids = torch.randint(V, (8, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss = float(next_token_loss(model(ids), model.head_weight, ids.roll(-1, 1))) / ids.numel()
    assert loss == pytest.approx(math.log(V), abs=0.1)


def test_an_init_that_there_is_not_is_refused():
    with pytest.raises(ConfigError, match="init: 'xavier' is none of gpt2, small, xavier_uniform"):
        drawn("xavier")
