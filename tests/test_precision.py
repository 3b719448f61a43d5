"""float16 with its loss scale, TF32, and which of them a machine is asked for."""

import contextlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import groundup
from groundup.config.options import MachineOptions, SpeedOptions
from groundup.errors import ConfigError
from groundup.model import loss as loss_module
from groundup.model.gpt2 import GPT2, GPT2Config
from groundup.model.initial import initialize
from groundup.model.loss import next_token_loss
from groundup.recipes.machine import machine_for
from groundup.runtime import device as device_module
from groundup.runtime.device import Machine, choose_machine, peak_flops
from groundup.training import loss_scale as loss_scale_module
from groundup.training.loss_scale import GROWTH_STEPS, LossScale
from tests.conftest import TINY, make_text
from tests.test_loss import plain

# Which machine


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with a GPU of compute capability 8.0, as far as is asked."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100-SXM4-80GB")
    return monkeypatch


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(
    ("bf16", "fp16", "tf32", "dtype"),
    [
        (None, False, False, torch.bfloat16),
        (None, True, False, torch.float16),
        (None, False, True, torch.float32),
        (None, True, True, torch.float16),
        (True, False, True, torch.bfloat16),
        (False, True, False, torch.float16),
        (False, False, False, torch.float32),
    ],
)
def test_bf16_is_taken_only_where_nothing_else_is_asked_for(bf16, fp16, tf32, dtype):
    machine = choose_machine("cuda", bf16, fp16, tf32)
    assert (machine.dtype, machine.tf32) == (dtype, tf32)
    words = {torch.bfloat16: "bf16 autocast", torch.float16: "fp16 autocast", torch.float32: "float32"}
    assert words[dtype] in machine.reason
    assert ("TF32" in machine.reason) is tf32


def test_two_precisions_are_refused():
    with pytest.raises(ConfigError, match="^fp16: .*bf16.*give one"):
        choose_machine("cpu", True, fp16=True)


def test_tf32_is_refused_where_it_would_do_nothing(cuda):
    with pytest.raises(ConfigError, match="^tf32: True.*cpu; leave --tf32 out"):
        choose_machine("cpu", False, tf32=True)
    cuda.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    cuda.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    with pytest.raises(ConfigError, match=r"^tf32: True.*Tesla T4.*7\.5.*leave --tf32 out"):
        choose_machine("cuda", False, tf32=True)


def test_a_training_says_fp16_and_nobody_else():
    options = MachineOptions(device="cpu")
    assert machine_for(options, training=True, speed=SpeedOptions(fp16=True)).dtype == torch.float16
    assert machine_for(options, training=False).dtype == torch.float32


def test_tf32_is_allowed_for_a_while_and_then_as_before():
    def machine(tf32: bool) -> Machine:
        return Machine(torch.device("cpu"), torch.float32, "", "", tf32)

    assert torch.get_float32_matmul_precision() == "highest"
    with machine(False).float32_products():
        assert torch.get_float32_matmul_precision() == "highest"
    with contextlib.suppress(KeyError), machine(True).float32_products():
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cuda.matmul.allow_tf32
        raise KeyError
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cuda.matmul.allow_tf32


def test_the_peak_of_an_emulated_type_takes_no_hours(monkeypatch):
    """float16 is 30,000 times slower than float32 on some processors: then a small product must do."""
    sizes = []

    def slow(machine: Machine, size: int, products: int) -> float:
        sizes.append(size)
        return 1e9

    monkeypatch.setattr(device_module, "_measured_flops", slow)
    assert peak_flops(Machine(torch.device("cpu"), torch.float16, "", "")) == (1e9, "measured")
    assert max(sizes) <= 256


# The loss scale


class Judged:
    """torch's own scaler, shown one gradient a step."""

    def __init__(self, growth_steps: int) -> None:
        self.scaler = torch.amp.GradScaler("cpu", growth_interval=growth_steps)
        self.weight = nn.Parameter(torch.zeros(1))
        self.optimizer = torch.optim.SGD([self.weight], lr=0.0)
        self.scaler.scale(torch.zeros(()))

    def after(self, finite: bool) -> tuple[float, int]:
        self.weight.grad = torch.tensor([0.0 if finite else float("inf")])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return self.scaler.get_scale(), self.scaler.state_dict()["_growth_tracker"]


def test_the_constants_are_those_of_torch():
    torchs = torch.amp.GradScaler("cpu")
    assert torchs.get_scale() == LossScale().scale
    assert torchs.get_growth_interval() == GROWTH_STEPS
    assert (torchs.get_growth_factor(), torchs.get_backoff_factor()) == (2.0, 0.5)


@settings(max_examples=30, deadline=None)
@given(steps=st.lists(st.integers(0, 3).map(bool), max_size=40))
def test_it_moves_as_torchs_does(steps):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_scale_module, "GROWTH_STEPS", 3)
        scale, torchs = LossScale(), Judged(3)
        for finite in steps:
            scale = scale.after(finite)
            assert (scale.scale, scale.good_steps) == torchs.after(finite)


def test_it_doubles_after_two_thousand_good_steps():
    scale, torchs = LossScale(), Judged(GROWTH_STEPS)
    for step in range(2 * GROWTH_STEPS + 10):
        finite = step != 5
        scale = scale.after(finite)
        assert (scale.scale, scale.good_steps) == torchs.after(finite)
    assert scale.scale == 2.0**17, "it fell once and rose twice"


