"""Surprise per token, for people: colours at a terminal, else a table."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.text import Text

# Bits, and how a token up to so surprising is shown: from expected to unheard of. Readable on light and on dark, and
# the strongest differ by more than their colour.
SCALE = (
    (1.0, "up to 1 bit", "dim"),
    (4.0, "4", "none"),
    (7.0, "7", "yellow"),
    (11.0, "11", "bold red"),
    (float("inf"), "more", "bold reverse red"),
)


def show_surprise(text: Mapping[str, Any], console: Console | None = None) -> None:
    """
    Print one text of ``score``'s result, token by token, and its summary.

    Args:
        console: where to; standard output by default. Where it is no terminal, one line a token: bits, rank, token.
    """
    console = console or Console(soft_wrap=True, highlight=False, markup=False)
    if console.is_terminal:
        shown = Text()
        for token in text["tokens"]:
            shown.append(token["token"], style=_style(token["bits"]))
        console.print(shown)
        legend = Text("surprise in bits: ")
        for _, words, style in SCALE:
            legend.append(words, style=style).append("  ")
        console.print(legend)
    else:
        console.print("bits\trank\ttoken")
        for token in text["tokens"]:
            console.print(f"{token['bits']:.2f}\t{token['rank']}\t{token['token']!r}")
    console.print(
        f"{len(text['tokens']):,} tokens: loss {text['loss']:.4f}, perplexity {text['perplexity']:,.2f}, "
        f"{text['bits_per_byte']:.3f} bits per byte"
    )


def _style(bits: float) -> str:
    return next(style for most, _, style in SCALE if bits <= most or most == float("inf"))
