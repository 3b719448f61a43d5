"""
Sources to a dataset: read twice, first to see what is there, then to tokenize it, in parallel and in order.

Everything is written into a hidden staging directory beside the target; one rename makes it the dataset.
"""

import hashlib
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np

from groundup.data.shards import SPLITS, Dataset, ShardWriter, Split, dtype_for, open_dataset, split_key, write_manifest
from groundup.data.sources import STDIN, Document, ReadOptions, SourceReport, copy_stdin, documents
from groundup.data.split import content_hash, in_sample, is_below
from groundup.errors import ConfigError, DataError
from groundup.runtime.files import (
    exclusive,
    explained_os_errors,
    make_directory,
    remove_directory,
    rename_durably,
    sync_directory,
    sync_file,
)
from groundup.tokenizer.pieces import pieces
from groundup.tokenizer.special import FILE_SEPARATOR
from groundup.tokenizer.tokenizer import TokenArray, Tokenizer

TASK_CHARACTERS = 2**20
POOL_FROM_BYTES = 2**24
"""Below 16 MiB of text, starting processes costs more than they save."""

Say = Callable[[str], None]
Digest = bytes
BuildTokenizer = Callable[[Iterable[str]], Tokenizer]


class Place(Enum):
    """Where a piece of text stands in its document."""

    PATH = "path"
    """Before it: its path, with a line break."""
    INSIDE = "inside"
    END = "end"


Piece = tuple[str, str, Place]
"""A split, a text, and its place."""


@dataclass(frozen=True)
class SourceFacts:
    """What the first reading saw of one source."""

    source: str
    documents: int
    bytes: int
    by_position: bool
    """The source is one document, which is split by position."""
    name: str = ""
    """Where sources have names, each is split by itself."""


@dataclass
class Survey:
    """What the first reading saw of all sources."""

    sources: list[SourceFacts] = field(default_factory=list)
    report: SourceReport = field(default_factory=SourceReport)
    digest: str = ""
    """Hash of every document's content, in order."""
    extremes: dict[str, tuple[Digest, Digest]] = field(default_factory=dict)
    """The lowest and the highest hash of the documents that are split by hash: of each named source, or of all under ''."""

    @property
    def documents(self) -> int:
        """Documents in all sources."""
        return sum(source.documents for source in self.sources)

    @property
    def bytes(self) -> int:
        """UTF-8 bytes in all sources."""
        return sum(source.bytes for source in self.sources)

    def is_validation(self, digest: Digest, fraction: float, name: str = "") -> bool:
        """
        Whether a document of a source is for validation: its hash is below the fraction.

        Neither side is left empty where there are two different documents: the lowest hash is for validation and the
        highest for training, wherever the fraction lies.
        """
        lowest, highest = self.extremes[name]
        if fraction <= 0 or digest == highest:
            return False
        return is_below(digest, fraction) or digest == lowest


@dataclass(frozen=True)
class PrepareRequest:
    """Everything that decides the bytes of a dataset."""

    sources: tuple[str, ...]
    validation_sources: tuple[str, ...]
    validation_fraction: float
    read: ReadOptions
    shard_tokens: int
    tokenizer: str
    vocab_size: int
    tokenizer_train_bytes: int
    names: tuple[str, ...] = ()
    """Of the sources, where they have some; there are no validation sources then."""
    path_context: bool = False
    """Each document begins with its path, after a special token."""

    @property
    def splits(self) -> tuple[str, ...]:
        """What the splits are called."""
        return tuple(split_key(split, name) for split in SPLITS for name in self.names or (None,))

    def description(self) -> dict[str, Any]:
        """As JSON values; equal descriptions of unchanged sources give equal datasets."""
        described = asdict(self)
        del described["read"]["stdin_copy"]
        described["names"] = list(self.names)
        if not self.names:
            del described["names"]
        if not self.path_context:
            del described["path_context"]
        if self.tokenizer != "bpe":
            del described["vocab_size"], described["tokenizer_train_bytes"]
        return described


