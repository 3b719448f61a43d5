"""The device, the precision that suits it, and its peak speed. Imported late, because it imports torch."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch

from groundup.errors import ConfigError, ResourceError

# Dense bf16 peaks in TFLOP/s from the makers' data sheets (without sparsity), which are float16's too, by a part of the
# device's name.
# Order matters: the first match wins.
DATA_SHEET_BF16_TFLOPS = {
    "B200": 2250.0, "GH200": 989.0, "H200": 989.0, "H100 PCIe": 756.0, "H100": 989.0, "H800": 989.0,
    "A100": 312.0, "A800": 312.0, "L40S": 362.0, "L40": 181.0, "L4": 121.0, "A40": 149.7, "A10G": 70.0, "A10": 125.0,
    "RTX 5090": 209.5, "RTX 4090": 165.2, "RTX 4080": 97.5, "RTX 3090": 71.2, "RTX 3080": 59.5,
}  # fmt: skip


@dataclass(frozen=True)
class Machine:
    """Where and how a run computes."""

    device: torch.device
    dtype: torch.dtype
    """What matrix products are computed in: bfloat16 or float16 under autocast, or float32."""
    name: str
    reason: str
    """Why this device and precision, for people."""
    tf32: bool = False
    """Whether float32 products may round their factors to TF32, see ``float32_products``."""

    def autocast(self) -> AbstractContextManager[object]:
        """The precision, as a context for forward passes."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    @contextmanager
    def float32_products(self) -> Iterator[None]:
        """
        Compute float32 products as this machine was asked to, for the whole process; afterwards as before.

        TF32 keeps 10 of the 23 bits of a factor's fraction, and adds in float32. The call is torch's older one on purpose:
        torch.compile fails after the newer, ``torch.backends.cuda.matmul.fp32_precision``
        (https://github.com/pytorch/pytorch/issues/166387), which torch 2.6 lacks.
        """
        if not self.tf32:
            yield
            return
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


def choose_machine(device: str, bf16: bool | None, fp16: bool = False, tf32: bool = False) -> Machine:
    """
    Pick a device (``auto``: cuda, then mps, then cpu) and a precision.

    Args:
        bf16: None takes bf16 where the hardware multiplies it, unless ``fp16`` or ``tf32`` asks for something else.
        fp16: float16 under autocast; training with it needs a loss scale.
        tf32: TF32 in float32 products, while ``Machine.float32_products`` is open.

    Raises:
        ConfigError: the device that was asked for is not there, or lacks TF32; or bf16 and fp16 are both asked for.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device != "auto" and not available[device]:
        there = ", ".join(name for name, is_there in available.items() if is_there)
        raise ConfigError(
            f"device: {device!r} is not available to torch {torch.__version__}; available: {there}. "
            "Leave --device out to take the best one"
        )
    kind = next(name for name, is_there in available.items() if is_there) if device == "auto" else device
    if bf16 and fp16:
        raise ConfigError("fp16: and bf16 are two precisions; give one of them")
    if tf32:
        _require_tf32(kind)
    has_bf16 = _multiplies_bf16(kind)
    use_bf16 = has_bf16 and not fp16 and not tf32 if bf16 is None else bf16
    dtype = torch.bfloat16 if use_bf16 else torch.float16 if fp16 else torch.float32
    precision = {torch.bfloat16: "bf16 autocast", torch.float16: "fp16 autocast", torch.float32: "float32"}[dtype]
    precision += ", TF32 products" if tf32 else ""
    if fp16:
        why = "as asked; most processors emulate fp16, slowly" if kind == "cpu" else "as asked"
    else:
        why = "as asked" if bf16 is not None or tf32 else "the hardware has bf16" if has_bf16 else "no fast bf16 here"
    name = torch.cuda.get_device_name() if kind == "cuda" else _threads() if kind == "cpu" else kind
    reason = f"{kind} ({name}), {precision} ({why})"
    return Machine(torch.device(kind), dtype, name, reason, tf32)


def _threads() -> str:
    count = torch.get_num_threads()
    return f"{count} thread{'' if count == 1 else 's'}"


def _require_tf32(kind: str) -> None:
    """
    Refuse TF32 where it would do nothing.

    Raises:
        ConfigError: the device has none.
    """
    if kind != "cuda":
        raise ConfigError(f"tf32: True, but TF32 is in CUDA devices only and this run computes on {kind}; leave --tf32 out")
    if (capability := torch.cuda.get_device_capability()) < (8, 0):
        raise ConfigError(
            f"tf32: True, but {torch.cuda.get_device_name()} has no TF32 (compute capability {capability[0]}.{capability[1]}; "
            "it came with 8.0); leave --tf32 out, or take --fp16"
        )


def _multiplies_bf16(kind: str) -> bool:
    if kind == "cuda":
        # Below 8.0 (Ampere) bf16 is emulated and slower than float32.
        return torch.cuda.get_device_capability() >= (8, 0)
    if kind == "cpu":
        return bool(torch.cpu._is_amx_tile_supported())
    return False


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was asked of it, so that a clock measures it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_flops(machine: Machine, given_tflops: float = 0.0) -> tuple[float, str]:
    """
    Peak FLOP/s of matrix products on this machine, and where the figure is from.

    A figure that the user gives wins, then the data sheet's for 16 bits on known GPUs, then a measurement of under a
    second: the best of 20 products of 2048 × 2048 (a processor takes several to reach its speed), of smaller ones where a
    type is emulated, a thousand times slower.
    """
    if given_tflops:
        return given_tflops * 1e12, "given"
    if machine.device.type == "cuda" and machine.dtype in (torch.bfloat16, torch.float16):
        for part, tflops in DATA_SHEET_BF16_TFLOPS.items():
            if part in machine.name:
                return tflops * 1e12, "data sheet"
    speed = _measured_flops(machine, 256, products=3)
    if 2 * 2048**3 / speed < 1.0:  # seconds for one product
        speed = _measured_flops(machine, 2048, products=20)
    return speed, "measured"


def _measured_flops(machine: Machine, size: int, products: int) -> float:
    """FLOP/s of the fastest of some products of square matrices."""
    left = torch.ones(size, size, device=machine.device, dtype=machine.dtype)
    seconds = []
    for _ in range(products):
        synchronize(machine.device)
        started = time.perf_counter()
        torch.mm(left, left)
        synchronize(machine.device)
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)


@contextmanager
def explained_memory_errors() -> Iterator[None]:
    """
    Turn a refused allocation into our error.

    Raises:
        ResourceError: out of memory.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # torch says so by a class of its own on CUDA, and only by words on the CPU.
        is_refusal = isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
        if not is_refusal:
            raise
        raise ResourceError(
            "out of memory: lower --per-device-train-batch-size (the global batch stays the same, accumulation makes up "
            "for it), --per-device-eval-batch-size or --n-positions, or take a smaller --model"
        ) from error
