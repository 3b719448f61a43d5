"""
Runs the blocks of a tutorial page, in order, as its reader would.

How such a page is written:

- A ``sh`` block is commands, a ``python`` block is Python; names live on from one Python block of a page to the next. Other
  blocks are only read, but a ``text`` block directly after one that was run is what that one printed.
- In what is printed … stands for anything: alone on a line for any number of lines, in a line for any characters. Words and
  whole numbers are compared exactly; numbers with a decimal point may be a twentieth off, because processors round differently.
  Speeds, durations and samples are not compared at all (CHANCE).
- HTML comments before a block, each with its reason, say otherwise:

      <!-- not run: needs a network -->                        the block is only read
      <!-- shorter: --max-steps 3 (three minutes) -->          these flags are added to its commands; no number is
                                                                compared, and more lines may be printed
      <!-- numbers differ: Python's library differs -->        no number is compared
      <!-- output differs: the draw is chance -->              something must be printed, no matter what
      <!-- exit code 1: a check fails -->                      that is how its last command ends
"""

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from groundup.cli.main import run as command

FENCE = re.compile(r"^(?P<mark>```+)(?P<language>\w*)[^\n]*\n(?P<text>.*?)^(?P=mark)[ \t]*$", re.MULTILINE | re.DOTALL)
NOTE = re.compile(r"<!-- (?P<kind>not run|shorter|numbers differ|output differs|exit code \d+): (?P<reason>[^>]+) -->")
COMMENTS = re.compile(r"(<!--[^>]*-->\s*)*$")
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")
CHANCE = [
    (re.compile(pattern), mark)
    for pattern, mark in (
        (r"[\d,.]+ tok/s", "# tok/s"),
        (r"mfu [\d.]+%", "mfu #"),
        (r"eta [\dhms]+", "eta #"),
        (r"\bin (\d+h)?(\d+m)?\d+s\b", "in #"),
        (r"\d+(\.\d+)? TFLOP/s", "# TFLOP/s"),
        (r"^device: .*", "device: #"),
        (r"^  sample: .*", "  sample: #"),
    )
]
# What a shell does and a list of words does not.
SHELL = re.compile(r"[|<>;&`]|\$\(|\$'|\$\w|~")


@dataclass(frozen=True)
class Block:
    """A block of code, and what the page says about it."""

    language: str
    text: str
    line: int
    notes: dict[str, str]
    """Kind to reason."""
    shown: str | None
    """What it prints, as the page shows it; None where the page does not."""

    @property
    def is_run(self) -> bool:
        return self.language in ("sh", "python") and "not run" not in self.notes

    @property
    def exit_code(self) -> int:
        return next((int(kind.split()[-1]) for kind in self.notes if kind.startswith("exit code")), 0)


def blocks(page: Path) -> list[Block]:
    """The blocks of a page that are code."""
    markdown, found = page.read_text(encoding="utf-8"), []
    fences = list(FENCE.finditer(markdown))
    for fence, following in zip(fences, [*fences[1:], None], strict=True):
        comments = COMMENTS.search(markdown[: fence.start()])
        notes = {note["kind"]: note["reason"].strip() for note in NOTE.finditer(comments[0] if comments else "")}
        shown = None
        if following and following["language"] == "text" and not markdown[fence.end() : following.start()].strip():
            shown = following["text"]
        found.append(Block(fence["language"], fence["text"], markdown.count("\n", 0, fence.start()) + 1, notes, shown))
    return [block for block in found if block.language in ("sh", "python")]


