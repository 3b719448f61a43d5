"""
Is this machine, this data, this model, this training right? Each answer is a ``Check``.

    print(groundup.diagnostics.check(model, batch, loss_fn))

examines any PyTorch language model; ``examine`` does so for a ``Subject``, check by check.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from groundup.diagnostics.check import Check, failed

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch import nn

    from groundup.diagnostics.api import Report
    from groundup.diagnostics.subject import Forward

__all__ = ["Check", "Report", "Subject", "check", "examine", "failed", "gpt2_subject"]

# Importing is free: torch comes when one of these is first used.
_LATE = {
    "Report": "groundup.diagnostics.api",
    "Subject": "groundup.diagnostics.subject",
    "examine": "groundup.diagnostics.examination",
    "gpt2_subject": "groundup.diagnostics.subject",
}


# A function of the name of a module: it stands after that module's import, so that it is the one that the name means.
def check(  # noqa: D417
    model: "nn.Module",
    batch: Any,
    loss_fn: Any = None,
    *,
    forward: "Forward | None" = None,
    optimizer: Any = None,
    learning_rate: float | None = None,
    only: "Collection[str]" = (),
    **known: Any,
) -> "Report":
    """
    Find what is wrong with somebody's language model; ``print`` the report. The model is left bit for bit as it was.

    Args:
        model: a PyTorch module: token ids (B, T) to scores of the next token (B, T, V), or to a tuple, a dict or an object
            with ``logits`` that holds them.
        batch: token ids and labels, each (B, T) int64, as a pair, a dict of ``input_ids`` and ``labels``, or an object with
            these; or token ids (B, T + 1) alone, whose labels are then the next tokens. 4 × 64 tokens are enough.
        loss_fn: scores and labels to the mean in nats; scores are (B, T, V), or (B · T, V) where only that works. None is
            ``torch.nn.functional.cross_entropy``.
        forward: how the model is run, where that is not ``model(inputs)``: a function of the model and the inputs.
        optimizer: a torch optimizer of this model's parameters, or a function of (model, learning rate) that makes one.
            None is AdamW.
        learning_rate: the highest of the schedule; None is the optimizer's, if that is given.
        only: groups of checks, among ``model``, ``gradients``, ``learning``; empty is all of them.
        known: further fields of ``Subject``: ``vocab_size``, ``warmup_steps``, ``max_grad_norm``, ``tied``, ``frozen``,
            ``trained``, ``seed``.

    Raises:
        ConfigError: it cannot be run: the batch, the scores or the loss have a shape that no language model's have.
    """
    from groundup.diagnostics.api import check_any

    return check_any(
        model, batch, loss_fn, forward=forward, optimizer=optimizer, learning_rate=learning_rate, only=only, known=known
    )


def __getattr__(name: str) -> Any:
    if name in _LATE:
        return getattr(import_module(_LATE[name]), name)
    raise AttributeError(f"module 'groundup.diagnostics' has no attribute {name!r}")
