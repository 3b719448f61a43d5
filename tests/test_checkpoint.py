"""The commit protocol: a checkpoint is whole, verified and durable, or it does not exist; damage is found and named."""

import errno
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import groundup
from groundup.checkpoint import commit as commit_module
from groundup.checkpoint.commit import checkpoints, commit, newest_good, prune, remove_leftovers, verify
from groundup.errors import CheckpointError, ResourceError
from groundup.recipes.selection import kept
from tests.conftest import TINY, Finished, flags, make_text
from tests.runs import Killed

pytestmark = pytest.mark.usefixtures("without_pictures")

QUIET = TINY | {"eval_steps": 0, "sample_tokens": 0}
FILES = {
    "config.json", "generation_config.json", "manifest.json", "model.safetensors", "optimizer.safetensors",
    "tokenizer.json", "tokenizer_config.json", "trainer_state.json",
}  # fmt: skip


def write_two(directory: Path) -> None:
    (directory / "a.bin").write_bytes(b"first")
    (directory / "b.bin").write_bytes(bytes(range(256)) * 10)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps with checkpoints 4, 8 and 12; tests work on copies."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text(make_text(300), encoding="utf-8")
    groundup.train(folder / "text.txt", folder / "run", **QUIET | {"save_total_limit": 0})
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained / "run", tmp_path / "run"))


def train_again(trained: Path, run: Path, **options: Any) -> dict[str, Any]:
    return groundup.train(trained / "text.txt", run, **QUIET | {"save_total_limit": 0} | options)


def nothing_said(line: str) -> None:
    raise AssertionError(f"said {line!r}")


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def names(run: Path) -> list[str]:
    return [path.name for path in checkpoints(run)]


