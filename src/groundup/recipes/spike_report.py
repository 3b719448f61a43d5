"""RUN/spikes/step-000123.txt: what a model read when its loss or gradient stood out, for a person to look at."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from groundup.data.batches import Batch, Samples, to_batch
from groundup.model.gpt2 import GPT2
from groundup.model.loss import next_token_scores
from groundup.runtime.device import Machine
from groundup.runtime.files import replace_durably, sync_directory
from groundup.tokenizer.tokenizer import Tokenizer
from groundup.tracking.surprise import harmless
from groundup.training.health import evaluating
from groundup.training.loop import StepResult
from groundup.training.spikes import Spike

SPIKES = "spikes"
MEASURED_WINDOWS = 256
"""Windows whose loss is measured, at most."""
PASS_TOKENS = 8192
"""Tokens in one forward pass of that measurement, at most, but for one window that is longer."""
REPORTED_WINDOWS = 16
"""Windows whose text is in a report, at most."""
REPORTED_CHARACTERS = 4000
"""Of each."""


def report_spike(
    run: Path, model: GPT2, samples: Samples, tokenizer: Tokenizer, step: StepResult, machine: Machine, *, action: str = ""
) -> Path:
    """
    Read a spike's batch again, measure each of its windows, and write both down; returns the file.

    Args:
        model: as it is after the step.
        samples: what the run reads.
        step: one with a spike.
        action: what is done about it, in a few words.
    """
    if step.spike is None:
        raise ValueError(f"step {step.step} is no spike")
    first, count = step.positions
    windows = samples.read(np.arange(first, first + count, dtype=np.int64))
    losses = window_losses(model, to_batch(windows[:MEASURED_WINDOWS], machine.device), machine.autocast)
    return write_spike_report(run, step.step, step.spike, windows, tokenizer, losses, digest=step.batch_digest, action=action)


def window_losses(model: GPT2, batch: Batch, autocast: Callable[[], AbstractContextManager[object]]) -> list[float]:
    """
    Mean loss of each window, nats per token, without dropout; the model is left as it was.

    Args:
        batch: (windows, T).
        autocast: the precision of the forward passes.
    """
    count, length = batch.labels.shape
    per_pass = max(1, PASS_TOKENS // length)
    losses = []
    with torch.no_grad(), evaluating(model):
        for first in range(0, count, per_pass):
            part = batch.rows(first, min(per_pass, count - first))
            with autocast():
                scores, _ = next_token_scores(model(part.input_ids), model.head_weight, part.labels)
            losses.append(scores.view(part.labels.shape).mean(1))
    return [float(loss) for loss in torch.cat(losses).tolist()]


def write_spike_report(
    run: Path,
    step: int,
    spike: Spike,
    windows: npt.NDArray[np.int64] | torch.Tensor,
    tokenizer: Tokenizer,
    losses: Sequence[float] | None = None,
    *,
    digest: str,
    action: str = "",
) -> Path:
    """
    Write what the model read in a step, worst window first where losses are given; returns the file.

    The same report is written once: a run that goes on from before the spike meets it again. Another one of the same step,
    after other data were taken, has a file of its own.

    Args:
        windows: tokens of the step, (W, T + 1).
        losses: mean loss of each of the first windows.
        digest: hash of the batch's tokens, as in metrics.jsonl.
        action: what is done about it, in a few words.

    Raises:
        OSError: the file cannot be written.
    """
    content = _report(step, spike, np.asarray(windows), tokenizer, losses, digest, action).encode()
    folder = run / SPIKES
    folder.mkdir(exist_ok=True)
    sync_directory(run)
    path, number = folder / f"step-{step:06}.txt", 1
    while path.exists() and path.read_bytes() != content:
        number += 1
        path = folder / f"step-{step:06}-{number}.txt"
    replace_durably(path, content)
    return path


def _report(
    step: int, spike: Spike, windows: npt.NDArray[np.int64], tokenizer: Tokenizer,
    losses: Sequence[float] | None, digest: str, action: str,
) -> str:  # fmt: skip
    count, length = windows.shape[0], windows.shape[1] - 1
    order = list(range(count) if losses is None else np.argsort(-np.nan_to_num(losses, nan=np.inf), kind="stable"))
    shown = order[:REPORTED_WINDOWS]
    lines = [
        f"step {step:,}: {spike.describe()}",
        f"loss: {spike.loss.value:.4f} nats per token (median {spike.loss.median:.4f}, score {spike.loss.score:.1f})",
        f"gradient norm: {spike.grad_norm.value:.4g} (median {spike.grad_norm.median:.4g}, score {spike.grad_norm.score:.1f})",
        *([f"done about it: {action}"] if action else []),
        f"batch: {count:,} windows of {length:,} tokens, batch_digest {digest}",
        "",
        "What the model read, in the order of the batch:" if losses is None else "What the model read, worst window first:",
    ]
    if losses is not None:
        lines.append(f"(losses as the model is after the step, without dropout; {len(losses):,} of {count:,} windows measured)")
    for window in shown:
        loss = "" if losses is None else f", loss {losses[window]:.4f}"
        text = _text(windows[window], tokenizer)
        lines += ["", f"--- window {window + 1:,} of {count:,}{loss}"]
        lines += [f"| {line}" for line in text[:REPORTED_CHARACTERS].split("\n")]
        if len(text) > REPORTED_CHARACTERS:
            lines.append(f"({len(text) - REPORTED_CHARACTERS:,} more characters of this window are left out)")
    if left_out := count - len(shown):
        lines += ["", f"({left_out:,} more windows are left out)"]
    return "\n".join(lines) + "\n"


def _text(tokens: npt.NDArray[np.int64], tokenizer: Tokenizer) -> str:
    """A window as text that is shown and not obeyed; ends of documents are spelled out."""
    ends = np.flatnonzero(tokens == tokenizer.end_of_text_id)
    return harmless(tokenizer.end_of_text.join(tokenizer.decode(part[part != tokenizer.end_of_text_id].tolist())
                                               for part in np.split(tokens, ends)))  # fmt: skip
