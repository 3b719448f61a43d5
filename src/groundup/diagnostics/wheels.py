"""
Which build of torch runs on which NVIDIA GPU, and with which driver: facts with their sources, and what follows from them.

Pure functions: whoever asks says what is there, so that any machine can be described in a test.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from groundup.diagnostics.check import Check

Capability = tuple[int, int]
Version = tuple[int, int]

# Lowest and highest compute capability of the wheels for Linux (x86-64) and Windows by CUDA version, from torch 2.8 on: the
# "PyTorch CUDA Support Matrix" of https://github.com/pytorch/pytorch/blob/main/RELEASE.md, as its changes quote it:
# https://github.com/pytorch/pytorch/pull/182849 (12.6, 13.0, 13.2 of torch 2.12), /pull/175253 (12.8 of 2.10 and 2.11),
# /issues/190355 (2.14). 12.8 lost 7.0 with torch 2.11; it is left out here, because nothing newer is built with 12.8.
BUILDS: dict[str, tuple[Capability, Capability]] = {
    "12.6": ((5, 0), (9, 0)),
    "13.0": ((7, 5), (12, 0)),
    "13.2": ((7, 5), (12, 0)),
}
FIRST_OF_MATRIX: Version = (2, 8)
# torch 2.14 is the last with wheels for CUDA 12.6, and so for anything below 7.5: notice of 2026-09-04,
# https://dev-discuss.pytorch.org/t/notice-cuda-12-6-wheels-will-no-longer-be-published-from-pytorch-2-15-drops-maxwell-pascal-volta/3432
# and https://github.com/pytorch/pytorch/issues/190385.
FIRST_WITHOUT_12_6: Version = (2, 15)
LAST_KNOWN_WITH_12_6 = "2.14.1"
"""The newest 2.14 on PyPI in November 2026; that its +cu126 wheel is published was not verified."""
# https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html, table 1, on Linux.
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
# RuntimeError of torch.compile: "Triton only supports devices of CUDA Capability >= 7.0", as in
# https://github.com/karpathy/nanoGPT/issues/157.
TRITON_FROM: Capability = (7, 0)
INDEX = "https://download.pytorch.org/whl/"


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU, as its driver describes it."""

    name: str
    capability: Capability
    driver: str
    memory_bytes: int = 0


@dataclass(frozen=True)
class Build:
    """The torch that is installed."""

    version: str
    """As ``torch.__version__``, e.g. 2.13.0+cpu."""
    cuda: str | None
    """The CUDA version that it was built with; None for a build without."""
    architectures: tuple[str, ...] = ()
    """As ``torch.cuda.get_arch_list()``: sm_75, compute_120, …"""

    @property
    def release(self) -> str:
        """The version without its local part: 2.13.0."""
        return self.version.partition("+")[0]


def runs_on(capability: Capability, architectures: Sequence[str]) -> bool:
    """
    Whether a build has code for a GPU.

    Machine code (``sm_XY``) runs on GPUs of the same major version whose minor version is not lower; portable code
    (``compute_XY``) on every newer GPU (CUDA C++ Programming Guide, 3.1.2 Binary Compatibility and 3.1.3 PTX Compatibility).
    """
    for name in architectures:
        found = re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", name)
        if not found:
            continue
        kind, own = found[1], (int(found[2]), int(found[3]))
        if kind == "sm" and not name.endswith(("a", "f")) and own[0] == capability[0] and own[1] <= capability[1]:
            return True
        if name.endswith(("a", "f")) and own == capability:  # for this very GPU alone
            return True
        if kind == "compute" and own <= capability:
            return True
    return False


def wheel_check(gpu: Gpu | None, build: Build, available: bool) -> Check:
    """
    Does the installed torch run on the GPU of this machine?

    Args:
        gpu: None where there is none.
        build: the installed torch.
        available: whether torch itself says that it can use CUDA.
    """
    expected = "a torch build with code for the GPU, and a driver that is new enough for it"
    if gpu is None:
        return Check("gpu_build", "machine", True, f"no NVIDIA GPU here; torch {build.version}", "a GPU's build only for a GPU")
    found = f"{gpu.name} (compute capability {_dotted(gpu.capability)}, driver {gpu.driver}), torch {build.version}"
    details = {"gpu": gpu.name, "capability": _dotted(gpu.capability), "driver": gpu.driver, "torch": build.version,
               "cuda": build.cuda, "architectures": list(build.architectures)}  # fmt: skip
    advice = ""
    if build.cuda is None:
        found, advice = f"{found}, built without CUDA", install_advice(gpu, build)
    elif build.architectures and not runs_on(gpu.capability, build.architectures):
        found, advice = f"{found} has code for {' '.join(build.architectures)} only", install_advice(gpu, build)
    elif not _driver_fits(gpu.driver, build.cuda):
        advice = _driver_advice(gpu, build)
    elif not available:
        advice = "the build and the driver fit, yet torch finds no GPU: look whether CUDA_VISIBLE_DEVICES hides it, or restart"
    return Check("gpu_build", "machine", not advice, found, expected, advice, details=details)