def run_page(page: Path) -> None:
    """Run all blocks of a page in the current folder; fails with the page's line."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        if not block.is_run:
            continue
        where = f"{page.name}, line {block.line}"
        printed = _run_python(block.text, names, where) if block.language == "python" else _run_shell(block, where)
        if "output differs" in block.notes:
            assert printed.strip(), f"{where} printed nothing"
        elif block.shown is not None:
            shown = "…\n".join(["", *block.shown.splitlines(True), ""]) if "shorter" in block.notes else block.shown
            problem = difference(shown, printed, numbers=not {"shorter", "numbers differ"} & set(block.notes))
            assert not problem, f"{where}: {problem}\n--- printed:\n{printed}"


def _run_python(text: str, names: dict[str, Any], where: str) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        exec(compile(text, where, "exec"), names)
    return printed.getvalue()


def _run_shell(block: Block, where: str) -> str:
    """One command after the other; groundup's own in this process, which has imported torch already."""
    printed = []
    commands = _commands(block.text)
    for number, line in enumerate(commands, start=1):
        if "shorter" in block.notes:
            line = f"{line} {block.notes['shorter'].split('(')[0].strip()}"
        if line.startswith("groundup ") and not SHELL.search(line):
            code, text = _run_here(shlex.split(line)[1:])
        else:
            code, text = _run_outside(line)
        expected = block.exit_code if number == len(commands) else 0
        assert code == expected, f"{where}: exit code {code} of {line}\n{text}"
        printed.append(text)
    return "".join(printed)


def _commands(text: str) -> list[str]:
    """Commands of a block: a line each, or several lines with \\ at their ends or inside quotes; comments are left out."""
    found, waiting = [], ""
    for line in text.splitlines():
        waiting = f"{waiting}\n{line}" if waiting else line
        if waiting.endswith("\\") or not _is_whole(waiting):
            continue
        line = waiting.replace("\\\n", " ").strip()
        if line and not line.startswith("#"):
            found.append(re.sub(r"\s{2,}# .*$", "", line))
        waiting = ""
    assert not waiting, f"a command does not end: {waiting}"
    return found


def _is_whole(line: str) -> bool:
    try:
        shlex.split(line, comments=True)
    except ValueError:
        return False
    return True


def _run_here(arguments: list[str]) -> tuple[int, str]:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = command(arguments)
    return code, printed.getvalue()


def _run_outside(line: str) -> tuple[int, str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", line], env={**os.environ, "PATH": path}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, timeout=240, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout.decode(errors="replace")


def difference(shown: str, printed: str, *, numbers: bool = True) -> str:
    """What is wrong with what was printed; empty where it is as shown."""
    expected, found = _lines(shown), _lines(printed)
    place = 0
    skipping = False
    for line in expected:
        if line == "…":
            skipping = True
            continue
        start = place
        while place < len(found) and not _alike(line, found[place], numbers) and skipping:
            place += 1
        if place == len(found) or not _alike(line, found[place], numbers):
            there = found[start] if start < len(found) else "nothing more"
            return f"shown:   {line}\nprinted: {there}"
        place, skipping = place + 1, False
    return "" if skipping or place == len(found) else f"printed, not shown: {found[place]}"


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.splitlines() if line.strip()]


def _alike(shown: str, printed: str, numbers: bool) -> bool:
    for pattern, mark in CHANCE:
        shown, printed = pattern.sub(mark, shown), pattern.sub(mark, printed)
    if not numbers:
        return bool(re.fullmatch(_pattern(NUMBER.sub("#", shown)), NUMBER.sub("#", printed)))
    match = re.fullmatch(_numbers_as_groups(shown), printed)
    return bool(match) and all(map(_close, NUMBER.findall(shown.replace("…", " ")), match.groups()))


def _pattern(text: str) -> str:
    """A pattern for a line in which … stands for anything; how many blanks there are between words does not matter."""
    return re.sub(r"(\\ )+", r"\\s+", re.escape(text)).replace("…", ".*?")


def _numbers_as_groups(shown: str) -> str:
    pieces, position = [], 0
    for number in NUMBER.finditer(shown):
        pieces += [_pattern(shown[position : number.start()]), f"({NUMBER.pattern})"]
        position = number.end()
    return "".join([*pieces, _pattern(shown[position:])])


def _close(shown: str, printed: str) -> bool:
    digits, _, power = shown.replace(",", "").partition("e")
    if not power and "." not in digits:
        return shown == printed
    expected, found = (float(number.replace(",", "")) for number in (shown, printed))
    last = 10.0 ** (int(power or 0) - len(digits.partition(".")[2]))
    return abs(expected - found) <= max(0.05 * abs(expected), 0.6 * last)
