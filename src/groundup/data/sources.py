"""
Sources to documents: files, folders, tables, compressed files, standard input, and Python's standard library.

Memory stays bounded: a document is opened, not held, and read in chunks.
"""

import codecs
import csv
import gzip
import io
import json
import os
import stat
import sys
import sysconfig
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from groundup.errors import DataError

PYTHON_STDLIB = "python-stdlib"
STDIN = "-"
CHUNK_BYTES = 2**20
SNIFF_BYTES = 2**13
ZSTD_READ_BYTES = 2**10
"""Compressed bytes unpacked at once: a block of zstd unpacks to 128 KiB at most, and the smallest takes a few bytes."""
RUN_HEADER = "# Resolved configuration of this run (groundup"
"""How a run's config.toml begins."""
TABLES = (".jsonl", ".csv", ".parquet")
STDLIB_TEST_FOLDERS = ("test", "tests", "idle_test", "site-packages", "dist-packages")


@dataclass(frozen=True)
class Document:
    """A text with a name. ``open`` reads it from the start, in chunks; it can be called again."""

    name: str
    open: Callable[[], Iterator[str]]


@dataclass
class SourceReport:
    """What reading saw: what was skipped and why, and how many invalid UTF-8 sequences were replaced."""

    skipped: Counter[str] = field(default_factory=Counter)
    replaced_sequences: int = 0


@dataclass(frozen=True)
class ReadOptions:
    """How to read sources."""

    text_column: str = "text"
    encoding_errors: str = "replace"
    stdin_copy: Path | None = None
    """Where standard input was copied, so that it can be read twice."""


def documents(source: str, options: ReadOptions, report: SourceReport) -> Iterator[Document]:
    """
    The documents of one source, in an order that does not depend on the file system.

    Raises:
        DataError: the source is missing, or a file in it is damaged.
    """
    if source == STDIN:
        if options.stdin_copy is None:
            raise DataError("source -: standard input is not available here; give a file or a folder")
        yield from _file_documents(options.stdin_copy, STDIN, options, report, explicit=True)
        return
    if source == PYTHON_STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        for path in _walk_stdlib(root):
            yield from _file_documents(path, str(path.relative_to(root)), options, report, explicit=False)
        return
    path = Path(source)
    try:
        path.stat()
    except (OSError, ValueError) as error:
        reason = "" if isinstance(error, FileNotFoundError) else f" ({getattr(error, 'strerror', error)})"
        raise DataError(
            f"source {source}: not found{reason}; give a file, a folder, - for standard input, or {PYTHON_STDLIB}"
        ) from None
    if path.is_dir():
        for file in _walk_folder(path, report):
            yield from _file_documents(file, str(file.relative_to(path)), options, report, explicit=False)
    else:
        yield from _file_documents(path, path.name, options, report, explicit=True)


def copy_stdin(target: Path) -> None:
    """Copy standard input to a file, because preparing reads its sources twice."""
    with target.open("wb") as file:
        while block := sys.stdin.buffer.read(CHUNK_BYTES):
            file.write(block)


def _walk_stdlib(root: Path) -> Iterator[Path]:
    for folder, names, files in os.walk(root):
        names[:] = sorted(n for n in names if n not in STDLIB_TEST_FOLDERS and not n.startswith(("config-", "__")))
        yield from (Path(folder, name) for name in sorted(files) if name.endswith(".py"))


def _walk_folder(root: Path, report: SourceReport) -> Iterator[Path]:
    """Files below a folder, sorted by name; hidden and git-ignored ones are skipped, each file is visited once."""
    import pathspec

    seen: set[tuple[int, int]] = set()

    def walk(folder: Path, ignores: tuple[tuple[Path, Any], ...]) -> Iterator[Path]:
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: os.fsencode(entry.name))
        except PermissionError:
            report.skipped["unreadable"] += 1
            return
        rules = folder / ".gitignore"
        if rules.is_file():
            lines = rules.read_text(encoding="utf-8", errors="replace").splitlines()
            ignores = (*ignores, (folder, pathspec.GitIgnoreSpec.from_lines(filter(_is_git_pattern, lines))))
        for entry in entries:
            path = Path(entry.path)
            if entry.name.startswith("."):
                report.skipped["hidden"] += 1
            elif _is_ignored(path, entry.is_dir(follow_symlinks=False), ignores):
                report.skipped["git-ignored"] += 1
            elif entry.is_dir(follow_symlinks=False) and is_groundup_output(path):
                report.skipped["groundup's own output"] += 1
            elif entry.is_dir(follow_symlinks=False):
                yield from walk(path, ignores)
            elif not _is_regular_file(path):
                # A link to a folder can loop, a pipe can block: neither is followed.
                report.skipped["not a regular file"] += 1
            elif (path.stat().st_dev, path.stat().st_ino) in seen:
                report.skipped["seen already (link)"] += 1
            else:
                seen.add((path.stat().st_dev, path.stat().st_ino))
                yield path

    yield from walk(root, ())


