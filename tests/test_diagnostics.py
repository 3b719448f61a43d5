"""Somebody else's model through the door, each check by itself, and that nothing is changed by looking."""

import random
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import groundup.diagnostics as diagnostics
from groundup.diagnostics.bench import IGNORED, blocks_of, family
from groundup.diagnostics.check import Check, failed
from groundup.diagnostics.examination import GROUPS, Examination, examine
from groundup.diagnostics.fitting import Curve, entropy_of_continuations
from groundup.diagnostics.learning_rate import read_range
from groundup.diagnostics.overfit import _need
from groundup.errors import ConfigError
from tests.planted import LeakyAttention, new_model, optimizer, sound, tokens


class Bag(nn.Module):
    """The least that sees its past: the mean of the embeddings so far."""

    def __init__(self, vocab: int = 20, width: int = 16):
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.embed, self.head = nn.Embedding(vocab, width), nn.Linear(width, vocab)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw))

    def hidden(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return x + x.cumsum(1) / torch.arange(1, ids.size(1) + 1, device=ids.device)[:, None]

    def forward(self, ids: Tensor) -> Any:
        return self.head(self.hidden(ids))


TEXT = tokens(20, 4, 17, 1)
PAIR = (TEXT[:, :-1], TEXT[:, 1:])


def by_name(checks: Any) -> dict[str, Check]:
    return {check.name: check for check in checks}


def look(model: nn.Module, batch: Any = PAIR, loss: Any = None, only: Any = ("model",), **known: Any) -> dict[str, Check]:
    return by_name(diagnostics.check(model, batch, loss, only=only, **known).checks)


# Nothing is changed.


def everything(model: nn.Module) -> list[Any]:
    state = [(name, tensor.clone(), tensor.dtype) for name, tensor in model.state_dict().items()]
    flags = [(name, p.requires_grad, None if p.grad is None else p.grad.clone()) for name, p in model.named_parameters()]
    return [state, flags, [(name, module.training, len(module._forward_hooks)) for name, module in model.named_modules()]]


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def test_model_and_random_numbers_are_left_as_they_were():
    model = new_model(1, norm="batch", n_layer=1, resid_pdrop=0.1)
    model.h[0].attn.requires_grad_(False)
    model.h[0].mlp.eval()
    model.ln_f.weight.grad = torch.ones(32)
    text = tokens(96, 2, 17, 1)
    made = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before, groups = everything(model), repr(made.state_dict())
    drawn = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    report = diagnostics.check(model, text, optimizer=made)
    assert {check.group for check in report.checks} == set(GROUPS)
    assert equal(everything(model), before)
    assert repr(made.state_dict()) == groups
    assert torch.equal(torch.get_rng_state(), drawn[0])
    assert random.getstate() == drawn[1]
    assert (np.random.get_state()[1] == drawn[2]).all()


def test_random_numbers_are_the_callers_between_two_checks():
    subject, before = sound(n_layer=1), torch.get_rng_state()
    for _ in examine(subject, only=["model"]):
        assert torch.equal(torch.get_rng_state(), before)


def test_it_says_the_same_each_time_whatever_was_drawn_before():
    first = diagnostics.check(Bag(), PAIR, learning_rate=1e-2)
    torch.rand(5)
    assert diagnostics.check(Bag(), PAIR, learning_rate=1e-2) == first


# The forms in which models, batches, losses and optimizers come.


@dataclass
class Output:
    logits: Tensor


@pytest.mark.parametrize(
    "wrap",
    [
        lambda scores: (None, scores),
        lambda scores: {"logits": scores},
        Output,
        lambda scores: scores.flatten(0, 1),
        lambda scores: [scores, torch.tensor(1.0)],
    ],
)
def test_scores_come_in_many_forms(wrap):
    class Wrapped(Bag):
        def forward(self, ids: Tensor) -> Any:
            return wrap(super().forward(ids))

    assert not failed(look(Wrapped()).values())


def test_a_model_that_gives_the_last_position_only_is_told_apart():
    class LastOnly(Bag):
        def forward(self, ids: Tensor, targets: Tensor | None = None) -> Any:
            hidden = self.hidden(ids)
            return (self.head(hidden if targets is not None else hidden[:, [-1]]), None)

    with pytest.raises(ConfigError, match=re.escape("pass forward=lambda model, ids: model(ids, ids)[0]")):
        look(LastOnly())
    assert not failed(look(LastOnly(), forward=lambda model, ids: model(ids, ids)[0]).values())


def test_a_model_that_gives_something_else_is_refused():
    with pytest.raises(ConfigError, match=r"returned \(4, 16\) for token ids \(4, 16\).*pass forward="):
        look(Bag(), forward=lambda model, ids: model(ids)[:, :, 0])


def test_a_model_that_fails_is_refused_in_one_line():
    with pytest.raises(ConfigError, match="Bag fails on token ids .* to 77: IndexError: index out of range") as caught:
        look(Bag(), (PAIR[0] * 0 + 77, PAIR[1]))
    assert "\n" not in str(caught.value)


def test_a_model_that_cannot_be_copied_is_refused():
    model = Bag()
    model.kept = model.embed.weight * 2
    with pytest.raises(ConfigError, match="Bag cannot be copied .* in buffers"):
        look(model)


@pytest.mark.parametrize("batch", [TEXT, PAIR, list(PAIR), {"input_ids": PAIR[0], "labels": PAIR[1]}])
def test_batches_come_in_many_forms(batch):
    assert look(Bag(), batch)["targets"].passed


def test_int32_tokens_are_tokens():
    assert look(Bag(), TEXT.int())["targets"].passed


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (3, "batch: int is not understood"),
        ((TEXT,), "batch: tuple is not understood"),
        ((TEXT, TEXT[:, 1:]), "batch: token ids .*both have to be"),
        ((TEXT.float(), TEXT.float()), "torch.float32.*whole numbers"),
    ],
)
def test_a_batch_of_another_kind_is_refused(batch, words):
    with pytest.raises(ConfigError, match=words):
        look(Bag(), batch)


