"""Say where and how a command computes."""

from groundup.config.options import MachineOptions
from groundup.runtime.device import Machine, choose_machine


def machine_for(options: MachineOptions, *, training: bool) -> Machine:
    """The machine of a command: bf16 by itself only for training, where speed counts more than the last digit."""
    return choose_machine(options.device, options.bf16 if training or options.bf16 is not None else False)
