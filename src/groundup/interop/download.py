"""
Fetch OpenAI's GPT-2 folders: up to 6 GB over lines that break, so what has arrived is kept and continued.

A file grows as ``NAME.part`` beside a note ``NAME.part.json`` of what it will be. It is continued only if the server
still has that very file (RFC 9110, section 13.1.5, If-Range), and gets its name only when it is whole and checked.
"""

import base64
import contextlib
import hashlib
import http.client
import json
import os
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from email.message import Message
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from groundup.errors import ConfigError, DataError, ResourceError
from groundup.runtime.files import (
    HASH_BLOCK_BYTES,
    exclusive,
    explained_os_errors,
    make_directory,
    sha256_of_file,
    sync_directory,
    sync_file,
)
from groundup.tokenizer.gpt2_files import FILES as KNOWN_SHA256

SIZES = ("124M", "355M", "774M", "1558M")
MIRRORS = (
    # https://github.com/openai/gpt-2/blob/master/download_model.py
    "https://openaipublic.blob.core.windows.net/gpt-2/models/{size}/",
    # The backup of https://github.com/rasbt/LLMs-from-scratch/blob/main/ch05/01_main-chapter-code/gpt_download.py
    "https://f001.backblazeb2.com/file/LLMs-from-scratch/gpt2/{size}/",
)
# Those that a known hash checks come first: what answers in a server's name (a hotel's login page) is found out at once.
RELEASE_FILES = (
    "encoder.json",
    "vocab.bpe",
    "hparams.json",
    "checkpoint",
    "model.ckpt.index",
    "model.ckpt.meta",
    "model.ckpt.data-00000-of-00001",
)
TIMEOUT_SECONDS = 30
CONTINUES = (http.HTTPStatus.PARTIAL_CONTENT, http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)

Progress = Callable[[str, int, int], None]
"""Called with a file's name, the bytes that are there, and the bytes that it will have."""


class _Failed(Exception):
    """A mirror did not give a file; the text says why."""


@dataclass(frozen=True)
class _Promise:
    """What a server said about a file, kept beside its part."""

    url: str
    size_bytes: int
    validator: str
    """Its strong ETag, or its Last-Modified, or nothing."""
    file_id: str
    """Backblaze's X-Bz-File-Id, which stands there for an ETag: a server that has it is asked without If-Range."""
    md5: str
    """Base64, or nothing."""


def download_openai(
    size: str, directory: Path, mirrors: Sequence[str] = MIRRORS, progress: Progress = lambda name, done, total: None
) -> None:
    """
    Fetch the seven files of a GPT-2 as OpenAI released it; files that are there stay as they are.

    Args:
        size: one of SIZES: the number of parameters.
        directory: made if it is not there.
        mirrors: addresses of folders, with ``{size}`` in them; tried in order, the last that worked first.
        progress: called as bytes arrive.

    Raises:
        ConfigError: no such size, an address that is not http(s), or a directory that cannot be written or is in use.
        DataError: no mirror gives a file, or a file that is there is not OpenAI's.
        ResourceError: the disk is full.
    """
    if size not in SIZES:
        raise ConfigError(f"import: OpenAI released no GPT-2 of size {size!r}; choose one of {', '.join(SIZES)}")
    for mirror in mirrors:
        if not _is_http(mirror):
            raise ConfigError(f"import: mirror {mirror!r} is no http or https address")
    make_directory(directory, "XDG_CACHE_HOME")
    if all((directory / name).exists() for name in RELEASE_FILES):
        for name in RELEASE_FILES:
            _check_known(directory / name)
        return  # a disk that is read only is no obstacle
    candidates = [mirror.replace("{size}", size).rstrip("/") + "/" for mirror in mirrors]
    with explained_os_errors(directory, "download"), exclusive(directory / ".download.lock", f"download to {directory}"):
        for name in RELEASE_FILES:
            if (directory / name).exists():
                _check_known(directory / name)
            else:
                _fetch(name, directory, candidates, progress)


def _is_http(address: str) -> bool:
    try:
        return urlsplit(address).scheme in ("http", "https")
    except ValueError:
        return False


def _check_known(path: Path) -> None:
    """Compare a file that is there with the hash of OpenAI's, where that is known."""
    expected = KNOWN_SHA256.get(path.name)
    if expected is not None and sha256_of_file(path) != expected:
        raise DataError(f"download: {path} is there and is not OpenAI's file (sha256 is not {expected[:12]}…); move it away")


def _fetch(name: str, directory: Path, candidates: list[str], progress: Progress) -> None:
    """Get one file from the first mirror that gives it; mirrors that failed go to the end of the list."""
    reasons = []
    for _ in range(len(candidates)):
        try:
            _fetch_from(candidates[0] + name, directory / name, progress)
            return
        except _Failed as failure:
            reasons.append(f"{candidates[0]}{name}: {failure}")
            candidates.append(candidates.pop(0))
    absent = ", ".join(name for name in RELEASE_FILES if not (directory / name).exists())
    raise DataError(
        f"download: cannot fetch {name} ({'; '.join(reasons)}); run the same command again to go on, or get OpenAI's {absent} "
        f"elsewhere and put them into {directory}"
    )


def _fetch_from(url: str, target: Path, progress: Progress) -> None:
    """Get one file from one mirror, going on for as long as each attempt brings more than all before."""
    part = target.with_name(f"{target.name}.part")
    furthest = _size(part) if _read_promise(part, url) else 0
    while True:
        try:
            promise = _receive(url, part, progress)
            break
        except _Failed:
            if _size(part) <= furthest:
                raise
            furthest = _size(part)
    try:
        _check_content(part, target.name, promise)
    except _Failed:
        _discard(part)
        raise
    sync_file(part)
    os.replace(part, target)
    sync_directory(target.parent)
    _discard(part)