def install_advice(gpu: Gpu, build: Build) -> str:
    """The exact torch to install for a GPU, as a command, and what is not certain about it."""
    cuda = next((name for name, (low, high) in BUILDS.items() if low <= gpu.capability and name != "12.6"), None)
    newest = max(high for _, high in BUILDS.values())
    if gpu.capability > newest:
        return f"no wheel is known for {_dotted(gpu.capability)}; look at https://pytorch.org/get-started/locally/"
    if cuda is not None and _driver_fits(gpu.driver, cuda):
        return _command(build.release, cuda)
    if not BUILDS["12.6"][0] <= gpu.capability:
        return f"no wheel of torch {'.'.join(map(str, FIRST_OF_MATRIX))} or newer has code for it; use --device cpu"
    if gpu.capability > BUILDS["12.6"][1]:
        return f"install an NVIDIA driver from {OLDEST_DRIVER[13]} on, then {_command(build.release, '13.0')}"
    fits = FIRST_OF_MATRIX <= _version(build.release) < FIRST_WITHOUT_12_6
    release = build.release if fits else LAST_KNOWN_WITH_12_6
    advice = _command(release, "12.6")
    if not _driver_fits(gpu.driver, "12.6"):
        advice = f"install an NVIDIA driver from {OLDEST_DRIVER[12]} on, then {advice}"
    if gpu.capability < BUILDS["13.0"][0]:
        advice += "; torch 2.14 is the last release with code for this GPU"
    if gpu.capability < TRITON_FROM:
        advice += "; it has neither --torch-compile (Triton needs 7.0) nor fast bf16: train in float32"
    return advice


def compile_reason(capability: Capability) -> str:
    """Why ``torch.compile`` cannot work on a GPU; nothing where it can."""
    if capability >= TRITON_FROM:
        return ""
    return (
        f"torch.compile needs Triton, which begins at compute capability {_dotted(TRITON_FROM)}; this is {_dotted(capability)}"
    )


def parse_smi(text: str) -> list[Gpu]:
    """
    The GPUs in what nvidia-smi says of name, compute_cap, driver_version and memory.total (MiB), as csv,noheader,nounits.

    Lines that are of another form are left out: old drivers do not know ``compute_cap``.
    """
    found = []
    for line in text.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == 4 and (capability := re.fullmatch(r"(\d+)\.(\d+)", parts[1])):
            memory = int(parts[3]) * 2**20 if parts[3].isdecimal() else 0
            found.append(Gpu(parts[0], (int(capability[1]), int(capability[2])), parts[2], memory))
    return found


def _command(release: str, cuda: str) -> str:
    return f"pip install torch=={release} --index-url {INDEX}cu{cuda.replace('.', '')}"


def _driver_fits(driver: str, cuda: str) -> bool:
    """Whether a driver runs a CUDA version; True where that is not known."""
    number = re.match(r"\d+", driver)
    oldest = OLDEST_DRIVER.get(int(cuda.partition(".")[0]))
    return number is None or oldest is None or int(number[0]) >= oldest


def _driver_advice(gpu: Gpu, build: Build) -> str:
    major = int(str(build.cuda).partition(".")[0])
    advice = f"CUDA {build.cuda} needs an NVIDIA driver from {OLDEST_DRIVER[major]} on: install a newer driver"
    low, high = BUILDS["12.6"]
    older_fits = _version(build.release) < FIRST_WITHOUT_12_6 and low <= gpu.capability <= high
    if major > 12 and older_fits and _driver_fits(gpu.driver, "12.6"):
        advice += f", or {_command(build.release, '12.6')}"
    return advice


def _version(release: str) -> Version:
    numbers = re.findall(r"\d+", release)
    return (int(numbers[0]), int(numbers[1])) if len(numbers) > 1 else (0, 0)


def _dotted(capability: Capability) -> str:
    return ".".join(map(str, capability))
