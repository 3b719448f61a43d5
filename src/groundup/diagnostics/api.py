"""The door for somebody else's model: what is needed of it is found out, and the checks become a report to print."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from groundup.diagnostics.check import Check, failed
from groundup.diagnostics.examination import culprits, examine
from groundup.diagnostics.subject import Forward, Loss, MakeOptimizer, Subject, gpt2_scores
from groundup.errors import ConfigError
from groundup.model.gpt2 import GPT2

SIGNS = {True: "ok", False: "FAIL", None: "-"}
"""In the table; ``-`` was not measured."""


@dataclass(frozen=True)
class Report:
    """All that was found; ``print`` shows it as a table."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return not failed(self.checks)

    @property
    def culprits(self) -> list[str]:
        """The faults that were named, each once."""
        return culprits(self.checks)

    def __str__(self) -> str:
        """A line for each check; below those that failed what was expected and what to do; at the end the verdict."""
        width = max((len(check.name) for check in self.checks), default=0)
        lines = list[str]()
        for check in self.checks:
            lines.append(f"{SIGNS[check.passed]:4} {check.name:{width}}  {check.measured}")
            if check.passed is False:
                lines += [f"{'':{width + 5}}  expected: {check.expected}", f"{'':{width + 5}}  {check.advice}"]
        count = len(failed(self.checks))
        verdict = "nothing is wrong" if not count else f"{count} of {len(self.checks)} failed"
        named = f"; culprit: {', '.join(self.culprits)}" if self.culprits else ""
        return "\n".join([*lines, verdict + named])


def check_any(
    model: nn.Module,
    batch: Any,
    loss_fn: Any,
    *,
    forward: Forward | None,
    optimizer: Any,
    learning_rate: float | None,
    only: str | Collection[str],
    known: Mapping[str, Any],
) -> Report:
    """As ``groundup.diagnostics.check``, which describes the arguments."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model: {type(model).__name__} is no torch.nn.Module; wrap it in one")
    free = {field.name for field in fields(Subject)} - {"model", "forward", "loss_fn", "inputs", "labels", "make_optimizer"}
    unknown = sorted(set(known) - free)
    if unknown:
        raise ConfigError(f"check: no argument {', '.join(unknown)}; there are {', '.join(sorted(free))}")
    known = dict(known)
    for name in ("tied", "frozen"):  # lists will do, and one name alone
        if isinstance(known.get(name), list):
            known[name] = tuple(known[name])
    if isinstance(known.get("frozen"), str):
        known["frozen"] = (known["frozen"],)
    first = next(iter([*model.parameters(), *model.buffers()]), None)
    inputs, labels = (part.to("cpu" if first is None else first.device) for part in _batch(batch))
    if isinstance(optimizer, torch.optim.Optimizer):
        learning_rate = learning_rate if learning_rate is not None else _highest_rate(optimizer)
    if isinstance(learning_rate, Tensor) and learning_rate.numel() == 1:
        learning_rate = float(learning_rate)
    if forward is None:
        forward = gpt2_scores if isinstance(model, GPT2) else lambda twin, ids: twin(ids)
    subject = Subject(
        model, forward, _loss(loss_fn), inputs, labels, make_optimizer=_maker(optimizer, model), learning_rate=learning_rate,
        **known,
    )  # fmt: skip
    return Report(tuple(examine(subject, only)))


def _batch(batch: Any) -> tuple[Tensor, Tensor]:
    """
    Token ids and labels out of a batch.

    Raises:
        ConfigError: they are not in it.
    """
    if isinstance(batch, Tensor) and batch.dim() == 2:
        return batch[:, :-1], batch[:, 1:]
    if isinstance(batch, Mapping):
        pair = batch.get("input_ids"), batch.get("labels")
    elif isinstance(batch, tuple | list):
        pair = (batch[0], batch[1]) if len(batch) == 2 else (None, None)
    else:
        pair = getattr(batch, "input_ids", None), getattr(batch, "labels", None)
    inputs, labels = pair
    if not isinstance(inputs, Tensor) or not isinstance(labels, Tensor):
        raise ConfigError(
            f"batch: {type(batch).__name__} is not understood; give (token ids, labels), two tensors of (windows, tokens)"
        )
    return inputs, labels


def _loss(loss_fn: Any) -> Loss:
    """
    A loss of scores (B, T, V) and labels (B, T), of one that may want them flattened.

    Both forms are tried, for each call anew: which one it is may depend on nothing but the shapes.
    """
    given = F.cross_entropy if loss_fn is None else loss_fn
    if not callable(given):
        raise ConfigError(f"loss_fn: {type(given).__name__} cannot be called; give a function of scores and labels")

    def loss(scores: Tensor, labels: Tensor) -> Tensor:
        reasons = []
        # Flattened first: cross_entropy takes (B, T, V) too where T and V happen to be equal, and means something else.
        for shape, flat in (("(B · T, V) and (B · T,)", True), ("(B, T, V) and (B, T)", False)):
            # Copies: a loss may change what it is given, and the next call is to get what this one got.
            theirs = scores.clone(), labels.clone()
            try:
                value = given(theirs[0].flatten(0, 1), theirs[1].flatten()) if flat else given(*theirs)
            except Exception as error:  # whatever somebody else's function raises is said in one line
                reasons.append(f"with {shape}: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}")
                continue
            value = value.loss if hasattr(value, "loss") else value
            if isinstance(value, Tensor) and value.numel() == 1:
                return value.reshape(())
            what = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            reasons.append(f"with {shape}: it returned {what}, not one number")
        raise ConfigError(f"loss_fn: it takes scores in neither form; {'; '.join(reasons)}")

    return loss


def _highest_rate(optimizer: torch.optim.Optimizer) -> float:
    return max(float(group["lr"]) for group in optimizer.param_groups)  # a rate may be a tensor


def _maker(optimizer: Any, model: nn.Module) -> MakeOptimizer | None:
    """
    What makes such an optimizer for a copy of the model.

    Raises:
        ConfigError: it is no optimizer.
    """
    if isinstance(optimizer, type):
        raise ConfigError(
            f"optimizer: {optimizer.__name__} is a class; give one that is made, {optimizer.__name__}(model.parameters(), lr=…)"
            ", or a function of (model, learning rate)"
        )
    if optimizer is None or (callable(optimizer) and not isinstance(optimizer, torch.optim.Optimizer)):
        return optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(
            f"optimizer: {type(optimizer).__name__} is none; give a torch optimizer, or a function of (model, learning rate)"
        )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    kind, top = type(optimizer), _highest_rate(optimizer)

    def make(twin: nn.Module, rate: float) -> torch.optim.Optimizer:
        own = dict(twin.named_parameters())
        groups = []
        for group in optimizer.param_groups:
            # One of another model stays what it is: the check of the groups says so.
            parameters = [own[names[id(p)]] if id(p) in names else p for p in group["params"]]
            share = float(group["lr"]) / top if top else 1.0
            groups.append({**group, "params": parameters, "lr": rate * share})
        return kind(groups, lr=rate)  # type: ignore[call-arg]

    return make