def test_a_committed_checkpoint_verifies_and_nothing_else_is_left(tmp_path):
    made = commit(tmp_path, 7, write_two)
    verify(made)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-7"]
    assert {path.name for path in made.iterdir()} == {"a.bin", "b.bin", "manifest.json"}
    manifest = json.loads((made / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["step"] == 7
    assert manifest["files"]["b.bin"]["bytes"] == 2560


def test_a_run_writes_the_files_it_promises(run):
    for path in checkpoints(run):
        verify(path)
        assert {file.name for file in path.iterdir()} == FILES


@pytest.mark.parametrize("moment", ["while writing", "while hashing", "at the rename"])
def test_a_failing_commit_leaves_the_older_one_and_no_trace(tmp_path, monkeypatch, moment):
    commit(tmp_path, 1, write_two)

    def fail(*arguments: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    writer = fail if moment == "while writing" else write_two
    if moment != "while writing":
        monkeypatch.setattr(commit_module, "sha256_of_file" if moment == "while hashing" else "rename_durably", fail)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        commit(tmp_path, 2, writer)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    verify(tmp_path / "checkpoint-1")


def test_a_failing_fsync_is_never_committed(tmp_path, monkeypatch):
    """After one failure the kernel may have dropped the pages: the save has failed, whatever a second try says."""
    real, calls = os.fsync, []

    def fails_once(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(handle)

    monkeypatch.setattr(os, "fsync", fails_once)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        commit(tmp_path, 2, write_two)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_while_writing_leaves_no_trace(tmp_path):
    def interrupted(directory: Path) -> None:
        write_two(directory)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        commit(tmp_path, 2, interrupted)
    assert list(tmp_path.iterdir()) == []


def test_the_same_step_again_replaces_it(tmp_path):
    commit(tmp_path, 3, write_two)
    commit(tmp_path, 3, lambda directory: (directory / "c.bin").write_bytes(b"new") and None)
    verify(tmp_path / "checkpoint-3")
    assert {path.name for path in (tmp_path / "checkpoint-3").iterdir()} == {"c.bin", "manifest.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_killed_while_the_same_step_is_replaced_one_of_the_two_is_left(tmp_path, monkeypatch):
    """The only checkpoint of a run must not be gone between the old one's going and the new one's coming."""
    commit(tmp_path, 3, write_two)

    def killed(source: Path, target: Path) -> None:
        monkeypatch.setattr(shutil, "rmtree", lambda *arguments, **options: None)  # the dead do not clean up
        raise Killed

    monkeypatch.setattr(commit_module, "rename_durably", killed)
    with pytest.raises(Killed):
        commit(tmp_path, 3, write_two)
    monkeypatch.undo()
    remove_leftovers(tmp_path)
    assert newest_good(tmp_path, lambda line: None) is not None


def test_checkpoints_sort_by_step_and_only_final_names_count(tmp_path):
    for step in (100, 20, 3):
        commit(tmp_path, step, write_two)
    for other in (".checkpoint-999.partial", "checkpoint-5.corrupt-1", "checkpoint-x", "checkpoint-", "my-checkpoint-4"):
        (tmp_path / other).mkdir()
    (tmp_path / "checkpoint-1000").write_text("a file", encoding="utf-8")
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-20", "checkpoint-100"]
    assert checkpoints(tmp_path / "nowhere") == []


@pytest.mark.parametrize(("keep", "left"), [(0, [1, 2, 10, 11]), (1, [11]), (2, [10, 11]), (9, [1, 2, 10, 11])])
def test_prune_keeps_the_newest(tmp_path, keep, left):
    for step in (1, 2, 10, 11):
        commit(tmp_path, step, write_two)
    prune(tmp_path, kept(tmp_path, keep, None))
    assert names(tmp_path) == [f"checkpoint-{step}" for step in left]
    assert len(list(tmp_path.iterdir())) == len(left), "nothing of the deleted is left"


def test_save_total_limit_holds_at_every_save(trained, tmp_path):
    with groundup.open_training(trained / "text.txt", tmp_path / "run", **QUIET | {"save_total_limit": 2}) as training:
        for step in training:
            training.save()
            training.prune()
            assert names(tmp_path / "run") == [f"checkpoint-{s}" for s in range(max(1, step.step - 1), step.step + 1)]


def test_leftovers_of_killed_runs_go_and_nothing_else(tmp_path):
    commit(tmp_path, 4, write_two)
    for name in (".checkpoint-8.partial", ".trash-checkpoint-2", "notes", "checkpoint-2.corrupt-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(b"x")
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2.corrupt-1", "checkpoint-4", "notes"]


def test_a_run_starts_by_removing_leftovers(trained, run):
    (run / ".checkpoint-16.partial").mkdir()
    (run / ".trash-checkpoint-4").mkdir()
    train_again(trained, run)
    assert not list(run.glob(".checkpoint-*"))
    assert not list(run.glob(".trash-*"))


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_flipped_bit_is_caught_and_the_file_named(run, name):
    """The first and the last bits of each file, and bits all over it."""
    file = run / "checkpoint-12" / name
    original, draw = file.read_bytes(), random.Random(1)
    bits = {0, 7, 8 * len(original) - 1, *(draw.randrange(8 * len(original)) for _ in range(40))}
    for bit in sorted(bits):
        flip(file, bit)
        with pytest.raises(CheckpointError, match=re.escape(str(file))):
            verify(run / "checkpoint-12")
        file.write_bytes(original)
    verify(run / "checkpoint-12")


def test_every_byte_of_the_manifest_counts(tmp_path):
    manifest = commit(tmp_path, 7, write_two) / "manifest.json"
    original = manifest.read_bytes()
    missed = []
    for place in range(len(original)):
        bit = 8 * place + place % 8
        flip(manifest, bit)
        try:
            verify(manifest.parent)
            missed.append(bit)
        except CheckpointError:
            pass
        manifest.write_bytes(original)
    assert missed == []


def damage(kind: str, file: Path) -> None:
    if kind == "truncated":
        file.write_bytes(file.read_bytes()[:-1])
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "missing":
        file.unlink()
    elif kind == "longer":
        file.write_bytes(file.read_bytes() + b"\0")
    elif kind == "a link":
        elsewhere = file.parents[2] / "elsewhere"
        file.rename(elsewhere)
        file.symlink_to(elsewhere)
    else:
        flip(file, 8 * (file.stat().st_size // 2))


@pytest.mark.parametrize("kind", ["truncated", "empty", "missing", "longer", "a link"])
@pytest.mark.parametrize("name", ["manifest.json", "model.safetensors", "trainer_state.json"])
def test_other_damage_is_caught_and_named(run, kind, name):
    if (kind, name) == ("a link", "manifest.json"):
        pytest.skip("the manifest is read through its own hash, link or not")
    damage(kind, run / "checkpoint-12" / name)
    with pytest.raises(CheckpointError, match=re.escape(name)):
        verify(run / "checkpoint-12")


def test_a_file_that_somebody_adds_does_no_harm(trained, run):
    (run / "checkpoint-12" / "README.md").write_text("a model card", encoding="utf-8")
    verify(run / "checkpoint-12")
    assert train_again(trained, run, max_steps=13)["steps"] == 13


def rewritten_manifest(checkpoint: Path, change: Any) -> None:
    """A manifest that says something else and is consistent in itself: not damage, but not ours."""
    body = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
    files = change(body["files"])
    (checkpoint / "manifest.json").write_bytes(commit_module._manifest_bytes(body["step"], files))


@pytest.mark.parametrize("name", ["../outside.bin", "/etc/hostname", "sub/file.bin"])
def test_a_manifest_cannot_point_outside(tmp_path, name):
    made = commit(tmp_path, 1, write_two)
    (tmp_path / "outside.bin").write_bytes(b"first")
    rewritten_manifest(made, lambda files: files | {name: files["a.bin"]})
    with pytest.raises(CheckpointError):
        verify(made)


@pytest.mark.parametrize("content", [b"", b"null", b"[]", b"7", b'"text"', b"{}", b'{"files": []}', b"[" * 100_000])
def test_a_manifest_that_is_something_else_is_damage(tmp_path, content):
    made = commit(tmp_path, 1, write_two)
    (made / "manifest.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        verify(made)


@pytest.mark.parametrize("kind", ["a flipped bit", "truncated", "missing"])
@pytest.mark.parametrize("name", sorted(FILES))
def test_the_older_one_is_used_loudly_when_the_newest_is_damaged(run, kind, name):
    damage(kind, run / "checkpoint-12" / name)
    said: list[str] = []
    assert newest_good(run, said.append) == run / "checkpoint-8"
    assert len(said) == 1
    assert said[0].startswith("WARNING")
    assert name in said[0]
    assert names(run) == ["checkpoint-4", "checkpoint-8"]
    assert (run / "checkpoint-12.corrupt-1").is_dir(), "set aside, not deleted"
    assert newest_good(run, nothing_said) == run / "checkpoint-8"


def test_training_goes_on_from_the_older_one_to_the_same_end(trained, run, capsys):
    damage("a flipped bit", run / "checkpoint-12" / "model.safetensors")
    train_again(trained, run)
    said = capsys.readouterr().err
    assert "WARNING" in said
    assert "resuming from checkpoint-8" in said
    for name in ("model.safetensors", "optimizer.safetensors"):
        straight = trained / "run" / "checkpoint-12" / name
        assert (run / "checkpoint-12" / name).read_bytes() == straight.read_bytes()


def test_two_damaged_ones_do_not_get_the_same_name(trained, run):
    for _ in range(2):
        damage("a flipped bit", run / "checkpoint-12" / "model.safetensors")
        train_again(trained, run)
    assert {path.name for path in run.glob("*.corrupt-*")} == {"checkpoint-12.corrupt-1", "checkpoint-12.corrupt-2"}


def test_without_a_good_one_it_never_starts_over(trained, run):
    for path in checkpoints(run):
        damage("a flipped bit", path / "optimizer.safetensors")
    for _ in range(2):  # and not the second time either, when all are set aside
        with pytest.raises(CheckpointError) as refusal:
            train_again(trained, run)
        for step in (4, 8, 12):
            assert f"checkpoint-{step}.corrupt-1" in str(refusal.value)
    assert names(run) == []


def test_a_checkpoint_under_another_steps_name_is_not_taken_for_it(trained, run, capsys):
    """A copy of step 4 that is called 100 would be the newest for ever: the step in the manifest decides."""
    shutil.copytree(run / "checkpoint-4", run / "checkpoint-100")
    assert train_again(trained, run)["steps"] == 12
    assert "resuming from checkpoint-12" in capsys.readouterr().err


def test_a_newer_format_is_said_not_set_aside_as_damage(run, monkeypatch):
    """Written by a later groundup: nothing is wrong with it, and this one must leave it alone."""
    monkeypatch.setattr(commit_module, "VERSION", 2)
    for path in checkpoints(run):
        rewritten_manifest(path, lambda files: files)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="version 2"):
        newest_good(run, lambda line: None)
    assert names(run) == ["checkpoint-4", "checkpoint-8", "checkpoint-12"]


def test_reading_moves_nothing(run):
    """Only a run that holds the directory sets damage aside; loading passes over it."""
    damage("a flipped bit", run / "checkpoint-12" / "model.safetensors")
    assert groundup.load(run).checkpoint == run / "checkpoint-8"
    assert names(run) == ["checkpoint-4", "checkpoint-8", "checkpoint-12"]
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        groundup.load(run / "checkpoint-12")


def test_loading_without_a_good_one_names_the_damage(run):
    for path in checkpoints(run):
        damage("truncated", path / "config.json")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        groundup.load(run)


def test_an_optimizer_of_another_model_is_refused(trained, tmp_path, run):
    """Consistent in itself, but with tensors of another shape."""
    groundup.train(trained / "text.txt", tmp_path / "other", **QUIET | {"n_embd": 32})
    checkpoint = run / "checkpoint-12"
    for path in checkpoints(run)[:-1]:
        shutil.rmtree(path)
    for file in checkpoint.iterdir():
        if file.name != "optimizer.safetensors":
            shutil.copy(file, tmp_path / file.name)
    shutil.copy(tmp_path / "other" / "checkpoint-12" / "optimizer.safetensors", tmp_path)

    def mixed(directory: Path) -> None:
        for name in FILES - {"manifest.json"}:
            shutil.copy(tmp_path / name, directory)

    commit(run, 12, mixed)
    with pytest.raises(CheckpointError, match="fits no parameter"):
        train_again(trained, run, max_steps=13)


def test_an_optimizer_that_lacks_tensors_is_refused(trained, run):
    """Starting some moments anew, silently, would be another run."""
    checkpoint, whole = run / "checkpoint-12", run.parent / "whole"
    shutil.copytree(checkpoint, whole)
    (whole / "manifest.json").unlink()
    tensors = load_file(whole / "optimizer.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("h.1.mlp.c_fc.weight/")}
    assert len(kept) == len(tensors) - 3
    save_file(kept, whole / "optimizer.safetensors")
    commit(run, 12, lambda directory: shutil.copytree(whole, directory, dirs_exist_ok=True) and None)
    verify(checkpoint)
    with pytest.raises(CheckpointError, match=r"h\.1\.mlp\.c_fc\.weight"):
        train_again(trained, run, max_steps=13)


def test_files_are_as_readable_as_the_umask_says(run):
    """Weights that only their owner may read cannot be shared on a machine."""
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in (run / "checkpoint-12").iterdir()}
    assert set(modes.values()) == {modes["config.json"]}, modes


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_leaves_the_older_ones(tmp_path, number):
    commit(tmp_path, 1, write_two)

    def full(directory: Path) -> None:
        write_two(directory)
        raise OSError(number, os.strerror(number))

    with pytest.raises(ResourceError, match="no space left"):
        commit(tmp_path, 2, full)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    verify(tmp_path / "checkpoint-1")


def train_in(limits: str, trained: Path, run: Path) -> Finished:
    """Train on in a shell that has set limits, 12 steps to 16."""
    arguments = ["train", trained / "text.txt", "--output-dir", run, *flags(QUIET | {"max_steps": 16, "save_total_limit": 0})]
    line = f'{limits} exec "$@"'
    done = subprocess.run(
        ["sh", "-c", line, "sh", sys.executable, "-m", "groundup", *map(str, arguments), "--json"],
        capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    return Finished(done.returncode, done.stdout.decode(), done.stderr.decode())


@pytest.mark.slow
def test_a_file_that_may_not_grow_exits_6_and_the_older_ones_are_good(trained, run):
    """The limit stops the weights' file in its middle, inside the library that writes it."""
    kibibytes = (run / "checkpoint-12" / "model.safetensors").stat().st_size // 1024 - 4
    before = names(run)
    # Without SIGXFSZ a file at its limit is an ordinary EFBIG; the unit of `ulimit -f` is half a kibibyte.
    done = train_in(f"trap '' XFSZ; ulimit -f {2 * kibibytes};", trained, run)
    assert done.code == 6, done.err
    assert len(done.error_lines) == 1
    assert names(run) == before
    assert not list(run.glob(".checkpoint-*"))
    for path in checkpoints(run):
        verify(path)


@pytest.mark.slow
def test_a_full_disk_exits_6_and_the_run_goes_on_with_space(trained, tmp_path):
    """A real one: room enough to start, which is checked, but too little for the files of one more checkpoint."""
    if os.geteuid() != 0 or not shutil.which("unshare"):
        pytest.skip("needs root and unshare, to mount a file system of its own")
    mount, saved = tmp_path / "disk", tmp_path / "saved"
    mount.mkdir()
    pages = sum(-(-path.stat().st_size // 4096) for path in (trained / "run").rglob("*"))
    size = 4 * pages + 136
    arguments = ["train", trained / "text.txt", "--output-dir", mount / "run",
                 *flags(QUIET | {"max_steps": 16, "save_total_limit": 0}), "--json"]  # fmt: skip
    script = f"""
        mount -t tmpfs -o size={size}k tmpfs '{mount}' || exit 90
        cp -a '{trained / "run"}' '{mount / "run"}' || exit 91
        "$@"
        code=$?
        cp -a '{mount / "run"}' '{saved}' || exit 92
        exit $code
    """
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", sys.executable, "-m", "groundup", *map(str, arguments)],
        capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    err = done.stderr.decode()
    if done.returncode == 90:
        pytest.skip(f"cannot mount here: {err}")
    assert done.returncode == 6, err
    assert [line for line in err.splitlines() if line.startswith("groundup:")][1:] == [], "one line"
    assert "step     16/16" in err, "it must fail at the save, not at the check before"
    assert names(saved) == ["checkpoint-4", "checkpoint-8", "checkpoint-12"]
    assert not list(saved.glob(".checkpoint-*"))
    for path in checkpoints(saved):
        verify(path)
    assert train_again(trained, saved, max_steps=16)["steps"] == 16


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_the_order_of_system_calls_survives_a_loss_of_power(trained, run, tmp_path):
    """
    kill -9 cannot test this, for the kernel keeps what was written; the order can be read.

    Every file is fsynced under its final name, then the directory, then it is renamed, then the parent is fsynced.
    """
    trace = tmp_path / "trace"
    done = subprocess.run(
        ["strace", "-f", "-y", "-qq", "-s", "300", "-o", trace, "-e", "trace=fsync,fdatasync,rename,renameat,renameat2",
         sys.executable, "-m", "groundup", "train", str(trained / "text.txt"), "--output-dir", str(run),
         *flags(QUIET | {"max_steps": 13, "save_total_limit": 2}), "--json"],
        capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    calls = [line.split(" ", 1)[1].strip() for line in trace.read_text(encoding="utf-8").splitlines()]
    staging = f"{run}/.checkpoint-13.partial"
    commit_at = next(i for i, call in enumerate(calls) if call.startswith("rename") and f'"{run}/checkpoint-13"' in call)
    synced = [match[1] for call in calls[:commit_at] if (match := re.match(r"f(?:data)?sync\(\d+<(.*)>", call))]
    for name in FILES:
        assert f"{staging}/{name}" in synced, f"{name} was not forced to the disk before the rename"
    assert synced[-2:] == [f"{staging}/manifest.json", staging], "the manifest is the last file, then the directory"
    after = calls[commit_at + 1 :]
    parent = next(i for i, call in enumerate(after) if call.startswith("fsync(") and f"<{run}>" in call)
    deletions = [i for i, call in enumerate(after) if ".trash-" in call]
    assert deletions, "older ones are deleted in this run, or the next line says nothing"
    assert parent < min(deletions), "older ones go after the new one is durable"
