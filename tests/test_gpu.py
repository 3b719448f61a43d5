"""What only a CUDA device can show; skips without one."""

import pytest
import torch

import groundup
from tests.conftest import TINY

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ON_CUDA = TINY | {"device": "cuda"}


def test_cuda_learns_what_the_cpu_learns(text_file, tmp_path):
    """The same weights, data and steps; only the order of sums differs."""
    cpu = groundup.train(text_file, tmp_path / "cpu", **TINY)
    cuda = groundup.train(text_file, tmp_path / "cuda", **ON_CUDA)
    assert cuda["eval_loss"] == pytest.approx(cpu["eval_loss"], abs=1e-3)


def test_bf16_and_compile_learn_too(text_file, tmp_path):
    plain = groundup.train(text_file, tmp_path / "plain", **ON_CUDA)
    fast = groundup.train(text_file, tmp_path / "fast", **(ON_CUDA | {"bf16": True, "torch_compile": True}))
    assert fast["eval_loss"] == pytest.approx(plain["eval_loss"], abs=0.05)


def test_a_cuda_run_goes_on_on_the_cpu(text_file, tmp_path):
    groundup.train(text_file, tmp_path / "run", **ON_CUDA)
    summary = groundup.train(text_file, tmp_path / "run", **(TINY | {"max_steps": TINY["max_steps"] + 4}))
    assert summary["steps"] == TINY["max_steps"] + 4


OPTIONS = (
    {"fp16": True},
    {"tf32": True},
    {"optim": "muon"},
    {"optim": "adafactor"},
    {"optim": "sgd"},
    {"ema_decay": 0.9, "activation_checkpointing": True, "health_steps": 2},
)


@pytest.mark.parametrize("options", OPTIONS)
def test_every_precision_and_optimizer_learns_and_goes_on(options, text_file, tmp_path):
    """On CUDA a step ends where the CPU's ends, but for the precision; a run goes on to where a straight one ends."""
    plain = groundup.train(
        text_file, tmp_path / "plain", **(TINY | {name: v for name, v in options.items() if name == "optim"})
    )
    straight = groundup.train(text_file, tmp_path / "straight", **(ON_CUDA | options))
    assert straight["eval_loss"] == pytest.approx(plain["eval_loss"], abs=0.05)
    groundup.train(text_file, tmp_path / "run", **(ON_CUDA | options | {"max_steps": 6, "lr_scheduler_type": "constant"}))
    resumed = groundup.train(text_file, tmp_path / "run", **(ON_CUDA | options | {"lr_scheduler_type": "constant"}))
    assert resumed["steps"] == TINY["max_steps"]


def test_a_size_that_fits_is_found(text_file, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    auto = {"per_device_train_batch_size": "auto", "per_device_eval_batch_size": "auto"}
    found = groundup.train(text_file, tmp_path / "auto", **(ON_CUDA | auto))
    given = groundup.train(text_file, tmp_path / "given", **ON_CUDA)
    assert found["eval_loss"] == pytest.approx(given["eval_loss"], abs=1e-3)