def survey(request: PrepareRequest) -> Survey:
    """Read every document once: count, hash, and find sources that are a single document."""
    found = Survey(report=SourceReport())
    corpus = hashlib.sha256()
    for number, source in enumerate((*request.sources, *request.validation_sources)):
        count = size = 0
        lowest, highest = b"\xff" * 16, b""
        for document in documents(source, request.read, found.report):
            digest, characters, length = content_hash(document.open())
            if not characters:
                found.report.skipped["empty"] += 1
                continue
            corpus.update(_content_of(document, digest, request))
            count, size = count + 1, size + length
            lowest, highest = min(lowest, digest), max(highest, digest)
        corpus.update(_source_end(number, request))
        by_position = count == 1 and not request.validation_sources
        name = request.names[number] if request.names else ""
        found.sources.append(SourceFacts(source, count, size, by_position, name))
        if not by_position:
            low, high = found.extremes.get(name, (lowest, highest))
            found.extremes[name] = min(low, lowest), max(high, highest)
    found.digest = corpus.hexdigest()
    empty = [source.source for source in found.sources if not source.documents]
    if not found.documents or (empty and request.names):
        skipped = ", ".join(f"{count} {reason}" for reason, count in sorted(found.report.skipped.items()))
        raise DataError(
            f"no text found in {', '.join(empty)} (skipped: {skipped or 'nothing, there are no files'}); "
            "give files or folders of UTF-8 text"
        )
    return found


def _content_of(document: Document, digest: Digest, request: PrepareRequest) -> bytes:
    """What stands for a document in the corpus' hash: its content's; where its path becomes text, the path too."""
    return digest + document.name.encode() if request.path_context else digest


def _source_end(number: int, request: PrepareRequest) -> bytes:
    """What stands for the end of a source in the corpus' hash: which side a text is on counts."""
    return b"end of source" if number < len(request.sources) else b"end of validation source"


def prepare(request: PrepareRequest, target: Path, build_tokenizer: BuildTokenizer, workers: int, say: Say) -> Dataset:
    """
    Make the dataset ``target`` from sources; the same bytes for any number of workers and any directory order.

    Args:
        build_tokenizer: from pieces of training text to the tokenizer (which may ignore them).
        workers: processes that tokenize; 0 is one per core.
        say: told, in one line each, what happens.

    Raises:
        DataError: no text, or a damaged source.
        ConfigError: the target cannot be written, or another process is writing it.
        ResourceError: the disk is full; nothing is left under the target's name.
    """
    real = target.resolve()  # a link to an empty folder stays one
    if real == Path.cwd():
        raise ConfigError(f"output_dir: {target} is the working directory, which is about to be replaced; name another folder")
    if real.is_mount():
        raise ConfigError(f"output_dir: {target} is a mount point, which cannot be replaced; name a folder inside it")
    staging = real.parent / f".{real.name}.partial"
    with explained_os_errors(target, "prepare"):
        make_directory(staging)
        lock = staging / ".lock"
        with exclusive(lock, f"dataset {target}"):
            try:
                _clear(staging, keep=lock)
                _write_dataset(request, staging, build_tokenizer, workers, say)
                lock.unlink()
                sync_directory(staging)
                if real.exists():
                    remove_directory(real)
                rename_durably(staging, real)
            except BaseException:
                shutil.rmtree(staging, ignore_errors=True)
                raise
    return open_dataset(target)


