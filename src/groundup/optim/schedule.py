"""Learning-rate schedules as pure functions of the step; no state to save."""

import math


def learning_rate_at(step: int, *, kind: str, peak: float, warmup_steps: int, total_steps: int, min_rate: float) -> float:
    """
    The learning rate of a step, counted from 1.

    Linear warmup reaches ``peak`` at step ``warmup_steps``. Then progress p goes from 0 at the next step towards 1 after
    the last, as in Hugging Face's schedules of these names: constant_with_warmup stays at peak; linear is
    peak · (1 − p); cosine is peak · (1 + cos πp) / 2; cosine_with_min_lr is the cosine between peak and
    min_rate · peak (Loshchilov and Hutter 2017, eq. 5, one cycle).
    """
    if step <= warmup_steps:
        return peak * step / warmup_steps
    progress = min(1.0, (step - 1 - warmup_steps) / max(1, total_steps - warmup_steps))
    if kind == "constant_with_warmup":
        return peak
    if kind == "linear":
        return peak * (1 - progress)
    floor = min_rate if kind == "cosine_with_min_lr" else 0.0
    return peak * (floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2)
