"""Texts that a command was given: on the command line, in files, on standard input."""

import sys
from collections.abc import Sequence
from pathlib import Path

from groundup.errors import ConfigError, DataError

STDIN = "-"


def given_texts(texts: Sequence[str], files: Sequence[str], option: str) -> list[str]:
    """
    The texts, then those of the files; one line break at the end of a file is the editor's and not part of the text.

    Args:
        option: the name of the option that holds the files, for error messages.

    Raises:
        ConfigError: standard input is named twice.
        DataError: a file cannot be read, or is not UTF-8.
    """
    if list(files).count(STDIN) > 1:
        raise ConfigError(f"{option}: - (standard input) is given twice; it can be read once")
    return [*texts, *(_read(file, option) for file in files)]


def _read(file: str, option: str) -> str:
    name = "standard input" if file == STDIN else file
    try:
        if file == STDIN and sys.stdin is None:
            raise DataError(f"{option}: standard input is closed; give a file, or pipe a text in")
        content = sys.stdin.buffer.read() if file == STDIN else Path(file).read_bytes()
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{option}: {name} cannot be read ({error.strerror}); give the path of a text file, or -") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{option}: {name} is not UTF-8 (byte {error.start:,}: {error.reason}); convert it first") from None
    return text.removesuffix("\n").removesuffix("\r")
