"""What people hand over that is not what was expected is named or refused in one line, and nothing of theirs is changed."""

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from groundup.diagnostics.check import failed
from groundup.errors import ConfigError
from tests.planted import tokens
from tests.test_diagnostics import PAIR, TEXT, Bag, look


def named(*args: Any, **known: Any) -> list[str]:
    failures = failed(look(*args, **known).values())
    assert all(check.advice for check in failures)
    return [check.culprit for check in failures]


# Nothing of theirs is changed.


def test_an_optimizer_of_another_model_is_named_and_that_model_left_alone():
    other = Bag()
    other(PAIR[0]).sum().backward()
    before = [parameter.clone() for parameter in other.parameters()]
    foreign = torch.optim.AdamW(other.parameters(), lr=0.1)
    assert named(Bag(), only=(), optimizer=foreign) == ["optimizer_of_another_model"]
    with pytest.raises(ConfigError, match="3 tensors of another model"):
        look(Bag(), only="learning", optimizer=foreign)
    with pytest.raises(ConfigError, match="3 tensors of another model"):
        look(Bag(), only="learning", optimizer=lambda twin, rate: foreign)
    assert all(map(torch.equal, before, other.parameters()))


def test_a_model_and_a_loss_may_change_what_they_are_given():
    class Clamping(Bag):
        def forward(self, ids: Tensor) -> Any:
            return super().forward(ids.clamp_(0, 5))

    def loss(scores: Tensor, labels: Tensor) -> Tensor:
        value = F.cross_entropy(scores.add_(1), labels.clone())
        labels.zero_()
        return value

    pair = TEXT[:, :-1].clone(), TEXT[:, 1:].clone()
    checks = look(Clamping(), pair, loss)
    assert checks["targets"].passed
    assert torch.equal(pair[0], TEXT[:, :-1])
    assert torch.equal(pair[1], TEXT[:, 1:])


# Models that are not what they seem.


def test_probabilities_in_place_of_scores_are_named():
    assert named(Bag(), forward=lambda model, ids: model(ids).softmax(-1)) == ["softmax_twice"]
    assert named(Bag(), forward=lambda model, ids: model(ids).log_softmax(-1)) == []


@pytest.mark.parametrize(
    "noisy", [lambda scores: F.dropout(scores, 0.1), lambda scores: scores + 0.01 * torch.randn_like(scores)]
)
def test_scores_that_differ_from_pass_to_pass_are_named_before_all_else(noisy):
    assert named(Bag(), only=(), forward=lambda model, ids: noisy(model(ids))) == ["scores_random"]


def test_a_norm_over_time_leaks_in_training_though_not_in_eval_mode():
    class Normed(Bag):
        def forward(self, ids: Tensor) -> Any:
            x = self.hidden(ids)
            return self.head(x / x.std((0, 1)) if self.training else x)

    assert named(Normed()) == ["batch_statistics"]
    assert named(nn.Sequential(Bag(), nn.Dropout(0.1))) == []


def test_weights_in_a_list_of_python_are_named():
    class Listed(Bag):
        def __init__(self):
            super().__init__()
            self.more = [nn.Linear(self.head.in_features, self.head.in_features)]

        def forward(self, ids: Tensor) -> Any:
            return self.head(self.more[0](self.hidden(ids)))

    assert "parameters_not_registered" in named(Listed(), only=("gradients",))
    assert named(Bag(), only=("gradients",)) == []


def test_a_vocabulary_of_two_is_one():
    text = tokens(2, 4, 17, 1)
    assert named(Bag(2), text) == []
    assert "labels_unrelated" in named(Bag(2), (text[:, :-1], 1 - text[:, 1:]))


def masked(model: nn.Module, ids: Tensor) -> Tensor:
    scores = model(ids).clone()
    scores[..., 17:] = -math.inf
    return scores


@pytest.mark.parametrize("vocab_size", [None, 17])
def test_rows_of_padding_may_be_masked(vocab_size):
    text = tokens(17, 4, 17, 1)
    checks = look(Bag(), text, forward=masked, vocab_size=vocab_size, only=())
    assert not failed(checks.values())
    assert checks["initial_loss"].details["uniform"] == pytest.approx(math.log(17))


@pytest.mark.parametrize("first", [5, 15])
def test_labels_of_a_prompt_may_be_left_out(first):
    labels = TEXT[:, 1:].clone()
    labels[:, :first] = -100
    assert named(Bag(), (TEXT[:, :-1], labels), only=("model", "gradients")) == named(Bag(), TEXT, only=("model", "gradients"))


def test_a_token_of_the_text_may_not_be_masked():
    assert named(Bag(), torch.cat([TEXT[:, 1:], torch.full((4, 1), 19)], 1), forward=masked) == ["scores_not_finite"]


def test_a_stated_vocabulary_below_the_text_is_named():
    assert named(Bag(), vocab_size=5, only=()) == ["vocabulary_too_small"]


def test_two_tokens_a_window_are_enough_not_to_fail():
    assert named(Bag(), TEXT[:, :3]) == []


