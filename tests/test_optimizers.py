"""Each optimizer's first twenty steps against its paper in float64; weight decay, groups, what is fused."""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from groundup.errors import ConfigError
from groundup.model.gpt2 import GPT2, GPT2Config
from groundup.model.initial import initialize
from groundup.optim.groups import decay_groups
from groundup.optim.optimizers import Optimizers, build_optimizer

CONFIG = GPT2Config(vocab_size=31, n_positions=12, n_embd=16, n_layer=2, n_head=2)
SETTINGS = {
    "optim": "adamw_torch_fused", "learning_rate": 1e-2, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "weight_decay": 0.1,
    "weight_decay_type": "decoupled", "sgd_momentum": 0.9, "muon_momentum": 0.95,
}  # fmt: skip
RATES = [1e-2 * min(step / 5, 1 - (step - 5) / 20) for step in range(1, 21)]
"""Of twenty steps: none has the rate of the one before."""
ALL = {
    "adamw, fused": {},
    "adamw": {"optim": "adamw_torch"},
    "adam with L2, fused": {"weight_decay_type": "coupled"},
    "adam with L2": {"optim": "adamw_torch", "weight_decay_type": "coupled"},
    "sgd": {"optim": "sgd"},
    "sgd with L2": {"optim": "sgd", "weight_decay_type": "coupled"},
    "sgd without momentum": {"optim": "sgd", "sgd_momentum": 0.0},
    "sgd without momentum, with L2": {"optim": "sgd", "sgd_momentum": 0.0, "weight_decay_type": "coupled"},
    "adafactor": {"optim": "adafactor"},
    "muon": {"optim": "muon"},
}
needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
EVERY = [pytest.param(name, marks=needs_muon if name == "muon" else ()) for name in ALL]


def build(model: nn.Module, **options: Any) -> Optimizers:
    return build_optimizer(model, **SETTINGS | options)


def new_model(seed: int = 0) -> GPT2:
    model = GPT2(CONFIG)
    initialize(model, torch.Generator().manual_seed(seed))
    with torch.no_grad():  # biases and norms that a decay would be seen on
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.1)
    return model


def give_gradients(model: nn.Module, step: int, size: float = 1.0) -> dict[str, Tensor]:
    """Gradients of every trained parameter, the same for the same step; their sizes differ between and within matrices."""
    draw = torch.Generator().manual_seed(100 + step)
    gradients = {}
    for number, (name, parameter) in enumerate(model.named_parameters()):
        gradient = size * 10 ** (-(number % 4)) * torch.randn(parameter.shape, generator=draw)
        gradient[..., ::3] *= 5
        if parameter.requires_grad:
            parameter.grad = gradient.clone()
        gradients[name] = gradient.double()
    return gradients


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def state(model: nn.Module, optimizers: Optimizers) -> dict[str, Tensor]:
    return {f"{n}/{slot}": value.clone() for n, p in model.named_parameters() for slot, value in optimizers.state_of(p).items()}


def trained(model: nn.Module, optimizers: Optimizers, steps: range) -> dict[str, Tensor]:
    for step in steps:
        give_gradients(model, step)
        optimizers.set_learning_rate(RATES[step - 1])
        optimizers.step()
        optimizers.zero_grad()
    return weights(model)


# What the papers say, for one tensor: from (weight, gradient, step, rate, kept) to the new weight; ``kept`` starts empty.
Rule = Callable[[Tensor, Tensor, int, float, dict[str, Any]], Tensor]


def adam(decoupled: float, coupled: float, beta1: float = 0.9, beta2: float = 0.95, epsilon: float = 1e-8) -> Rule:
    """Kingma and Ba 2015, algorithm 1; Loshchilov and Hutter 2019, algorithm 2, with its decay times the learning rate."""

    def rule(w: Tensor, g: Tensor, t: int, rate: float, kept: dict[str, Any]) -> Tensor:
        g = g + coupled * w
        kept["m"] = beta1 * kept.get("m", 0.0) + (1 - beta1) * g
        kept["v"] = beta2 * kept.get("v", 0.0) + (1 - beta2) * g**2
        m_hat, v_hat = kept["m"] / (1 - beta1**t), kept["v"] / (1 - beta2**t)
        return w - rate * (m_hat / (v_hat.sqrt() + epsilon) + decoupled * w)

    return rule


def sgd(decoupled: float, coupled: float, momentum: float) -> Rule:
    """Momentum as Sutskever et al. 2013 write it, with the rate outside."""

    def rule(w: Tensor, g: Tensor, t: int, rate: float, kept: dict[str, Any]) -> Tensor:
        kept["b"] = momentum * kept.get("b", 0.0) + g + coupled * w
        return w - rate * (kept["b"] + decoupled * w)

    return rule


