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
