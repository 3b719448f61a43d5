"""groundup prepare: text to a tokenizer and shards."""

import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from groundup.checkpoint.commit import checkpoints
from groundup.config.load import Settings
from groundup.config.options import DataOptions, TokenizerOptions
from groundup.data.named import EXAMPLE, NamedSource, named_sources
from groundup.data.prepare import PrepareRequest, counted, prepare, survey
from groundup.data.shards import MANIFEST, SPLITS, Dataset, open_dataset
from groundup.data.sources import STDIN, ReadOptions, is_groundup_output, is_run
from groundup.errors import ConfigError, DataError
from groundup.runtime.files import explained_os_errors
from groundup.tokenizer.gpt2_files import gpt2_tokenizer
from groundup.tokenizer.special import FILE_SEPARATOR
from groundup.tokenizer.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer
from groundup.tokenizer.training import train_bpe

Say = Callable[[str], None]
DATASET = "dataset"
"""The folder in a run that holds the dataset made for it."""
OF_THE_WEIGHTS = "of the weights"
"""Stands in a dataset for a tokenizer that no option named."""


def prepare_dataset(
    sources: Sequence[str],
    target: Path,
    settings: Settings,
    say: Say,
    *,
    replace: bool = False,
    tokenizer: Tokenizer | None = None,
    tokenizer_origin: str = OF_THE_WEIGHTS,
    named: Sequence[NamedSource] | None = None,
) -> Dataset:
    """
    Make a dataset from sources, or use the one that is there when it was made from the same.

    Args:
        sources: plain ones; none where the option ``source`` names some.
        replace: make it anew where it was made from something else, instead of refusing.
        tokenizer: this one, instead of what the option names.
        tokenizer_origin: what the dataset says of that tokenizer.
        named: these sources with names, instead of those of the option.

    Raises:
        ConfigError: no sources, or plain ones and named ones; or the target holds another dataset, or something else.
        DataError: a source is missing, empty or damaged.
    """
    named = sources_with_names(sources, settings) if named is None else named
    paths = [source.path for source in named] or sources
    if not paths and not settings[DataOptions].validation_source:
        raise ConfigError(
            "sources: none given; give files or folders, - for standard input, python-stdlib, or --source NAME=PATH:WEIGHT"
        )
    for source in (*paths, *settings[DataOptions].validation_source):
        if is_run(Path(source)):
            raise ConfigError(f"source {source}: is a run, not text; the data that it was trained on is {source}/{DATASET}")
    for part in named:
        if is_groundup_output(Path(part.path)):
            raise ConfigError(
                f"source {part.path} ({part.name}): is a dataset that is prepared already; leave it out here, and give it to "
                "`groundup train --source`, which mixes it as it is"
            )
    request = _request(paths, settings, tuple(source.name for source in named))
    if tokenizer is not None:
        request = dataclasses.replace(request, tokenizer=tokenizer_origin)
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


def sources_with_names(sources: Sequence[str], settings: Settings) -> tuple[NamedSource, ...]:
    """
    The sources that the option ``source`` names, with their weights; () where it names none.

    Raises:
        ConfigError: plain sources are given too; or an option that named ones have no use for, or a malformed one.
    """
    data, origins = settings[DataOptions], settings.origins
    if not data.source:
        return ()
    if sources:
        raise ConfigError(
            f"sources: {', '.join(sources)} and --source {data.source[0]} (from {origins['source']}) cannot be mixed; give all "
            f"of them as --source {EXAMPLE}"
        )
    if data.validation_source:
        raise ConfigError(
            f"validation_source: {data.validation_source[0]} (from {origins['validation_source']}) has no place beside "
            "--source, whose sources are each evaluated on a share of their own (--validation-fraction); leave it out"
        )
    if not data.validation_fraction:
        raise ConfigError(
            f"validation_fraction: 0 (from {origins['validation_fraction']}) leaves nothing to evaluate each --source on; give "
            "more than 0"
        )
    return named_sources(data.source, origins["source"])


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

    def tokens(source: str | None = None) -> dict[str, int]:
        return {f"{split}_tokens": dataset.split(split, source).tokens for split in SPLITS}

    return {
        "dataset": str(dataset.directory),
        "documents": facts["documents"],
        **tokens(),
        **({"sources": {name: tokens(name) for name in dataset.sources}} if dataset.sources else {}),
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


def _request(sources: Sequence[str], settings: Settings, names: tuple[str, ...]) -> PrepareRequest:
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
        names=names,
        path_context=data.path_context,
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
    keys += [key for key in ("names", "path_context") if key in was and key not in now]
    if differences := [f"{key} {was.get(key)!r} → {now.get(key)!r}" for key in keys if was.get(key) != now.get(key)]:
        raise ConfigError(
            f"dataset {target}: was made with other options ({'; '.join(differences)}); choose another --output-dir, or "
            "delete it to make it anew"
        )
    if by_path:
        made_with = tokenizer or tokenizer_named(request.tokenizer)
        if request.path_context:
            made_with = made_with.with_special_tokens([FILE_SEPARATOR])
        if not made_with.gives_the_ids_of(dataset.tokenizer):
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
