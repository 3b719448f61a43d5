"""
How much memory is there for this process: what the machine, its control group, the shell and the device leave of it.

Every figure is taken where the kernel writes it, below a root that can be given, so that any machine can be described by
a folder. Where a file is absent (macOS has none of them), that limit is not there.
"""

import contextlib
import os
import resource
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

# The soft limits that the shell's ulimit sets, the line of /proc/self/status that each counts, and its flag.
PROCESS_LIMITS = {"RLIMIT_AS": ("VmSize", "ulimit -v"), "RLIMIT_DATA": ("VmData", "ulimit -d")}
UNLIMITED_BYTES = 2**62
"""Control groups of version 1 write 2^63 less a page where there is no limit."""


@dataclass(frozen=True)
class Limit:
    """What one limit leaves."""

    free_bytes: int
    reason: str
    """For people, and the same as long as the limit is: without the figures that change by the second."""


def available_bytes(device: str = "cpu") -> tuple[int, str]:
    """
    Memory that this process can still take on a device, and which limit says so: the least of those that hold.

    Args:
        device: ``cpu``, ``cuda`` or ``mps``, as torch names them. For ``cuda`` it is what the driver reports free.
    """
    if device.partition(":")[0] == "cuda":
        import torch

        return int(torch.cuda.mem_get_info()[0]), f"free on {torch.cuda.get_device_name()}"
    limits = host_limits()
    if device == "mps":
        import torch

        free = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
        limits.append(Limit(int(free), "left of what the GPU may take"))
    least = min(limits, key=lambda limit: limit.free_bytes)
    return max(0, least.free_bytes), least.reason


def host_limits(root: Path = Path("/")) -> list[Limit]:
    """Every limit on this process's memory, at least one: the machine's own."""
    return [_machine_limit(root), *control_group_limits(root), *process_limits(root).values()]


def read_table(path: Path) -> dict[str, int]:
    """
    The figures of /proc/meminfo, /proc/self/status or a memory.stat, in bytes; empty where there is no such file.

    Lines are ``Name:  123 kB`` or ``name 123``; others are left out.
    """
    found = {}
    with contextlib.suppress(OSError):
        for line in path.read_text(errors="replace").splitlines():
            name, *words = line.replace(":", " ", 1).split() or [""]
            if words and words[0].isdecimal():
                found[name] = int(words[0]) * (1024 if words[1:] == ["kB"] else 1)
    return found


def process_limits(root: Path = Path("/")) -> dict[str, Limit]:
    """What ulimit leaves this process, by the limit's name; empty without limits, and where the system does not count."""
    status, found = read_table(root / "proc/self/status"), {}
    for name, (counted, flag) in PROCESS_LIMITS.items():
        soft, _ = resource.getrlimit(getattr(resource, name))
        if soft != resource.RLIM_INFINITY and counted in status:
            found[name] = Limit(soft - status[counted], f"left of {flag} {soft // 1024}")
    return found


def control_group_limits(root: Path = Path("/")) -> list[Limit]:
    """
    What the control groups above this process leave it: versions 1 and 2 (docs.kernel.org, admin-guide/cgroup-v2).

    The file cache of a group counts as its use and is given back on demand, so it is free. Inside a container the path of
    the group may be the host's, which does not exist there: then the nearest one above it that does is the container's.
    """
    limits = []
    for mount, group in _memory_groups(root):
        for folder in (group, *group.parents):
            if not folder.is_relative_to(mount):
                break
            limits += _group_limit(folder)
    return limits


def _memory_groups(root: Path) -> Iterator[tuple[Path, Path]]:
    """(where a hierarchy that counts memory is mounted, the folder of this process's group in it)."""
    try:
        lines = (root / "proc/self/cgroup").read_text(errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = (*line.split(":", 2), "", "")[:3]
        if number == "0" and not controllers:
            mounts = [root / "sys/fs/cgroup", root / "sys/fs/cgroup/unified"]
        elif "memory" in controllers.split(","):
            mounts = [root / "sys/fs/cgroup/memory"]
        else:
            continue
        for mount in mounts:
            if mount.is_dir():
                # Seen from inside a namespace, a group above it begins with "/..".
                yield mount, mount.joinpath(*(part for part in path.split("/") if part not in ("", "..")))


def _group_limit(folder: Path) -> list[Limit]:
    statistics = read_table(folder / "memory.stat")
    # Version 2 throttles above memory.high, which is a standstill for a program that cannot give memory back.
    for limits, usage, prefix in (
        (("memory.max", "memory.high"), "memory.current", ""),
        (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_"),
    ):
        bounds = [bound for name in limits if (bound := _number(folder / name)) is not None and bound < UNLIMITED_BYTES]
        used = _number(folder / usage)
        if bounds and used is not None:
            cache = statistics.get(f"{prefix}inactive_file", 0) + statistics.get(f"{prefix}active_file", 0)
            free = min(bounds) - max(0, used - cache)
            return [Limit(free, f"left of a control group's {size_text(min(bounds))}")]
    return []


def _number(path: Path) -> int | None:
    """The number that a file holds; None for another word ("max") or no file."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _machine_limit(root: Path) -> Limit:
    table = read_table(root / "proc/meminfo")
    if "MemAvailable" in table:
        return Limit(table["MemAvailable"], "free on this machine")
    # Without the kernel's estimate: half of the memory, which is what a desktop usually leaves.
    return Limit(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2, "half of this machine")


def confine(room: Mapping[str, int], root: Path = Path("/")) -> None:
    """
    Let this process grow by so much from now on and no more, so that an allocation beyond is refused instead of granted.

    Args:
        room: bytes by the limit's name, as in ``PROCESS_LIMITS``. A limit that is lower already stays.
    """
    status = read_table(root / "proc/self/status")
    for name, growth in room.items():
        counted, _ = PROCESS_LIMITS[name]
        kind = getattr(resource, name)
        soft, hard = resource.getrlimit(kind)
        wanted = status.get(counted, 0) + growth
        bounds = [bound for bound in (wanted, soft, hard) if bound != resource.RLIM_INFINITY]
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(kind, (min(bounds), hard))


def be_the_first_victim() -> None:
    """Where memory runs out, the kernel kills this process before any other (proc(5), oom_score_adj). Best effort."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def return_freed_memory() -> None:
    """Give freed memory back to the kernel, which the C library would keep for later (glibc: malloc_trim). Best effort."""
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def restart_peak() -> None:
    """Let ``peak_resident_bytes`` count from now on, where the kernel can (Linux: proc(5), clear_refs). Best effort."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_resident_bytes() -> int:
    """The most memory that this process has held since ``restart_peak``, or where that cannot be, since it started."""
    status = read_table(Path("/proc/self/status"))
    if "VmHWM" in status:
        return status["VmHWM"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def size_text(size: float) -> str:
    """Bytes for people: 1.6 GiB, 310 MiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{max(0.0, size) / 2**20:.0f} MiB"
