"""Numbers as people write them."""

import math


def whole_number(value: object) -> int:
    """
    A whole number that a counter holds: 524288, 524_288, 2^19, 2**19, 5e5.

    Raises:
        ValueError: anything else.
    """
    if isinstance(value, str):
        text = value.replace("_", "").replace(",", "").strip()
        base, power, exponent = text.replace("**", "^").partition("^")
        try:
            if power and 0 <= int(exponent) <= 64:
                value = int(base) ** int(exponent)
            else:
                value = int(text) if text.lstrip("+-").isdigit() else float(text)
        except ValueError:
            raise ValueError("is not a whole number (524288, 524_288 and 2^19 are)") from None
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 2**63:
        raise ValueError("is not a whole number (524288, 524_288 and 2^19 are)")
    return value