def is_run(folder: Path) -> bool:
    """Whether a folder is a run of groundup's: its config.toml says so."""
    try:
        if not (folder / "config.toml").is_file():
            return False  # a pipe would never answer
        with (folder / "config.toml").open(encoding="utf-8", errors="replace") as file:
            return file.readline().startswith(RUN_HEADER)
    except OSError:
        return False


def is_groundup_output(folder: Path) -> bool:
    """Whether a folder is a run or a dataset: text that a run writes must not become its training text."""
    return is_run(folder) or ((folder / "dataset.json").is_file() and (folder / "tokenizer.json").is_file())


def _is_git_pattern(line: str) -> bool:
    """Whether a line of a .gitignore means anything; git passes over the others."""
    import pathspec

    try:
        pathspec.GitIgnoreSpec.from_lines([line])
    except ValueError:
        return False
    return True


def _is_regular_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:  # a link to nothing, or to itself
        return False


def _is_ignored(path: Path, is_folder: bool, ignores: tuple[tuple[Path, Any], ...]) -> bool:
    """Apply .gitignore files from the outermost to the innermost; the last rule that matches decides, as in git."""
    decision = False
    for base, spec in ignores:
        name = path.relative_to(base).as_posix() + ("/" if is_folder else "")
        matched = spec.check_file(name).include
        if matched is not None:
            decision = bool(matched)
    return decision


def _file_documents(path: Path, name: str, options: ReadOptions, report: SourceReport, *, explicit: bool) -> Iterator[Document]:
    """The documents of one file: each row of a table, or the whole of any other text."""
    label = str(path) if name != STDIN else STDIN
    name = os.fsencode(name).decode("utf-8", errors="backslashreplace")
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise DataError(f"source {label}: is not a regular file; use - to read from a pipe")
        kind = path.name.lower().removesuffix(".gz").removesuffix(".zst")
        if kind.endswith(TABLES):
            table = _table_documents(path, name, kind, options, report)
            if explicit:
                yield from table
            else:
                yield from _if_it_has_the_column(table, report)
            return
        with _opened(path) as file:
            head = file.read(SNIFF_BYTES)
    except PermissionError:
        if explicit:
            raise DataError(f"source {label}: permission denied; make it readable") from None
        report.skipped["unreadable"] += 1
        return
    reason = _not_text(head)
    if reason and explicit:
        raise DataError(f"source {label}: is {reason}, not UTF-8 text; convert it first")
    if reason:
        report.skipped[reason] += 1
    elif not head:
        report.skipped["empty"] += 1
    else:
        yield Document(name, lambda: _decoded(path, label, options.encoding_errors, report))


def _not_text(head: bytes) -> str:
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    # git's rule: https://git-scm.com/docs/gitattributes, "binary" is what has a NUL near its start.
    return "binary" if b"\0" in head else ""


