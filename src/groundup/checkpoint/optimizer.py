"""An optimizer's state as named tensors, and back."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from groundup.errors import CheckpointError


def save_optimizer(optimizers: Sequence[torch.optim.Optimizer], model: nn.Module, path: Path) -> None:
    """Write the state of every parameter as ``<parameter>/<slot>``, e.g. ``wte.weight/exp_avg``; each is in one optimizer."""
    tensors = {
        f"{name}/{slot}": value.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        for optimizer in optimizers
        for slot, value in optimizer.state.get(parameter, {}).items()
        if value is not None
    }
    save_file(tensors, path, metadata={"format": "pt"})


def load_optimizer(optimizers: Sequence[torch.optim.Optimizer], model: nn.Module, path: Path) -> None:
    """
    Restore what ``save_optimizer`` wrote; hyper-parameters stay those of ``optimizers``.

    Raises:
        CheckpointError: the file is damaged, or of another model or optimizer.
    """
    try:
        tensors: Mapping[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {path}: cannot be read ({error})") from None
    parameters = dict(model.named_parameters())
    owners = {p: (o, group) for o in optimizers for group in o.param_groups for p in group["params"]}
    slots = {name: _slots(*owners[p], p) for name, p in parameters.items() if p in owners}
    for key, tensor in tensors.items():
        name, _, slot = key.partition("/")
        if name not in slots or (slot in slots[name] and tensor.shape != slots[name][slot]):
            raise CheckpointError(f"checkpoint {path}: {key} {tuple(tensor.shape)} fits no parameter of this model")
        optimizer, group = owners[parameters[name]]
        if slot not in slots[name]:
            kept = f"keeps {', '.join(slots[name])}" if slots[name] else "keeps nothing"
            raise CheckpointError(
                f"checkpoint {path}: {key} is of another optimizer ({type(optimizer).__name__} {kept}); go on with the "
                "--optim that the run was started with, or use another --output-dir for a new run"
            )
        # Steps are counted on the CPU, unless a fused kernel counts them.
        device = parameters[name].device if slot != "step" or group.get("fused") else "cpu"
        optimizer.state[parameters[name]][slot] = tensor.to(device)
    # All or none: before the first update an optimizer has no state.
    missing = [f"{name}/{slot}" for name in slots for slot in slots[name] if tensors and f"{name}/{slot}" not in tensors]
    if missing:
        raise CheckpointError(f"checkpoint {path}: lacks {len(missing)} tensors of the optimizer (first: {missing[0]})")


def _slots(optimizer: torch.optim.Optimizer, group: Mapping[str, Any], parameter: Tensor) -> dict[str, torch.Size]:
    """What an optimizer keeps of a parameter after an update: torch's names and the shapes."""
    shape, scalar = parameter.shape, torch.Size()
    if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        return {"step": scalar, "exp_avg": shape, "exp_avg_sq": shape}
    if isinstance(optimizer, torch.optim.Adafactor):
        if len(shape) < 2:
            return {"step": scalar, "variance": shape}
        return {"step": scalar, "row_var": torch.Size([*shape[:-1], 1]), "col_var": torch.Size([*shape[:-2], 1, shape[-1]])}
    if isinstance(optimizer, torch.optim.SGD) and not group["momentum"]:
        return {}
    return {"momentum_buffer": shape}  # of SGD, and of Muon
