"""The averaged weights of a checkpoint: ``ema.safetensors``, under the model's own names."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from groundup.errors import CheckpointError

AVERAGE = "ema.safetensors"


def save_average(tensors: Mapping[str, Tensor], checkpoint: Path) -> None:
    """Write averaged weights into a checkpoint that is being made."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, checkpoint / AVERAGE)


def load_average(checkpoint: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """
    Read averaged weights.

    Args:
        like: the model's own tensors, by name; names and shapes must be theirs.

    Raises:
        CheckpointError: there are none, or they are damaged or another model's.
    """
    path = checkpoint / AVERAGE
    if not path.is_file():
        raise CheckpointError(
            f"checkpoint {checkpoint}: holds no averaged weights (ema); its run was trained without --ema-decay: leave "
            "--weights out"
        )
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {path}: cannot be read ({error})") from None
    if {n: t.shape for n, t in tensors.items()} != {n: t.shape for n, t in like.items()}:
        raise CheckpointError(f"checkpoint {path}: its tensors are not those of the model beside it")
    return tensors
