"""An optimizer's state as named tensors, and back."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from groundup.errors import CheckpointError


def save_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, path: Path) -> None:
    """Write the state of every parameter as ``<parameter>/<slot>``, e.g. ``wte.weight/exp_avg``."""
    tensors = {
        f"{name}/{slot}": value.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        for slot, value in optimizer.state.get(parameter, {}).items()
    }
    save_file(tensors, path, metadata={"format": "pt"})


def load_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, path: Path) -> None:
    """
    Restore what ``save_optimizer`` wrote; hyper-parameters stay those of ``optimizer``.

    Raises:
        CheckpointError: the file is damaged or of another model.
    """
    try:
        tensors: Mapping[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {path}: cannot be read ({error})") from None
    parameters = dict(model.named_parameters())
    for key, tensor in tensors.items():
        name, _, slot = key.partition("/")
        parameter = parameters.get(name)
        if parameter is None or (tensor.dim() and tensor.shape != parameter.shape):
            raise CheckpointError(f"checkpoint {path}: {key} {tuple(tensor.shape)} fits no parameter of this model")
        optimizer.state[parameter][slot] = tensor.to(parameter.device)
    # All or none: before the first update an optimizer has no state.
    slots = {key.partition("/")[2] for key in tensors}
    trained = [name for name, parameter in parameters.items() if parameter.requires_grad]
    missing = [f"{name}/{slot}" for name in trained for slot in slots if f"{name}/{slot}" not in tensors]
    if missing:
        raise CheckpointError(f"checkpoint {path}: lacks {len(missing)} tensors of the optimizer (first: {missing[0]})")