def adafactor(decay: float) -> Rule:
    """Shazeer and Stern 2018, algorithms 4 and 5: sums over rows and columns, ε₁ = 1e-30 in the square, d = 1, absolute α."""

    def rms(x: Tensor) -> float:
        return float((x**2).mean().sqrt())

    def rule(w: Tensor, g: Tensor, t: int, rate: float, kept: dict[str, Any]) -> Tensor:
        beta2, square = 1 - t**-0.8, g**2 + 1e-30
        if w.dim() == 2:
            kept["r"] = beta2 * kept.get("r", 0.0) + (1 - beta2) * square.sum(1)
            kept["c"] = beta2 * kept.get("c", 0.0) + (1 - beta2) * square.sum(0)
            v = torch.outer(kept["r"], kept["c"]) / kept["r"].sum()
        else:
            v = kept["v"] = beta2 * kept.get("v", 0.0) + (1 - beta2) * square
        u = g / v.sqrt()
        # torch's, not the paper's: tensors of a root mean square above 1 move as much more.
        return w - rate * decay * w - max(1.0, rms(w)) * rate * u / max(1.0, rms(u))

    return rule


def muon(decay: float, momentum: float = 0.95) -> Rule:
    """Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/), scaled as Liu et al. 2025, eq. 4."""

    def rule(w: Tensor, g: Tensor, t: int, rate: float, kept: dict[str, Any]) -> Tensor:
        kept["b"] = momentum * kept.get("b", 0.0) + g
        x = g + momentum * kept["b"]
        x = x / x.norm()
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        return w - rate * (0.2 * math.sqrt(max(w.shape)) * x + decay * w)

    return rule


def rule_for(name: str, decay: float, parameter: str) -> Rule:
    decoupled, coupled = (0.0, decay) if "L2" in name else (decay, 0.0)
    if name == "adafactor":
        return adafactor(decay)
    if name == "muon" and parameter.startswith("h."):
        return muon(decay)
    if name.startswith("sgd"):
        return sgd(decoupled, coupled, 0.0 if "without momentum" in name else 0.9)
    return adam(decoupled, coupled)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("decay", [0.0, 5.0])
def test_the_first_twenty_steps_are_the_papers(name, decay):
    """Biases and norms do not decay; Muon is for the matrices of the blocks, and computes in bfloat16."""
    model = new_model()
    optimizers = build(model, **ALL[name], weight_decay=decay)
    before = {key: value.double() for key, value in weights(model).items()}
    expected, kept = dict(before), {key: {} for key in before}  # type: ignore[var-annotated]
    for step, rate in enumerate(RATES, 1):
        gradients = give_gradients(model, step)
        optimizers.set_learning_rate(rate)
        optimizers.step()
        optimizers.zero_grad()
        for key, w in expected.items():
            matrix = w.dim() == 2
            rule = rule_for("adamw" if name == "muon" and not matrix else name, decay if matrix else 0.0, key)
            expected[key] = rule(w, gradients[key], step, rate, kept[key])
    for key, found in weights(model).items():
        error, way = (found.double() - expected[key]).norm(), (expected[key] - before[key]).norm()
        by_muon = name == "muon" and key.startswith("h.") and found.dim() == 2
        rounding = len(RATES) * 2**-24 * expected[key].norm()
        assert error < (0.02 if by_muon else 2e-5) * way + rounding, (key, float(error / way))


@pytest.mark.parametrize("name", EVERY)
def test_a_rate_of_zero_changes_nothing(name):
    model = new_model()
    optimizers = build(model, **ALL[name])
    before = weights(model)
    for step in range(1, 4):
        give_gradients(model, step)
        optimizers.set_learning_rate(0.0)
        optimizers.step()
    assert all(torch.equal(before[key], value) for key, value in weights(model).items())


class OneMatrix(nn.Module):
    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight.clone())


@pytest.mark.parametrize("weight_decay_type", ["coupled", "decoupled"])
def test_plain_sgd_is_exactly_the_formula(weight_decay_type):
    """w ← w − α (∂L/∂w + λw), in fractions; numbers that float32 holds exactly, so that no rounding hides an error."""
    draw = torch.Generator().manual_seed(0)
    start, *gradients = (torch.randint(-32, 33, (7, 5), generator=draw) / 8 for _ in range(4))
    model = OneMatrix(start)
    optimizers = build(model, optim="sgd", sgd_momentum=0.0, weight_decay=0.125, weight_decay_type=weight_decay_type)
    expected = [Fraction(value) for value in start.flatten().tolist()]
    for gradient in gradients:
        model.weight.grad = gradient.clone()
        optimizers.set_learning_rate(0.25)
        optimizers.step()
        values = gradient.flatten().tolist()
        expected = [w - Fraction(1, 4) * (Fraction(g) + Fraction(1, 8) * w) for w, g in zip(expected, values, strict=True)]
        assert [Fraction(value) for value in model.weight.flatten().tolist()] == expected


def test_coupled_sgd_is_the_formula_in_its_order_to_the_last_bit():
    """First g + λw, then w − α of it: two roundings an element, whatever the numbers."""
    model = OneMatrix(torch.randn(37, 29, generator=torch.Generator().manual_seed(0)))
    optimizers = build(model, optim="sgd", sgd_momentum=0.0, weight_decay=0.1, weight_decay_type="coupled", learning_rate=0.03)
    expected = model.weight.detach().clone()
    for step in range(1, 21):
        gradient = torch.randn(37, 29, generator=torch.Generator().manual_seed(step))
        model.weight.grad = gradient.clone()
        optimizers.step()
        expected = expected.add(gradient.add(expected, alpha=0.1), alpha=-0.03)
        assert torch.equal(model.weight, expected)


