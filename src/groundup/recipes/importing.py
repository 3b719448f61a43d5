"""groundup import: other people's weights to a checkpoint of ours, which is a Hugging Face folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from groundup.checkpoint.commit import fill, step_of
from groundup.config.load import Settings
from groundup.config.options import ImportOptions
from groundup.data.sources import is_run
from groundup.errors import ConfigError
from groundup.interop.huggingface import save_model
from groundup.interop.imported import fitted
from groundup.model.flops import parameter_count
from groundup.recipes.loading import is_ours
from groundup.recipes.prepare import tokenizer_named
from groundup.recipes.weights import open_weights, say_report, tokenizer_hint
from groundup.runtime.device import explained_memory_errors
from groundup.runtime.files import new_place, require_free
from groundup.tokenizer.special import never_written

Say = Callable[[str], None]


def import_model(source: str, target: Path, settings: Settings, say: Say) -> dict[str, Any]:
    """
    Read a model, whatever it is stored in, and write it as a checkpoint.

    Returns:
        What ``import --json`` prints: format, parameters, vocab_size, n_positions, missing, unexpected, reshaped, checkpoint.

    Raises:
        ConfigError: the target is taken, or the tokenizer is not known.
        CheckpointError: the source cannot be used.
    """
    options = settings[ImportOptions]
    require_new(target)
    if is_ours(Path(source)):
        raise ConfigError(f"import: {source} is groundup's own already; every command opens it as it is")
    # Named, or not, before gigabytes are read.
    named = tokenizer_named(options.tokenizer) if options.tokenizer else None
    with explained_memory_errors():
        imported = open_weights(source, say, n_head=options.n_head, mirrors=options.mirror)
    if imported.tokenizer is None and named is None:
        raise ConfigError(
            f"tokenizer: {source} holds none; name the one that the model was trained with: --tokenizer "
            f"{tokenizer_hint(imported)}"
        )
    if imported.tokenizer is None and named is not None:
        imported = fitted(imported, named, source)
    tokenizer = imported.tokenizer
    assert tokenizer is not None  # one of the two
    if named is not None and not tokenizer.gives_the_ids_of(named):
        raise ConfigError(
            f"tokenizer: {options.tokenizer!r} (from {settings.origins['tokenizer']}) is not the one that {source} holds; "
            "leave --tokenizer out"
        )

    def write(directory: Path) -> None:
        save_model(imported.model, directory, tokenizer.end_of_text_id, never_written=never_written(tokenizer))
        tokenizer.save(directory)

    say_report(imported, say)
    if not imported.model.config.tie_word_embeddings:
        say("head: a matrix of its own, not the token embedding")
    with new_place(target, "import") as staged:
        # What a folder's name says of its step is held against its manifest.
        fill(staged, step_of(target), write)
    config = imported.model.config
    return {
        "format": imported.format,
        "parameters": parameter_count(imported.model),
        "vocab_size": config.vocab_size,
        "n_positions": config.n_positions,
        "missing": list(imported.missing),
        "unexpected": list(imported.unexpected),
        "reshaped": list(imported.reshaped),
        "checkpoint": str(target),
    }


def require_new(target: Path) -> None:
    """
    Refuse a place where something is, before minutes are spent; it is asked again when the result is there.

    Raises:
        ConfigError: a file, a folder that is not empty, or the inside of a run.
    """
    place = target.resolve()
    if is_run(place.parent):
        raise ConfigError(f"{target}: is inside the run {place.parent}, which would take it for its own; choose another place")
    require_free(place)
