"""
Is this machine right? Each check takes seconds at most, and measures: nothing is concluded from a name.

Kernels are run on the device that a training would take, and what they return is compared with a sum in float64.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from groundup.diagnostics.check import Check
from groundup.diagnostics.wheels import Build, Gpu, compile_reason, parse_smi, wheel_check
from groundup.runtime.device import Machine, synchronize
from groundup.runtime.memory import available_bytes, size_text

OLDEST_PYTHON = (3, 11)
LEAST_MEMORY_BYTES, LEAST_DISK_BYTES = 2**30, 2**30
"""A small preset's run holds about 0.7 GiB, and its checkpoints take some hundred megabytes."""
SMI = ("nvidia-smi", "--query-gpu=name,compute_cap,driver_version,memory.total", "--format=csv,noheader,nounits")
SMI_SECONDS = COMPILER_SECONDS = 10.0
MATRIX = 1024
"""Rows and columns of the products that are timed."""
COPY_BYTES = 2**27
"""Far more than the caches hold."""
TIMED_SECONDS = 0.4
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-3}
"""
Largest error of an entry, relative to its size and the entries' standard deviation together: a few roundings of the type, of
2⁻⁹ and 2⁻¹² each; in float32 of sums over a thousand terms. A kernel that is wrong is off by about 1.
"""


NAMES = (
    "python", "gpu_build", "device", "precision", "compiler", "memory", "disk", "threads", "matrix_product", "attention",
    "memory_bandwidth",
)  # fmt: skip


