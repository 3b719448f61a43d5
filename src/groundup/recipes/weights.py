"""Whatever somebody's GPT-2 is stored in, opened: the one place that knows all the formats."""

import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from groundup.errors import CheckpointError, ConfigError
from groundup.interop.huggingface import read_hugging_face
from groundup.interop.imported import Imported, most_padding
from groundup.interop.pickled import shown
from groundup.interop.state_dicts import read_state_dict

Say = Callable[[str], None]
OPENAI, HUB = "openai:", "hf:"
HUB_FILES = ["config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer.json", "tokenizer_config.json",
             "vocab.json", "merges.txt"]  # fmt: skip
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
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
        ConfigError: ``n_head`` is not what the files say.
    """
    with _explained(source):
        imported = _open(source, say, n_head, mirrors)
    if n_head and imported.model.config.n_head != n_head:
        raise ConfigError(f"n_head: {n_head} is not the {imported.model.config.n_head} that {source} says; leave --n-head out")
    return imported


@contextmanager
def _explained(source: str) -> Iterator[None]:
    """
    Turn what libraries and we ourselves stumble over in a crafted file into our error; ``--debug`` shows where.

    Raises:
        CheckpointError: the files cannot be read.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error):
            raise  # memory, not the file
        words = shown(f"{type(error).__name__}: {error}")
        raise CheckpointError(
            f"checkpoint {source}: cannot be read ({words}); it is damaged, or no GPT-2; get it again"
        ) from error


def _open(source: str, say: Say, n_head: int, mirrors: Sequence[str]) -> Imported:
    if source.startswith(OPENAI):
        return _openai(source.removeprefix(OPENAI), mirrors)
    if source.startswith(HUB):
        return read_hugging_face(_from_hub(source.removeprefix(HUB), say))
    return _open_path(Path(source), n_head)


def _open_path(path: Path, n_head: int) -> Imported:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        looks_like_hub = not (path.parent.is_dir() and path.parent.name) and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(path))
        hint = f"a model on the Hugging Face hub is spelled hf:{path}" if looks_like_hub else f"give {ACCEPTED}"
        raise CheckpointError(f"checkpoint {path}: not found ({error.strerror}); {hint}") from None
    if stat.S_ISDIR(mode):
        return _open_folder(path)
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"checkpoint {path}: is neither a file nor a folder; give {ACCEPTED}")
    try:
        with path.open("rb") as file:
            is_gguf = file.read(4) == b"GGUF"
    except OSError as error:
        raise CheckpointError(f"checkpoint {path}: cannot be read ({error.strerror}); make it readable") from None
    if path.name in ("model.safetensors", "pytorch_model.bin") and (path.parent / "config.json").is_file():
        raise CheckpointError(f"checkpoint {path}: is one file of several; give the folder, {path.parent}")
    if is_gguf:
        from groundup.interop.gguf_files import read_gguf

        return read_gguf(path)
    return read_state_dict(path, None, n_head or None)


def _open_folder(path: Path) -> Imported:
    try:
        names = sorted(entry.name for entry in path.iterdir())
        odd = [name for name in names if _is_odd(path / name)]
    except OSError as error:
        raise CheckpointError(f"checkpoint {path}: cannot be read ({error.strerror}); make it readable") from None
    if odd:
        raise CheckpointError(f"checkpoint {path / odd[0]}: is neither a file nor a folder; remove it")
    # Half of a download too, so that what is said is what is missing of it.
    if {"hparams.json", "checkpoint", "model.ckpt.index"} & set(names):
        from groundup.interop.openai import read_openai

        return read_openai(path)
    if {"config.json", "adapter_config.json"} & set(names):
        return read_hugging_face(path)
    weights = [name for name in names if name.endswith(WEIGHTS)]
    inner = [name for name in names if (path / name / "config.json").is_file()]
    if "dataset.json" in names:
        hint = "it is a dataset; give the run that was trained on it"
    elif {"model.safetensors", "pytorch_model.bin"} & set(weights):
        hint = "it has weights and no config.json, which says their shape; copy that too"
    elif weights or inner:
        hint = f"give what is in it: {path / (weights or inner)[0]}"
    else:
        hint = f"give {ACCEPTED}"
    raise CheckpointError(f"checkpoint {path}: no checkpoint in it; {hint}")


def _is_odd(path: Path) -> bool:
    """Whether it is a pipe, a socket or a device, which would never end; a link is what it leads to."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False  # a link to nothing
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def tokenizer_hint(imported: Imported) -> str:
    """Which tokenizer a model without one may have had, by its vocabulary."""
    ids = imported.model.config.vocab_size
    if 50257 <= ids <= 50257 + most_padding(50257):
        return "gpt2"
    note = ", of single characters? nanoGPT keeps these in meta.pkl, which groundup does not read" if ids < 256 else ""
    return f"FILE, a tokenizer.json with its {ids:,} ids{note}"


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
    with download_progress() as bars:
        download_openai(size, folder, mirrors or MIRRORS, bars)
    return read_openai(folder)


def _from_hub(name: str, say: Say) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ConfigError(f"hf:{name}: huggingface_hub is not installed; pip install huggingface_hub") from None
    say(f"hf:{name}: looking it up on the hub")
    try:
        folder = Path(snapshot_download(name, allow_patterns=HUB_FILES))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=[*HUB_FILES, "pytorch_model*"]))
        return folder
    except Exception as error:  # the library raises a dozen kinds, and its HTTP client others
        reason = shown(" ".join(str(error).split())[:200])
        raise CheckpointError(
            f"hf:{name}: cannot be fetched ({type(error).__name__}: {reason}); offline, download config.json, "
            "model.safetensors and tokenizer.json elsewhere and give their folder"
        ) from None
