"""
Runs whose batches and sequences grow, and the length of a run: against a loop written here, with torch's own parts.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import groundup
from groundup.cli.main import run as command
from groundup.errors import ConfigError
from groundup.model.gpt2 import GPT2
from groundup.tracking.metrics import read_rows
from tests.conftest import TINY, flags
from tests.runs import assert_same_end, contents, prepared

pytestmark = pytest.mark.usefixtures("quick")

QUIET = TINY | {"eval_steps": 0, "sample_tokens": 0, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 3}
LENGTH = TINY["n_positions"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory, words=800)


def mean_loss(model: GPT2, tokens: Tensor, length: int) -> Tensor:
    """Mean over all targets, where the model is shown no more than ``length`` tokens at once; one piece after the other."""
    losses = []
    for window in tokens:
        for start in range(0, len(window) - 1, length):
            inputs, labels = window[start : start + length], window[start + 1 : start + length + 1]
            losses.append(F.cross_entropy(model.logits(model(inputs[None]))[0], labels, reduction="none"))
    return torch.cat(losses).mean()


def by_hand(training: Any, windows: list[int], lengths: list[int]) -> Iterator[tuple[float, float]]:
    """
    Loss and gradient norm of each step: GPT-3's recipe with torch's AdamW, all windows of a step at once.

    Args:
        windows: in the batch of each step.
        lengths: of the sequences of each step.
    """
    model, position = copy.deepcopy(training.model), 0
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0, betas=(0.9, 0.95), eps=1e-8)
    for step, (count, length) in enumerate(zip(windows, lengths, strict=True), 1):
        tokens = torch.from_numpy(training.course.samples.read(np.arange(position, position + count)))
        loss = mean_loss(model, tokens, length)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, step / 3)
        optimizer.step()
        optimizer.zero_grad()
        position += count
        yield loss.item(), norm.item()


RAMPS = {
    # 12 steps; half of them are the ramp, and a step of the ramp is a sixth of the way.
    "batch": ({"total_batch_tokens": "32:128@0.5"}, [2, 3, 4, 5, 6, 7, 8, 8, 8, 8, 8, 8], [16] * 12),
    "batch, in passes of three": (
        {"total_batch_tokens": "32:128@6", "per_device_train_batch_size": 3}, [2, 3, 4, 5, 6, 7, 8, 8, 8, 8, 8, 8], [16] * 12
    ),
    "batch that shrinks": ({"total_batch_tokens": "96:32@4"}, [6, 5, 4, 3, 2, 2, 2, 2, 2, 2, 2, 2], [16] * 12),
    "sequences": ({"sequence_length": "2:16@7"}, [8] * 12, [2, 4, 4, 8, 8, 8, 8, 16, 16, 16, 16, 16]),
    "short sequences throughout": ({"sequence_length": 4}, [8] * 12, [4] * 12),
    "both": (
        {"total_batch_tokens": "32:128@6", "sequence_length": "4:16@6", "per_device_train_batch_size": 4},
        [2, 3, 4, 5, 6, 7, 8, 8, 8, 8, 8, 8], [4, 4, 8, 8, 8, 8, 16, 16, 16, 16, 16, 16],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RAMPS)
def test_a_ramp_is_the_same_batches_by_hand(data, tmp_path, name):
    options, windows, lengths = RAMPS[name]
    with groundup.open_training(data, tmp_path / "run", **QUIET | options) as training:
        expected = list(by_hand(training, windows, lengths))
        done = list(training)
        assert [step.loss for step in done] == pytest.approx([loss for loss, _ in expected], abs=2e-5)
        assert [step.grad_norm for step in done] == pytest.approx([norm for _, norm in expected], rel=1e-3)
        assert [step.tokens for step in done] == [count * LENGTH for count in windows]
        assert [step.positions for step in done] == [(sum(windows[:i]), windows[i]) for i in range(12)]
        assert done[-1].loss < done[0].loss - 0.2, "it learns, or equal curves would say little"


def test_what_is_logged_of_a_growing_run(data, tmp_path, capsys):
    options, windows, _ = RAMPS["both"]
    summary = groundup.train(data, tmp_path / "run", **QUIET | options)
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    seen = [sum(windows[: i + 1]) * LENGTH for i in range(12)]
    assert [row["num_input_tokens_seen"] for row in rows] == seen
    with groundup.open_training(data, tmp_path / "run", **QUIET | options) as training:
        assert [row["epoch"] for row in rows] == [round(tokens / LENGTH / training.plan.windows, 6) for tokens in seen]
    assert summary["num_input_tokens_seen"] == seen[-1]
    said = capsys.readouterr().err
    assert "batch: 128 tokens = 8 windows of 16, in 2 passes of at most 4; at first 32 tokens; cut into 4 tokens" in said
    assert f"length: 12 steps = {seen[-1]:,} tokens" in said


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"max_train_tokens": 1280}, 10),
        ({"max_train_tokens": 1281}, 11),
        ({"max_train_tokens": 1}, 1),
        # 2 + 3 + 4 + 5 + 6 windows, and one more.
        ({"max_train_tokens": 20 * 16, "total_batch_tokens": "32:128@6"}, 5),
        ({"max_train_tokens": 20 * 16 + 1, "total_batch_tokens": "32:128@6"}, 6),
    ],
)
def test_a_run_ends_where_so_many_tokens_were_seen(data, tmp_path, options, steps, capsys):
    given = {name: value for name, value in QUIET.items() if name != "max_steps"} | options
    summary = groundup.train(data, tmp_path / "run", **given)
    assert summary["steps"] == steps
    assert options["max_train_tokens"] <= summary["num_input_tokens_seen"] < options["max_train_tokens"] + 128
    capsys.readouterr()
    assert groundup.train(data, tmp_path / "run", **given)["steps"] == steps
    assert f"already complete at step {steps}; raise --max-train-tokens to go on" in capsys.readouterr().err
    # More tokens go on.
    more = groundup.train(data, tmp_path / "run", **given | {"max_train_tokens": 2000, "num_train_epochs": 1})
    assert more["num_input_tokens_seen"] >= 2000


@pytest.mark.parametrize(
    ("was", "now", "words"),
    [
        ({"total_batch_tokens": "32:128@6"}, {"total_batch_tokens": "64:128@6"},
         "total_batch_ramp: 32:128@6 → 64:128@6"),
        ({"total_batch_tokens": "32:128@6"}, {"total_batch_tokens": 128}, "total_batch_ramp: 32:128@6 → default"),
        ({"total_batch_tokens": 128}, {"total_batch_tokens": "32:128@6"}, "total_batch_ramp: default → 32:128@6"),
        ({"sequence_length": "4:16@6"}, {"sequence_length": "4:16@0.5"}, "sequence_length: 4:16@6 → 4:16@0.5"),
        ({"sequence_length": 8}, {"sequence_length": 0}, "sequence_length: 8 → default"),
        ({"sequence_length": 8}, {"sequence_length": 4}, "sequence_length: 8 → 4"),
    ],
)  # fmt: skip
def test_a_changed_ramp_is_refused_in_one_line(data, tmp_path, was, now, words, capsys):
    run = tmp_path / "run"
    groundup.train(data, run, **QUIET | was | {"max_steps": 3})
    before = contents(run)
    with pytest.raises(ConfigError) as error:
        groundup.train(data, run, **QUIET | now)
    assert str(error.value).startswith(f"run {run}: cannot resume checkpoint-3 with changed {words}; give the values")
    capsys.readouterr()
    assert command(["train", str(data), "--output-dir", str(run), *flags(QUIET | now)]) == 2
    assert len([line for line in capsys.readouterr().err.splitlines() if line.startswith("groundup:")]) == 1
    assert contents(run) == before


def test_a_run_that_grows_goes_on_where_it_was(data, tmp_path):
    """A ramp in steps is the same for any length of the run; where the run is in the data is in the checkpoint."""
    options = QUIET | RAMPS["both"][0]
    groundup.train(data, tmp_path / "straight", **options)
    for steps in (2, 5, 12):
        groundup.train(data, tmp_path / "run", **options | {"max_steps": steps})
    assert_same_end(tmp_path / "run", tmp_path / "straight")
