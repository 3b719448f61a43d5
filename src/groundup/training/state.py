"""All that must survive a restart besides weights and optimizer: a few numbers."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class TrainState:
    """Where a run is. Schedules, data order and dropout are functions of these."""

    step: int = 0
    """Optimizer steps done, skipped ones included."""
    samples_seen: int = 0
    """The position in the data: windows read, and those that were left out."""
    tokens_seen: int = 0
    skipped_steps: int = 0
    """Steps that updated nothing: not finite, or a spike that was not to be learned from."""
    skipped_in_a_row: int = 0
    loss_scale: float = 0.0
    """Of fp16; 0 before its first step."""
    loss_scale_good_steps: int = 0
    """Steps since the loss scale changed."""
    recent_losses: list[float] = field(default_factory=list)
    """Of the last steps, which a spike is compared with."""
    recent_norms: list[float] = field(default_factory=list)

    @property
    def updates(self) -> int:
        """Steps that changed the weights."""
        return self.step - self.skipped_steps

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)
