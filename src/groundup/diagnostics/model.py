"""Is the model one: shapes, the loss of guessing, tied weights, the groups of the optimizer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from groundup.diagnostics.bench import IGNORED, plural, reference_loss, some
from groundup.diagnostics.check import Check
from groundup.diagnostics.subject import Subject
from groundup.model.gpt2 import GPT2

EVEN = 1.0
"""
Nats above ln V that a new model may have. Scores of standard deviation σ that know nothing cost σ²/2 more than equal ones:
GPT-2's initial weights have σ ≤ 0.8 up to 1,600 wide, PyTorch's 0.6, and √2 is the most that an initialisation in use gives.
"""
LEARNED = 0.5
"""Nats below ln V from which on a model has learned something: the text's most frequent tokens are worth about that."""


@dataclass(frozen=True)
class Start:
    """The loss before training."""

    loss: float
    """Of all tokens."""
    fair_loss: float
    """Without the token that a position has just read, which tied embeddings favour."""
    vocab_size: int
    trained: bool

    @property
    def too_large(self) -> bool:
        """A new model is sure of something."""
        return not self.trained and not self.fair_loss - math.log(self.vocab_size) <= EVEN


@torch.no_grad()
def look_at_start(subject: Subject, scores: Tensor, targets: Tensor) -> Start:
    """
    The loss of the weights as they are.

    Args:
        scores: (B, T, rows of the head) of the subject's inputs.
        targets: (B, T) the tokens that come next.
    """
    real = scores[..., : subject.vocab_size].double()
    count = int((~absent_columns(real)).sum())
    loss = float(reference_loss(real, targets, None))
    # Embeddings that are the head too give the token just read a high score, whatever the model: |wte|² · √C / |x|.
    read = subject.inputs[..., None]
    fair = real.scatter(-1, read, -torch.inf)
    others = torch.where(targets == subject.inputs, IGNORED, targets)
    fair_loss = float(reference_loss(fair, others, None)) if bool((others != IGNORED).any()) else loss
    uniform = math.log(count)
    return Start(loss, fair_loss, count, loss < uniform - LEARNED if subject.trained is None else subject.trained)


def shape_checks(subject: Subject, scores: Tensor) -> list[Check]:
    """The scores have a shape that a language model's have, and are numbers."""
    B, T, V = scores.shape
    real = scores[..., : subject.vocab_size]
    most = int(torch.max(subject.inputs.max(), subject.labels.max()))
    needed, there = max(most + 1, subject.vocab_size or 0), min(V, subject.vocab_size or V)
    enough = needed <= V and most < there
    stated = f", vocab_size {subject.vocab_size}" if subject.vocab_size is not None and most >= there else ""
    shape = Check(
        "shapes", "model", enough,
        f"scores ({B}, {T}, {V}) of token ids ({B}, {T}), the largest id {most}{stated}",
        f"(B, T, V) with V of {needed:,} at least",
        "" if enough else "there are fewer rows than the text has tokens: set the vocabulary of the tokenizer",
        "" if enough else "vocabulary_too_small",
    )  # fmt: skip
    # Rows of padding that are masked are sound, as long as no token of the text is among them.
    absent = absent_columns(real)
    spoken = torch.cat([subject.inputs.flatten(), subject.labels[subject.labels >= 0]])
    absent[spoken[spoken < absent.numel()]] = False
    finite = (torch.isfinite(real) | absent).all(-1)  # (B, T)
    if bool(finite.all()):
        return [shape, Check("finite", "model", True, f"all {real.numel():,} scores are finite", "all scores are finite")]
    where = sorted({int(t) for t in (~finite).any(0).nonzero()})
    advice = "a number overflowed or was divided by 0; look for the first module whose output is not finite"
    if 0 in where and len(where) < T:
        advice = "a row of the attention mask that forbids every position gives nan: each position must see itself"
    return [shape, Check(
        "finite", "model", False, f"not finite at {plural(len(where), 'position')} of {T}: {some(where)}",
        "all scores are finite", advice, "scores_not_finite",
    )]  # fmt: skip


def absent_columns(scores: Tensor) -> Tensor:
    """(V,) tokens whose score (B, T, V) is -inf wherever it was looked: they cannot come, and cost nothing."""
    return (scores == -torch.inf).flatten(0, -2).all(0)


def probability_check(scores: Tensor) -> Check:
    """The scores are no probabilities already."""
    measured = "no position's scores are all positive and of the sum 1"
    sums = scores.double().sum(-1)
    if not (bool((scores >= 0).all()) and bool(((sums - 1).abs() < 1e-2).all())):
        return Check("scores_are_no_probabilities", "model", True, measured, measured)
    return Check(
        "scores_are_no_probabilities", "model", False, "every position's scores are positive and their sum is 1", measured,
        "the model ends in a softmax, and cross-entropy takes another: return the scores before it", "softmax_twice",
    )  # fmt: skip


def repeat_check(once: Tensor, again: Tensor) -> Check:
    """Two passes of one model in eval mode over the same tokens give the same scores (B, T, V)."""
    expected = "the same scores in every pass in eval mode"
    most = float(once.nan_to_num(0.0, 0.0, 0.0).abs().max())
    apart = float((once - again).nan_to_num(0.0).abs().max())  # -inf twice is the same
    if apart <= 16 * torch.finfo(once.dtype).eps * most:
        return Check("scores_repeat", "model", True, "the same scores twice", expected)
    return Check(
        "scores_repeat", "model", False, f"two passes over the same tokens differ by {apart:.2g}, of {most:.2g}", expected,
        "dropout that stays on in eval mode, as F.dropout(x, p) does without training=self.training? noise, or something that "
        "is kept from pass to pass?", "scores_random",
    )  # fmt: skip


