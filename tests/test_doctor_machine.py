"""doctor with nothing: which torch a GPU needs, and whether this machine computes what it should."""

from pathlib import Path

import pytest
import torch

from groundup.diagnostics import machine as machine_checks
from groundup.diagnostics.machine import NAMES, TOLERANCES, compile_problem, examine_machine, kernel_check, threads_check
from groundup.diagnostics.wheels import Build, Gpu, compile_reason, parse_smi, runs_on, wheel_check
from groundup.runtime.device import Machine, choose_machine

GTX_1070_TI = Gpu("NVIDIA GeForce GTX 1070 Ti", (6, 1), "535.183.01")
CU126 = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")
CU130 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((6, 1), CU126, True),  # sm_60's code, same major version
        ((6, 1), CU130, False),
        ((8, 9), CU130, True),
        ((9, 0), CU130, True),
        ((12, 1), CU130, True),  # portable code
        ((12, 0), CU126, False),
        ((12, 0), (*CU126, "compute_90"), True),
        ((7, 0), ("sm_75",), False),  # a lower minor version
        ((9, 0), ("sm_90a",), True),
        ((10, 0), ("sm_90a",), False),
        ((7, 5), (), False),
    ],
)  # fmt: skip
def test_a_build_runs_on_a_gpu_that_it_has_code_for(
    capability: tuple[int, int], architectures: tuple[str, ...], runs: bool
) -> None:
    assert runs_on(capability, architectures) is runs


@pytest.mark.parametrize(
    ("build", "command"),
    [
        # The build without CUDA, and that of PyPI: the same version for CUDA 12.6.
        (Build("2.13.0+cpu", None), "pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cu126"),
        (Build("2.14.1+cu132", "13.2", CU130), "pip install torch==2.14.1 --index-url https://download.pytorch.org/whl/cu126"),
        # From 2.15 on there is none.
        (Build("2.15.0", "13.2", CU130), "pip install torch==2.14.1 --index-url https://download.pytorch.org/whl/cu126"),
    ],
)
def test_a_gtx_1070_ti_is_told_the_exact_version_to_install(build: Build, command: str) -> None:
    check = wheel_check(GTX_1070_TI, build, available=True)
    assert check.passed is False
    assert command in check.advice
    assert "2.14 is the last" in check.advice
    assert "GTX 1070 Ti (compute capability 6.1" in check.measured


def test_a_gtx_1070_ti_with_the_right_build_passes() -> None:
    check = wheel_check(GTX_1070_TI, Build("2.13.0+cu126", "12.6", CU126), available=True)
    assert check.passed
    assert not check.advice
    assert "begins at compute capability 7.0" in compile_reason(GTX_1070_TI.capability)
    assert not compile_reason((7, 0))


def test_a_driver_that_is_too_old_is_told_apart_from_a_build_that_is_wrong() -> None:
    ampere = Gpu("NVIDIA A100", (8, 0), "550.54.15")
    check = wheel_check(ampere, Build("2.13.0+cu130", "13.0", CU130), available=False)
    assert check.passed is False
    assert "needs an NVIDIA driver from 580 on" in check.advice
    assert "torch==2.13.0" in check.advice
    assert "cu126" in check.advice
    newer = Gpu("NVIDIA A100", (8, 0), "580.65.06")
    assert wheel_check(newer, Build("2.13.0+cu130", "13.0", CU130), available=True).passed
    hidden = wheel_check(newer, Build("2.13.0+cu130", "13.0", CU130), available=False)
    assert hidden.passed is False
    assert "CUDA_VISIBLE_DEVICES" in hidden.advice
    blackwell = Gpu("NVIDIA RTX 5090", (12, 0), "550.54.15")
    advice = wheel_check(blackwell, Build("2.13.0+cpu", None), available=False).advice
    assert "driver from 580 on, then pip install torch==2.13.0" in advice
    assert "cu130" in advice


def test_a_gpu_that_no_wheel_is_known_for_is_not_given_a_made_up_one() -> None:
    kepler = wheel_check(Gpu("Tesla K80", (3, 7), "470.0"), Build("2.13.0", "13.0", CU130), available=False)
    assert "pip" not in kepler.advice
    assert "--device cpu" in kepler.advice
    future = wheel_check(Gpu("GPU of tomorrow", (15, 0), "700.1"), Build("2.13.0+cu126", "12.6", CU126), available=False)
    assert "pip" not in future.advice
    assert "pytorch.org" in future.advice


def test_no_gpu_is_no_fault() -> None:
    assert wheel_check(None, Build("2.13.0+cpu", None), available=False).passed


def test_the_driver_is_read_and_odd_lines_are_left_out() -> None:
    text = 'NVIDIA GeForce GTX 1070 Ti, 6.1, 535.183.01, 8192\nNVIDIA X, [N/A], 1, 2\nField "compute_cap" is not valid\n'
    assert parse_smi(text) == [Gpu("NVIDIA GeForce GTX 1070 Ti", (6, 1), "535.183.01", 8192 * 2**20)]


@pytest.mark.parametrize(("threads", "passed"), [(1, False), (2, True), (4, True), (8, False)])
def test_too_many_threads_and_too_few(threads: int, passed: bool) -> None:
    check = threads_check(threads, 4, 0.5, "")
    assert check.passed is passed
    assert bool(check.advice) is not passed


def test_a_busy_machine_is_said() -> None:
    assert "other work" in threads_check(2, 2, 9.0, "").measured


def test_a_kernel_that_computes_wrongly_is_found() -> None:
    right = torch.randn(64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for dtype in TOLERANCES:
        assert kernel_check("k", "", right.to(dtype).double(), right, dtype, {}).passed
        wrong = right.clone()
        wrong[3, 4] += 1
        assert kernel_check("k", "", wrong, right, dtype, {}).passed is False
        assert kernel_check("k", "", right * float("nan"), right, dtype, {}).passed is False


def test_a_compiler_that_fails_is_told(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'fatal error: no headers' >&2\nexit 1\n", encoding="utf-8")
    broken.chmod(0o755)
    assert compile_problem(str(broken)) == "fatal error: no headers"
    assert compile_problem(str(tmp_path / "none"))


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """The machine that a training would take, looked at for less time."""
    monkeypatch.setattr(machine_checks, "TIMED_SECONDS", 0.01)
    monkeypatch.setattr(machine_checks, "COPY_BYTES", 2**20)
    return choose_machine("cpu", None)


def test_this_machine_is_examined_and_every_check_says_something(brief: Machine, tmp_path: Path) -> None:
    found = list(examine_machine(brief, tmp_path / "new" / "run"))
    assert tuple(check.name for check in found) == NAMES
    assert all(check.group == "machine" and check.measured and check.expected for check in found)
    kernels = [check for check in found if check.name in ("matrix_product", "attention", "memory_bandwidth")]
    assert all(check.passed for check in kernels)
    assert not (tmp_path / "new").exists()