def _write_dataset(request: PrepareRequest, staging: Path, build_tokenizer: BuildTokenizer, workers: int, say: Say) -> None:
    stdin_copy = staging / ".stdin"
    if STDIN in (*request.sources, *request.validation_sources):
        copy_stdin(stdin_copy)
        request = replace(request, read=replace(request.read, stdin_copy=stdin_copy))
    seen = survey(request)
    say(f"read {counted(seen.documents, 'document')}, {seen.bytes:,} bytes{_skipped(seen.report)}")

    fraction = request.tokenizer_train_bytes / max(1, seen.bytes)
    tokenizer = build_tokenizer(
        text for split, text, _ in _split_pieces(request, seen) if split.startswith("train") and in_sample(text, fraction)
    )
    if request.path_context:
        tokenizer = tokenizer.with_special_tokens([FILE_SEPARATOR])
    tokenizer.save(staging)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        sync_file(staging / name)
    say(
        f"tokenizer {request.tokenizer}: {tokenizer.vocab_size:,} ids{_fewer(request, tokenizer)}"
        + ("" if tokenizer.runs_fast else "; its file is not plain ranked BPE, so tokenizing is ten times slower")
    )

    dtype = dtype_for(tokenizer.vocab_size)
    writers = {split: ShardWriter(staging, split, dtype, request.shard_tokens) for split in request.splits}
    counts = {split: [0, 0] for split in request.splits}
    corpus = hashlib.sha256()
    tasks = _tasks(_split_pieces(request, seen, corpus), counts)
    for split, tokens in _encoded(tasks, tokenizer, workers if seen.bytes >= POOL_FROM_BYTES else 1):
        writers[split].append(tokens)
    if corpus.hexdigest() != seen.digest:
        raise DataError("a source changed while it was read; run again when nothing writes to it")
    splits = {name: Split(writer.close(), *counts[name]) for name, writer in writers.items()}
    if request.names:
        _require_both_sides(seen, splits)
    facts = {
        "documents": seen.documents,
        "bytes": seen.bytes,
        "skipped": dict(sorted(seen.report.skipped.items())),
        "replaced_sequences": seen.report.replaced_sequences,
        "content_sha256": seen.digest,
        "request": request.description(),
    }
    stdin_copy.unlink(missing_ok=True)
    write_manifest(staging, tokenizer, dtype, splits, facts, request.names)


def _require_both_sides(seen: Survey, splits: dict[str, Split]) -> None:
    """Each named source is trained on and evaluated by itself."""
    for facts in seen.sources:
        for side in SPLITS:
            if not splits[split_key(side, facts.name)].tokens:
                raise DataError(
                    f"source {facts.source}: {counted(facts.documents, 'document')}, and no text for {side} of {facts.name}; "
                    "give it more text, or change --validation-fraction"
                )


def _fewer(request: PrepareRequest, tokenizer: Tokenizer) -> str:
    if request.tokenizer != "bpe" or tokenizer.vocab_size >= request.vocab_size:
        return ""
    return f" ({request.vocab_size:,} asked for; the text has no more pairs that repeat)"


