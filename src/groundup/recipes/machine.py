"""Say where and how a command computes."""

from groundup.config.options import MachineOptions, SpeedOptions
from groundup.runtime.device import Machine, choose_machine


def machine_for(options: MachineOptions, *, training: bool, speed: SpeedOptions | None = None) -> Machine:
    """
    The machine of a command: bf16 by itself only for training, where speed counts more than the last digit.

    Args:
        speed: of a training; fp16 and TF32 are there alone.

    Raises:
        ConfigError: the device that was asked for is not there, or lacks TF32.
    """
    bf16 = options.bf16 if training or options.bf16 is not None else False
    if speed is None:
        return choose_machine(options.device, bf16)
    return choose_machine(options.device, bf16, speed.fp16, speed.tf32)
