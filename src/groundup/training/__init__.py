"""The step and the loop, as values."""