def counted(number: int, noun: str) -> str:
    """A number with its noun: 1 document, 2 documents."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _skipped(report: SourceReport) -> str:
    parts = [f"{count:,} {reason}" for reason, count in sorted(report.skipped.items())]
    text = f"; skipped {', '.join(parts)}" if parts else ""
    if report.replaced_sequences:
        text += f"; replaced {report.replaced_sequences:,} invalid UTF-8 sequences by U+FFFD"
    return text


def _split_pieces(request: PrepareRequest, seen: Survey, corpus: Any = None) -> Iterator[Piece]:
    """Every piece of text with its split and its place in its document, in the canonical order."""
    fraction = request.validation_fraction
    for number, facts in enumerate(seen.sources):
        for document in documents(facts.source, request.read, SourceReport()):
            digest, characters, _ = content_hash(document.open())
            if not characters:
                continue
            if corpus is not None:
                corpus.update(_content_of(document, digest, request))
            path = document.name.replace("\n", " ") + "\n" if request.path_context else ""
            if request.validation_sources:
                yield from _whole("validation" if number >= len(request.sources) else "train", document, path)
            elif facts.by_position:
                yield from _by_position(document, int(characters * (1 - fraction)), characters, facts.name, path)
            else:
                side = "validation" if seen.is_validation(digest, fraction, facts.name) else "train"
                yield from _whole(split_key(side, facts.name), document, path)
        if corpus is not None:
            corpus.update(_source_end(number, request))


def _whole(split: str, document: Document, path: str) -> Iterator[Piece]:
    yield from _marked(split, pieces(document.open()), path)


def _by_position(document: Document, boundary: int, characters: int, name: str, path: str) -> Iterator[Piece]:
    """The first ``boundary`` characters for training, the rest for validation; each part ends as a document."""

    def part(start: int, end: int) -> Iterator[str]:
        place = 0
        for chunk in document.open():
            yield chunk[max(0, start - place) : max(0, end - place)]
            place += len(chunk)

    yield from _marked(split_key("train", name), pieces(part(0, boundary)), path)
    yield from _marked(split_key("validation", name), pieces(part(boundary, characters)), path)


def _marked(split: str, texts: Iterable[str], path: str) -> Iterator[Piece]:
    """The pieces of one document with their places, after its path where there is one."""
    before: str | None = None
    for text in texts:
        if before is not None:
            yield split, before, Place.INSIDE
        elif path:
            yield split, path, Place.PATH
        before = text
    if before is not None:
        yield split, before, Place.END


@dataclass(frozen=True)
class Task:
    """Consecutive pieces of one split, about ``TASK_CHARACTERS`` in all."""

    split: str
    parts: tuple[tuple[str, Place], ...]


def _tasks(marked: Iterable[Piece], counts: dict[str, list[int]]) -> Iterator[Task]:
    waiting: dict[str, list[tuple[str, Place]]] = {split: [] for split in counts}
    sizes = dict.fromkeys(counts, 0)
    for split, text, place in marked:
        counts[split][0] += place is Place.END
        counts[split][1] += len(text.encode())
        waiting[split].append((text, place))
        sizes[split] += len(text)
        if sizes[split] >= TASK_CHARACTERS:
            yield Task(split, tuple(waiting[split]))
            waiting[split], sizes[split] = [], 0
    for split, parts in waiting.items():
        if parts:
            yield Task(split, tuple(parts))


def _encode_task(tokenizer: Tokenizer, task: Task) -> TokenArray:
    end = np.array([tokenizer.end_of_text_id], dtype=np.uint32)
    arrays = []
    for text, place in task.parts:
        if place is Place.PATH:
            arrays.append(np.array([tokenizer.special_ids[FILE_SEPARATOR]], dtype=np.uint32))
        arrays.append(tokenizer.encode(text))
        if place is Place.END:
            arrays.append(end)
    return np.concatenate(arrays)


_worker_tokenizer: Tokenizer


def _start_worker(tokenizer_json: str, end_of_text: str) -> None:
    global _worker_tokenizer
    # Ctrl-C and SIGTERM may reach the whole process group; the parent decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker_tokenizer = Tokenizer(tokenizer_json, end_of_text)


def _end_with_parent() -> None:
    """End this process when its parent is gone, however it went: a pool's worker would wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _encode_in_worker(task: Task) -> TokenArray:
    return _encode_task(_worker_tokenizer, task)


def _encoded(tasks: Iterable[Task], tokenizer: Tokenizer, workers: int) -> Iterator[tuple[str, TokenArray]]:
    """Encode tasks in order, at most two waiting per worker, so that memory stays bounded."""
    workers = workers or os.cpu_count() or 1
    if workers == 1:
        for task in tasks:
            yield task.split, _encode_task(tokenizer, task)
        return
    waiting: deque[tuple[str, Future[TokenArray]]] = deque()
    # spawn: a forked child of a process that runs threads can hang.
    with ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _start_worker, (tokenizer.json, tokenizer.end_of_text)
    ) as pool:
        try:
            for task in tasks:
                waiting.append((task.split, pool.submit(_encode_in_worker, task)))
                if len(waiting) > 2 * workers:
                    split, future = waiting.popleft()
                    yield split, future.result()
            while waiting:
                split, future = waiting.popleft()
                yield split, future.result()
        except BrokenProcessPool:
            raise DataError(
                "a tokenizing process died (killed, or out of memory); run again with --workers 1. In a script, put the "
                'call under `if __name__ == "__main__":`'
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _clear(staging: Path, keep: Path) -> None:
    """Remove what a killed run left."""
    for path in staging.iterdir():
        if path != keep:
            path.unlink()
