"""What a position sees: never what comes after it, itself and what comes before, and no other window."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from groundup.diagnostics.bench import Scores, blocks_of, copied, plural, redraw
from groundup.diagnostics.check import Check
from groundup.diagnostics.subject import Subject

LOOKED_AT = 16
"""Positions whose influence on each other is measured; each is a window of a pass."""
SEEN = 1e-9
"""Relative change of a score from which on it counts as moved, in float64, whose rounding is 1e-16 an operation."""
SEEN_FLOAT32 = 1e-4
"""The same for a model that runs in float32 only."""


@torch.no_grad()
def influences(model: nn.Module, scores: Scores, inputs: Tensor) -> tuple[Tensor, bool]:
    """
    How much the scores of position t move when token p is another one, (p, t), relative to the largest move.

    Args:
        inputs: (1, T) token ids; each is replaced by another token of the window, so that it surely is in the vocabulary.

    Returns:
        the moves, and whether a window moves one beside it.
    """
    T = inputs.size(1)
    others = torch.arange(T, device=inputs.device)
    variants = inputs.repeat(T, 1)  # (T, T)
    variants[others, others] = _another(inputs[0])
    pairs = [(inputs, variants[:1]), (variants[:1], inputs)]
    alone = scores(model, inputs)[0]
    together = [scores(model, torch.cat(pair))[row] for row, pair in enumerate(pairs)]
    beside = max(float((window - alone).nan_to_num(0.0).abs().max()) for window in together)
    mixed = beside > SEEN_FLOAT32 * float(alone[alone.isfinite()].abs().max())
    # Were windows mixed up, they would seem to leak: then each goes alone, which takes longer.
    passes = [variants[p : p + 1] for p in range(T)] if mixed else [variants]
    moves = torch.cat([(scores(model, part) - alone).nan_to_num(0.0).abs().amax(-1) for part in passes])  # (p, t)
    return moves / (float(moves.max()) or 1.0), mixed


def _another(tokens: Tensor) -> Tensor:
    """For each token (T,) one that differs from it, of the window if it has two."""
    first = tokens[0]
    others = tokens[tokens != first]
    second = others[0] if others.numel() else torch.where(first > 0, first - 1, first + 1)
    return torch.where(tokens == first, second, first)


def sight_checks(subject: Subject, scores: Scores) -> list[Check]:
    """No position sees what comes after it; each sees itself and what comes before; no window sees another."""
    inputs = subject.inputs[:1, :LOOKED_AT]
    found = []
    # With weights of our own too: a projection that starts at 0 would hide that something leaks through it.
    for mine in (False, True):
        model, seen = copied(subject.model), SEEN
        if mine:
            redraw(model, subject.seed)
        try:
            moves, mixed = influences(model.double(), scores, inputs)
        except Exception:
            model, seen = copied(subject.model), SEEN_FLOAT32
            if mine:
                redraw(model, subject.seed)
            moves, mixed = influences(model, scores, inputs)
        found.append((moves.cpu() > seen, mixed))
    (as_it_is, mixed_as_it_is), (redrawn, mixed_redrawn) = found
    moved = as_it_is | redrawn
    leak = _leak(moved, len(blocks_of(subject.model)))
    if leak.passed and _leaks_in_training(subject, scores, inputs):
        leak = _by_statistics(leak)
    return [leak, _context(redrawn), _windows(mixed_as_it_is or mixed_redrawn)]


def _leaks_in_training(subject: Subject, scores: Scores, inputs: Tensor) -> bool:
    """Whether a position sees what comes after it in training mode only; False where chance, as in dropout, hides it."""
    model = copied(subject.model).train()
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()
    once, again = (scores(model, inputs) for _ in range(2))
    if not torch.equal(once, again):
        return False
    moves, _ = influences(model, scores, inputs)
    return bool((moves.cpu() > SEEN_FLOAT32).tril(-1).any())  # (p, t), where t < p


def _by_statistics(leak: Check) -> Check:
    return replace(
        leak, passed=False, measured="in training mode, though not in eval mode, a token moves the scores before it",
        advice="statistics over time, as of batch norm, tell a position of those after it: use a norm of each position alone",
        culprit="batch_statistics",
    )  # fmt: skip


def _leak(moved: Tensor, blocks: int) -> Check:
    pairs = [(int(p), int(t)) for p, t in moved.nonzero() if t < p]
    name, expected = "causal_leak", "changing a token moves no score of a position before it"
    T = moved.size(0)
    if not pairs:
        return Check(name, "model", True, f"none of {T * (T - 1) // 2} pairs of positions moved", expected)
    ahead = sorted({p - t for p, t in pairs})
    # One ahead in each block adds up to as many as there are blocks.
    off_by_one = ahead[-1] <= max(1, blocks) and ahead[-1] < T - 1
    p, t = min(pairs, key=lambda pair: (pair[0] - pair[1], pair[1]))
    return Check(
        name, "model", False,
        f"changing token {p} moves the scores of position {t}; {plural(len(pairs), 'pair')} of {T * (T - 1) // 2}, "
        f"{ahead[0]}" + (f" to {ahead[-1]}" if len(ahead) > 1 else "") + " ahead",
        expected,
        "the model sees what it has to predict: "
        + ("the mask is off by one: it must forbid the first diagonal above the main one" if off_by_one else
           "the mask is missing or turned round, or something mixes positions, such as a norm over time"),
        "causal_leak",
        {"pairs": pairs},
    )  # fmt: skip


def _context(moved: Tensor) -> Check:
    name, expected = "sees_context", "each position sees its own token and the ones before it"
    T = moved.size(0)
    itself = int(moved.diagonal().sum())
    before = int(moved.diagonal(1).sum())  # token p moves position p + 1
    past = [int(t - p) for p, t in moved.nonzero() if t > p]
    measured = f"{itself} of {T} see themselves, {before} of {T - 1} the token before, and up to {max(past, default=0)} back"
    if past and itself:
        return Check(name, "model", True, measured, expected)
    if T == 1:
        return Check(name, "model", None, "windows of one token", expected)
    return Check(
        name, "model", False, measured, expected,
        "attention passes nothing on: is its output added to the stream, is the mask turned round? A bigram model is meant so",
        "past_unseen",
    )  # fmt: skip


def _windows(mixed: bool) -> Check:
    name, expected = "windows_apart", "a window's scores do not depend on the windows beside it"
    if not mixed:
        return Check(name, "model", True, "windows do not influence each other", expected)
    return Check(
        name, "model", False, "another second window moves the scores of the first", expected,
        "batch and time are mixed up: look for a view or reshape that should be a transpose", "windows_mixed",
    )  # fmt: skip
