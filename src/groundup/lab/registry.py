"""All experiments, by name."""

import difflib

from groundup.errors import ConfigError
from groundup.lab.experiment import Experiment
from groundup.lab.experiments import (
    accumulation,
    batch_size,
    clipping,
    decoding,
    initialisation,
    label_smoothing,
    learning_rate,
    normalisation,
    precision,
    warmup,
    weight_decay,
)

EXPERIMENTS: dict[str, Experiment] = {
    module.EXPERIMENT.name: module.EXPERIMENT
    for module in (
        learning_rate,
        warmup,
        batch_size,
        initialisation,
        normalisation,
        weight_decay,
        label_smoothing,
        clipping,
        accumulation,
        precision,
        decoding,
    )
}


def experiment_named(name: str) -> Experiment:
    """
    The experiment of a name; ``_`` counts as ``-``.

    Raises:
        ConfigError: there is none; the message names the nearest.
    """
    if found := EXPERIMENTS.get(name.replace("_", "-").lower()):
        return found
    near = difflib.get_close_matches(name.replace("_", "-").lower(), EXPERIMENTS, n=1)
    hint = f"; did you mean {near[0]}?" if near else "; `groundup lab list` shows them"
    raise ConfigError(f"lab: {name!r} is not one of {', '.join(EXPERIMENTS)}{hint}")
