"""How good a model is on text that it has not seen: loss, perplexity, bits per byte, token accuracy."""

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
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
    was_training = model.training
    model.eval()
    loss = hits = 0.0
    tokens = size = 0
    try:
        for batch in batches:
            if should_stop():
                return None
            with torch.no_grad(), autocast():
                losses, right = next_token_scores(model(batch.input_ids), model.head_weight, batch.labels)
            # In float64, or a long sum of float32 would drift with the batch size.
            loss += float(losses.cpu().double().sum())
            hits += int(right.sum())
            tokens += batch.labels.numel()
            size += int(token_byte_counts[batch.labels.cpu().numpy()].sum())
    finally:
        model.train(was_training)
    mean = loss / tokens
    return Evaluation(
        loss=mean,
        perplexity=math.exp(mean) if mean < 700 else math.inf,
        bits_per_byte=loss / math.log(2) / max(1, size),
        token_accuracy=hits / tokens,
        tokens=tokens,
    )


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
