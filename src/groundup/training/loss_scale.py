"""
The factor that keeps small float16 gradients from vanishing.

Float16 has nothing below 6e-8, where many gradients are. The loss is multiplied by a factor before the backward pass, the
gradient divided by it afterwards (Micikevicius et al. 2018, "Mixed Precision Training", section 3.2). The factor is looked
for while training: too large makes a gradient infinite, which costs a step; too small costs precision.
"""

from dataclasses import dataclass

GROWTH_STEPS = 2000
LARGEST = 2.0**127
"""The largest power of two in float32."""


@dataclass(frozen=True)
class LossScale:
    """A factor, always a power of two, with the constants of ``torch.amp.GradScaler``."""

    scale: float = 2.0**16
    good_steps: int = 0
    """Finite steps in a row since it last changed."""

    def after(self, finite: bool) -> "LossScale":
        """What follows a step: half after a gradient that was not finite, double after GROWTH_STEPS good ones in a row."""
        if not finite:
            return LossScale(self.scale / 2, 0)
        if self.good_steps + 1 < GROWTH_STEPS:
            return LossScale(self.scale, self.good_steps + 1)
        return LossScale(min(self.scale * 2, LARGEST), 0)
