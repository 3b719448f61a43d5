"""Decay groups, AdamW's update in closed form, and the schedules against tables and against transformers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from groundup.config.options import BatchOptions, ModelOptions, OptimizerOptions, RunOptions
from groundup.config.plan import plan_run
from groundup.model.gpt2 import GPT2, GPT2Config
from groundup.optim.adamw import build_adamw, decay_groups
from groundup.optim.schedule import learning_rate_at

CONFIG = GPT2Config(vocab_size=31, n_positions=12, n_embd=16, n_layer=2, n_head=2)


def test_every_parameter_is_in_exactly_one_group():
    model = GPT2(CONFIG)
    grouped = [id(p) for group in decay_groups(model, 0.1) for p in group["params"]]  # type: ignore[attr-defined]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    assert len(set(grouped)) == len(grouped)


def test_matrices_decay_and_nothing_else():
    model = GPT2(CONFIG)
    names = {id(p): name for name, p in model.named_parameters()}
    decaying, others = ([names[id(p)] for p in group["params"]] for group in decay_groups(model, 0.1))  # type: ignore[attr-defined]
    assert [group["weight_decay"] for group in decay_groups(model, 0.1)] == [0.1, 0.0]
    per_block = {"attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"}
    assert set(decaying) == {"wte.weight", "wpe.weight"} | {f"h.{i}.{name}" for i in range(2) for name in per_block}
    assert all(name.endswith("bias") or "ln_" in name for name in others)


class Two(nn.Module):
    """A matrix, which decays, and a bias, which does not."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(3, 4, generator=draw))
        self.bias = nn.Parameter(torch.randn(4, generator=draw))


@settings(max_examples=25, deadline=None)
@given(
    rate=st.sampled_from([1e-4, 1e-2, 0.5]),
    beta1=st.sampled_from([0.0, 0.9]),
    beta2=st.sampled_from([0.95, 0.999]),
    epsilon=st.sampled_from([1e-8, 1e-3]),
    decay=st.sampled_from([0.0, 0.1]),
    steps=st.integers(1, 4),
)
def test_the_update_is_the_papers(rate, beta1, beta2, epsilon, decay, steps):
    """By hand in float64: w ← w − α (m̂ / (√v̂ + ε) + λ w), with moments corrected for their start."""
    model = Two()
    optimizer = build_adamw(model, learning_rate=rate, beta1=beta1, beta2=beta2, epsilon=epsilon, weight_decay=decay)
    draw = torch.Generator().manual_seed(1)
    expected = {name: (p.detach().double(), torch.zeros(p.shape), torch.zeros(p.shape)) for name, p in model.named_parameters()}
    for step in range(1, steps + 1):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn(parameter.shape, generator=draw)
            w, m, v = expected[name]
            g = parameter.grad.double()
            m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
            m_hat, v_hat = m / (1 - beta1**step), v / (1 - beta2**step)
            w = w - rate * (m_hat / (v_hat.sqrt() + epsilon) + (decay if name == "matrix" else 0.0) * w)
            expected[name] = (w, m, v)
        optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach().double(), expected[name][0], rtol=2e-5, atol=2e-6)


# By hand: peak 1, 4 steps of warmup, 12 in all; p = (step − 5) / 8.
STEPS = range(1, 13)
WARMUP = [0.25, 0.5, 0.75, 1.0]
COSINE = [(1 + math.cos(math.pi * p / 8)) / 2 for p in range(8)]
TABLES = {
    "constant_with_warmup": [*WARMUP, *[1.0] * 8],
    "linear": [*WARMUP, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8],
    "cosine": [*WARMUP, *COSINE],
    "cosine_with_min_lr": [*WARMUP, *[0.1 + 0.9 * value for value in COSINE]],
}


def rate_at(step: int, kind: str, peak: float = 1.0, warmup: int = 4, total: int = 12, floor: float = 0.1) -> float:
    return learning_rate_at(step, kind=kind, peak=peak, warmup_steps=warmup, total_steps=total, min_rate=floor)


