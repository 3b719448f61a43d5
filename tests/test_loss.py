"""The loss with the head inside, against torch's cross-entropy over all logits at once."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from groundup.model import loss as loss_module
from groundup.model.loss import next_token_loss, next_token_scores

TOLERANCE = {torch.float64: {"rtol": 1e-10, "atol": 1e-12}, torch.float32: {"rtol": 2e-5, "atol": 2e-5}}


@contextmanager
def block_logits(count: int) -> Iterator[None]:
    """Form at most so many logits at once, so that small inputs take several blocks."""
    before, loss_module.BLOCK_LOGITS = loss_module.BLOCK_LOGITS, count
    try:
        yield
    finally:
        loss_module.BLOCK_LOGITS = before


def problem(windows: int, length: int, width: int, vocabulary: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(windows, length, width, generator=draw, dtype=dtype, requires_grad=True)
    head = torch.randn(vocabulary, width, generator=draw, dtype=dtype, requires_grad=True)
    return hidden, head, torch.randint(vocabulary, (windows, length), generator=draw)


def plain(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """What the paper says, with all logits at once."""
    return F.cross_entropy((hidden @ head.T).flatten(0, 1), labels.flatten(), reduction="sum")


def value_and_gradients(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return (loss.detach(), *torch.autograd.grad(loss, inputs))


SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 12), st.integers(1, 40))


@settings(max_examples=60, deadline=None)
@given(shape=SHAPES, block=st.integers(1, 400), dtype=st.sampled_from(list(TOLERANCE)), seed=st.integers(0, 9))
def test_value_and_both_gradients_are_those_of_cross_entropy(shape, block, dtype, seed):
    hidden, head, labels = problem(*shape, dtype, seed)
    with block_logits(block):
        found = value_and_gradients(next_token_loss(hidden, head, labels), hidden, head)
    for ours, theirs in zip(found, value_and_gradients(plain(hidden, head, labels), hidden, head), strict=True):
        torch.testing.assert_close(ours, theirs, **TOLERANCE[dtype])


def test_the_gradient_of_a_mean_is_the_mean_of_the_gradient():
    """A step divides the sum by its tokens before it goes back."""
    hidden, head, labels = problem(3, 5, 7, 11, torch.float64)
    with block_logits(30):
        found = value_and_gradients(next_token_loss(hidden, head, labels) / 15, hidden, head)
    for ours, theirs in zip(found, value_and_gradients(plain(hidden, head, labels) / 15, hidden, head), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_gradients_are_the_slopes_of_the_loss():
    """Against central differences, one element at a time; torch's gradcheck goes back twice, which this loss refuses."""
    hidden, head, labels = problem(2, 3, 4, 5, torch.float64)
    with block_logits(10), torch.no_grad():  # two rows at a time
        for tensor, gradient in zip((hidden, head), gradients(hidden, head, labels), strict=True):
            flat, step = tensor.view(-1), 1e-6
            for index in range(flat.numel()):
                value = flat[index].item()
                sides = []
                for moved in (value + step, value - step):
                    flat[index] = moved
                    sides.append(float(next_token_loss(hidden, head, labels)))
                flat[index] = value
                assert float(gradient.view(-1)[index]) == pytest.approx((sides[0] - sides[1]) / (2 * step), abs=1e-7)


