"""Do the gradients exist, and are they right?"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from groundup.diagnostics.bench import Scores, blocks_of, copied, family, going_back, plural, redraw, reference_loss, some
from groundup.diagnostics.check import Check
from groundup.diagnostics.subject import Subject

SHIFT = 1e-5
"""Step of the difference quotient, relative to the weights: in float64 its own error is about 1e-7 of the derivative."""
WRONG = 1e-3
"""Relative error from which on a gradient is wrong; kinks, as ReLU has, may give 1e-4, and a forgotten path gives 0.1 to 1."""
SHIFT_FLOAT32, WRONG_FLOAT32 = 1e-2, 0.2
"""The same for a model that runs in float32 only: its rounding drowns all but gross errors."""
TOKENS = 16
"""Tokens of the gradient check: two windows of eight."""


@dataclass(frozen=True)
class FamilyError:
    """The derivative of the loss in a random direction of one kind of parameters."""

    analytic: float
    numeric: float
    wrong: bool

    @property
    def relative(self) -> float:
        """Of the difference."""
        return abs(self.analytic - self.numeric) / max(abs(self.analytic), abs(self.numeric), 1e-300)


@dataclass(frozen=True)
class Backward:
    """What was found out about the backward pass."""

    precision: str
    families: dict[str, FamilyError]
    frozen: list[str]
    """Parameters that are not trained, and were not said to be so on purpose."""
    cut_off: list[str]
    """Parameters that the loss depends on and that get no gradient."""
    unused: list[str]
    """Parameters that the loss does not depend on."""
    cut_blocks: list[str] = field(default_factory=list)
    """Blocks whose own derivative by their input is wrong."""
    strangers: list[tuple[int, ...]] = field(default_factory=list)
    """Shapes of weights that the loss depends on and that are not among the model's parameters."""

    @property
    def wrong(self) -> list[str]:
        """Families whose gradient is not the derivative."""
        return [name for name, error in self.families.items() if error.wrong]

    @property
    def culprit(self) -> str:
        """
        The name of what is wrong with it.

        A path that is cut falsifies the gradients of all that is before it, the embeddings first of all; a mistake in the
        backward pass of one module falsifies that module's own.
        """
        if not (self.wrong or self.cut_off):
            return ""
        return "residual_detached" if self.cut_blocks or self.cut_off or len(self.wrong) > 2 else "backward_wrong"


