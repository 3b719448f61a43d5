"""Whatever somebody's GPT-2 is stored in, opened: the one place that knows all the formats."""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from groundup.errors import CheckpointError, ConfigError
from groundup.interop.huggingface import read_hugging_face
from groundup.interop.imported import Imported
from groundup.interop.state_dicts import read_state_dict

Say = Callable[[str], None]
OPENAI, HUB = "openai:", "hf:"
HUB_FILES = ["config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer.json", "tokenizer_config.json",
             "vocab.json", "merges.txt"]  # fmt: skip
ACCEPTED = (
    "a run, a checkpoint, a Hugging Face folder (config.json), OpenAI's folder (hparams.json), a state dict of nanoGPT, "
    "build-nanogpt or LLMs-from-scratch (.pt, .pth, .safetensors), a .gguf file, openai:124M, or hf:OWNER/NAME"
)


def open_weights(source: str, say: Say, *, n_head: int = 0, mirrors: Sequence[str] = ()) -> Imported:
    """
    Read a model from other people's files, told apart by what they hold.

    Args:
        source: a folder or a file; ``openai:SIZE`` and ``hf:OWNER/NAME`` are downloaded.
        n_head: attention heads, where the files do not say; 0 is not given.
        mirrors: where to download OpenAI's files from; empty is OpenAI.

    Raises:
        CheckpointError: nothing there that is known, or damaged, or another kind of model.
    """
    if source.startswith(OPENAI):
        return _openai(source.removeprefix(OPENAI), mirrors)
    if source.startswith(HUB):
        return read_hugging_face(_from_hub(source.removeprefix(HUB), say))
    path = Path(source)
    if path.is_file():
        with path.open("rb") as file:
            is_gguf = file.read(4) == b"GGUF"
        if is_gguf:
            from groundup.interop.gguf_files import read_gguf

            return read_gguf(path)
        return read_state_dict(path, None, n_head or None)
    if not path.is_dir():
        looks_like_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", source) is not None
        hint = f"; a model on the Hugging Face hub is spelled hf:{source}" if looks_like_hub else f"; give {ACCEPTED}"
        raise CheckpointError(f"checkpoint {source}: not found{hint}")
    # Half of a download too, so that what is said is what is missing of it.
    if any((path / name).is_file() for name in ("hparams.json", "checkpoint", "model.ckpt.index")):
        from groundup.interop.openai import read_openai

        return read_openai(path)
    return read_hugging_face(path)


def say_report(imported: Imported, say: Say) -> None:
    """What had to be done to the tensors, a line each."""
    for title, notes in (
        ("missing", imported.missing),
        ("left out", imported.unexpected),
        ("reshaped", imported.reshaped),
    ):
        for note in notes[:10]:
            say(f"{title}: {note}")
        if len(notes) > 10:
            say(f"{title}: and {len(notes) - 10:,} more")


def _openai(size: str, mirrors: Sequence[str]) -> Imported:
    from groundup.interop.download import MIRRORS, download_openai
    from groundup.interop.openai import read_openai
    from groundup.tracking.progress import download_progress

    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(cache, "groundup", "gpt-2", size)
    with download_progress() as shown:
        download_openai(size, folder, mirrors or MIRRORS, shown)
    return read_openai(folder)


def _from_hub(name: str, say: Say) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ConfigError(f"hf:{name}: huggingface_hub is not installed; pip install huggingface_hub") from None
    say(f"hf:{name}: looking it up on the hub")
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:  # the library raises a dozen kinds, and its HTTP client others
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"hf:{name}: cannot be fetched ({type(error).__name__}: {reason}); offline, download config.json, "
            "model.safetensors and tokenizer.json elsewhere and give their folder"
        ) from None