def _decoded(path: Path, label: str, errors: str, report: SourceReport) -> Iterator[str]:
    """Decode a file in chunks; invalid sequences become U+FFFD and are counted, or stop with their place."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors=errors)
    tail, offset = b"", 0
    with _opened(path) as file:
        while True:
            block = file.read(CHUNK_BYTES)
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                place = offset - (len(error.object) - len(block)) + error.start
                raise DataError(
                    f"source {label}: byte {place} is not UTF-8 ({error.reason}); repair the file, or let "
                    "--encoding-errors replace count and replace it"
                ) from None
            if errors == "replace":
                # U+FFFD that stood in the file already is not a replacement.
                report.replaced_sequences += text.count("\ufffd") - (tail + block).count(b"\xef\xbf\xbd")
                tail = (tail + block)[-2:]
            offset += len(block)
            if text:
                yield text
            if not block:
                return


def _lines(path: Path, options: ReadOptions, report: SourceReport) -> Iterator[str]:
    """The decoded lines of a table with their line ends, without the byte-order mark that spreadsheets write."""
    rest, first = "", True
    for text in _decoded(path, str(path), options.encoding_errors, report):
        if first:
            text, first = text.removeprefix("\ufeff"), False
        *whole, rest = (rest + text).split("\n")
        for line in whole:
            yield line + "\n"
    if rest:
        yield rest


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading, decompressing .gz and .zst; damage becomes an error that names the file."""
    import zstandard

    suffix = path.suffix.lower()
    try:
        with path.open("rb") as raw:
            if suffix == ".gz":
                with gzip.GzipFile(fileobj=raw) as unzipped:
                    yield unzipped  # type: ignore[misc]
            elif suffix == ".zst":
                yield io.BufferedReader(_ZstdFrames(raw))
            else:
                yield raw
    except (gzip.BadGzipFile, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise DataError(f"source {path}: damaged or truncated {suffix} file ({error}); fetch or compress it again") from None


class _ZstdFrames(io.RawIOBase):
    """Frames of a .zst file; unlike zstandard's own reader it fails when the file ends inside a frame."""

    def __init__(self, raw: IO[bytes]):
        import zstandard

        self._raw = raw
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._frame: Any = None
        self._pending = b""
        self._given = 0

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, target: Any) -> int:
        """Fill ``target`` with decompressed bytes; 0 only at the end of a whole frame."""
        while not self._pending:
            between_frames = self._frame is None or self._frame.eof
            block = (self._frame.unused_data if self._frame and between_frames else b"") or self._raw.read(ZSTD_READ_BYTES)
            if not block and between_frames:
                return 0
            if not block:
                raise EOFError("the file ends inside a frame")
            if between_frames:
                self._frame = self._new_frame()
            self._pending = self._frame.decompress(block)
            self._given = 0
        count = min(len(target), len(self._pending) - self._given)
        target[:count] = self._pending[self._given : self._given + count]
        self._given += count
        if self._given == len(self._pending):
            self._pending = b""
        return count


def _table_documents(path: Path, name: str, kind: str, options: ReadOptions, report: SourceReport) -> Iterator[Document]:
    rows = _parquet_rows if kind.endswith(".parquet") else _csv_rows if kind.endswith(".csv") else _jsonl_rows
    for number, text in rows(path, options, report):
        if text:
            yield Document(f"{name}:{number}", lambda text=text: iter((text,)))  # type: ignore[misc]
        else:
            report.skipped["empty"] += 1


def _jsonl_rows(path: Path, options: ReadOptions, report: SourceReport) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(_lines(path, options, report), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"source {path}, line {number}: is not JSON ({error}); each line is one object") from None
        if not isinstance(row, dict):
            raise _NoColumnError(f"source {path}, line {number}: is not a JSON object; each line is one object")
        yield number, _column(row, path, number, options.text_column)


def _csv_rows(path: Path, options: ReadOptions, report: SourceReport) -> Iterator[tuple[int, str]]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(_lines(path, options, report), strict=True)
    try:
        for row in reader:
            yield reader.line_num, _column(row, path, reader.line_num, options.text_column)
    except csv.Error as error:
        raise DataError(f"source {path}, line {reader.line_num}: is not CSV ({error})") from None


def _parquet_rows(path: Path, options: ReadOptions, report: SourceReport) -> Iterator[tuple[int, str]]:
    import pyarrow
    import pyarrow.parquet

    column = options.text_column
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if column not in names:
                raise _no_column(path, 0, column, names)
            number = 0
            for batch in file.iter_batches(batch_size=256, columns=[column]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield number, _column({column: value}, path, number, column)
    except PermissionError:
        raise
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"source {path}: cannot be read as parquet ({error})") from None


def _column(row: dict[str, Any], path: Path, number: int, column: str) -> str:
    if column not in row:
        raise _no_column(path, number, column, [str(key) for key in row])
    value = row[column]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise _NoColumnError(f"source {path}, row {number}: column {column!r} holds {type(value).__name__}, not text")
    # JSON can spell lone surrogates, which no UTF-8 text holds.
    return value.encode("utf-8", errors="replace").decode() if any("\ud800" <= c <= "\udfff" for c in value) else value


class _NoColumnError(DataError):
    """A table that holds no text under the column's name."""


def _if_it_has_the_column(table: Iterator[Document], report: SourceReport) -> Iterator[Document]:
    """In a folder a table that holds no text is passed over, like a binary file; one that was named is an error."""
    try:
        first = next(table, None)
    except _NoColumnError:
        report.skipped["table without the text column"] += 1
        return
    if first is not None:
        yield first
        yield from table


def _no_column(path: Path, number: int, column: str, names: list[str]) -> DataError:
    place = f", row {number}" if number else ""
    return _NoColumnError(f"source {path}{place}: has no column {column!r}; --text-column takes one of: {', '.join(names)}")