def _receive(url: str, part: Path, progress: Progress) -> _Promise:
    """Bring a part to its full size, or as far as the server goes."""
    promise, name = _read_promise(part, url), part.name.removesuffix(".part")
    if promise is not None and _size(part) == promise.size_bytes:
        return promise  # stopped between the last byte and the check
    request = urllib.request.Request(url, headers={"Accept-Encoding": "identity", "User-Agent": "groundup"})
    if promise is not None:
        request.add_header("Range", f"bytes={_size(part)}-")
        if promise.validator:
            request.add_header("If-Range", promise.validator)
    with _answer(request) as response:
        if promise is not None and response.status in CONTINUES:
            expected = (f"bytes {_size(part)}-{promise.size_bytes - 1}/{promise.size_bytes}", promise.file_id)
            if (response.headers.get("Content-Range"), response.headers.get("X-Bz-File-Id", "")) != expected:
                _discard(part)  # the server's file has changed, and it does not know If-Range
                return _receive(url, part, progress)
        else:  # the whole file: no part, another file than the part's, or a server that does not continue
            promise = _promise(url, response.status, response.headers)
            _discard(part)
            _note(part).write_text(json.dumps(asdict(promise)), encoding="utf-8")
        done = _size(part)
        free = shutil.disk_usage(part.parent).free
        if promise.size_bytes - done > free:
            raise ResourceError(
                f"download: {name} needs {(promise.size_bytes - done) / 2**20:,.0f} MiB more, {part.parent} has "
                f"{free / 2**20:,.0f} MiB free; free some space and run the same command again to go on"
            )
        progress(name, done, promise.size_bytes)
        with part.open("ab") as file:
            while done < promise.size_bytes:
                block = _read(response, promise.size_bytes - done)
                if not block:
                    raise _Failed(f"broke off after {done:,} of {promise.size_bytes:,} bytes")
                file.write(block)
                done += len(block)
                progress(name, done, promise.size_bytes)
    return promise


def _answer(request: urllib.request.Request) -> Any:
    """Open an address; only http and https, also where one sends us on to another."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler, urllib.request.HTTPHandler, urllib.request.HTTPSHandler, urllib.request.UnknownHandler,
        urllib.request.HTTPRedirectHandler, urllib.request.HTTPDefaultErrorHandler, urllib.request.HTTPErrorProcessor,
    ):  # fmt: skip
        opener.add_handler(handler())
    try:
        return opener.open(request, timeout=TIMEOUT_SECONDS)
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, urllib.error.HTTPError) and error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return error  # an answer too
        raise _Failed(_one_line(error)) from None


def _read(response: IO[bytes], size_bytes: int) -> bytes:
    """The next bytes of an answer; none where it ends."""
    try:
        return response.read(min(HASH_BLOCK_BYTES, size_bytes))
    except (OSError, http.client.HTTPException) as error:
        raise _Failed(_one_line(error)) from None


def _promise(url: str, status: int, headers: Message) -> _Promise:
    """What a server says about the file that it starts to send."""
    length, encoding = headers.get("Content-Length", ""), headers.get("Content-Encoding", "identity")
    if status != http.HTTPStatus.OK or re.fullmatch(r"\d{1,15}", length) is None or encoding != "identity":
        raise _Failed(f"answered with status {status}, Content-Length {length or 'absent'}, Content-Encoding {encoding}")
    etag = headers.get("ETag", "")
    # If-Range takes no weak ETag: such a one is equal for files that differ.
    validator = etag if etag.startswith('"') else headers.get("Last-Modified", "")
    md5 = headers.get("x-ms-blob-content-md5") or headers.get("Content-MD5") or ""
    return _Promise(url, int(length), validator, headers.get("X-Bz-File-Id", ""), md5)


def _read_promise(part: Path, url: str) -> _Promise | None:
    """The note beside a part, where it lets the part be continued from this address."""
    try:
        raw = json.loads(_note(part).read_text(encoding="utf-8"))
        promise = _Promise(**raw)
        well_formed = all(type(raw[field.name]) is field.type for field in fields(_Promise))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    if not well_formed or promise.url != url or not 0 < _size(part) <= promise.size_bytes:
        return None
    # Without either, nothing says that what is there belongs to what would come.
    is_header = re.fullmatch(r"[\x20-\x7e]*", promise.validator) is not None
    return promise if is_header and (promise.validator or promise.file_id) else None


def _check_content(part: Path, name: str, promise: _Promise) -> None:
    """Compare a whole file with the MD5 that the server gave, and with the SHA-256 that is known."""
    if promise.md5:
        digest = hashlib.md5(usedforsecurity=False)
        with part.open("rb") as file:
            while block := file.read(HASH_BLOCK_BYTES):
                digest.update(block)
        with contextlib.suppress(ValueError):  # a server that means something else by it has told us nothing
            if digest.digest() != base64.b64decode(promise.md5, validate=True):
                raise _Failed("what arrived does not have the MD5 that the server gave")
    expected = KNOWN_SHA256.get(name)
    if expected is not None and sha256_of_file(part) != expected:
        raise _Failed(f"what arrived is not OpenAI's file (sha256 is not {expected[:12]}…)")


def _note(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _discard(part: Path) -> None:
    """Remove a part and its note; the part first, so that no note speaks of another file's bytes."""
    part.unlink(missing_ok=True)
    _note(part).unlink(missing_ok=True)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
