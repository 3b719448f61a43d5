"""All that must survive a restart besides weights and optimizer: a few integers."""

from dataclasses import asdict, dataclass


@dataclass
class TrainState:
    """Where a run is. Schedules, data order and dropout are functions of these."""

    step: int = 0
    """Optimizer steps done, skipped ones included."""
    samples_seen: int = 0
    """Windows read: the position in the data."""
    tokens_seen: int = 0
    skipped_steps: int = 0
    """Steps whose loss or gradient was not finite."""
    skipped_in_a_row: int = 0

    def as_dict(self) -> dict[str, int]:
        """As JSON values."""
        return asdict(self)