@torch.enable_grad()
def gradients(hidden: Tensor, head: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(next_token_loss(hidden, head, labels), (hidden, head))


def test_a_second_derivative_is_an_error_not_a_wrong_number():
    """It is differentiable once, as it says; torch must not be handed a gradient that lacks a part."""
    hidden, head, labels = problem(2, 3, 4, 5, torch.float64)
    with pytest.raises(RuntimeError):  # noqa: PT012 - either call may say so
        (first,) = torch.autograd.grad(next_token_loss(hidden.tanh(), head, labels), hidden, create_graph=True)
        torch.autograd.grad(first.square().sum(), hidden)


@pytest.mark.parametrize("frozen", ["hidden", "head"])
def test_one_side_may_be_without_gradient(frozen):
    hidden, head, labels = problem(2, 3, 4, 5, torch.float64)
    still, moving = (hidden, head) if frozen == "hidden" else (head, hidden)
    still.requires_grad_(False)
    (found,) = torch.autograd.grad(next_token_loss(hidden, head, labels), moving)
    (expected,) = torch.autograd.grad(plain(hidden, head, labels), moving)
    torch.testing.assert_close(found, expected)


def test_tied_weights_get_both_gradients():
    """In the model the head is the embedding that the hidden states are from."""
    _, weight, labels = problem(2, 3, 4, 5, torch.float64)
    ids = labels.flip(1)
    (found,) = torch.autograd.grad(next_token_loss(weight[ids].tanh(), weight, labels), weight)
    (expected,) = torch.autograd.grad(plain(weight[ids].tanh(), weight, labels), weight)
    torch.testing.assert_close(found, expected)


def test_huge_logits_do_not_overflow():
    hidden, head, labels = problem(2, 3, 4, 5, torch.float32)
    found = value_and_gradients(next_token_loss(hidden * 1e4, head, labels), hidden, head)
    expected = value_and_gradients(plain(hidden * 1e4, head, labels), hidden, head)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-2)


def test_under_bf16_autocast_it_is_close():
    """Products in bf16, sums in float32; the gradients have the types of what they belong to."""
    hidden, head, labels = problem(4, 32, 64, 500, torch.float32)
    scaled = [t.detach().mul(0.2).requires_grad_() for t in (hidden, head)]
    with block_logits(10 * 500), torch.autocast("cpu", dtype=torch.bfloat16):
        found = value_and_gradients(next_token_loss(*scaled, labels), *scaled)
    expected = value_and_gradients(plain(*scaled, labels), *scaled)
    assert [t.dtype for t in found] == [torch.float32] * 3
    torch.testing.assert_close(found[0], expected[0], rtol=1e-3, atol=0.0)
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 0.02


@settings(max_examples=40, deadline=None)
@given(shape=SHAPES, block=st.integers(1, 400))
def test_scores_are_the_loss_token_by_token(shape, block):
    hidden, head, labels = problem(*shape, torch.float32)
    with block_logits(block):
        losses, hits = next_token_scores(hidden, head, labels)
        total = next_token_loss(hidden, head, labels)
    assert losses.shape == hits.shape == (labels.numel(),)
    torch.testing.assert_close(losses.sum(), total.detach(), rtol=1e-5, atol=1e-4)
    logits = (hidden @ head.T).flatten(0, 1)
    torch.testing.assert_close(losses, F.cross_entropy(logits, labels.flatten(), reduction="none"), rtol=1e-4, atol=1e-4)
    assert torch.equal(hits, logits.argmax(-1) == labels.flatten())


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any result of an operation had."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def largest_in(loss: Any, hidden: Tensor, head: Tensor, labels: Tensor) -> int:
    with LargestTensor() as largest:
        torch.autograd.grad(loss(hidden, head, labels), (hidden, head))
    return largest.elements


def test_all_logits_are_never_formed():
    """Forward and back: no tensor holds more than a block, or than an input."""
    hidden, head, labels = problem(8, 64, 16, 1000, torch.float32)
    block = 20_000
    with block_logits(block):
        assert largest_in(next_token_loss, hidden, head, labels) <= block
    assert largest_in(plain, hidden, head, labels) >= labels.numel() * head.size(0), "the plain way does, so we can tell"


def test_nothing_is_computed_for_gradients_that_nobody_wants():
    hidden, head, labels = problem(2, 3, 4, 5, torch.float32)
    with torch.no_grad():
        loss = next_token_loss(hidden, head, labels)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, plain(hidden, head, labels).detach())