def per_window(scores: Tensor, labels: Tensor) -> Tensor:
    assert scores.dim() == 3
    return F.cross_entropy(scores.transpose(1, 2), labels)


@pytest.mark.parametrize(
    "loss", [None, F.cross_entropy, nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=0.1), per_window]
)
def test_losses_come_flattened_or_not(loss):
    assert not failed(look(Bag(), PAIR, loss).values())


def test_as_many_positions_as_tokens_are_no_trap():
    # F.cross_entropy takes scores (B, T, V) with labels (B, T), in another sense, exactly if T = V.
    text = tokens(20, 4, 21, 1)
    assert not failed(look(Bag(), text, F.cross_entropy).values())


def test_a_loss_that_takes_neither_form_is_refused_with_both_reasons():
    with pytest.raises(ConfigError, match=r"\(B · T, V\).*not one number; with \(B, T, V\).*RuntimeError"):
        look(Bag(), PAIR, nn.CrossEntropyLoss(reduction="none"))


def test_an_optimizer_is_made_anew_for_the_copy_group_by_group():
    model = Bag()
    groups = [{"params": [model.embed.weight], "lr": 1e-2}, {"params": list(model.head.parameters()), "lr": 5e-3}]
    checks = look(model, optimizer=torch.optim.SGD(groups, lr=1e-2, momentum=0.9), only=())
    assert checks["decay_groups"].measured == "2 groups, 3 trained parameters, 0 of them decay"
    assert "0.01: loss" in checks["learning_rate"].measured


def test_what_is_no_optimizer_is_refused():
    with pytest.raises(ConfigError, match="optimizer: str is none"):
        look(Bag(), optimizer="adam")


def test_an_argument_that_there_is_not_is_refused():
    with pytest.raises(ConfigError, match="no argument vocabsize; there are .*vocab_size"):
        look(Bag(), vocabsize=3)


def test_a_group_that_there_is_not_is_refused():
    with pytest.raises(ConfigError, match="no group models; there are model, gradients, learning"):
        look(Bag(), only=["models"])


def test_what_is_no_module_is_refused():
    with pytest.raises(ConfigError, match="function is no torch.nn.Module"):
        diagnostics.check(lambda ids: ids, PAIR)  # type: ignore[arg-type]


