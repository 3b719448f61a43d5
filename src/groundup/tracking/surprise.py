"""Surprise per token, for people: colours at a terminal, else a table."""

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

# Bits, and how text up to so surprising is shown: from expected to unheard of. Readable on light and on dark, and the
# strongest differ by more than their colour.
SCALE = (
    (1.0, "up to 1 bit", "dim"),
    (4.0, "4", "none"),
    (7.0, "7", "yellow"),
    (11.0, "11", "bold red"),
    (float("inf"), "more", "bold reverse red"),
)


def show_surprise(text: Mapping[str, Any], console: "Console | None" = None) -> None:
    """
    Print one text of ``score``'s result, token by token, and its summary.

    Args:
        console: where to; standard output by default. Where it is no terminal, one line a token, separated by tabs: bits,
            rank, token.
    """
    from rich.console import Console  # late: rich draws random numbers when it is imported
    from rich.text import Text

    console = console or Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    summary = (
        f"{len(text['tokens']):,} tokens: loss {text['loss']:.4f}, perplexity {text['perplexity']:,.2f}, "
        f"{text['bits_per_byte']:.3f} bits per byte"
    )
    if not console.is_terminal:
        rows = [f"{token['bits']:.2f}\t{token['rank']}\t{token['token']!r}" for token in text["tokens"]]
        print("\n".join(["bits\trank\ttoken", *rows, summary]), file=console.file)
        return
    shown = Text()
    for characters, bits in _characters(text["tokens"]):
        shown.append(harmless(characters), style=_style(bits))
    console.print(shown)
    legend = Text("surprise in bits: ")
    for _, words, style in SCALE:
        legend.append(words, style=style).append("  ")
    console.print(legend)
    console.print(Text(summary))


def harmless(text: str) -> str:
    """Text that a terminal shows and does not obey: control characters but line breaks and tabs become U+FFFD."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else "\ufffd" for c in text)


def _characters(tokens: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, float]]:
    """Whole characters with their surprise: tokens that share one are put together."""
    held, bits = b"", 0.0
    for token in tokens:
        held, bits = held + bytes(token["bytes"]), bits + token["bits"]
        try:
            text = held.decode()
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data":
                continue
            text = held.decode(errors="replace")
        yield text, bits
        held, bits = b"", 0.0
    if held:
        yield held.decode(errors="replace"), bits


def _style(bits: float) -> str:
    return next(style for most, _, style in SCALE if bits <= most or most == float("inf"))