def look_at_backward(subject: Subject, scores: Scores, targets: Tensor) -> Backward:
    """
    Compare the backward pass with difference quotients, on a copy with weights at which every part does something.

    Args:
        targets: (B, T) the tokens that come next.
    """
    rows, length = min(2, subject.inputs.size(0)), min(TOKENS // 2, subject.inputs.size(1))
    inputs, targets = subject.inputs[:rows, :length], targets[:rows, :length]
    precise = True
    try:
        model = _redrawn(subject).double()
        precise = scores(model, inputs).dtype == torch.float64
    except Exception:
        precise = False
    model = model if precise else _redrawn(subject)

    def loss() -> Tensor:
        return reference_loss(scores(model, inputs), targets, subject.vocab_size)

    frozen = [n for n, p in subject.model.named_parameters() if not p.requires_grad and not n.startswith(subject.frozen)]
    named = list(model.named_parameters())
    value = loss()
    strangers = _strangers(value, model)
    with going_back("model"):
        gradients = (
            torch.autograd.grad(value, [p for _, p in named], allow_unused=True) if value.requires_grad else [None] * len(named)
        )
    wanted = dict(zip((name for name, _ in named), gradients, strict=True))
    shift, limit = (SHIFT, WRONG) if precise else (SHIFT_FLOAT32, WRONG_FLOAT32)
    slopes = _Slopes(loss, shift, subject.seed)
    kinds: dict[str, list[str]] = {}
    for name, _ in named:
        kinds.setdefault(family(name), []).append(name)
    parameters = dict(named)
    pairs = {kind: slopes.both([parameters[n] for n in names], [wanted[n] for n in names]) for kind, names in kinds.items()}
    # Rounding in the loss itself, carried through the quotient, is no error of the gradient.
    rounding = 100 * torch.finfo(value.dtype).eps * abs(float(value.detach())) / shift
    families = {kind: FamilyError(a, n, abs(a - n) > limit * max(abs(a), abs(n)) + rounding) for kind, (a, n) in pairs.items()}
    silent = [n for n, g in wanted.items() if g is None or not bool(g.any())]
    moved = {n: slopes.both([parameters[n]], [None])[1] for n in silent}
    cut_off = [n for n, slope in moved.items() if abs(slope) > rounding]
    unused = [n for n in silent if n not in cut_off]
    suspicious = bool(cut_off) or any(error.wrong for error in families.values())
    cut_blocks = _cut_blocks(model, scores, inputs, shift, limit, subject.seed) if suspicious else []
    return Backward("float64" if precise else "float32", families, frozen, cut_off, unused, cut_blocks, strangers)


def _strangers(loss: Tensor, model: nn.Module) -> list[tuple[int, ...]]:
    """Shapes of the leaves of the loss's graph that are no parameters of the model: no optimizer is told of them."""
    known = {id(parameter) for parameter in model.parameters()}
    found: dict[int, tuple[int, ...]] = {}
    waiting, seen = [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in known:
            found[id(leaf)] = tuple(leaf.shape)
        waiting += [before for before, _ in node.next_functions]
    return list(found.values())


def _redrawn(subject: Subject) -> nn.Module:
    """A copy with random weights, all of them trained."""
    model = copied(subject.model)
    redraw(model, subject.seed)
    return model.requires_grad_()


class _Slopes:
    """Derivatives in random directions, from the backward pass and from a difference quotient."""

    def __init__(self, loss: Callable[[], Tensor], shift: float, seed: int):
        self._loss, self._shift, self._draw = loss, shift, torch.Generator().manual_seed(seed + 1)

    @torch.no_grad()
    def both(self, parameters: list[nn.Parameter], gradients: list[Tensor | None]) -> tuple[float, float]:
        """The derivative in one direction of some parameters: as the gradients have it, and as it is."""
        directions = [torch.randn(p.shape, generator=self._draw, dtype=torch.float64).to(p) for p in parameters]
        # As large as the weights, so that the step is a relative one.
        directions = [d * (p.square().mean().sqrt() if p.any() else 1.0) for d, p in zip(directions, parameters, strict=True)]
        analytic = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True) if g is not None)
        before = [p.clone() for p in parameters]
        values = []
        for sign in (1, -1):
            for p, b, d in zip(parameters, before, directions, strict=True):
                p.copy_(b + sign * self._shift * d)
            values.append(float(self._loss()))
        for p, b in zip(parameters, before, strict=True):
            p.copy_(b)
        return analytic, (values[0] - values[1]) / (2 * self._shift)


