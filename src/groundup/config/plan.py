"""From options and facts about data and machine to what a run will do: pure arithmetic."""

import math
from dataclasses import dataclass

from groundup.config.options import BatchOptions, ModelOptions, OptimizerOptions, RunOptions
from groundup.errors import ConfigError


@dataclass(frozen=True)
class Plan:
    """What a run will do, in numbers."""

    windows: int
    """Training windows in one epoch."""
    windows_per_step: int
    """Windows in a global batch, over all ranks."""
    tokens_per_step: int
    micro_batches: tuple[tuple[int, int], ...]
    """This rank's passes of a step, each as (first window, windows) within the global batch."""
    total_steps: int
    warmup_steps: int

    @property
    def epochs(self) -> float:
        """Passes over the data that the run makes."""
        return self.total_steps * self.windows_per_step / self.windows


def plan_run(
    model: ModelOptions,
    batch: BatchOptions,
    optimizer: OptimizerOptions,
    run: RunOptions,
    *,
    windows: int,
    world_size: int = 1,
    rank: int = 0,
) -> Plan:
    """
    Work out accumulation, steps and warmup.

    Args:
        windows: training windows in one epoch, at least 1.
        world_size: ranks that share the global batch.
        rank: this process among them.

    Raises:
        ConfigError: fewer windows in the global batch than ranks.
    """
    micro = batch.per_device_train_batch_size
    if batch.gradient_accumulation_steps:
        windows_per_step = micro * batch.gradient_accumulation_steps * world_size
    else:
        windows_per_step = batch.total_batch_tokens // model.n_positions
    if windows_per_step < world_size:
        raise ConfigError(
            f"total_batch_tokens: {batch.total_batch_tokens} is {windows_per_step} windows of {model.n_positions} "
            f"tokens, fewer than the {world_size} processes; give at least {world_size * model.n_positions}"
        )
    total_steps = run.max_steps or math.ceil(run.num_train_epochs * windows / windows_per_step)
    warmup = optimizer.warmup_steps
    return Plan(
        windows=windows,
        windows_per_step=windows_per_step,
        tokens_per_step=windows_per_step * model.n_positions,
        micro_batches=micro_batches(windows_per_step, micro, world_size, rank),
        total_steps=total_steps,
        warmup_steps=math.ceil(warmup * total_steps) if warmup < 1 else round(warmup),
    )


def micro_batches(windows: int, micro: int, world_size: int, rank: int) -> tuple[tuple[int, int], ...]:
    """
    Cut a global batch into one rank's passes of at most ``micro`` windows; the last one may be smaller.

    Each rank takes a contiguous block, so the global batch is the same for any number of ranks.
    """
    start, end = windows * rank // world_size, windows * (rank + 1) // world_size
    return tuple((first, min(micro, end - first)) for first in range(start, end, micro))
