"""The workbench: copies of a model that checks may change, small parts of the batch, and the loss that would be right."""

import copy
import random
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from groundup.diagnostics.subject import Subject
from groundup.errors import ConfigError

IGNORED = -100
"""A label that no loss is computed for, as in ``torch.nn.functional.cross_entropy``."""


@contextmanager
def undisturbed(subject: Subject) -> Iterator[None]:
    """Draw from seeds of our own; afterwards every random generator is where it was."""
    python, arrays = random.getstate(), np.random.get_state()
    devices = [subject.inputs.device.index or 0] if subject.inputs.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.enable_grad():
        torch.manual_seed(subject.seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)


def copied(model: nn.Module) -> nn.Module:
    """
    A copy that shares nothing with the model; without gradients, and without dropout.

    Raises:
        ConfigError: the model cannot be copied.
    """
    try:
        twin = copy.deepcopy(model)
    except Exception as error:
        raise ConfigError(
            f"model: {type(model).__name__} cannot be copied ({first_line(error)}), and the original is not to be changed; "
            "let it hold no tensors that were computed from others (keep them in buffers)"
        ) from error
    twin.zero_grad(set_to_none=True)
    for module in twin.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            module.sparse = False  # the same gradient, in a form whose norm can be taken
    return twin.eval()


def learner(model: nn.Module) -> nn.Module:
    """A copy to train, in float32 at least: without dropout, but batch norm does what it does in training."""
    twin = copied(model)
    if any(p.dtype in (torch.float16, torch.bfloat16) for p in twin.parameters()):
        twin = twin.float()
    for module in twin.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()
    return twin


@torch.no_grad()
def redraw(model: nn.Module, seed: int) -> None:
    """
    Random weights of a size at which every part of a model does something, in place.

    What a model computes from what can be hidden by its weights: a projection that starts at 0 hides what is before it, and
    huge ones saturate. A product with √C inputs of size 1 and weights of 0.7 / √C is of size 0.7.
    """
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float64).to(parameter)
        if parameter.dim() >= 2:
            parameter.copy_(noise * (0.7 / (parameter.numel() / parameter.size(0)) ** 0.5))
        elif parameter.dim() == 1:
            parameter.copy_(0.1 * noise + (0.0 if "bias" in name.rsplit(".", 1)[-1] else 1.0))


@torch.no_grad()
def start_anew(model: nn.Module, seed: int) -> None:
    """GPT-2's initial weights, in place: matrices normal with 0.02, biases 0, the weights of norms 1."""
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=draw).to(parameter))
        elif parameter.dim() == 1:
            parameter.fill_(0.0 if "bias" in name.rsplit(".", 1)[-1] else 1.0)


def family(name: str) -> str:
    """The kind of a parameter: its name without the numbers of blocks, heads and the like."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def blocks_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The blocks in their order, by name: the list of modules of one class that holds most of the parameters."""
    best: tuple[int, list[tuple[str, nn.Module]]] = (0, [])
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        children = [(f"{name}.{key}".lstrip("."), child) for key, child in module.named_children()]
        size = sum(p.numel() for p in module.parameters())
        if children and len({type(child) for _, child in children}) == 1 and size > best[0]:
            best = (size, children)
    return best[1]


class Scores:
    """Scores (B, T, V) out of whatever a model returns."""

    def __init__(self, subject: Subject):
        self._forward = subject.forward

    def __call__(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """
        The scores of token ids (B, T).

        Raises:
            ConfigError: the model fails on them, or returns nothing of that shape.
        """
        try:
            output = self._forward(model, inputs.clone())  # a model may change what it is given
        except Exception as error:  # whatever somebody else's model raises is said in one line
            raise ConfigError(
                f"model: {type(model).__name__} fails on token ids {tuple(inputs.shape)} from {int(inputs.min())} to "
                f"{int(inputs.max())}: {type(error).__name__}: {first_line(error)}; check that they are below its vocabulary "
                "and no more than its positions, or say with forward= how it is run"
            ) from error
        return _scores_in(output, inputs)


def _scores_in(output: object, inputs: Tensor) -> Tensor:
    """
    The member that has the shape of scores.

    Raises:
        ConfigError: none has.
    """
    B, T = inputs.shape
    if hasattr(output, "logits"):
        members: Sequence[object] = [output.logits]
    elif isinstance(output, dict):
        members = [output["logits"]] if "logits" in output else list(output.values())
    else:
        members = output if isinstance(output, tuple | list) else [output]
    tensors = [member for member in members if isinstance(member, Tensor)]
    for tensor in tensors:
        if tensor.dim() == 3 and tensor.shape[:2] == (B, T):
            return tensor
        if tensor.dim() == 2 and tensor.size(0) == B * T and T > 1:  # flattened before the loss, as in many a lecture
            return tensor.view(B, T, -1)
    shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors) or type(output).__name__
    if any(tensor.dim() == 3 and tensor.size(1) == 1 and T > 1 for tensor in tensors):
        raise ConfigError(
            f"model: it returned {shapes} for token ids ({B}, {T}), the scores of one position; like nanoGPT it wants targets "
            "to return all: pass forward=lambda model, ids: model(ids, ids)[0]"
        )
    raise ConfigError(
        f"model: it returned {shapes} for token ids ({B}, {T}), and nothing of the shape ({B}, {T}, vocabulary); pass "
        "forward=, a function of (model, ids) that returns the scores"
    )


@contextmanager
def going_back(whose: str) -> Iterator[None]:
    """
    Around a backward pass of somebody else's.

    Raises:
        ConfigError: it fails.
    """
    try:
        yield
    except RuntimeError as error:
        raise ConfigError(
            f"{whose}: its backward pass fails: {first_line(error)}; does it change in place what the backward pass needs?"
        ) from error


def reference_loss(scores: Tensor, targets: Tensor, vocab_size: int | None, reduction: str = "mean") -> Tensor:
    """
    The loss that is right: the mean cross-entropy, in nats, over the tokens that there are.

    Args:
        scores: (B, T, rows of the head).
        targets: (B, T) next tokens; ``IGNORED`` where there is none.
    """
    real = scores[..., :vocab_size]
    return F.cross_entropy(real.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction=reduction)


def next_tokens(inputs: Tensor) -> Tensor:
    """What a language model has to predict, (B, T): the inputs one position on, and ``IGNORED`` at the end."""
    return torch.cat([inputs[:, 1:], torch.full_like(inputs[:, :1], IGNORED)], 1)


def plural(count: int, noun: str) -> str:
    """``1 block``, ``2 blocks``."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def some(items: Sequence[object]) -> str:
    """The first few, and how many more."""
    return ", ".join(map(str, items[:4])) + (f" and {len(items) - 4} more" if len(items) > 4 else "")


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error).strip().splitlines() or [""])[0][:200]
