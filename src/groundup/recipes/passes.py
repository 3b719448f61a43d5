"""How many windows a pass takes: as given, as recorded by the run, or found by a dry run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from groundup.config.declaration import AUTO
from groundup.config.load import Settings
from groundup.config.options import (
    BatchOptions,
    InitialWeightsOptions,
    OptimizerOptions,
    RunOptions,
    ScheduleOptions,
    SpeedOptions,
)
from groundup.config.ramp import ends
from groundup.model.gpt2 import GPT2Config
from groundup.recipes.batch_size import fitting_batch_sizes
from groundup.runtime.device import Machine

Say = Callable[[str], None]


@dataclass(frozen=True)
class Passes:
    """Windows in one pass, of training and of evaluation."""

    train: int
    evaluation: int


def passes_for(
    settings: Settings,
    config: GPT2Config,
    machine: Machine,
    *,
    validation_windows: int,
    recorded: Mapping[str, Any] | None,
    say: Say,
) -> Passes:
    """
    Windows in one pass. A run that goes on takes what it was started with: another cut would round otherwise.

    Args:
        validation_windows: windows in the validation text.
        recorded: trainer_state.json of the checkpoint that the run goes on from.

    Raises:
        ResourceError: auto, and not one window fits.
    """
    batch, run = settings[BatchOptions], settings[RunOptions]
    given = {"train": batch.per_device_train_batch_size, "evaluation": batch.per_device_eval_batch_size}
    if recorded is not None:
        before = {"train": recorded.get("train_batch_size"), "evaluation": recorded.get("eval_batch_size")}
        given = {name: before[name] or value if value == AUTO else value for name, value in given.items()}
    asked = {name for name, value in given.items() if value == AUTO}
    if not asked:
        return Passes(int(given["train"]), int(given["evaluation"]))
    measured = validation_windows
    if run.max_eval_tokens:
        measured = min(measured, max(1, run.max_eval_tokens // config.n_positions))
    found = fitting_batch_sizes(
        config,
        machine,
        train_windows=max(ends(batch.total_batch_tokens)) // config.n_positions if "train" in asked else 0,
        eval_windows=measured if "evaluation" in asked else 0,
        optimizer=optimizer_arguments(settings),
        activation_checkpointing=settings[SpeedOptions].activation_checkpointing,
        torch_compile=settings[SpeedOptions].torch_compile,
        ema=settings[OptimizerOptions].ema_decay > 0,
        freeze=settings[InitialWeightsOptions].freeze,
        say=say,
    )
    train = found.train if "train" in asked else int(given["train"])
    evaluation = found.evaluation if "evaluation" in asked else int(given["evaluation"])
    return Passes(train, evaluation)


def optimizer_arguments(settings: Settings) -> dict[str, Any]:
    """The arguments of ``build_optimizer``, but the model."""
    options = settings[OptimizerOptions]
    return {
        "optim": options.optim,
        "learning_rate": settings[ScheduleOptions].learning_rate,
        "beta1": options.adam_beta1,
        "beta2": options.adam_beta2,
        "epsilon": options.adam_epsilon,
        "weight_decay": options.weight_decay,
        "weight_decay_type": options.weight_decay_type,
        "sgd_momentum": options.sgd_momentum,
        "muon_momentum": options.muon_momentum,
    }