def test_our_own_model_gives_hidden_states_and_is_known():
    checks = look(new_model(1), tokens(96, 4, 17, 1))
    assert checks["shapes"].measured.startswith("scores (4, 16, 96)")
    assert checks["tied_weights"].measured == "the head is wte.weight"


def test_the_report_is_a_table_with_advice_and_a_verdict():
    report = diagnostics.check(Bag(), (TEXT, TEXT), only=["model"])
    assert not report.passed
    lines = str(report).splitlines()
    assert lines[-1] == "1 of 12 failed; culprit: target_not_shifted"
    assert any(line.startswith("FAIL targets") and "t: 100%" in line for line in lines)
    assert any("expected: position t is compared with token t + 1" in line for line in lines)
    assert str(diagnostics.check(Bag(), PAIR, only=["model"])).endswith("nothing is wrong")


# Each check by itself.


@pytest.mark.parametrize(
    ("loss", "culprit", "words"),
    [
        (lambda s, y: F.cross_entropy(s, y) / 8, "loss_scaled", "0.125 times the mean"),
        (lambda s, y: F.cross_entropy(s, y) / np.log(2), "loss_scaled", "bits instead of nats"),
        (lambda s, y: F.cross_entropy(s, y, reduction="sum"), "loss_summed", "the sum over all tokens, 64"),
        (lambda s, y: F.cross_entropy(s, y) * 16, "loss_summed", "the positions of a window, 16"),
        (lambda s, y: F.cross_entropy(s, y) * 4, "loss_summed", "the windows, 4"),
        (lambda s, y: F.cross_entropy(-s, y), "loss_sign_wrong", "LESS likely"),
        (lambda s, y: F.cross_entropy(s.detach(), y), "loss_detached", "no slope"),
        (lambda s, y: F.cross_entropy(s, y) * (1 + 1e-4 * (s - s.detach()).sum()), "loss_slope_wrong", "off by"),
        (lambda s, y: F.cross_entropy(s, y.roll(5)), "labels_unrelated", "t+1"),
    ],
)
def test_what_is_wrong_with_a_loss_is_named(loss, culprit, words):
    failures = failed(look(Bag(), PAIR, loss).values())
    assert [check.culprit for check in failures] == [culprit]
    assert words in failures[0].measured


def test_labels_that_are_left_out_are_no_fault():
    labels = PAIR[1].clone()
    labels[:, :5] = IGNORED
    assert not failed(look(Bag(), (PAIR[0], labels), F.cross_entropy).values())


