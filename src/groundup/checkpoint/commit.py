"""
The commit protocol. A directory named checkpoint-N is whole, verified and durable; anything else has another name.

Order: stage, fsync every file, hash it, write the manifest, fsync the directory, rename, fsync the parent; prune last.
"""

import json
import re
import shutil
from collections.abc import Callable, Collection
from hashlib import sha256
from pathlib import Path
from typing import Any

from groundup.errors import CheckpointError
from groundup.runtime.files import (
    explained_os_errors,
    remove_directory,
    rename_durably,
    sha256_of_file,
    sync_directory,
    sync_file,
    write_durably,
)

MANIFEST = "manifest.json"
FORMAT, VERSION = "groundup-checkpoint", 1
NAME = re.compile(r"checkpoint-(\d+)")

Say = Callable[[str], None]


class NotDamagedError(CheckpointError):
    """Nothing says that the bytes are wrong: another version of groundup wrote them, or they cannot be read now."""


def commit(run: Path, step: int, write: Callable[[Path], None]) -> Path:
    """
    Make RUN/checkpoint-``step`` from the files that ``write`` puts into the directory it is given.

    Raises:
        ResourceError: the disk is full; nothing of the checkpoint is left, older ones are untouched.
    """
    target = run / f"checkpoint-{step}"
    staging = run / f".checkpoint-{step}.partial"
    with explained_os_errors(run, f"checkpoint {step}"):
        try:
            shutil.rmtree(staging, ignore_errors=True)
            fill(staging, step, write)
            replaced = run / f".replaced-{target.name}"
            if target.exists():
                target.rename(replaced)
            rename_durably(staging, target)
            shutil.rmtree(replaced, ignore_errors=True)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    return target


def fill(directory: Path, step: int, write: Callable[[Path], None]) -> None:
    """Make a directory, have ``write`` fill it, and seal it: every file on the disk, and its hash in the manifest."""
    directory.mkdir()
    write(directory)
    files = {}
    for path in sorted(directory.iterdir()):
        # safetensors writes files that only their owner may read; the folder has the user's own mode.
        path.chmod(directory.stat().st_mode & 0o666)
        sync_file(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
    write_durably(directory / MANIFEST, _manifest_bytes(step, files))
    sync_directory(directory)


def verify(checkpoint: Path) -> None:
    """
    Read every file of a checkpoint and hold it against the manifest.

    Raises:
        CheckpointError: names the file, what was found and what was expected.
    """
    try:
        _verify(checkpoint)
    except OSError as error:
        raise NotDamagedError(
            f"checkpoint {error.filename or checkpoint}: cannot be read ({error.strerror}); make it readable"
        ) from None


def _verify(checkpoint: Path) -> None:
    path = checkpoint / MANIFEST
    try:
        content = path.read_bytes()
        manifest: dict[str, Any] = json.loads(content)
        files = manifest["files"]
        if manifest["format"] == FORMAT and manifest["version"] != VERSION:
            raise NotDamagedError(
                f"checkpoint {checkpoint}: format version {manifest['version']}, this groundup reads {VERSION}"
            )
        whole = content == _manifest_bytes(manifest["step"], files)
        if not all(
            isinstance(name, str) and type(facts["bytes"]) is int and isinstance(facts["sha256"], str)
            for name, facts in files.items()
        ):
            raise ValueError("files")
        own_name = not NAME.fullmatch(checkpoint.name) or step_of(checkpoint) == manifest["step"]
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {checkpoint}: has no {MANIFEST}, so it is not whole") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"checkpoint {path}: damaged ({type(error).__name__})") from None
    if not whole:
        raise CheckpointError(f"checkpoint {path}: damaged: its content does not match its own sha256")
    if not own_name:
        raise CheckpointError(f"checkpoint {path}: is of step {manifest['step']}, not of the step that its folder's name says")
    for name, facts in files.items():
        file = checkpoint / name
        if "/" in name or file.is_symlink() or not file.is_file():
            raise CheckpointError(f"checkpoint {file}: missing, though {MANIFEST} lists it")
        if file.stat().st_size != facts["bytes"]:
            raise CheckpointError(f"checkpoint {file}: {file.stat().st_size:,} bytes long, {MANIFEST} says {facts['bytes']:,}")
        if (found := sha256_of_file(file)) != facts["sha256"]:
            raise CheckpointError(
                f"checkpoint {file}: damaged: its sha256 is {found[:12]}…, {MANIFEST} says {facts['sha256'][:12]}…"
            )


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run by step, the newest last; only those with a final name."""
    if not run.is_dir():
        return []
    found = [(int(match[1]), path) for path in run.iterdir() if (match := NAME.fullmatch(path.name)) and path.is_dir()]
    return [path for _, path in sorted(found)]


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's name gives."""
    match = NAME.fullmatch(checkpoint.name)
    return int(match[1]) if match else 0


def newest_good(run: Path, say: Say) -> Path | None:
    """
    The newest checkpoint that verifies; damaged ones are set aside, loudly. None where the run never saved one.

    Raises:
        CheckpointError: there were checkpoints, and none is good. Starting over is never silent.
    """
    for path in reversed(checkpoints(run)):
        try:
            verify(path)
            return path
        except NotDamagedError:
            raise
        except CheckpointError as error:
            aside = _aside(path)
            path.rename(aside)
            say(f"WARNING: {error}; set aside as {aside.name}, trying an older one")
    damaged = sorted(path.name for path in run.glob("checkpoint-*.corrupt-*"))
    if damaged:
        raise CheckpointError(
            f"run {run}: no good checkpoint is left (damaged: {', '.join(damaged)}); restore one from a copy, or delete "
            "these folders to start over from step 0"
        )
    return None


def prune(run: Path, keep: Collection[Path]) -> None:
    """Delete all checkpoints but these."""
    for path in checkpoints(run):
        if path not in keep:
            remove_directory(path)


def remove_leftovers(run: Path) -> None:
    """Delete what killed runs left half-written or half-deleted; the caller holds the run's lock."""
    for path in run.glob(".replaced-checkpoint-*"):
        # Killed between the two renames of a replacement: the old one is the only one.
        if not (target := run / path.name.removeprefix(".replaced-")).exists():
            path.rename(target)
    for pattern in (".checkpoint-*.partial", ".trash-checkpoint-*", ".replaced-checkpoint-*"):
        for path in run.glob(pattern):
            shutil.rmtree(path)


def _aside(path: Path) -> Path:
    number = 1
    while (aside := path.with_name(f"{path.name}.corrupt-{number}")).exists():
        number += 1
    return aside


def _manifest_bytes(step: int, files: dict[str, Any]) -> bytes:
    """The manifest, its own hash included, in the only spelling that verifies."""
    body = {"format": FORMAT, "version": VERSION, "step": step, "files": files}
    digest = sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "sha256": digest}, indent=2, sort_keys=True).encode()
