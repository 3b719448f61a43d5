"""How good a model is on text that it has not seen: loss, perplexity, bits per byte, token accuracy."""

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from groundup.data.batches import Batch
from groundup.model.gpt2 import GPT2
from groundup.model.loss import next_token_scores


@dataclass(frozen=True)
class Evaluation:
    """Measurements over some validation windows."""

    loss: float
    """Mean cross-entropy, nats per token."""
    perplexity: float
    """exp(loss)."""
    bits_per_byte: float
    """Cross-entropy per UTF-8 byte of the text: comparable between tokenizers."""
    token_accuracy: float
    """Share of tokens that were the most likely one."""
    tokens: int
    sources: dict[str, "Evaluation"] = field(default_factory=dict)
    """Of each named source; empty where there are none."""


@dataclass
class _Sums:
    """Sums over tokens."""

    loss: float = 0.0
    hits: int = 0
    tokens: int = 0
    bytes: int = 0

    def add(self, other: "_Sums") -> None:
        self.loss += other.loss
        self.hits += other.hits
        self.tokens += other.tokens
        self.bytes += other.bytes

    def evaluation(self, sources: dict[str, Evaluation]) -> Evaluation:
        mean = self.loss / self.tokens
        return Evaluation(
            loss=mean,
            perplexity=math.exp(mean) if mean < 700 else math.inf,
            bits_per_byte=self.loss / math.log(2) / max(1, self.bytes),
            token_accuracy=self.hits / self.tokens,
            tokens=self.tokens,
            sources=sources,
        )


def evaluate_model(
    model: GPT2,
    batches: Iterable[Batch],
    token_byte_counts: npt.NDArray[np.int64],
    autocast: Callable[[], AbstractContextManager[object]],
    should_stop: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """
    Measure a model on batches; sums are exact means over tokens, however the batches are cut.

    Args:
        token_byte_counts: bytes of each token id, (V,); end-of-text has none.
        should_stop: asked between batches; when true the evaluation is given up.

    Returns:
        The measurements, or None when it was given up.
    """
    return evaluate_sources(model, {"": batches}, token_byte_counts, autocast, should_stop)


def evaluate_sources(
    model: GPT2,
    batches: Mapping[str, Iterable[Batch]],
    token_byte_counts: npt.NDArray[np.int64],
    autocast: Callable[[], AbstractContextManager[object]],
    should_stop: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """
    Measure a model on the batches of several sources, by name: over all tokens, and in ``sources`` over those of each.

    A source without a name, '', has no measurements of its own. Otherwise as ``evaluate_model``.
    """
    was_training = model.training
    model.eval()
    total, found = _Sums(), {}
    try:
        for name, some in batches.items():
            sums = _Sums()
            for batch in some:
                if should_stop():
                    return None
                with torch.no_grad(), autocast():
                    losses, right = next_token_scores(model(batch.input_ids), model.head_weight, batch.labels)
                # In float64, or a long sum of float32 would drift with the batch size.
                sums.loss += float(losses.cpu().double().sum())
                sums.hits += int(right.sum())
                sums.tokens += batch.labels.numel()
                sums.bytes += int(token_byte_counts[batch.labels.cpu().numpy()].sum())
            total.add(sums)
            if name:
                found[name] = sums.evaluation({})
    finally:
        model.train(was_training)
    return total.evaluation(found)


def byte_frequency_baseline(train: npt.NDArray[Any], validation: npt.NDArray[Any], token_bytes: list[bytes]) -> float:
    """
    Bits per byte of the model that knows only how often each byte occurs in the training text.

    Args:
        train: token ids, (N,).
        validation: token ids, (M,).
        token_bytes: the bytes of each id.
    """
    per_token = np.zeros((len(token_bytes), 256))
    for index, content in enumerate(token_bytes):
        np.add.at(per_token[index], np.frombuffer(content, dtype=np.uint8), 1)
    seen, asked = (np.bincount(ids, minlength=len(token_bytes)) @ per_token for ids in (train, validation))
    frequencies = (seen + 1) / (seen + 1).sum()
    return float(-(asked * np.log2(frequencies)).sum() / max(1.0, asked.sum()))
