"""Files and signals: two writers of one file, what a killed one left, and an end that tidies up."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from groundup.runtime.files import ABANDONED_SECONDS, replace_durably
from groundup.runtime.signals import TERMINATED, orderly_end
from tests.runs import end, wait_until


@pytest.fixture
def quick_disk(monkeypatch):
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


def test_two_writers_of_one_file_do_not_disturb_each_other(tmp_path, quick_disk):
    path, failed = tmp_path / "report.html", []
    contents = [letter * 300_000 for letter in (b"a", b"b")]

    def write(content: bytes) -> None:
        try:
            for _ in range(60):
                replace_durably(path, content)
        except OSError as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if path.exists():
            assert path.read_bytes() in contents
    assert failed == []
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_a_link_that_lies_in_wait_is_not_written_through(tmp_path, quick_disk):
    other, path = tmp_path / "other", tmp_path / "report.html"
    other.write_text("precious")
    (tmp_path / ".report.html.tmp").symlink_to(other)
    replace_durably(path, b"new")
    assert other.read_text() == "precious"
    assert path.read_bytes() == b"new"


def test_what_a_killed_writer_left_goes_and_what_is_being_written_stays(tmp_path, quick_disk):
    path = tmp_path / "a[1].json"
    old, young, others = (tmp_path / name for name in (".a[1].json.0123.tmp", ".a[1].json.4567.tmp", ".a1.json.0123.tmp"))
    for file in (old, young, others):
        file.touch()
    before = time.time() - 2 * ABANDONED_SECONDS
    for file in (old, others):
        os.utime(file, (before, before))
    replace_durably(path, b"{}")
    assert sorted(tmp_path.iterdir()) == sorted([path, young, others])


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        replace_durably(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_sigterm_ends_in_order_and_what_was_there_before_comes_back():
    before, tidied = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # a second one does not cut it short
            tidied.append(True)

    with pytest.raises(SystemExit) as caught, orderly_end():
        work()
    assert (caught.value.code, tidied) == (TERMINATED, [True])
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["lab", "learning-rate", "--output-dir", "out"], ["doctor", "text.txt"]], ids=" ".join)
def test_sigterm_leaves_no_temporary_folder(tmp_path: Path, arguments: list[str]) -> None:
    import subprocess
    import sys

    (tmp_path / "text.txt").write_text("a little text, and more of it.\n" * 4000)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "groundup", *arguments], cwd=tmp_path, env={**os.environ, "TMPDIR": str(scratch)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert wait_until(process, lambda: any(scratch.glob("groundup-*")))
    time.sleep(1)
    done = end(process, signal.SIGTERM)
    assert done.code == TERMINATED, done.err
    assert not list(scratch.glob("groundup-*"))
    assert "Traceback" not in done.err
