"""What every importer returns, and the last steps that they share: fitting the vocabulary, building the model."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from groundup.errors import CheckpointError
from groundup.model.gpt2 import GPT2, GPT2Config
from groundup.model.variants import build_gpt2
from groundup.tokenizer.tokenizer import Tokenizer

VOCABULARY_ROWS = ("wte.weight", "lm_head.weight")


@dataclass(frozen=True)
class Imported:
    """A model from somebody's files, in float32 on the CPU, with what had to be done to them."""

    model: GPT2
    tokenizer: Tokenizer | None
    """The tokenizer that came with the weights, or that was given; None where there is neither."""
    format: str
    """What the files were, for people: ``OpenAI checkpoint``, ``nanoGPT checkpoint``, …"""
    missing: tuple[str, ...] = ()
    """Tensors that the files lack, each with what stands in for it."""
    unexpected: tuple[str, ...] = ()
    """Tensors in the files that GPT-2 has no place for, left out."""
    reshaped: tuple[str, ...] = ()
    """Tensors whose shape was changed, each with how."""


def fit_vocabulary(
    config: GPT2Config, tensors: Mapping[str, Tensor], tokenizer: Tokenizer | None, origin: str
) -> tuple[GPT2Config, dict[str, Tensor], tuple[str, ...]]:
    """
    Undo the padding of a vocabulary: rows beyond the tokenizer's ids (50,304 instead of 50,257) are cut off.

    Args:
        tensors: under our names; ``wte.weight`` and ``lm_head.weight`` are (vocab_size, n_embd).

    Returns:
        The configuration and the tensors that fit the tokenizer, and what was reshaped.

    Raises:
        CheckpointError: the tokenizer has ids that the model does not know, or far fewer.
    """
    if tokenizer is None or tokenizer.vocab_size == config.vocab_size:
        return config, dict(tensors), ()
    rows = tokenizer.vocab_size
    if not 0 <= config.vocab_size - rows <= most_padding(rows):
        raise CheckpointError(
            f"{origin}: the tokenizer has {rows:,} ids, the model knows {config.vocab_size:,}; they belong to different "
            "models: give --tokenizer the one that the model was trained with"
        )
    fitted = {name: tensor[:rows].contiguous() if name in VOCABULARY_ROWS else tensor for name, tensor in tensors.items()}
    notes = tuple(
        f"{name} {tuple(tensors[name].shape)} → {tuple(fitted[name].shape)} (ids without a token)"
        for name in VOCABULARY_ROWS
        if name in tensors
    )
    return replace(config, vocab_size=rows), fitted, notes


def most_padding(rows: int) -> int:
    """Rows beyond the tokenizer's that may be padding, to a multiple of 128, or of 1,024; more are tokens unknown to it."""
    return min(1023, max(127, rows // 8))


def build_model(config: GPT2Config, tensors: Mapping[str, Tensor], origin: str) -> GPT2:
    """
    A model in float32 and evaluation mode that takes the tensors as its weights.

    Args:
        tensors: under our names and in our shapes, none missing and none left over.
        origin: the file, for error messages.

    Raises:
        CheckpointError: names or shapes are not those of the configuration.
    """
    with torch.device("meta"):
        model = build_gpt2(config)
    state = model.state_dict()
    expected = {name: tuple(tensor.shape) for name, tensor in state.items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if expected != found:
        wrong = [
            f"{name} {found.get(name, 'missing')} instead of {expected.get(name, 'nothing')}"
            for name in sorted(expected.keys() | found.keys())
            if expected.get(name) != found.get(name)
        ]
        raise CheckpointError(f"checkpoint {origin}: {len(wrong)} tensors do not fit the model: {'; '.join(wrong[:10])}")
    # Float32, but for batch norm's count of batches.
    model.load_state_dict({name: tensor.to(state[name].dtype) for name, tensor in tensors.items()}, assign=True)
    return model.eval()


def fitted(imported: Imported, tokenizer: Tokenizer, origin: str) -> Imported:
    """
    The same for a tokenizer that was named or found elsewhere: the vocabulary's padding is undone.

    Raises:
        CheckpointError: the tokenizer has ids that the model does not know.
    """
    config, tensors, notes = fit_vocabulary(imported.model.config, imported.model.state_dict(), tokenizer, origin)
    model = build_model(config, tensors, origin) if notes else imported.model
    return replace(imported, model=model, tokenizer=tokenizer, reshaped=(*imported.reshaped, *notes))


def with_context(model: GPT2, n_positions: int, origin: str) -> GPT2:
    """
    The same model for another context: positions beyond it are cut off, new ones are copies of the first, in order.

    Copies keep what is local right, so that training goes on from a far better place than from random embeddings
    (Beltagy et al. 2020, Longformer, section 5).
    """
    positions = model.wpe.weight  # (n_positions, C)
    repeated = positions.repeat(-(-n_positions // positions.size(0)), 1)[:n_positions]
    tensors = {**model.state_dict(), "wpe.weight": repeated.contiguous()}
    return build_model(replace(model.config, n_positions=n_positions), tensors, origin)


def with_vocabulary(model: GPT2, vocab_size: int) -> GPT2:
    """
    The same model with rows for ids after its last one, each the mean of those that are there; the head's too if its own.

    A mean scores like an average token, so that what the model knew stays nearly as likely as it was; a random row can score
    above all others (Hewitt 2021, https://nlp.stanford.edu/~johnhew/vocab-expansion.html).

    Args:
        vocab_size: at least the model's.
    """
    new = vocab_size - model.config.vocab_size
    tensors = {
        name: torch.cat([tensor, tensor.mean(0, keepdim=True).expand(new, -1)]) if name in VOCABULARY_ROWS else tensor
        for name, tensor in model.state_dict().items()
    }
    return build_model(replace(model.config, vocab_size=vocab_size), tensors, "with more ids")
