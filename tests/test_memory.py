"""What the machine, control groups and ulimit leave, on machines described by a folder; and the limits that we set."""

import resource
import subprocess
import sys

import pytest

from groundup.runtime import memory
from groundup.runtime.memory import available_bytes, control_group_limits, host_limits, process_limits, read_table, size_text

MIB, GIB = 2**20, 2**30
NO_LIMIT_V1 = 9223372036854771712  # what version 1 writes: the largest 64-bit number, rounded down to a page


def tree(root, files):
    """Write files below a folder that stands for a machine's /."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(content))
    return root


@pytest.fixture
def no_ulimit(monkeypatch):
    monkeypatch.setattr(memory.resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def test_tables_are_read(tmp_path):
    path = tmp_path / "table"
    path.write_text("MemTotal:   2048 kB\nThreads:\t3\nName:\tpython 3\ninactive_file 4096\n\nbroken\nodd: -5 kB\n")
    assert read_table(path) == {"MemTotal": 2 * MIB, "Threads": 3, "inactive_file": 4096}
    assert read_table(tmp_path / "none") == {}


def test_the_machine_says_what_is_available(tmp_path, no_ulimit):
    tree(tmp_path, {"proc/meminfo": "MemTotal: 9000000 kB\nMemFree: 100 kB\nMemAvailable: 3145728 kB\n"})
    assert host_limits(tmp_path) == [memory.Limit(3 * GIB, "free on this machine")]


def test_a_machine_without_proc_still_has_memory(tmp_path, no_ulimit):
    (limit,) = host_limits(tmp_path)
    assert MIB < limit.free_bytes < 2**50
    assert limit.reason == "half of this machine"


def test_version_2_every_group_up_to_the_root_counts(tmp_path):
    groups = tmp_path / "sys/fs/cgroup"
    tree(tmp_path, {"proc/self/cgroup": "0::/user.slice/job.scope\n"})
    tree(groups, {"user.slice/job.scope/memory.max": "max\n", "user.slice/job.scope/memory.current": 5 * MIB})
    tree(groups, {"user.slice/memory.max": 2 * GIB, "user.slice/memory.current": 3 * GIB // 2})
    # File cache counts as use, but is given back on demand; memory in tmpfs (shmem) is not.
    tree(groups, {"user.slice/memory.stat": f"anon 7\nfile 99\nshmem 50\ninactive_file {100 * MIB}\nactive_file {28 * MIB}\n"})
    assert control_group_limits(tmp_path) == [memory.Limit(640 * MIB, "left of a control group's 2.0 GiB")]


def test_version_2_throttling_is_a_limit_too(tmp_path):
    tree(tmp_path, {"proc/self/cgroup": "0::/a\n"})
    tree(tmp_path / "sys/fs/cgroup/a", {"memory.max": "max", "memory.high": GIB, "memory.current": 24 * MIB})
    assert control_group_limits(tmp_path) == [memory.Limit(1000 * MIB, "left of a control group's 1.0 GiB")]


def test_version_1(tmp_path):
    tree(tmp_path, {"proc/self/cgroup": "9:name=systemd:/x\n4:cpu,memory:/docker/77\n0::/\n"})
    group = tmp_path / "sys/fs/cgroup/memory"
    tree(group, {"memory.limit_in_bytes": NO_LIMIT_V1, "memory.usage_in_bytes": 1})
    tree(group / "docker/77", {"memory.limit_in_bytes": GIB, "memory.usage_in_bytes": GIB // 2})
    tree(group / "docker/77", {"memory.stat": f"inactive_file 1\ntotal_inactive_file {MIB}\ntotal_active_file {MIB}\n"})
    assert control_group_limits(tmp_path) == [memory.Limit(514 * MIB, "left of a control group's 1.0 GiB")]


@pytest.mark.parametrize("path", ["/docker/of-the-host", "/../..", "/"])
def test_in_a_container_the_mount_is_the_group(tmp_path, path):
    tree(tmp_path, {"proc/self/cgroup": f"0::{path}\n"})
    tree(tmp_path / "sys/fs/cgroup", {"memory.max": GIB, "memory.current": 0})
    assert control_group_limits(tmp_path) == [memory.Limit(GIB, "left of a control group's 1.0 GiB")]


@pytest.mark.parametrize("content", ["", "garbage\n", "0::\n", "4:memory:/x\n"])
def test_no_groups_are_no_limit(tmp_path, content):
    assert control_group_limits(tmp_path) == []
    tree(tmp_path, {"proc/self/cgroup": content, "sys/fs/cgroup/memory.max": "unreadable"})
    assert control_group_limits(tmp_path) == []


def test_ulimit_leaves_what_is_not_mapped_yet(tmp_path, monkeypatch):
    soft = {resource.RLIMIT_AS: 2 * GIB, resource.RLIMIT_DATA: resource.RLIM_INFINITY}
    monkeypatch.setattr(memory.resource, "getrlimit", lambda kind: (soft[kind], resource.RLIM_INFINITY))
    tree(tmp_path, {"proc/self/status": "VmSize: 524288 kB\nVmData: 1024 kB\n"})
    assert process_limits(tmp_path) == {"RLIMIT_AS": memory.Limit(3 * GIB // 2, "left of ulimit -v 2097152")}
    soft[resource.RLIMIT_DATA] = MIB
    assert process_limits(tmp_path)["RLIMIT_DATA"] == memory.Limit(0, "left of ulimit -d 1024")
    assert process_limits(tmp_path / "macOS") == {}


def in_a_process(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's figures are Linux's")


@linux
def test_the_least_limit_is_said():
    free, *reason = in_a_process(
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**28, 2**28))\n"
        "from groundup.runtime.memory import available_bytes; print(*available_bytes('cpu'))"
    )
    assert 100 * MIB < int(free) < 256 * MIB
    assert " ".join(reason) == "left of ulimit -v 262144"


def test_this_machine_has_some():
    free, reason = available_bytes()
    assert free > 0
    assert reason


@linux
def test_a_confined_process_is_refused_what_is_beyond():
    assert in_a_process(
        "from groundup.runtime.memory import confine\n"
        "confine({'RLIMIT_AS': 2**26})\n"
        "bytes(2**25); print('granted')\n"
        "try: bytes(2**27)\n"
        "except MemoryError: print('refused')\n"
        # A second, wider room does not lift the first.
        "confine({'RLIMIT_AS': 2**40})\n"
        "try: bytes(2**27)\n"
        "except MemoryError: print('refused')\n"
    ) == ["granted", "refused", "refused"]


@linux
def test_the_peak_begins_anew():
    first, second = map(int, in_a_process(
        "from groundup.runtime.memory import peak_resident_bytes, restart_peak\n"
        "restart_peak(); base = peak_resident_bytes()\n"
        "held = b'x' * 2**27; del held\n"
        "print(peak_resident_bytes() - base); restart_peak(); print(peak_resident_bytes() - base)"
    ))  # fmt: skip
    assert first == pytest.approx(2**27, rel=0.05)
    # Some kernels cannot: then the peak stays.
    assert second < 2**24 or second == first


@linux
def test_the_first_victim():
    assert in_a_process(
        "from groundup.runtime.memory import be_the_first_victim\nbe_the_first_victim()\n"
        "print(open('/proc/self/oom_score_adj').read())"
    ) == ["1000"]


def test_sizes_are_said_in_words():
    assert [size_text(size) for size in (0, 310 * MIB, 1.6 * GIB, -1)] == ["0 MiB", "310 MiB", "1.6 GiB", "0 MiB"]