def test_the_default_is_torchs_fused_adamw_to_the_last_bit():
    ours, theirs = new_model(), new_model()
    optimizers = build(ours)
    groups = decay_groups(theirs.parameters(), 0.1)
    (part,) = optimizers.parts
    plain = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, fused=True)
    assert type(part) is torch.optim.AdamW
    assert [{**group, "params": len(group["params"])} for group in part.param_groups] == [
        {**group, "params": len(group["params"])} for group in plain.param_groups
    ]
    trained(ours, optimizers, range(1, 11))
    trained(theirs, Optimizers((plain,)), range(1, 11))
    assert all(torch.equal(value, weights(theirs)[key]) for key, value in weights(ours).items())


def test_decoupled_and_coupled_decay_differ_where_they_should():
    """The same without momentum; and not in Adam, which divides an L2 penalty by the size of the gradient."""

    def end(name: str) -> Tensor:
        model = new_model()
        return trained(model, build(model, **ALL[name]), range(1, 11))["wte.weight"]

    plain, plain_coupled = end("sgd without momentum"), end("sgd without momentum, with L2")
    torch.testing.assert_close(plain, plain_coupled, rtol=1e-5, atol=1e-7)
    for one, other in (("sgd", "sgd with L2"), ("adamw, fused", "adam with L2, fused"), ("adamw", "adam with L2")):
        assert (end(one) - end(other)).abs().max() > 1e-5


@pytest.mark.parametrize("size", [100.0, 1e-3, 1e-5])
def test_adafactor_does_not_care_how_large_gradients_are(size):
    """The mean square of a large model's clipped gradient is 1e-8 and less; torch's own ε₁ would be more than it."""
    model, reference = new_model(), new_model()
    optimizers, others = build(model, optim="adafactor"), build(reference, optim="adafactor")
    for step in range(1, 6):
        give_gradients(model, step, size)
        optimizers.step()
        give_gradients(reference, step)
        others.step()
    for key, value in weights(model).items():
        torch.testing.assert_close(value, weights(reference)[key], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", EVERY)
def test_gradients_of_zero_are_no_trouble(name):
    """Tokens that a batch does not hold have none."""
    model = new_model()
    optimizers = build(model, **ALL[name])
    for step in range(1, 4):
        give_gradients(model, step)
        assert model.wte.weight.grad is not None
        model.wte.weight.grad[step:] = 0
        model.wpe.weight.grad = torch.zeros_like(model.wpe.weight)
        optimizers.step()
    assert all(value.isfinite().all() for value in weights(model).values())


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("frozen", [[], ["wte.weight"], ["h.*"], ["not h.*"]], ids=str)
def test_every_trained_parameter_is_in_exactly_one_group_and_frozen_ones_keep_their_bits(name, frozen):
    model = new_model()
    for key, parameter in model.named_parameters():
        in_block = key.startswith("h.")
        parameter.requires_grad_(
            not (key in frozen or (in_block and "h.*" in frozen) or (not in_block and "not h.*" in frozen))
        )
    optimizers = build(model, **ALL[name])
    groups = [group for part in optimizers.parts for group in part.param_groups]
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    before = weights(model)
    trained(model, optimizers, range(1, 3))
    moved = {key for key, value in weights(model).items() if not torch.equal(value, before[key])}
    assert moved == {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    decaying = {id(p) for group in groups if group["weight_decay"] or group.get("shrink_by") for p in group["params"]}
    assert decaying == {id(p) for p in model.parameters() if p.requires_grad and p.dim() == 2}


@needs_muon
def test_muon_has_the_matrices_of_the_blocks_and_adamw_the_rest():
    model = new_model()
    names = {id(p): name for name, p in model.named_parameters()}
    by_muon, by_adamw = (
        {names[id(p)] for group in part.param_groups for p in group["params"]} for part in build(model, optim="muon").parts
    )
    assert by_muon == {name for name, p in model.named_parameters() if name.startswith("h.") and p.dim() == 2}
    assert {"wte.weight", "wpe.weight", "ln_f.weight", "h.0.ln_1.weight", "h.1.mlp.c_fc.bias"} <= by_adamw
    assert len(by_muon) + len(by_adamw) == len(names)


@pytest.mark.parametrize("name", EVERY)
def test_what_torch_can_fuse_is_fused_but_where_it_is_asked_for_plain(name):
    parts = build(new_model(), **ALL[name]).parts
    fused = {type(part).__name__: {group["fused"] for group in part.param_groups} for part in parts if "fused" in part.defaults}
    plain = ALL[name].get("optim") == "adamw_torch"
    assert list(fused.values()) == ([] if name == "adafactor" else [{None if plain else True}])


def test_muon_without_a_torch_that_has_it_is_one_line(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(ConfigError, match=r"optim: muon needs torch 2\.9 or newer, and this is "):
        build(new_model(), optim="muon")
