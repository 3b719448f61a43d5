"""Files that are whole or absent: staged, fsynced, hashed, renamed; and the lock that keeps two writers apart."""

import errno
import fcntl
import glob
import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

from safetensors import SafetensorError

from groundup.errors import ConfigError, ResourceError

HASH_BLOCK_BYTES = 2**20
STAGING, STAGING_LOCK = ".partial", ".groundup-staging"
TEMPORARY, ABANDONED_SECONDS = ".tmp", 3600.0
"""Of a file that is being replaced: nobody writes one for so long, so who wrote it was killed."""


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file's content, as hexadecimal, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def write_durably(path: Path, content: bytes) -> None:
    """Write a file and force it to the disk. The name is final at once: use it inside a staging directory."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace_durably(path: Path, content: bytes) -> None:
    """Replace a file so that readers, and a crash, see the old content or the new, never a part."""
    stem = f".{os.fsdecode(os.fsencode(path.name)[:200])}."
    for left in path.parent.glob(f"{glob.escape(stem)}*{TEMPORARY}"):
        with suppress(FileNotFoundError):
            if left.lstat().st_mtime < time.time() - ABANDONED_SECONDS:
                left.unlink()
    # A name of its own for each writer; what is there already, a link too, is not written through.
    temporary = path.with_name(f"{stem}{secrets.token_hex(8)}{TEMPORARY}")
    with temporary.open("xb") as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    sync_directory(path.parent)


def sync_file(path: Path) -> None:
    """Force a file's content to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Force a directory's names to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def rename_durably(source: Path, target: Path) -> None:
    """Give a staged directory its final name: the commit point."""
    os.rename(source, target)
    sync_directory(target.parent)


def remove_directory(path: Path) -> None:
    """Delete a directory so that its name never stands for a part of it: rename it aside, then delete."""
    trash = path.with_name(f".trash-{path.name}")
    if trash.exists():
        shutil.rmtree(trash)
    os.rename(path, trash)
    shutil.rmtree(trash)


@contextmanager
def explained_os_errors(path: Path, what: str) -> Iterator[None]:
    """
    Turn the operating system's refusals while writing into our errors.

    Raises:
        ResourceError: the disk is full.
        ConfigError: the place cannot be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as caught:
        # safetensors reports the system's refusals in words: "… (os error 28)".
        number = re.search(r"os error (\d+)", str(caught)) if isinstance(caught, SafetensorError) else None
        if isinstance(caught, SafetensorError) and number is None:
            raise
        error = OSError(int(number[1]), os.strerror(int(number[1]))) if number else cast("OSError", caught)
        cut_short = error.errno is None and "requested and" in str(error)  # numpy's words for a write that was cut
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or cut_short:
            free = shutil.disk_usage(existing_parent(path)).free
            raise ResourceError(
                f"{what}: no space left at {path} ({free / 2**20:,.0f} MiB free); nothing was lost, free some space "
                "or choose another place, and run the same command again"
            ) from error
        if error.errno in (
            errno.EACCES,
            errno.ENOENT,
            errno.EPERM,
            errno.EROFS,
            errno.ENOTDIR,
            errno.EISDIR,
            errno.ENAMETOOLONG,
            errno.EEXIST,
        ):
            named = error.filename2 or error.filename or path  # of a rename the name that was asked for, which is the second
            raise ConfigError(f"{what}: cannot write {named} ({error.strerror}); choose a place that you may write") from error
        raise


def make_directory(path: Path, option: str = "--output-dir") -> None:
    """
    Make a directory for results, with those above it.

    Args:
        option: what the user chose it with.

    Raises:
        ConfigError: the place cannot hold one.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{option}: cannot make {path} ({error.strerror}); choose a folder that you may write") from error


def existing_parent(path: Path) -> Path:
    """The nearest directory above a path that exists."""
    path = path.absolute()
    while not path.is_dir():
        path = path.parent
    return path


@contextmanager
def exclusive(path: Path, what: str) -> Iterator[None]:
    """
    Hold a lock file; the kernel releases it when the process dies, however it dies.

    Raises:
        ConfigError: another process holds it; the message names that process.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner = os.read(handle, 200).decode(errors="replace").strip()
            raise ConfigError(
                f"{what}: in use by another process ({owner or 'unknown'}); wait for it, stop it, or choose another "
                "--output-dir"
            ) from None
        os.ftruncate(handle, 0)
        os.write(handle, f"pid {os.getpid()} on {os.uname().nodename}\n".encode())
        yield
    finally:
        os.close(handle)


@contextmanager
def new_place(target: Path, what: str) -> Iterator[Path]:
    """
    A path to write a file or a folder to, which becomes ``target`` when the block ends well; nothing is ever replaced.

    What killed processes left beside the target is removed; what others are writing is left alone.

    Raises:
        ConfigError: something is there, before or after; or the place cannot be written.
        ResourceError: the disk is full.
    """
    place = target.resolve()  # a link to a folder stays one
    with explained_os_errors(target, what):
        require_free(place)
        make_directory(place.parent, what)
        for left in place.parent.glob(f".{glob.escape(place.name)}.*{STAGING}"):
            _remove_abandoned(left)
        with (
            TemporaryDirectory(prefix=f".{place.name[:200]}.", suffix=STAGING, dir=place.parent) as folder,
            exclusive(Path(folder) / STAGING_LOCK, what),
        ):
            yield (staged := Path(folder) / "new")
            _give_name(staged, place)


def require_free(place: Path) -> None:
    """
    Refuse a place where something is.

    Raises:
        ConfigError: anything but an empty folder is there.
    """
    try:
        taken = os.path.lexists(place) and not (place.is_dir() and not any(place.iterdir()))
    except OSError as error:
        raise ConfigError(f"{place}: cannot be written ({error.strerror}); choose another place") from None
    if taken:
        raise ConfigError(f"{place}: exists already; choose another place, or delete it first")


def _give_name(staged: Path, place: Path) -> None:
    """Rename, unless something has come there meanwhile: no rename replaces a folder that is not empty, no link a file."""
    try:
        if staged.is_dir():
            sync_directory(staged)
            os.rename(staged, place)
        else:
            if place.is_dir():
                place.rmdir()  # an empty folder of that name is what was asked for
            os.link(staged, place)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise ConfigError(f"{place}: something else came there meanwhile; choose another place") from None
        if staged.is_dir() or error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise
        require_free(place)  # a file system without hard links
        os.rename(staged, place)
    sync_directory(place.parent)


def _remove_abandoned(folder: Path) -> None:
    """Delete a staging folder of ours that no living process holds."""
    lock = folder / STAGING_LOCK
    if folder.is_symlink() or not lock.is_file():
        return
    with suppress(ConfigError, OSError), exclusive(lock, ""):
        shutil.rmtree(folder)