@pytest.mark.parametrize("kind", list(TABLES))
def test_each_schedule_by_hand(kind):
    assert [rate_at(step, kind) for step in STEPS] == pytest.approx(TABLES[kind], abs=1e-12)
    assert [rate_at(step, kind, peak=3e-4) for step in STEPS] == pytest.approx([3e-4 * r for r in TABLES[kind]], abs=1e-15)


def test_some_values_of_the_cosine_by_hand():
    assert rate_at(9, "cosine") == pytest.approx(0.5)  # half way
    assert rate_at(9, "cosine_with_min_lr") == pytest.approx(0.55)
    assert rate_at(7, "cosine") == pytest.approx((1 + math.sqrt(0.5)) / 2)


@pytest.mark.parametrize("kind", list(TABLES))
def test_after_the_planned_end_the_rate_stays_at_its_floor(kind):
    floor = {"constant_with_warmup": 1.0, "cosine_with_min_lr": 0.1}.get(kind, 0.0)
    assert [rate_at(step, kind) for step in (13, 14, 1000)] == pytest.approx([floor] * 3, abs=1e-12)


@pytest.mark.parametrize("kind", list(TABLES))
@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (0, 10), (1, 1), (10, 10), (20, 10)])
def test_short_runs_and_long_warmups_are_defined(kind, warmup, total):
    rates = [rate_at(step, kind, warmup=warmup, total=total) for step in range(1, total + 1)]
    assert all(0 <= rate <= 1 for rate in rates)
    assert rates[0] == (1.0 if warmup == 0 else 1 / warmup)
    assert rates[:warmup] == pytest.approx([(i + 1) / warmup for i in range(min(warmup, total))])


def hugging_face_rates(kind: str, warmup: int, total: int, floor: float) -> list[float]:
    """The rates that transformers' scheduler of the same name gives, steps counted from 0."""
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    extra = {"min_lr_rate": floor} if kind == "cosine_with_min_lr" else None
    scheduler = get_scheduler(kind, optimizer, warmup, total, scheduler_specific_kwargs=extra)
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("kind", list(TABLES))
@pytest.mark.parametrize(("warmup", "total"), [(0, 12), (4, 12), (30, 100)])
def test_after_warmup_it_is_the_schedule_of_transformers(kind, warmup, total):
    """Their step t is our step t + 1. Their warmup wastes its first step on a rate of 0; ours does not."""
    theirs = hugging_face_rates(kind, warmup, total, 0.1)
    ours = [rate_at(step, kind, warmup=warmup, total=total) for step in range(1, total + 1)]
    assert ours[warmup:] == pytest.approx(theirs[warmup:], abs=1e-12)
    assert ours[:warmup] == pytest.approx([*theirs[1:warmup], *([1.0] if warmup else [])], abs=1e-12)


def planned(**options: float) -> tuple[int, int]:
    batch = BatchOptions(total_batch_tokens=100)
    run = RunOptions(max_steps=int(options.get("max_steps", 0)), num_train_epochs=options.get("num_train_epochs", 3.0))
    plan = plan_run(
        ModelOptions(n_positions=10), batch, OptimizerOptions(warmup_steps=options.get("warmup_steps", 0.05)), run, windows=95
    )
    return plan.total_steps, plan.warmup_steps


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_steps": 200}, (200, 10)),
        ({"max_steps": 200, "warmup_steps": 7}, (200, 7)),
        ({"max_steps": 200, "warmup_steps": 0}, (200, 0)),
        ({"max_steps": 200, "warmup_steps": 0.5}, (200, 100)),
        ({"num_train_epochs": 2.0, "warmup_steps": 1}, (19, 1)),  # 190 windows, 10 a step
        ({"num_train_epochs": 0.01, "warmup_steps": 0}, (1, 0)),
    ],
    ids=str,
)
def test_warmup_in_steps_or_as_a_part_of_the_run(options, expected):
    assert planned(**options) == expected
