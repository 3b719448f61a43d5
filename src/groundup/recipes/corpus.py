"""The data of a run: a dataset as it is, or a mixture of sources with names and weights, from text or prepared before."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path

from groundup.config.load import Settings
from groundup.config.options import PREPARE_GROUPS, DataOptions, InitialWeightsOptions, TokenizerOptions
from groundup.data.mixture import Corpus, Part
from groundup.data.named import NamedSource
from groundup.data.shards import Dataset
from groundup.errors import ConfigError
from groundup.recipes.loading import is_dataset, open_any_dataset
from groundup.recipes.prepare import DATASET, OF_THE_WEIGHTS, prepare_dataset, report, sources_with_names, tokenizer_named
from groundup.tokenizer.special import FILE_SEPARATOR
from groundup.tokenizer.tokenizer import Tokenizer

Say = Callable[[str], None]
OF_A_DATASET = "of a dataset"
"""Stands in a dataset for the tokenizer of another one, with which it is mixed."""


def corpus_of_run(sources: Sequence[str], run: Path, settings: Settings, say: Say, tokenizer: Tokenizer | None) -> Corpus:
    """
    The data to train on: the source itself, a mixture of named ones, or RUN/dataset made from the sources.

    Args:
        tokenizer: that of the weights to start from, instead of the one that the option names.
    """
    given = _given_tokenizer(settings)
    # Nothing was learned from the dataset of a run without checkpoints: it may still change.
    fresh = not any(run.glob("checkpoint-*"))
    if named := sources_with_names(sources, settings):
        return prepare_mixture(named, run / DATASET, settings, say, replace=fresh, tokenizer=tokenizer or given)
    if len(sources) == 1 and is_dataset(Path(sources[0])):
        dataset = open_any_dataset(Path(sources[0]), tokenizer or given)
        if tokenizer is None and given and "request" in dataset.manifest:
            was = dataset.manifest["request"]["tokenizer"]
            if given != was:
                raise ConfigError(
                    f"tokenizer: {given!r} (from {settings.origins['tokenizer']}), but {sources[0]} was made with {was!r}; "
                    "leave --tokenizer out, or prepare the text again"
                )
        names = [f.name for group in PREPARE_GROUPS for f in fields(group) if settings.origins[f.name] != "default"]
        if idle := [name for name in names if name != "tokenizer"]:
            say(f"no effect, because {sources[0]} is prepared already: {', '.join(idle)}")
        report(dataset, say)
        return Corpus.of(dataset)
    if tokenizer is None and settings[InitialWeightsOptions].init_from and given is None:
        raise ConfigError(
            f"tokenizer: {settings[InitialWeightsOptions].init_from} holds none; name the one that it was trained with, "
            "usually --tokenizer gpt2"
        )
    return Corpus.of(prepare_dataset(sources, run / DATASET, settings, say, replace=fresh, tokenizer=tokenizer))


def _given_tokenizer(settings: Settings) -> str | None:
    """The tokenizer option, where somebody gave it."""
    return None if settings.origins["tokenizer"] == "default" else settings[TokenizerOptions].tokenizer


def prepare_mixture(
    named: Sequence[NamedSource],
    target: Path,
    settings: Settings,
    say: Say,
    *,
    replace: bool = False,
    tokenizer: Tokenizer | str | None = None,
) -> Corpus:
    """
    The mixture of named sources: datasets are opened where they are, text is prepared into ``target``.

    Where there are datasets, text is tokenized as they are.

    Args:
        replace: make ``target`` anew where it was made from something else, instead of refusing.
        tokenizer: that of the weights to start from, or the option's name for one, where somebody gave it.

    Raises:
        ConfigError: a dataset has no source of that name, or was made with another tokenizer.
        DataError: a source is missing, empty or damaged.
    """
    prepared = [source for source in named if is_dataset(Path(source.path))]
    opened = {path: open_any_dataset(Path(path), tokenizer) for path in sorted({source.path for source in prepared})}
    for dataset in opened.values():
        report(dataset, say)
    if not prepared:
        given, origin = tokenizer if isinstance(tokenizer, Tokenizer) else None, OF_THE_WEIGHTS
    else:
        # Checked before any text is read.
        given, origin = _mixture(prepared, opened).tokenizer, OF_A_DATASET
        if settings[DataOptions].path_context and FILE_SEPARATOR not in given.special_ids:
            raise ConfigError(
                f"path_context: True (from {settings.origins['path_context']}), but {prepared[0].path} was prepared without "
                "it; prepare it again with --path-context, or leave it out"
            )
        asked = tokenizer_named(tokenizer) if isinstance(tokenizer, str) and tokenizer != "bpe" else None
        if asked is not None and not given.gives_the_ids_of(asked):
            raise ConfigError(
                f"tokenizer: {tokenizer} (from {settings.origins['tokenizer']}), but {prepared[0].path} was made with another; "
                "leave --tokenizer out, or prepare the text again"
            )
    if texts := [source for source in named if source.path not in opened]:
        made = prepare_dataset(
            [], target, settings, say, replace=replace, tokenizer=given, tokenizer_origin=origin, named=texts
        )
        opened |= {source.path: made for source in texts}
    return _mixture(named, opened)


def open_mixture(named: Sequence[NamedSource], made: Path, tokenizer: Tokenizer) -> Corpus:
    """
    The mixture of a run again: datasets where they are, and ``made``, the dataset that was made of its text.

    Args:
        tokenizer: for .bin files, which do not say theirs.

    Raises:
        ConfigError: one of them is gone.
    """
    opened = {}
    for source in named:
        if is_dataset(Path(source.path)):
            opened[source.path] = open_any_dataset(Path(source.path), tokenizer)
        elif is_dataset(made) and source.name in (dataset := open_any_dataset(made, tokenizer)).sources:
            opened[source.path] = dataset
        else:
            raise ConfigError(
                f"data: the dataset of source {source.name} is gone (was {source.path}); put it back there, or give --data "
                "with a dataset or validation text"
            )
    return _mixture(named, opened)


def _mixture(named: Sequence[NamedSource], opened: Mapping[str, Dataset]) -> Corpus:
    """The named sources, each in the dataset of its path."""
    parts = []
    for source in named:
        dataset = opened[source.path]
        if dataset.sources and source.name not in dataset.sources:
            raise ConfigError(
                f"source: {source.path} has no source {source.name}, it holds {', '.join(dataset.sources)}; name one of these"
            )
        parts.append(Part(source.name, source.weight, dataset, source.name if dataset.sources else None))
    return Corpus(tuple(parts))
