"""Learning-rate schedules as pure functions of the step; no state to save."""

import math
from dataclasses import dataclass

INVERSE_SQRT_TIMESCALE = 10_000
"""Steps after which ``inverse_sqrt`` has fallen to 1/√2, where it has neither warmup nor a scale; transformers' default."""


@dataclass(frozen=True)
class Schedule:
    """
    A learning rate for every step of a run, counted from 1; the kinds have Hugging Face's names.

    But for ``constant`` the rate first rises linearly and is α = ``peak`` at step w = ``warmup_steps``. From the next step on
    it follows the progress p = (s − 1 − w) / (T − w) of step s, from 0 towards 1, with T = ``total_steps`` and
    m = ``min_rate``:

    ====================  ==========================================================================
    constant              α, from the first step on
    constant_with_warmup  α
    linear                α (1 − p), as BERT (Devlin et al. 2019, appendix A.2)
    cosine                α (1 + cos πp) / 2 (Loshchilov and Hutter 2017, eq. 5, one cycle)
    cosine_with_min_lr    α (m + (1 − m) (1 + cos πp) / 2), as GPT-3 (Brown et al. 2020, appendix B)
    polynomial            α (m + (1 − m) (1 − p)^``power``)
    inverse_sqrt          C · min(1/√s, s/w^1.5), or C/√s where w is 0 (Vaswani et al. 2017, section 5.3)
    warmup_stable_decay   α, then over the last ``decay_steps`` α (m + (1 − m) f(q)), q from 0 towards 1 over them
                          (Hu et al. 2024, MiniCPM, section 4)
    ====================  ==========================================================================

    The C of inverse_sqrt is ``scale``, and peak has no effect; where scale is 0, C = α√w, which peaks at α. Without warmup
    and scale it is α / √(1 + s / 10,000), as in transformers.

    The f of warmup_stable_decay is ``decay_type``: ``linear`` is 1 − q, ``cosine`` (1 + cos πq) / 2, and ``1-sqrt`` 1 − √q
    (Hägele et al. 2024, section 3). Its warmup starts from m · α, as in transformers, not from 0.

    Transformers' schedulers count from 0 and waste their first step on a rate of 0. Ours do not: in warmup, and for all of
    inverse_sqrt, our step s has the rate of their step s, after warmup that of s − 1.
    """

    kind: str
    peak: float
    """The learning rate at its highest."""
    warmup_steps: int
    total_steps: int
    """Steps of the run; after them the rate stays where it ends."""
    min_rate: float = 0.0
    """Floor of cosine_with_min_lr, polynomial and warmup_stable_decay, as a fraction of peak."""
    power: float = 1.0
    """Of polynomial."""
    decay_steps: int = 0
    """Last steps of warmup_stable_decay; where they do not fit after warmup, all steps after it."""
    decay_type: str = "cosine"
    """How warmup_stable_decay falls: linear, cosine or 1-sqrt."""
    scale: float = 0.0
    """C of inverse_sqrt; 0 takes the C that peaks at ``peak``."""

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 1."""
        if self.kind == "constant":
            return self.peak
        if self.kind == "inverse_sqrt" and (self.scale or not self.warmup_steps):
            return self._inverse_sqrt(step)
        if step <= self.warmup_steps:
            if self.kind == "warmup_stable_decay":
                return self.peak * (self.min_rate + (1 - self.min_rate) * step / self.warmup_steps)
            return self.peak * step / self.warmup_steps
        progress = min(1.0, (step - 1 - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        match self.kind:
            case "constant_with_warmup":
                return self.peak
            case "linear":
                return self.peak * (1 - progress)
            case "polynomial":
                return self.peak * (self.min_rate + (1 - self.min_rate) * math.pow(1 - progress, self.power))
            case "inverse_sqrt":
                return self.peak * math.sqrt(self.warmup_steps / step)
            case "warmup_stable_decay":
                return self._stable_decay(step)
        floor = self.min_rate if self.kind == "cosine_with_min_lr" else 0.0
        return self.peak * (floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2)

    def _inverse_sqrt(self, step: int) -> float:
        """With a scale of its own, or without a warmup that would give one."""
        if not self.scale:
            return self.peak / math.sqrt(1 + step / INVERSE_SQRT_TIMESCALE)
        if not self.warmup_steps:
            return self.scale / math.sqrt(step)
        return self.scale * min(1 / math.sqrt(step), step / math.pow(self.warmup_steps, 1.5))

    def _stable_decay(self, step: int) -> float:
        """After warmup: the plateau, then the fall."""
        length = max(0, min(self.decay_steps, self.total_steps - self.warmup_steps))
        done = step - 1 - (self.total_steps - length)
        if done < 0:
            return self.peak
        progress = min(1.0, done / length) if length else 1.0
        shape = {
            "linear": 1 - progress,
            "cosine": (1 + math.cos(math.pi * progress)) / 2,
            "1-sqrt": 1 - math.sqrt(progress),
        }[self.decay_type]
        return self.peak * (self.min_rate + (1 - self.min_rate) * shape)