def test_hugging_faces_way_of_shifting_in_the_loss_is_sound():
    def loss(scores: Tensor, labels: Tensor) -> Tensor:
        assert scores.dim() == 3
        return F.cross_entropy(scores[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    checks = look(Bag(), (TEXT, TEXT), loss)
    assert not failed(checks.values())
    assert checks["targets"].details["agreement"]["1"] == 1.0


def test_scores_that_are_no_numbers_end_the_examination():
    class Strict(Bag):
        def hidden(self, ids: Tensor) -> Tensor:
            x = self.embed(ids)
            mask = torch.ones(ids.size(1), ids.size(1), dtype=torch.bool).tril(-1)  # nobody sees itself
            return mask.float().log().softmax(-1) @ x

    checks = diagnostics.check(Strict(), PAIR).checks
    assert [check.name for check in checks] == ["shapes", "finite"]
    assert "1 position of 16: 0" in checks[-1].measured
    assert "mask that forbids every position" in checks[-1].advice


def test_a_head_with_too_few_rows_is_named():
    failures = failed(look(Bag(), PAIR, vocab_size=30).values())
    assert [check.culprit for check in failures] == ["vocabulary_too_small"]


@pytest.mark.parametrize("row", [0, -1])
def test_windows_that_are_mixed_up_are_named(row):
    class Mixed(Bag):
        def hidden(self, ids: Tensor) -> Tensor:
            return super().hidden(ids) + self.embed(ids[row]).cumsum(0)

    failures = failed(look(Mixed()).values())
    assert [check.culprit for check in failures] == ["windows_mixed"]


def test_a_model_without_a_past_is_named():
    failures = failed(look(Bag(), forward=lambda model, ids: model.head(model.embed(ids))).values())
    assert [check.culprit for check in failures] == ["past_unseen"]


def test_a_leak_behind_a_projection_that_starts_at_zero_is_seen():
    made = sound(init="small")
    made.model.h[0].attn.__class__ = LeakyAttention
    leak = by_name(examine(made, only=["model"]))["causal_leak"]
    assert leak.culprit == "causal_leak"
    assert "token 1 moves the scores of position 0" in leak.measured


def test_copies_that_were_meant_to_be_tied_are_named():
    class Two(Bag):
        def __init__(self) -> None:
            super().__init__()
            self.head.weight.data = self.embed.weight.data.clone()

    failures = failed(look(Two()).values())
    assert [check.culprit for check in failures] == ["weights_not_tied"]
    model = Bag()
    assert look(model, tied=(("embed.weight", "head.weight"),))["tied_weights"].culprit == "weights_not_tied"
    assert "no parameter x" in look(model, tied=(("embed.weight", "x"),))["tied_weights"].measured
    model.head.weight = model.embed.weight
    assert look(model, tied=(("embed.weight", "head.weight"),))["tied_weights"].passed


def test_blocks_that_start_as_copies_are_not_meant_to_be_tied():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.Sequential(nn.Embedding(20, 16), nn.TransformerEncoder(layer, 3), nn.Linear(16, 20))
    assert look(model)["tied_weights"].passed


def test_parameters_that_the_optimizer_lacks_or_has_twice_are_named():
    model = Bag()
    lacking = look(model, optimizer=torch.optim.AdamW(model.head.parameters()))["decay_groups"]
    assert lacking.culprit == "parameters_frozen"
    assert "in none: embed.weight" in lacking.measured
    other = look(model, optimizer=torch.optim.AdamW([*model.parameters(), *Bag().parameters()]))["decay_groups"]
    assert "3 tensors of another model" in other.measured

    @dataclass
    class Twice:
        param_groups: list[dict[str, Any]]

    def make(twin: nn.Module, rate: float) -> Any:
        return Twice([{"params": list(twin.parameters()), "lr": rate}, {"params": [twin.embed.weight], "lr": rate}])

    assert look(model, optimizer=make)["decay_groups"].culprit == "decay_groups_overlap"


def test_a_trained_model_is_told_so_and_not_accused():
    model = Bag()
    fitted = torch.optim.AdamW(model.parameters(), lr=0.03)
    for _ in range(60):
        fitted.zero_grad()
        F.cross_entropy(model(PAIR[0]).flatten(0, 1), PAIR[1].flatten()).backward()
        fitted.step()
    check = look(model)["initial_loss"]
    assert check.passed
    assert "trained already" in check.measured


def test_a_parameter_that_is_not_used_is_named():
    model = Bag()
    model.spare = nn.Linear(3, 3)
    failures = failed(look(model, only=["gradients"]).values())
    assert [check.culprit for check in failures] == ["parameters_unused"]
    assert "spare.weight, spare.bias" in failures[0].measured


def test_parameters_may_be_frozen_on_purpose():
    model = Bag()
    model.embed.requires_grad_(False)
    assert look(model, only=["gradients"])["gradients_reach"].culprit == "parameters_frozen"
    assert look(model, only=["gradients"], frozen=("embed",))["gradients_reach"].passed


class Crooked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return slope * weight, 1.01 * (slope * x).sum((0, 1))  # one percent too much


def test_a_backward_pass_that_is_wrong_by_one_percent_is_named():
    class Scaled(Bag):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(16))

        def hidden(self, ids: Tensor) -> Tensor:
            return Crooked.apply(super().hidden(ids), self.scale)

    checks = look(Scaled(), only=["gradients"])
    assert [check.culprit for check in failed(checks.values())] == ["backward_wrong"]
    assert checks["gradient_check"].details["scale"]["relative_error"] == pytest.approx(0.01, rel=0.02)


def test_a_stream_that_is_cut_between_modules_is_named():
    checks = look(Bag(), only=["gradients"], forward=lambda model, ids: model.head(model.hidden(ids).detach()))
    assert {check.culprit for check in failed(checks.values())} == {"residual_detached"}


class Chain(nn.Module):
    """Blocks without a residual stream, each of which multiplies by about the same."""

    def __init__(self, factor: float, depth: int = 8):
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 16), nn.Linear(16, 20)
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(depth))
        with torch.no_grad():
            for block in self.blocks:
                block.weight.copy_(factor * torch.eye(16))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_the_depth_profile_names_what_vanishes_and_what_explodes():
    small, large, fine = (look(Chain(factor), only=["gradients"])["gradient_depth"] for factor in (0.1, 10.0, 1.0))
    assert (small.culprit, fine.passed) == ("gradients_vanish", True)
    assert large.passed is False
    sizes = small.details["gradient_rms"]
    assert list(sizes) == [f"blocks.{i}" for i in range(8)]
    assert sizes["blocks.0"] / sizes["blocks.7"] == pytest.approx(1e-7, rel=0.01)