def _cut_blocks(model: nn.Module, scores: Scores, inputs: Tensor, shift: float, limit: float, seed: int) -> list[str]:
    """Blocks whose derivative by their input, in a random direction and seen from another, is not what autograd says."""
    calls: dict[str, tuple[nn.Module, Any, Any]] = {}
    hooks = []
    for name, block in blocks_of(model):

        def keep(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            calls[name] = (module, args, kwargs)

        hooks.append(block.register_forward_pre_hook(keep, with_kwargs=True))
    try:
        with torch.no_grad():
            scores(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    draw = torch.Generator().manual_seed(seed + 2)
    wrong = []
    for name, (block, args, kwargs) in calls.items():
        if not args or not isinstance(args[0], Tensor) or not args[0].is_floating_point():
            continue
        x = args[0].detach().clone().requires_grad_()
        u, v = (torch.randn(x.shape, generator=draw, dtype=torch.float64).to(x) for _ in range(2))

        def seen(at: Tensor, block: Any = block, rest: Any = args[1:], kwargs: Any = kwargs, v: Tensor = v) -> Tensor:
            output = block(at, *rest, **kwargs)
            output = output[0] if isinstance(output, tuple | list) else output
            product: Tensor = (output * v).sum()
            return product

        value = seen(x)
        (slope,) = torch.autograd.grad(value, x, allow_unused=True) if value.requires_grad else (None,)
        analytic = 0.0 if slope is None else float((slope * u).sum())
        with torch.no_grad():
            numeric = float(seen(x + shift * u) - seen(x - shift * u)) / (2 * shift)
        if abs(analytic - numeric) > limit * max(abs(analytic), abs(numeric)):
            wrong.append(name)
    return wrong


def reach_check(found: Backward) -> Check:
    """Every parameter gets a gradient."""
    name, group = "gradients_reach", "gradients"
    expected = "every parameter is trained, has a part in the loss, and gets a gradient"
    if found.strangers:
        return Check(
            name, group, False,
            f"the loss depends on {plural(len(found.strangers), 'tensor')} that model.parameters() does not have, the first of "
            f"shape {found.strangers[0]}", expected,
            "modules in a list or a dict of Python are not found, so no optimizer trains them: take nn.ModuleList, "
            "nn.ModuleDict, nn.Parameter", "parameters_not_registered",
        )  # fmt: skip
    if found.cut_off:
        return Check(
            name, group, False,
            f"{plural(len(found.cut_off), 'parameter')} that the loss depends on get none: {some(found.cut_off)}",
            expected, _where(found), "residual_detached",
        )  # fmt: skip
    if found.frozen:
        return Check(
            name, group, False, f"{plural(len(found.frozen), 'parameter')} with requires_grad False: {some(found.frozen)}",
            expected, "let them be trained, or say that it is meant so: frozen=(the beginnings of their names)",
            "parameters_frozen",
        )  # fmt: skip
    if found.unused:
        return Check(
            name, group, False, f"the loss does not depend on {some(found.unused)}", expected,
            "the forward pass leaves them out, or a mask does: use them, or take them away", "parameters_unused",
        )  # fmt: skip
    return Check(name, group, True, "all get one", expected)


def gradient_check(found: Backward) -> Check:
    """The gradient is the derivative, for each kind of parameters."""
    limit = WRONG if found.precision == "float64" else WRONG_FLOAT32
    expected = f"relative error below {limit:g} against a difference quotient, in {found.precision}"
    details = {kind: {"analytic": e.analytic, "numeric": e.numeric, "relative_error": e.relative, "wrong": e.wrong}
               for kind, e in found.families.items()}  # fmt: skip
    if not found.families:
        return Check("gradient_check", "gradients", None, "there are no parameters", expected)
    if found.wrong:
        worst = max(found.wrong, key=lambda kind: found.families[kind].relative)
        return Check(
            "gradient_check", "gradients", False,
            f"{len(found.wrong)} of {len(found.families)} kinds of parameters wrong, most {worst}: "
            f"relative error {found.families[worst].relative:.2g}",
            expected, _where(found), found.culprit, details,
        )  # fmt: skip
    sound = [e.relative for e in found.families.values() if max(abs(e.analytic), abs(e.numeric)) > 1e-6]
    worst_error = f"largest error {max(sound):.0e}, " if sound else ""
    return Check(
        "gradient_check", "gradients", True, f"{worst_error}{plural(len(found.families), 'kind')} of parameters", expected,
        details=details,
    )  # fmt: skip


def _where(found: Backward) -> str:
    if found.cut_blocks:
        return f"the gradient is cut inside {some(found.cut_blocks)}: look for .detach(), .data, torch.no_grad or a new tensor"
    if found.culprit == "residual_detached":
        return (
            "the gradient is cut between modules: look for .detach(), .data, torch.no_grad or a new tensor in the forward pass"
        )
    return f"the backward pass of {some(found.wrong)} is wrong: a function of your own, or .detach() of the weight?"
