"""How an option is declared."""

from dataclasses import field
from typing import Any

AUTO = "auto"


def option(
    default: Any,
    help: str,
    *,
    unit: str = "",
    choices: tuple[str, ...] = (),
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    why: str = "",
) -> Any:
    """Declare one option: its default, its meaning, its unit and the values that it accepts."""
    return field(
        default=default,
        metadata={
            "help": help,
            "unit": unit,
            "choices": choices,
            "at_least": at_least,
            "above": above,
            "at_most": at_most,
            "below": below,
            "why": why,
        },
    )