def test_a_model_of_float32_only_is_examined_in_float32():
    def forward(model: nn.Module, ids: Tensor) -> Tensor:
        return (model.hidden(ids).float() @ model.head.weight.float().T) + model.head.bias.float()

    class Stubborn(Bag):
        def hidden(self, ids: Tensor) -> Tensor:
            assert self.embed.weight.dtype == torch.float32
            return super().hidden(ids)

    checks = look(Stubborn(), only=("model", "gradients"), forward=forward)
    assert not failed(checks.values())
    assert "float32" in checks["gradient_check"].expected


def test_a_model_in_bfloat16_is_trained_in_float32():
    checks = look(Bag().bfloat16(), only=("learning",), learning_rate=1e-2)
    assert checks["overfit"].passed


def test_more_is_not_asked_of_a_batch_than_it_can_give():
    # After equal beginnings come different tokens: ln 2 in the first column, nothing in the second.
    inputs, targets = torch.tensor([[1, 2], [1, 3]]), torch.tensor([[2, 5], [3, 6]])
    assert entropy_of_continuations(inputs, targets) == pytest.approx(np.log(2) / 2)
    targets[:, 0] = IGNORED
    assert entropy_of_continuations(inputs, targets) == 0.0


def test_the_range_is_read_from_where_the_loss_falls():
    rates = tuple(10.0**k for k in range(-6, 2))
    found = read_range(Curve(rates, (5.0, 5.0, 5.0, 5.0, 4.0, 2.0, 1.0, 6.0, float("inf")), (1.0,) * 8, 0.0))
    assert (found.low, found.high) == (pytest.approx(1e-3), pytest.approx(0.1 / 3))
    assert read_range(Curve((), (5.0,), (), 0.0)).rates == ()


CALM = Curve((0.1,) * 3, (4.0, 3.0, 2.0, 1.5), (1.0, 1.0, 1.0), 0.0)
WILD = Curve((0.1,) * 3, (4.0, 2.0, 3.0, 1.5), (1.0, 9.0, 1.0), 0.0)


@pytest.mark.parametrize(
    ("without", "with_it", "has", "passed", "words"),
    [
        (CALM, CALM, 0, True, "not needed: at 0.1 the loss rises by 0"),
        (WILD, CALM, 0, False, "needed: at 0.1 the loss rises by 1, with it by 0; largest gradient norm 9, median 1"),
        (WILD, CALM, 100, True, "needed"),
        (WILD, CALM, None, None, "needed"),
        (WILD, WILD, 0, True, "makes no difference"),
    ],
)
def test_warmup_is_called_for_where_it_helps_and_is_missing(without, with_it, has, passed, words):
    check = _need("warmup", 0.1, without, with_it, has, "warm up")
    assert (check.passed, check.advice) == (passed, "warm up" if passed is False else "")
    assert check.measured.startswith(words)


def test_blocks_and_families_are_found_by_structure():
    assert [name for name, _ in blocks_of(new_model(0))] == ["h.0", "h.1"]
    assert blocks_of(Bag()) == []
    assert family("h.3.attn.c_attn.weight") == "h.*.attn.c_attn.weight"
    assert family("blocks.0.heads.11.key.weight") == "blocks.*.heads.*.key.weight"


def test_a_step_of_the_subjects_own_optimizer_is_what_is_used():
    examination = Examination(sound(n_layer=1, learning_rate=1e-3))
    assert examination.subject.make_optimizer is optimizer
    assert by_name([examination._decay_groups()])["decay_groups"].measured.startswith("2 groups")
