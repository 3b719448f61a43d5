"""
Every feature that has a state, or decides what is read, survives kill -9: two kills and two resumes within one epoch end where
an uninterrupted run ends, bit for bit.
"""

import signal
import time
from pathlib import Path
from typing import Any

import pytest

from groundup.checkpoint.commit import checkpoints
from groundup.tracking.metrics import read_rows
from tests.conftest import TINY, flags, make_text
from tests.runs import assert_same_end, fork, last_state, logged_step

# 70 steps are an epoch.
WORDS = 2000
RUN = TINY | {"max_steps": 60, "eval_steps": 30, "save_steps": 5, "sample_tokens": 0, "warmup_steps": 5}
FEATURES: dict[str, dict[str, Any]] = {
    "fp16": {"fp16": True},
    "bf16": {"bf16": True},
    "ema": {"ema_decay": 0.99},
    "ramps": {"total_batch_tokens": "32:192@0.5", "sequence_length": "4:16@0.5"},
    "mixture": {},
    "fim": {"fim_rate": 0.7},
    "muon": {"optim": "muon"},
    "sgd": {"optim": "sgd"},
    "adafactor": {"optim": "adafactor"},
    "coupled decay": {"weight_decay_type": "coupled"},
    "batch norm": {"norm": "batch", "per_device_train_batch_size": 4},
    "post-norm, rms, dropout, recomputed": {
        "norm": "rms", "norm_position": "post", "resid_pdrop": 0.1, "per_device_train_batch_size": 4,
        "activation_checkpointing": True,
    },
    "spikes that are skipped": {"spike_action": "skip", "spike_threshold": 0.5, "spike_window": 20, "max_skipped_steps": 60},
    "health": {"health_steps": 3},
    "label smoothing": {"label_smoothing_factor": 0.1},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("sources")
    (found / "a.txt").write_text(make_text(WORDS), encoding="utf-8")
    (found / "b.txt").write_text(make_text(WORDS // 2, seed=1).upper(), encoding="utf-8")
    return found


def given(name: str, folder: Path) -> list[str]:
    """Source and options of a run."""
    if name == "mixture":
        named = [f"--source=a={folder / 'a.txt'}:0.7", f"--source=b={folder / 'b.txt'}:0.3"]
        return [*named, *flags(RUN)]
    return [str(folder / "a.txt"), *flags(RUN | FEATURES[name])]


@pytest.mark.slow
@pytest.mark.parametrize("name", FEATURES)
def test_killed_and_resumed_twice_in_one_epoch(name, folder, tmp_path):
    straight, run, log = tmp_path / "straight", tmp_path / "run", tmp_path / "log"
    arguments = ["train", *given(name, folder)]
    process = fork([*arguments, "--output-dir", str(straight)], log)
    process.join()
    assert process.exitcode == 0, log.read_text()
    assert logged_step(straight) == RUN["max_steps"]

    for target in (8, 33):
        process = fork([*arguments, "--output-dir", str(run)], log)
        while process.is_alive() and logged_step(run) < target:
            time.sleep(0.001)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, log.read_text()
        assert logged_step(run) < RUN["max_steps"]
    process = fork([*arguments, "--output-dir", str(run)], log)
    process.join()
    assert process.exitcode == 0, log.read_text()
    assert "resuming from checkpoint-" in log.read_text()
    assert_same_end(run, straight)
    if name == "ema":
        assert last_state(run)["ema.safetensors"] == last_state(straight)["ema.safetensors"]
    if name == "spikes that are skipped":
        assert read_rows(straight / "metrics.jsonl")[-1].get("skipped_steps") or "SPIKE" in log.read_text()
    assert len(checkpoints(run)) == 2
