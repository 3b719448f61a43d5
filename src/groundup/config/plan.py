"""From options and facts about data and machine to what a run will do: pure arithmetic."""

import math
from dataclasses import dataclass

from groundup.config.options import BatchOptions, ModelOptions, RunOptions, ScheduleOptions
from groundup.config.ramp import Ramp, ends, value_at
from groundup.errors import ConfigError

MicroBatches = tuple[tuple[int, int], ...]
"""Passes of a step, each as (first window, windows) within the global batch."""


@dataclass(frozen=True)
class Plan:
    """What a run will do, in numbers. Steps are counted from 1; what changes over the run is a function of the step."""

    windows: int
    """Training windows in one epoch."""
    n_positions: int
    """Tokens of a window."""
    global_batch: int | Ramp
    """Windows in a global batch, over all ranks."""
    sequence_length: int | Ramp
    per_pass: int
    """Windows of one pass at most."""
    total_steps: int
    warmup_steps: int
    decay_steps: int
    """The last steps, in which the rate of warmup_stable_decay falls."""
    world_size: int = 1
    rank: int = 0

    def windows_at(self, step: int) -> int:
        """Windows in the global batch of a step."""
        return int(value_at(self.global_batch, step, self.total_steps))

    def tokens_at(self, step: int) -> int:
        """Tokens in the global batch of a step."""
        return self.windows_at(step) * self.n_positions

    def sequence_length_at(self, step: int) -> int:
        """Tokens of the pieces that windows are cut into at a step: a divisor of n_positions."""
        wanted = int(value_at(self.sequence_length, step, self.total_steps))
        return next(length for length in range(wanted, 0, -1) if self.n_positions % length == 0)

    def micro_batches_at(self, step: int) -> MicroBatches:
        """Passes of a step, of this rank."""
        return micro_batches(self.windows_at(step), self.per_pass, self.world_size, self.rank)

    @property
    def windows_per_step(self) -> int:
        """Windows in the global batch, where the run has reached its full size."""
        return ends(self.global_batch)[1]

    @property
    def tokens_per_step(self) -> int:
        """Tokens in the global batch, where the run has reached its full size."""
        return self.windows_per_step * self.n_positions

    @property
    def total_windows(self) -> int:
        """Windows that the whole run reads."""
        return _windows_of(self.global_batch, self.total_steps)

    @property
    def epochs(self) -> float:
        """Passes over the data that the run makes."""
        return self.total_windows / self.windows


def plan_run(
    model: ModelOptions,
    batch: BatchOptions,
    schedule: ScheduleOptions,
    run: RunOptions,
    *,
    windows: int,
    per_pass: int = 0,
    world_size: int = 1,
    rank: int = 0,
) -> Plan:
    """
    Work out accumulation, steps and warmup.

    Args:
        windows: training windows in one epoch, at least 1.
        per_pass: windows of one pass, where the option says auto.
        world_size: ranks that share the global batch.
        rank: this process among them.

    Raises:
        ConfigError: fewer windows in the global batch than ranks.
    """
    micro = per_pass or int(batch.per_device_train_batch_size)
    length, total = model.n_positions, batch.total_batch_tokens
    global_batch: int | Ramp
    if batch.gradient_accumulation_steps:
        global_batch = micro * batch.gradient_accumulation_steps * world_size
    elif isinstance(total, Ramp):
        global_batch = Ramp(f"{total.start // length}:{total.end // length}@{total.length}")
    else:
        global_batch = total // length
    if min(ends(global_batch)) < world_size:
        raise ConfigError(
            f"total_batch_tokens: {total} is {min(ends(global_batch))} windows of {length} tokens, fewer than the "
            f"{world_size} processes; give at least {world_size * length}"
        )
    if run.max_steps:
        total_steps = run.max_steps
    elif run.max_train_tokens:
        total_steps = _steps_for(math.ceil(run.max_train_tokens / length), global_batch)
    else:
        total_steps = _steps_for(math.ceil(run.num_train_epochs * windows), global_batch)
    return Plan(
        windows=windows,
        n_positions=length,
        global_batch=global_batch,
        sequence_length=batch.sequence_length or length,
        per_pass=micro,
        total_steps=total_steps,
        warmup_steps=steps_of(schedule.warmup_steps, total_steps),
        decay_steps=steps_of(schedule.num_decay_steps, total_steps),
        world_size=world_size,
        rank=rank,
    )


def micro_batches(windows: int, micro: int, world_size: int, rank: int) -> MicroBatches:
    """
    Cut a global batch into one rank's passes of at most ``micro`` windows; the last one may be smaller.

    Each rank takes a contiguous block, so the global batch is the same for any number of ranks.
    """
    start, end = windows * rank // world_size, windows * (rank + 1) // world_size
    return tuple((first, min(micro, end - first)) for first in range(start, end, micro))


def steps_of(given: float, total_steps: int) -> int:
    """Steps as given, or below 1 as a fraction of the run."""
    return math.ceil(given * total_steps) if given < 1 else round(given)


def _windows_of(global_batch: int | Ramp, total_steps: int) -> int:
    """Windows that a run of so many steps reads."""
    if not isinstance(global_batch, Ramp):
        return global_batch * total_steps
    growing = min(total_steps, global_batch.steps(total_steps))
    read = sum(int(global_batch.value_at(step, total_steps)) for step in range(1, growing + 1))
    return read + (total_steps - growing) * global_batch.end


def _steps_for(windows: int, global_batch: int | Ramp) -> int:
    """The fewest steps that read so many windows."""
    if not isinstance(global_batch, Ramp):
        return math.ceil(windows / global_batch)
    low, high = 1, math.ceil(windows / min(ends(global_batch)))
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _windows_of(global_batch, middle) >= windows else (middle + 1, high)
    return low
