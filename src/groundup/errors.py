"""
The errors that a person is meant to read, and the exit code of each.

Every message says what is wrong, the value, where it came from and what to do, in one line.
"""


class GroundupError(Exception):
    """Base of every error that groundup raises on purpose."""

    exit_code = 1


class ConfigError(GroundupError):
    """An option is wrong, or two of them contradict each other."""

    exit_code = 2


class DataError(GroundupError):
    """A source, a tokenizer file or a dataset cannot be used."""

    exit_code = 3


class CheckpointError(GroundupError):
    """A checkpoint is damaged, missing or does not fit."""

    exit_code = 4


class DivergedError(GroundupError):
    """Training produced numbers that are not finite."""

    exit_code = 5


class ResourceError(GroundupError):
    """Out of disk or memory."""

    exit_code = 6


class Stopped(GroundupError):
    """A signal asked the run to stop; a checkpoint was saved."""

    exit_code = 75