@pytest.mark.parametrize(
    ("batch", "words"), [(TEXT[:, :2], "windows of one token"), ((PAIR[0], torch.full_like(PAIR[1], -100)), "all labels")]
)
def test_a_batch_that_nothing_can_be_learned_from_is_refused(batch, words):
    with pytest.raises(ConfigError, match=words):
        look(Bag(), batch)


def test_a_model_without_parameters_is_refused():
    with pytest.raises(ConfigError, match="Identity has no parameters"):
        look(nn.Identity(), forward=lambda model, ids: F.one_hot(ids, 20).float())


def test_all_parameters_frozen_are_named_or_meant():
    frozen = Bag().requires_grad_(False)
    assert named(frozen, only="learning") == ["parameters_frozen"]
    assert look(frozen, only="learning", frozen=["embed", "head"])["overfit"].passed is None


def test_an_embedding_with_sparse_gradients_is_examined():
    model = Bag()
    model.embed.sparse = True
    assert named(model, only="learning") == []
    assert model.embed.sparse


# Losses.


@pytest.mark.parametrize(
    ("loss", "culprit"),
    [
        (lambda s, y: s.square().mean(), "labels_ignored"),
        (lambda s, y: s.logsumexp(-1).mean(), "labels_ignored"),
        (lambda s, y: F.cross_entropy(s, y) / 0, "loss_not_finite"),
        (lambda s, y: s.sum() * math.nan, "loss_not_finite"),
    ],
)
def test_a_loss_that_is_none_is_named_once(loss, culprit):
    assert named(Bag(), PAIR, loss) == [culprit]


def test_a_loss_with_weights_in_float32_is_examined_in_float32():
    assert named(Bag(), PAIR, nn.CrossEntropyLoss(weight=torch.linspace(0.5, 2, 20))) == []
    weight = torch.ones(20)

    def wrong(scores: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(scores, labels, weight=weight) * (1 + 1e-3 * (scores - scores.detach()).sum())

    assert named(Bag(), PAIR, wrong) == ["loss_slope_wrong"]


# What is raised by theirs, and arguments that cannot be.


def raising(error: Exception) -> Any:
    def fail(*arguments: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize("error", [KeyError("x"), ZeroDivisionError("z"), StopIteration(), Exception("two\nlines")])
@pytest.mark.parametrize("where", ["loss", "forward", "optimizer"])
def test_whatever_theirs_raises_is_said_in_one_line(error, where):
    with pytest.raises(ConfigError, match=type(error).__name__) as caught:
        look(Bag(), **{where: raising(error)})
    assert "\n" not in str(caught.value)


def test_a_backward_pass_that_fails_is_said_in_one_line():
    def broken(scores: Tensor, labels: Tensor) -> Tensor:
        value = F.cross_entropy(scores, labels)
        labels.zero_()
        return value

    with pytest.raises(ConfigError, match=r"loss_fn: its backward pass fails: .*inplace"):
        look(Bag(), PAIR, broken)

    def overwriting(model: nn.Module, ids: Tensor) -> Tensor:
        scores = model(ids)
        squares = scores.square()
        scores.add_(1)
        return squares

    for group in ("gradients", "learning"):
        with pytest.raises(ConfigError, match=r"model: its backward pass fails: .*inplace"):
            look(Bag(), forward=overwriting, only=group)


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        (torch.optim.AdamW, "AdamW is a class"),
        (lambda model, rate: None, "returned NoneType"),
        (lambda model, rate: torch.optim.LBFGS(model.parameters(), lr=rate), "LBFGS fails in a step: .*closure"),
    ],
)
def test_an_optimizer_that_cannot_be_used_is_refused(optimizer, words):
    with pytest.raises(ConfigError, match=words):
        look(Bag(), only="learning", optimizer=optimizer)


def test_a_rate_may_be_a_tensor():
    model = Bag()
    made = torch.optim.AdamW(model.parameters(), lr=torch.tensor(1e-2))
    for how in ({"optimizer": made}, {"learning_rate": torch.tensor(1e-2)}):
        checks = look(model, only="learning", **how)
        assert json.dumps([check.as_json() for check in checks.values()])
        assert checks["learning_rate"].passed


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *(("vocab_size", value) for value in (0, -3, "3", 2.5)),
        *(("learning_rate", value) for value in (-1, math.nan, math.inf, "x")),
        *(("max_grad_norm", value) for value in (-1.0, math.nan, "x")),
        *(("warmup_steps", value) for value in (-1, 0.5)),
        *(("seed", value) for value in (2**70, -1)),
        ("trained", "maybe"),
        ("tied", ("embed.weight",)),
        ("tied", "ab"),
        ("frozen", 3),
    ],
)
def test_an_argument_that_cannot_be_is_refused_by_name(argument, value):
    with pytest.raises(ConfigError, match=f"^{argument}: "):
        look(Bag(), **{argument: value})


def test_a_group_may_be_named_alone_and_names_come_in_lists():
    model = Bag()
    model.head.weight = model.embed.weight
    checks = look(model, only="model", tied=[["embed.weight", "head.weight"]], frozen="embed")
    assert checks["tied_weights"].passed
    assert {check.group for check in checks.values()} == {"model"}