def initial_loss(start: Start) -> Check:
    """A new model guesses evenly: its loss is about ln V."""
    uniform = math.log(start.vocab_size)
    measured = f"{start.loss:.3f} nats per token"
    if abs(start.fair_loss - start.loss) > 0.1:
        measured += f", {start.fair_loss:.3f} without the token just read"
    expected = f"ln {start.vocab_size:,} = {uniform:.3f}, at most {EVEN:g} more"
    details = {"loss": start.loss, "loss_without_read_token": start.fair_loss, "uniform": uniform}
    if start.trained:
        return Check("initial_loss", "model", True, f"{measured}: the model is trained already", expected, details=details)
    if start.too_large:
        return Check(
            "initial_loss", "model", False, measured, expected,
            "initial weights too large: the model is sure of what it cannot know. GPT-2 draws matrices and embeddings with a "
            "standard deviation of 0.02; PyTorch draws embeddings with 1, which a tied head cannot bear",
            "initial_weights_too_large", details,
        )  # fmt: skip
    return Check("initial_loss", "model", True, measured, expected, details=details)


def tied_weights(subject: Subject) -> Check:
    """Pairs that have to be one parameter are one; and no two parameters look as if somebody had meant to tie them."""
    name, expected = "tied_weights", "one parameter under both names"
    by_name = dict(subject.model.named_parameters(remove_duplicate=False))
    unknown = [part for pair in subject.tied for part in pair if part not in by_name]
    apart = [pair for pair in subject.tied if not unknown and by_name[pair[0]] is not by_name[pair[1]]]
    pairs = apart or _lookalikes(subject.model)
    if unknown:
        return Check(name, "model", False, f"no parameter {', '.join(unknown)}", expected, "name them as named_parameters does")
    if pairs:
        shown = "; ".join(f"{a} and {b}" for a, b in pairs[:3])
        return Check(
            name, "model", False, f"{shown}: two parameters" + ("" if apart else " of the same values"), expected,
            "assign the parameter itself, head.weight = embedding.weight, after all weights are in place; a copy of its values "
            "is trained apart", "weights_not_tied",
        )  # fmt: skip
    names: dict[int, list[str]] = {}
    for key, parameter in by_name.items():
        names.setdefault(id(parameter), []).append(key)
    shared = [" = ".join(group) for group in names.values() if len(group) > 1]
    if isinstance(subject.model, GPT2):  # its head is a function of the embedding, no parameter of its own
        tied = subject.model.head_weight is subject.model.wte.weight
        if tied != subject.model.config.tie_word_embeddings:
            return Check(name, "model", False, f"head is the embedding: {tied}", f"tie_word_embeddings: {not tied}",
                         "give head_weight what the configuration says", "weights_not_tied")  # fmt: skip
        shared += ["the head is wte.weight" if tied else "the head is lm_head.weight, untied as configured"]
    return Check(name, "model", True, "; ".join(shared) or "no parameter has two names", expected)


def _lookalikes(model: nn.Module) -> list[tuple[str, str]]:
    found, seen = [], list[tuple[str, nn.Parameter]]()
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or parameter.numel() < 2 or bool((parameter == parameter.flatten()[0]).all()):
            continue
        found += [
            (other_name, name)
            for other_name, other in seen
            if other.shape == parameter.shape and other.device == parameter.device and torch.equal(other, parameter)
        ]
        seen.append((name, parameter))
    # Blocks that are copies of each other (deepcopy, as nn.TransformerEncoder makes them) start alike and are not tied.
    return [(a, b) for a, b in found if a.rsplit(".", 1)[-1] == b.rsplit(".", 1)[-1] and not _numbered_alike(a, b)]


def _numbered_alike(a: str, b: str) -> bool:
    """Names that differ in numbers only: the same place of two blocks."""
    return ["#" if part.isdigit() else part for part in a.split(".")] == ["#" if p.isdigit() else p for p in b.split(".")]


def decay_groups_check(subject: Subject, groups: Sequence[dict[str, Any]] | None, model: nn.Module) -> Check:
    """
    Every trained parameter is in exactly one group of the optimizer.

    Args:
        groups: of the optimizer of ``model``, as torch keeps them; None where there is none.
    """
    name, expected = "decay_groups", "every trained parameter in exactly one group of the optimizer"
    if groups is None:
        return Check(name, "model", None, "no optimizer was given", expected)
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    count = dict.fromkeys(names, 0)
    for group in groups:
        for parameter in group["params"]:
            count[id(parameter)] = count.get(id(parameter), 0) + 1
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    foreign = [key for key in count if key not in names]
    missing = [names[key] for key in trained if not count[key]]
    twice = [names[key] for key in names if count[key] > 1]
    decayed = sum(len(group["params"]) for group in groups if group.get("weight_decay"))
    measured = f"{plural(len(groups), 'group')}, {len(trained)} trained parameters, {decayed} of them decay"
    if not (missing or twice or foreign):
        return Check(name, "model", True, measured, expected)
    parts = [f"in none: {some(sorted(missing))}" if missing else "", f"in several: {some(sorted(twice))}" if twice else "",
             f"{plural(len(foreign), 'tensor')} of another model" if foreign else ""]  # fmt: skip
    return Check(
        name, "model", False, f"{measured}; " + "; ".join(part for part in parts if part), expected,
        "build the groups from model.parameters() by one rule and its opposite, after the model is complete",
        "optimizer_of_another_model" if foreign else "parameters_frozen" if missing else "decay_groups_overlap",
    )  # fmt: skip
