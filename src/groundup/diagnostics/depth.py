"""Do gradients arrive: across the depth, and at every matrix in the first steps?"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from groundup.diagnostics.bench import Scores, blocks_of, going_back, learner, plural, reference_loss, some
from groundup.diagnostics.check import Check
from groundup.diagnostics.gradients import Backward
from groundup.diagnostics.subject import Subject

STEEP = 1e3
"""Ratio of gradient sizes across the depth: more than Adam's division by its own mean can even out in bfloat16's 8 bits."""


@dataclass(frozen=True)
class Depth:
    """Root mean square of the loss's gradient by each block's output, the first block first; and by all parameters."""

    names: list[str]
    sizes: list[float]
    total: float
    stuck: list[str]
    """Matrices that get no gradient at all in the first steps, though the loss depends on them."""
    stuck_at_zero: bool
    """All of them are 0."""


def look_at_depth(subject: Subject, scores: Scores, targets: Tensor) -> Depth:
    """
    Gradients of the weights as they are, and of the first steps.

    Args:
        targets: (B, T) the tokens that come next.
    """
    model = learner(subject.model).requires_grad_()
    names, outputs, hooks = [], [], []
    for name, block in blocks_of(model):

        def keep(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
            tensor = output[0] if isinstance(output, tuple | list) else output
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.retain_grad()
                names.append(name)
                outputs.append(tensor)

        hooks.append(block.register_forward_hook(keep))
    loss = reference_loss(scores(model, subject.inputs), targets, subject.vocab_size)
    for hook in hooks:
        hook.remove()
    if loss.requires_grad:
        with going_back("model"):
            loss.backward()  # type: ignore[no-untyped-call]
    sizes = [0.0 if t.grad is None else float(t.grad.double().square().mean().sqrt()) for t in outputs]
    total = math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None))
    stuck = _stuck(model, subject, scores, targets)
    return Depth(
        names, sizes, total, stuck, bool(stuck) and not any(bool(dict(model.named_parameters())[n].any()) for n in stuck)
    )


def _stuck(model: nn.Module, subject: Subject, scores: Scores, targets: Tensor) -> list[str]:
    """
    Matrices whose gradient is exactly 0 in each of three steps.

    One step is not enough: where a branch ends in a projection that starts at 0 (Zhang et al. 2019, Fixup), what is before
    it gets a gradient from the second step on.
    """
    matrices = {name: p for name, p in model.named_parameters() if p.dim() >= 2}
    waiting = {name for name, p in matrices.items() if p.grad is None or not bool(p.grad.any())}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    rows = slice(0, 1)
    for _ in range(3):
        if not waiting:
            break
        optimizer.step()
        optimizer.zero_grad()
        loss = reference_loss(scores(model, subject.inputs[rows]), targets[rows], subject.vocab_size)
        if not loss.requires_grad:
            break
        loss.backward()  # type: ignore[no-untyped-call]
        waiting -= {name for name in waiting if matrices[name].grad is not None and bool(matrices[name].grad.any())}  # type: ignore[union-attr]
    return sorted(waiting)


def depth_check(found: Depth, blame: str) -> Check:
    """Gradients are about as large at the first block as at the last."""
    name, group, expected = "gradient_depth", "gradients", f"sizes at the first and the last block within a factor of {STEEP:g}"
    details = {"gradient_rms": dict(zip(found.names, found.sizes, strict=True)), "gradient_norm": found.total}
    if len(found.sizes) < 2 or not math.isfinite(found.total) or not found.sizes[-1]:
        measured = f"gradient norm {found.total:.3g}, {plural(len(found.sizes), 'block')} with a gradient"
        return Check(name, group, None, measured, expected, details=details)
    ratio = found.sizes[0] / found.sizes[-1]
    factor = (ratio or 1e-300) ** (1 / (len(found.sizes) - 1))
    measured = (f"first block {found.sizes[0]:.2e}, last {found.sizes[-1]:.2e}: times {ratio:.3g}, "
                f"{factor:.3g} per block going back; gradient norm {found.total:.3g}")  # fmt: skip
    if 1 / STEEP <= ratio <= STEEP:
        return Check(name, group, True, measured, expected, details=details)
    if ratio > STEEP:
        culprit, advice = "gradients_explode", "smaller initial weights, norms before each part (pre-norm), clipping"
    else:
        culprit, advice = (
            "gradients_vanish",
            "residual connections that nothing interrupts, pre-norm instead of post-norm, warmup",
        )
    return Check(name, group, False, measured, expected, advice, blame or culprit, details)


def stuck_check(found: Depth, backward: Backward) -> Check:
    """Every matrix starts to move."""
    name, group, expected = "initial_values", "gradients", "every matrix gets a gradient within three steps"
    # What gets no gradient whatever its weights is not the fault of the weights.
    stuck = [n for n in found.stuck if n not in backward.unused and n not in backward.cut_off]
    if not stuck:
        return Check(name, group, True, f"all do; gradient norm {found.total:.3g} at the first step", expected)
    measured = f"{len(stuck)} of the matrices get none: {some(stuck)}"
    if found.stuck_at_zero:
        return Check(
            name, group, False, f"{measured}; all of them are 0", expected,
            "initial weights 0: what is multiplied by 0 neither passes anything on nor learns; draw them, as GPT-2 with 0.02",
            "initial_weights_zero",
        )  # fmt: skip
    return Check(
        name, group, False, measured, expected,
        "units that never fire, or a softmax that is saturated: smaller initial weights",
        "units_dead",
    )  # fmt: skip
