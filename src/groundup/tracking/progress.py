"""What a person sees while a run goes on: one live line in a terminal, a plain line per logged step elsewhere."""

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from groundup.tracking.surprise import harmless

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live


class Progress:
    """Lines on standard error; standard output stays free for results."""

    def __init__(self, live: "Live | None", console: "Console"):
        self._live = live
        self._console = console

    def say(self, line: str) -> None:
        """A line that stays."""
        from rich.text import Text

        self._console.print(Text(harmless(line)), soft_wrap=True)

    def step(self, line: str) -> None:
        """The progress line: replaced in a terminal, one line after the other elsewhere."""
        from rich.text import Text

        if self._live is None:
            self.say(line)
        else:
            # Started late: a live display takes over standard output, where a text may be streaming.
            self._live.start()
            self._live.update(Text(line, style="bold"), refresh=True)


@contextmanager
def progress() -> Iterator[Progress]:
    """Progress on standard error while the block runs."""
    drawn = random.getstate()
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    random.setstate(drawn)  # rich draws from the caller's stream when it is imported
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        yield Progress(None, Console(file=sys.stderr, highlight=False, width=10**6))
        return
    live = Live(Text(""), console=console, auto_refresh=False, transient=True)
    try:
        yield Progress(live, console)
    finally:
        live.stop()


@contextmanager
def download_progress() -> Iterator[Callable[[str, int, int], None]]:
    """Bars on standard error, one a file; told a file's name, the bytes that are there and the bytes that it will have."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TaskID, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Bars(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, TaskID] = {}

        def shown(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=total)
            bars.update(tasks[name], completed=done, total=total)

        yield shown


def step_line(row: dict[str, Any], total_steps: int, seconds_left: float) -> str:
    """One line about a logged step: loss, learning rate, gradient norm, speed, and time left."""
    parts = [
        f"step {row['step']:>6,}/{total_steps:,} ({row['step'] / total_steps:.1%})",
        f"loss {row['loss']:.4f}",
        f"lr {row['learning_rate']:.2e}",
        f"norm {row['grad_norm']:.2f}",
        f"{row['tokens_per_second']:,.0f} tok/s",
        f"mfu {row['mfu']:.1%}",
        f"eta {duration(seconds_left)}",
    ]
    if row.get("skipped_steps"):
        parts.append(f"{row['skipped_steps']} skipped")
    return " | ".join(parts)


def perplexity_text(perplexity: float) -> str:
    """A perplexity for a person; of a loss of hundreds it has hundreds of digits."""
    return f"{perplexity:,.2f}" if perplexity < 1e12 else f"{perplexity:.2e}"


def duration(seconds: float) -> str:
    """Seconds as people say them: 42s, 3m05s, 2h10m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
