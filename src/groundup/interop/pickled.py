"""
Other people's pickles (``.pt``, ``.pth``, ``.bin``), read without running them.

A pickle is a program: it names functions, and a plain reader imports and calls them. torch's weights-only reader knows
tensors and plain containers only, and refuses the rest before it is imported. Checkpoints of trainers hold a settings
object or a measured number beside the weights; an inert stand-in takes the place of these, so that nothing of theirs is
imported either.
"""

import pickle
import re
import reprlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from groundup.errors import CheckpointError

ZIP_START, PICKLE_START, LFS_START = b"PK\x03\x04", b"\x80", b"version https://git-lfs"
SAVE_ADVICE = (
    "where it was trained, save the weights alone: torch.save(model.state_dict(), 'weights.pt'), or "
    "safetensors.torch.save_model(model, 'model.safetensors')"
)

# build-nanogpt saves its GPTConfig, forks of nanoGPT an argparse.Namespace, from whatever module it was defined in.
SETTINGS_CLASSES = frozenset({"GPTConfig", "GPT2Config", "Namespace"})
# Losses that were measured with numpy, and folders among the settings.
SETTINGS_VALUES = frozenset(
    {"numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype"}
    | {f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")}
)
MOST_STAND_INS = 20  # each costs reading the file's instructions once more

# How torch's reader names what it refused: torch/_weights_only_unpickler.py, the GLOBAL instruction.
REFUSED = re.compile(r"GLOBAL (\S+) (?:was not an allowed|whose module)")


class Settings:
    """
    Stands in for an object of settings in a pickle: keeps the attributes it is given, and does nothing with them.

    Each class of the file has a subclass of its own, of the same name.
    """

    values: Mapping[str, Any] = MappingProxyType({})
    """The attributes, by name."""

    def __init__(self, *_: object): ...

    def __setstate__(self, state: object) -> None:
        parts = state if isinstance(state, tuple) else (state,)  # (attributes, slots) of a class with slots
        self.values = {
            name: value for part in parts if isinstance(part, dict) for name, value in part.items() if isinstance(name, str)
        }


def shown(thing: object) -> str:
    """Something from a file for a message: short, on one line, and without control characters for the terminal."""
    # Only so much of something nested or long is spelled out.
    text = thing if isinstance(thing, str) else reprlib.repr(thing)
    return text[:100] if text.isprintable() else ascii(text)[:100]


def is_pickle(path: Path) -> bool:
    """
    Whether a file begins as torch.save writes it, in its zip form or in the older bare one.

    A .safetensors file begins with the length of its JSON header, whose first byte may be a pickle's; the brace after
    the eight bytes tells them apart.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        start = file.read(9)
    return start.startswith(ZIP_START) or (start.startswith(PICKLE_START) and start[8:] != b"{")


def read_pickled(path: Path) -> Any:
    """
    What torch.save wrote, on the CPU: tensors, numbers, strings and containers of them; nothing in the file is run.

    The tensors of a zip file stay on disk until they are used. Objects of settings come as ``Settings``.

    Raises:
        CheckpointError: not a file of torch.save, damaged, or a pickle that asks for more than data.
    """
    _require_pickle(path)
    stand_ins: dict[str, type[Settings]] = {}
    while True:
        try:
            with (
                warnings.catch_warnings(),
                torch.serialization.safe_globals([(kind, name) for name, kind in stand_ins.items()]),
            ):
                warnings.simplefilter("ignore")
                return _load(path)
        except pickle.UnpicklingError as error:
            found = REFUSED.search(str(error))
            if found is None:
                raise CheckpointError(
                    f"checkpoint {path}: is no file of torch.save, or damaged, or holds more than weights; nothing in it was "
                    f"run; {SAVE_ADVICE}"
                ) from None
            wanted = found[1]
            is_setting = wanted.rpartition(".")[2] in SETTINGS_CLASSES or wanted in SETTINGS_VALUES
            if not is_setting or wanted in stand_ins or len(stand_ins) == MOST_STAND_INS:
                raise CheckpointError(
                    f"checkpoint {path}: the pickle asks for {shown(wanted)}, which is code, not weights; it was not run; "
                    f"{SAVE_ADVICE}"
                ) from None
            stand_ins[wanted] = type(wanted.rpartition(".")[2], (Settings,), {})
        except Exception as error:  # a damaged pickle fails in as many ways as there are instructions
            reason = shown(str(error).partition("\n")[0] or type(error).__name__)
            raise CheckpointError(f"checkpoint {path}: cannot be read ({reason}); it is damaged, copy it again") from None


def _load(path: Path) -> Any:
    # As an open file, because torch reads what is called .safetensors as that; and only zip files can stay on disk.
    with path.open("rb") as file:
        stays_on_disk = file.read(4) == ZIP_START and path.suffix != ".safetensors"
        file.seek(0)
        return torch.load(path if stays_on_disk else file, map_location="cpu", weights_only=True, mmap=stays_on_disk)


def _require_pickle(path: Path) -> None:
    if path.is_dir():
        raise CheckpointError(f"checkpoint {path}: is a folder; give the file of weights in it")
    try:
        found = is_pickle(path)
        with path.open("rb") as file:
            start = file.read(len(LFS_START))
    except OSError as error:
        raise CheckpointError(f"checkpoint {path}: cannot be read ({error.strerror})") from None
    if not start:
        raise CheckpointError(f"checkpoint {path}: is empty; copy it again")
    if start == LFS_START:
        raise CheckpointError(f"checkpoint {path}: is a Git LFS pointer, not the weights themselves; run git lfs pull")
    if not found:
        raise CheckpointError(
            f"checkpoint {path}: is neither a file of torch.save nor safetensors (it begins with {start[:8]!r}); {SAVE_ADVICE}"
        )