def examine_machine(machine: Machine, folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> Iterator[Check]:
    """
    Everything about this machine, as it is found.

    Args:
        machine: the device and precision that a training would take.
        folder: where something would be written; it need not exist.
        wanted: which checks to make, by name.
    """
    device = "the fastest device that torch can use, in a precision that it has"
    make: dict[str, Callable[[], Check]] = {
        "python": _python,
        "gpu_build": lambda: wheel_check(find_gpu(), installed_build(), torch.cuda.is_available()),
        "device": lambda: Check("device", "machine", True, machine.reason, device),
        "precision": lambda: _precision(machine),
        "compiler": lambda: _compiler(machine),
        "memory": lambda: _memory(machine),
        "disk": lambda: _disk(folder),
        "threads": _threads,
        "matrix_product": lambda: _product(machine),
        "attention": lambda: _attention(machine),
        "memory_bandwidth": lambda: _bandwidth(machine),
    }
    for name in NAMES:
        if wanted(name):
            yield make[name]()


def find_gpu() -> Gpu | None:
    """The first NVIDIA GPU, from its driver, which also knows those that torch cannot use; None where there is none."""
    program = shutil.which(SMI[0])
    if program is None:
        return None
    try:
        done = subprocess.run([program, *SMI[1:]], capture_output=True, text=True, timeout=SMI_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return next(iter(parse_smi(done.stdout)), None)


def installed_build() -> Build:
    """The torch that is installed."""
    return Build(torch.__version__, torch.version.cuda, tuple(torch.cuda.get_arch_list()))


def _python() -> Check:
    version = sys.version_info[:3]
    sixty_four = sys.maxsize > 2**32
    measured = f"{platform.python_implementation()} {'.'.join(map(str, version))}, {64 if sixty_four else 32} bits, "
    return Check(
        "python", "machine", version >= OLDEST_PYTHON and sixty_four, measured + platform.platform(terse=True),
        f"{'.'.join(map(str, OLDEST_PYTHON))} or newer, 64 bits",
        "" if version >= OLDEST_PYTHON and sixty_four else "install a newer Python and make the environment again",
    )  # fmt: skip


def _precision(machine: Machine) -> Check:
    """The speed of 16-bit products against that of float32, which says whether bf16 is there or emulated."""
    device = machine.device
    single = _speed(_square(MATRIX, torch.float32, device))
    # An emulated type is a thousand times slower: the small product tells that in no time.
    small = _speed(_square(MATRIX // 4, torch.bfloat16, device), seconds=0.1)
    half = _speed(_square(MATRIX, torch.bfloat16, device)) if small > single / 50 else small
    ratio = half / single
    chosen = str(machine.dtype).removeprefix("torch.")
    measured = f"bf16 products at {half / 1e9:,.0f} GFLOP/s, float32 at {single / 1e9:,.0f}: {ratio:,.1f} times as fast; "
    measured += f"training would take {chosen}"
    expected = "the faster of the two is taken"
    slow = machine.dtype != torch.float32 and ratio < 0.8
    missed = machine.dtype == torch.float32 and ratio > 2.0 and not machine.tf32
    advice = ""
    if slow:
        advice = "bf16 is slower than float32 here: give --no-bf16"
    elif missed:
        advice = "bf16 is much faster here: try --bf16, and compare the losses"
    details = {"float32_flops": single, "bfloat16_flops": half, "chosen": chosen}
    return Check("precision", "machine", not advice, measured, expected, advice, details=details)


def _compiler(machine: Machine) -> Check:
    """What --torch-compile needs: a C++ compiler that works, or Triton on a GPU. The compiling itself takes too long here."""
    name, expected = "compiler", "a C++ compiler that builds a library, for --torch-compile; without one leave it out"
    if machine.device.type == "cuda":
        if reason := compile_reason(torch.cuda.get_device_capability()):
            return Check(name, "machine", None, reason, "compute capability 7.0 or more; otherwise leave --torch-compile out")
        import importlib.util

        if importlib.util.find_spec("triton") is None:
            return Check(name, "machine", None, "no triton installed", "Triton, for --torch-compile; without it leave it out")
    wanted = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++", "c++")), None)
    if wanted is None:
        return Check(name, "machine", None, "no C++ compiler found (g++, clang++, c++, CXX)", expected)
    started = time.perf_counter()
    problem = compile_problem(wanted)
    seconds = time.perf_counter() - started
    if problem:
        return Check(
            name, "machine", False, f"{wanted} failed: {problem}", expected,
            "install the compiler and Python's headers (Debian: g++ python3-dev), or leave --torch-compile out",
        )  # fmt: skip
    return Check(name, "machine", True, f"{wanted} builds a library with OpenMP in {seconds:.1f} s", expected)


def compile_problem(compiler: str) -> str:
    """Build what ``torch.compile`` builds on a CPU, a library with OpenMP and Python's headers; why that failed, or nothing."""
    source = "#include <Python.h>\n#include <omp.h>\n#include <cmath>\n"
    source += 'extern "C" int groundup_probe() { return omp_get_max_threads() + (int)std::sqrt(4.0); }\n'
    # Apple's clang knows OpenMP only through a library of its own, and torch.compile brings that itself.
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    source = source.replace("#include <omp.h>\n", "").replace("omp_get_max_threads()", "1") if not openmp else source
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "probe.cpp")
        path.write_text(source, encoding="utf-8")
        headers = sysconfig.get_path("include")
        link = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        command = [*compiler.split(), "-shared", "-fPIC", *openmp, f"-I{headers}", str(path), *link, "-o", f"{path}.so"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILER_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            return f"took more than {COMPILER_SECONDS:.0f} s"
        except OSError as error:
            return str(error.strerror)
    if done.returncode == 0:
        return ""
    return next((line for line in done.stderr.splitlines() if "error" in line), f"exit code {done.returncode}")[-200:]


def _memory(machine: Machine) -> Check:
    free, reason = available_bytes(machine.device.type)
    passed = free >= LEAST_MEMORY_BYTES
    return Check(
        "memory", "machine", passed, f"{size_text(free)} {reason}", f"{size_text(LEAST_MEMORY_BYTES)} for a small model",
        "" if passed else "close other programs, or take gpt2-nano with --per-device-train-batch-size 1",
        details={"free_bytes": free},
    )  # fmt: skip


def _disk(folder: Path) -> Check:
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    passed, writable = free >= LEAST_DISK_BYTES, os.access(place, os.W_OK)
    advice = "" if passed else "free some space, or give an --output-dir on another disk"
    advice = advice if writable else f"{place} cannot be written to; give an --output-dir elsewhere"
    return Check(
        "disk", "machine", passed and writable, f"{size_text(free)} free below {place}{'' if writable else ', read-only'}",
        f"{size_text(LEAST_DISK_BYTES)} free, where one may write", advice, details={"free_bytes": free},
    )  # fmt: skip


def _threads() -> Check:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return threads_check(torch.get_num_threads(), cores, busy, os.environ.get("OMP_NUM_THREADS", ""))


def threads_check(threads: int, cores: int, busy: float | None, given: str) -> Check:
    """
    As many threads as cores?

    Args:
        threads: that torch computes with.
        cores: that this process may use.
        busy: processes that wanted a core in the last minute, on average; None where that is not known.
        given: OMP_NUM_THREADS.
    """
    measured = f"{threads} of {cores} cores" + (f", OMP_NUM_THREADS={given}" if given else "")
    measured += "" if busy is None else f"; {busy:.1f} processes wanted a core in the last minute"
    if busy is not None and busy > 1.5 * cores + 1:
        measured += ": other work takes a part of the machine, speeds here are too low"
    # A physical core may have two logical ones, and torch takes the physical: half of them is right.
    passed = max(1, cores // 2) <= threads <= cores
    advice = ""
    if threads > cores:
        advice = f"more threads than cores wait for each other: set OMP_NUM_THREADS={cores}"
    elif not passed:
        advice = f"cores are left idle: unset OMP_NUM_THREADS, or set it to {cores}"
    details = {"threads": threads, "cores": cores, "load": busy}
    return Check("threads", "machine", passed, measured, "a thread for each core", advice, details=details)


def _product(machine: Machine) -> Check:
    """A product of matrices: right, and how fast."""
    device, dtype = machine.device, machine.dtype
    draw = torch.Generator().manual_seed(0)
    left, right = (torch.randn(MATRIX, MATRIX, generator=draw) for _ in range(2))
    found = (left.to(device, dtype) @ right.to(device, dtype)).cpu().double()
    wanted = left.to(dtype).double() @ right.to(dtype).double()
    speed = _speed(_square(MATRIX, dtype, device))
    return kernel_check(
        "matrix_product", f"{MATRIX} × {MATRIX}, {_short(dtype)}, {speed / 1e9:,.0f} GFLOP/s", found, wanted, dtype,
        {"flops": speed},
    )  # fmt: skip


def _attention(machine: Machine) -> Check:
    """Causal attention as the model calls it, against its formula in float64."""
    device, dtype, shape = machine.device, machine.dtype, (4, 4, 256, 64)
    draw = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(shape, generator=draw).to(dtype) for _ in range(3))
    q, k, v = query.to(device), key.to(device), value.to(device)

    def run() -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    seconds = _seconds(run, device)
    scores = query.double() @ key.double().transpose(-1, -2) / shape[-1] ** 0.5
    hidden = torch.ones(shape[-2], shape[-2], dtype=torch.bool).triu(1)
    wanted = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value.double()
    # Two products of (T × T) and (T × d) for each head; the half that is masked is counted.
    speed = 4 * shape[0] * shape[1] * shape[2] ** 2 * shape[3] / seconds
    what = f"causal, {shape[0]} × {shape[1]} heads × {shape[2]} tokens, {_short(dtype)}, {speed / 1e9:,.0f} GFLOP/s"
    return kernel_check("attention", what, run().cpu().double(), wanted, dtype, {"flops": speed})


def kernel_check(name: str, what: str, found: Tensor, wanted: Tensor, dtype: torch.dtype, details: dict[str, float]) -> Check:
    """
    Whether a kernel computed what it should.

    Args:
        what: it did, and how fast.
        found: what it returned, float64.
        wanted: the same in float64 from the start, of the same shape.
        dtype: that it computed in.
    """
    error = ((found - wanted).abs() / (wanted.abs() + wanted.std())).max().item()
    passed = error <= TOLERANCES[dtype]  # also False where it is not a number
    return Check(
        name, "machine", passed, f"{what}; largest error {error:.1e}, relative",
        f"an error of at most {TOLERANCES[dtype]:.0e}",
        "" if passed else "this device computes wrongly: update torch and the driver, then test the memory",
        details={**details, "error": error},
    )  # fmt: skip


def _bandwidth(machine: Machine) -> Check:
    """Copying: what bounds a small model and the writing of text."""
    device = machine.device
    source = torch.zeros(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    speed = 2 * COPY_BYTES / _seconds(lambda: target.copy_(source), device)
    right = torch.equal(target, source)
    return Check(
        "memory_bandwidth", "machine", right, f"{speed / 1e9:,.1f} GB/s copying {COPY_BYTES / 2**20:.0f} MiB (read, written)",
        "what is copied arrives", "" if right else "memory is faulty: test it", details={"bytes_per_second": speed},
    )  # fmt: skip


def _square(size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    matrix = torch.ones(size, size, dtype=dtype, device=device)
    return matrix, torch.empty_like(matrix)


def _speed(matrices: Sequence[Tensor], seconds: float = TIMED_SECONDS) -> float:
    """FLOP/s of the product of a square matrix with itself, the fastest."""
    matrix, out = matrices
    return 2 * len(matrix) ** 3 / _seconds(lambda: torch.mm(matrix, matrix, out=out), matrix.device, seconds)


def _seconds(run: Callable[[], object], device: torch.device, limit: float = TIMED_SECONDS) -> float:
    """The shortest time of a run, after one to warm up: what else the machine does only ever adds."""
    run()
    synchronize(device)
    best, begun = float("inf"), time.perf_counter()
    while best == float("inf") or time.perf_counter() - begun < limit:
        started = time.perf_counter()
        run()
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
