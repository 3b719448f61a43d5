"""groundup prepare: text to a tokenizer and shards."""

import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from groundup.checkpoint.commit import checkpoints
from groundup.config.load import Settings
from groundup.config.options import DataOptions, TokenizerOptions
from groundup.data.prepare import PrepareRequest, counted, prepare, survey
from groundup.data.shards import MANIFEST, Dataset, open_dataset
from groundup.data.sources import STDIN, ReadOptions, is_run
from groundup.errors import ConfigError, DataError
from groundup.runtime.files import explained_os_errors
from groundup.tokenizer.gpt2_files import gpt2_tokenizer
from groundup.tokenizer.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer
from groundup.tokenizer.training import train_bpe

Say = Callable[[str], None]
DATASET = "dataset"
"""The folder in a run that holds the dataset made for it."""


def prepare_dataset(
    sources: Sequence[str],
    target: Path,
    settings: Settings,
    say: Say,
    *,
    replace: bool = False,
    tokenizer: Tokenizer | None = None,
) -> Dataset:
    """
    Make a dataset from sources, or use the one that is there when it was made from the same.

    Args:
        replace: make it anew where it was made from something else, instead of refusing.
        tokenizer: this one, instead of what the option names.

    Raises:
        ConfigError: no sources; or the target holds another dataset, or something else.
        DataError: a source is missing, empty or damaged.
    """
    if not sources and not settings[DataOptions].validation_source:
        raise ConfigError("sources: none given; give files or folders, - for standard input, or python-stdlib")
    for source in (*sources, *settings[DataOptions].validation_source):
        if is_run(Path(source)):
            raise ConfigError(f"source {source}: is a run, not text; the data that it was trained on is {source}/{DATASET}")
    request = _request(sources, settings)
    if tokenizer is not None:
        request = dataclasses.replace(request, tokenizer="of the weights")
    with explained_os_errors(target, "prepare"):
        exists = (target / MANIFEST).is_file()
    if exists:
        try:
            return _reuse(request, target, say, tokenizer)
        except (ConfigError, DataError):
            if not replace:
                raise
            say(f"dataset {target}: was made from something else; making it anew")
    elif target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"output_dir: {target} exists and is no dataset; delete it, or choose another --output-dir")
    builder = _tokenizer_builder(settings) if tokenizer is None else lambda texts: tokenizer
    dataset = prepare(request, target, builder, settings[DataOptions].workers, say)
    report(dataset, say)
    return dataset


def report(dataset: Dataset, say: Say) -> None:
    """Say what a dataset holds."""
    tokens = sum(split.tokens for split in dataset.splits.values())
    for name, split in dataset.splits.items():
        if not split.tokens:
            continue
        parts = [counted(split.tokens, "token")]
        parts[0] += f" of {counted(split.documents, 'document')}" if split.documents else ""
        parts[0] += f" in {counted(len(split.shards), 'shard')}"
        if split.bytes:
            parts.append(f"{split.bytes / split.tokens:.2f} bytes per token")
        if split.tokens < tokens:
            parts.append(f"{split.tokens / tokens:.1%} of all")
        say(f"{name}: {', '.join(parts)}")


def summary(dataset: Dataset) -> dict[str, Any]:
    """What ``prepare --json`` prints."""
    facts = dataset.manifest
    return {
        "dataset": str(dataset.directory),
        "documents": facts["documents"],
        "train_tokens": dataset.splits["train"].tokens,
        "validation_tokens": dataset.splits["validation"].tokens,
        "bytes": facts["bytes"],
        "vocab_size": dataset.tokenizer.vocab_size,
        "skipped": facts["skipped"],
        "replaced_sequences": facts["replaced_sequences"],
    }


def tokenizer_named(name: str) -> Tokenizer:
    """The tokenizer that an option names, except bpe, which must be trained."""
    if name == "byte":
        return byte_tokenizer()
    if name == "gpt2":
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        return gpt2_tokenizer(Path(cache, "groundup", "gpt2"))
    path = Path(name)
    if is_run(path):  # its tokenizer is in what it prepared, or in what it saved
        path = next((place for place in (path / DATASET, *checkpoints(path)) if (place / "tokenizer.json").is_file()), path)
    return load_tokenizer(path)


def _tokenizer_builder(settings: Settings) -> Callable[[Iterable[str]], Tokenizer]:
    options = settings[TokenizerOptions]
    if options.tokenizer == "bpe":
        return lambda texts: train_bpe(texts, options.vocab_size)
    # Found, or not, before any text is read.
    tokenizer = tokenizer_named(options.tokenizer)
    return lambda texts: tokenizer


def _request(sources: Sequence[str], settings: Settings) -> PrepareRequest:
    data, tokenizer = settings[DataOptions], settings[TokenizerOptions]
    if [*sources, *data.validation_source].count(STDIN) > 1:
        raise ConfigError("sources: - (standard input) is given twice; it can be read once")
    return PrepareRequest(
        sources=tuple(sources),
        validation_sources=data.validation_source,
        validation_fraction=data.validation_fraction,
        read=ReadOptions(data.text_column, data.encoding_errors),
        shard_tokens=data.shard_tokens,
        tokenizer=tokenizer.tokenizer,
        vocab_size=tokenizer.vocab_size,
        tokenizer_train_bytes=tokenizer.tokenizer_train_bytes,
    )


def _reuse(request: PrepareRequest, target: Path, say: Say, tokenizer: Tokenizer | None) -> Dataset:
    """The dataset that is there, if it was made as asked for, from sources that have not changed."""
    dataset = open_dataset(target)
    was, now = dataset.manifest["request"], request.description()
    # The same text may be spelled by another path: sources are compared by their content.
    keys = [key for key in now if not key.endswith("sources")]
    by_path = request.tokenizer not in ("bpe", "byte", "gpt2") and was["tokenizer"] not in ("bpe", "byte", "gpt2")
    if by_path:
        keys.remove("tokenizer")
    if differences := [f"{key} {was.get(key)!r} → {now[key]!r}" for key in keys if was.get(key) != now[key]]:
        raise ConfigError(
            f"dataset {target}: was made with other options ({'; '.join(differences)}); choose another --output-dir, or "
            "delete it to make it anew"
        )
    if by_path and (tokenizer or tokenizer_named(request.tokenizer)).sha256 != dataset.tokenizer.sha256:
        raise ConfigError(
            f"dataset {target}: was made with another tokenizer than {request.tokenizer} is now; choose another "
            "--output-dir, or delete it to make it anew"
        )
    if STDIN in (*request.sources, *request.validation_sources):
        raise ConfigError(
            f"dataset {target}: exists, and standard input cannot be compared with it; to go on, give "
            f"{target} as the source instead of -"
        )
    if survey(request).digest != dataset.manifest["content_sha256"]:
        raise ConfigError(
            f"dataset {target}: the text in {', '.join(request.sources)} is not what it was made from; choose another "
            f"--output-dir, or use {target} itself as the source to go on with the old text"
        )
    say(f"dataset {target}: made from the same text before, used as it is")
    return dataset
