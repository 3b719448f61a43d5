"""A quantity that grows over the first part of a run: ``START:END@LENGTH``."""

import math

from groundup.config.numbers import whole_number


class Ramp(str):
    """
    ``32768:524288@0.2``: from 32,768 to 524,288 over the first fifth of the run; from 1 on, LENGTH counts steps.

    It is its own spelling, so that it goes through config files and JSON unchanged.

    Raises:
        ValueError: another spelling, or numbers that make no ramp.
    """

    start: int
    end: int
    length: float

    def __new__(cls, text: str) -> "Ramp":
        """Read the three numbers, and spell them one way."""
        try:
            first, _, rest = text.partition(":")
            last, _, part = rest.partition("@")
            start, end, length = whole_number(first), whole_number(last), float(part)
        except ValueError:
            raise ValueError("is not START:END@LENGTH, e.g. 32768:524288@0.2") from None
        if not (math.isfinite(length) and length > 0):
            raise ValueError("must end with @ and a length above 0: a fraction of the run, or from 1 on steps")
        ramp = super().__new__(cls, f"{start}:{end}@{int(length) if length.is_integer() else length}")
        ramp.start, ramp.end, ramp.length = start, end, length
        return ramp

    def value_at(self, step: int, total_steps: int) -> float:
        """The value at a step, counted from 1: START at the first, END from the end of the ramp on, evenly between."""
        steps = self.steps(total_steps)
        return self.start + (self.end - self.start) * min(1.0, (step - 1) / steps)

    def steps(self, total_steps: int) -> int:
        """Steps until the end is reached, at least 1."""
        return max(1, math.ceil(self.length * total_steps) if self.length < 1 else round(self.length))


def ends(value: int | Ramp) -> tuple[int, int]:
    """First and last value of a number or a ramp."""
    return (value.start, value.end) if isinstance(value, Ramp) else (value, value)


def value_at(value: int | Ramp, step: int, total_steps: int) -> float:
    """A number, or the value of a ramp at a step."""
    return value.value_at(step, total_steps) if isinstance(value, Ramp) else value
