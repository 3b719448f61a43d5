"""Training that learns from another model's predictions too."""

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from groundup.errors import ConfigError, GroundupError
from groundup.model.flops import parameter_count
from groundup.model.gpt2 import GPT2
from groundup.model.loss import SoftTargets
from groundup.recipes.loading import load_checkpoint
from groundup.runtime.device import Machine
from groundup.tokenizer.tokenizer import Tokenizer

Say = Callable[[str], None]


@dataclass(frozen=True)
class Teacher:
    """A frozen model that is asked; it computes in the precision of whoever asks."""

    model: GPT2
    temperature: float
    weight: float
    checkpoint: Path
    """Where it was read from: of a run, the checkpoint itself."""
    digest: str
    """Of its weights."""

    def __call__(self, input_ids: Tensor) -> SoftTargets:
        """What it predicts after each of the tokens (B, T)."""
        return SoftTargets(self.model(input_ids), self.model.head_weight, self.temperature, self.weight)


def open_teacher(
    source: str,
    tokenizer: Tokenizer,
    n_positions: int,
    machine: Machine,
    temperature: float,
    weight: float,
    say: Say,
) -> Teacher:
    """
    Read a teacher onto the machine.

    Args:
        source: a run, a checkpoint, or whatever ``open_weights`` reads.
        tokenizer: the student's.
        n_positions: the student's context.
        temperature: divides the logits of both.
        weight: share of the teacher's part in the loss.

    Raises:
        CheckpointError: nothing there, or damaged.
        ConfigError: it has another tokenizer or a shorter context than the student.
    """
    try:
        loaded = load_checkpoint(Path(source), say)
    except GroundupError as error:
        raise type(error)(f"teacher: {error}") from None
    config = loaded.model.config
    _require_tokenizer(source, loaded.tokenizer, config.vocab_size, tokenizer)
    if config.n_positions < n_positions:
        raise ConfigError(
            f"teacher: {source} has a context of {config.n_positions:,} tokens and cannot read this run's {n_positions:,}; "
            f"give --n-positions {config.n_positions}, or take another teacher"
        )
    digest = _digest(loaded.model)
    model = loaded.model.to(machine.device).eval().requires_grad_(False)
    say(
        f"teacher: {loaded.checkpoint}, {parameter_count(model):,} parameters; share {weight:g} of the loss, temperature "
        f"{temperature:g}"
    )
    return Teacher(model, temperature, weight, loaded.checkpoint, digest)


def _require_tokenizer(source: str, its: Tokenizer, vocab_size: int, tokenizer: Tokenizer) -> None:
    """
    Refuse a teacher whose predictions are of other tokens.

    Raises:
        ConfigError: the tokenizers differ, or the teacher predicts ids that neither has.
    """
    if its.gives_the_ids_of(tokenizer) and tokenizer.gives_the_ids_of(its):
        if vocab_size == tokenizer.vocab_size:
            return
        difference = f"predicts {vocab_size:,} ids, and this run's tokenizer has {tokenizer.vocab_size:,}"
    elif tokenizer.gives_the_ids_of(its):
        difference = f"does not know {_names(tokenizer, its)}, special tokens of this run"
    elif its.gives_the_ids_of(tokenizer):
        difference = f"knows the special tokens {_names(its, tokenizer)}, which this run does not"
    else:
        difference = f"has another tokenizer than this run ({its.vocab_size:,} and {tokenizer.vocab_size:,} ids)"
    raise ConfigError(
        f"teacher: {source} {difference}; its predictions would be of other tokens: take another teacher, or prepare the text "
        f"with --tokenizer and the tokenizer of {source}"
    )


def _names(of: Tokenizer, beside: Tokenizer) -> str:
    """The special tokens of one that the other lacks."""
    return ", ".join(name for name in of.special_ids if name not in beside.special_ids)


def _digest(model: GPT2) -> str:
    """Hash of the weights, wherever they were read from."""
    found = sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.contiguous().view(torch.uint8).numpy() if tensor.dim() else str(tensor.item()).encode())
    return found.hexdigest()[:16]
