"""
The command line: verbs to recipes. Recipes are imported when called.

Progress and errors go to standard error; standard output holds the result, with ``--json`` one object and nothing else.
"""

import contextlib
import errno
import os
import sys
import traceback

import click

from groundup.cli import looking, models, training  # noqa: F401 - their verbs
from groundup.cli.command import ReaderGoneError, cli
from groundup.errors import ConfigError, GroundupError
from groundup.tracking.surprise import harmless

LONGEST_LINE = 2000
"""Characters of an error: it may quote what a file says."""


def main() -> None:
    """The ``groundup`` command."""
    # A closed stream must not make what belongs there go elsewhere.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command; returns its exit code. Errors are one line each, a traceback only with ``--debug``."""
    try:
        # Without its standalone mode click returns the code of an Exit, and otherwise what the verb returns: None.
        return int(cli.main(arguments, prog_name="groundup", standalone_mode=False) or 0)
    except click.exceptions.Exit as request:
        return request.exit_code
    except Exception as error:
        if "--debug" in arguments:
            traceback.print_exc()
        return _explain(error)
    except (KeyboardInterrupt, click.Abort):
        print("groundup: interrupted", file=sys.stderr)
        return 130


def _explain(error: Exception) -> int:
    """Print an error for a person; returns the exit code."""
    if isinstance(error, BrokenPipeError | ReaderGoneError):
        # The reader of standard output has gone (`| head`); Python must not complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    if isinstance(error, GroundupError):
        # A configuration lists its problems; elsewhere a line break can only come from a file's name.
        lines = str(error).split("\n") if isinstance(error, ConfigError) else [str(error).replace("\n", "\\n")]
        code = error.exit_code
    elif isinstance(error, click.Abort):
        lines, code = ["interrupted"], 130
    elif isinstance(error, click.exceptions.NoArgsIsHelpError):
        print(error.format_message(), file=sys.stderr)
        return 2
    elif isinstance(error, click.ClickException):
        command = getattr(getattr(error, "ctx", None), "command_path", "groundup")
        lines, code = [f"{' '.join(error.format_message().split())} ({command} --help lists the options)"], 2
    elif isinstance(error, MemoryError):
        lines, code = ["out of memory: give smaller input, or a machine with more"], 6
    elif isinstance(error, OSError) and error.errno == errno.ENOSPC:
        lines, code = [f"no space left for the output ({error.strerror}); free some"], 6
    else:
        lines, code = [f"internal error: {type(error).__name__}: {error} (run again with --debug for the traceback)"], 1
    for line in lines:
        print(f"groundup: {harmless(line[:LONGEST_LINE])}", file=sys.stderr)
    return code