def test_it_never_becomes_infinite():
    scale = LossScale(loss_scale_module.LARGEST, GROWTH_STEPS - 1)
    assert scale.after(finite=True) == LossScale(loss_scale_module.LARGEST, 0)


# float16 in the loss, whose gradients are formed before the loss scale reaches them


def exact_in_float16(windows: int, vocabulary: int, width: int, spread: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, head and labels whose logits float16 holds exactly, so that nothing but the gradients is rounded."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randint(-spread, spread + 1, (1, windows, width), generator=draw).float()
    head = torch.randint(-1, 2, (vocabulary, width), generator=draw).float() / 2
    labels = (hidden[0] @ head.T).argmax(-1)[None]
    return hidden.requires_grad_(), head.requires_grad_(), labels


def float16_gradients(hidden: Tensor, head: Tensor, labels: Tensor, scale: float) -> tuple[Tensor, ...]:
    """As a step does it: the loss times the scale, the gradient divided by it."""
    tokens = labels.numel()
    with torch.autocast("cpu", dtype=torch.float16):
        loss = next_token_loss(hidden, head, labels, loss_scale=scale) / tokens
    return tuple(gradient * tokens / scale for gradient in torch.autograd.grad(loss * scale, (hidden, head)))


@pytest.mark.parametrize("scale", [2.0**16, 2.0**20])
def test_unlikely_tokens_learn_in_float16_too(scale):
    """
    GPT-2's vocabulary, a peaked prediction: without a factor float16 makes 0 of most probabilities.

    The rows of tokens that are no label learn from nothing but probabilities. Measured without the factor, half of these
    gradients are 2 % off and more, a tenth 66 % and more; with it 0.05 % and 1 %. The gradient as a whole is right either way.
    """
    hidden, head, labels = exact_in_float16(64, 50257, 48, 4)
    found = float16_gradients(hidden, head, labels, scale)
    expected = torch.autograd.grad(plain(hidden.double(), head.double(), labels), (hidden, head))
    for ours, theirs in zip(found, expected, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-3
    unseen = torch.ones(50257, dtype=torch.bool)
    unseen[labels] = False
    errors = ((found[1] - expected[1]).norm(dim=1) / expected[1].norm(dim=1))[unseen]
    assert float(errors.median()) < 1e-3
    assert float(errors.quantile(0.9)) < 0.02


def test_an_overflow_in_the_loss_is_cured_by_a_smaller_scale():
    """One label, the same large hidden state everywhere: its row is a sum beyond float16, until the loss scale has fallen."""
    hidden, head, labels = torch.full((1, 4096, 2), 30.0), torch.zeros(4, 2), torch.zeros(1, 4096, dtype=torch.int64)
    hidden.requires_grad_()
    head.requires_grad_()
    assert not float16_gradients(hidden, head, labels, 2.0**16)[1].isfinite().all()
    found = float16_gradients(hidden, head, labels, 2.0**12)[1]
    torch.testing.assert_close(found[0], torch.full((2,), -0.75 * 30 * 4096), rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("rows", [1, 63, 320, 8192, 2**20])
@pytest.mark.parametrize("scale", [2.0**-10, 1.0, 1000.0, 2.0**16, 2.0**30])
def test_the_factor_is_a_power_of_two_that_leaves_room(rows, scale):
    """So dividing by it later changes no digit; a sum of rows of 8 at the largest loss scale still is a number of float16."""
    factor = loss_module._float16_multiplier(rows, scale)
    assert math.frexp(factor)[0] == 0.5
    assert factor * rows * 8 <= min(scale, 2.0**16) < 2 * factor * rows * 8


def test_a_model_in_float16_has_the_gradients_of_float32():
    config = GPT2Config(vocab_size=300, n_positions=32, n_embd=32, n_layer=2, n_head=2)
    model = GPT2(config)
    initialize(model, torch.Generator().manual_seed(0))
    ids = torch.randint(300, (4, 32), generator=torch.Generator().manual_seed(1))
    machine, scale, gradients = choose_machine("cpu", None, fp16=True), LossScale().scale, []
    for autocast in (machine.autocast, choose_machine("cpu", False).autocast):
        with autocast():
            loss = next_token_loss(model(ids), model.head_weight, ids.roll(-1, 1)) / ids.numel()
        (loss * scale).backward()
        gradients.append([p.grad / scale for p in model.parameters()])
        model.zero_grad()
    for half, single in zip(*gradients, strict=True):
        assert half.dtype == torch.float32
        assert float((half - single).norm() / single.norm()) < 0.01


@pytest.mark.slow
def test_training_in_float16_learns_and_goes_on_as_if_never_interrupted(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(make_text(), encoding="utf-8")
    half = TINY | {"fp16": True, "bf16": None}
    half = {name: value for name, value in half.items() if value is not None}
    single = groundup.train(text, tmp_path / "single", **TINY)
    whole = groundup.train(text, tmp_path / "whole", **half)
    assert whole["eval_loss"] == pytest.approx(single["eval_loss"], abs=0.02)
    assert whole["skipped_steps"] <= 3
    groundup.train(text, tmp_path / "parts", **(half | {"max_steps": 8, "lr_scheduler_type": "constant_with_warmup"}))
    groundup.train(text, tmp_path / "parts", **(half | {"lr_scheduler_type": "constant_with_warmup"}))
    groundup.train(text, tmp_path / "straight", **(half | {"lr_scheduler_type": "constant_with_warmup"}))
    parts, straight = (groundup.load(tmp_path / name).model.state_dict() for name in ("parts", "straight"))
    assert all(torch.equal(parts[name], straight[name]) for name in straight)
