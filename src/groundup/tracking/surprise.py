"""Surprise per token, for people: colours at a terminal, else a table."""

import unicodedata
from collections.abc import Iterable, Iterator, Mapping
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
    for characters, tokens in whole_characters(text["tokens"]):
        shown.append(harmless(characters), style=_style(sum(token["bits"] for token in tokens)))
    console.print(shown)
    legend = Text("surprise in bits: ")
    for _, words, style in SCALE:
        legend.append(words, style=style).append("  ")
    console.print(legend)
    console.print(Text(summary))


def harmless(text: str) -> str:
    """Text that a terminal shows and does not obey: control characters but line breaks and tabs become U+FFFD."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else "\ufffd" for c in text)


def whole_characters(tokens: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, list[Mapping[str, Any]]]]:
    """Text with the tokens that it is from, as short as can be: tokens that share a character are put together."""
    held: list[Mapping[str, Any]] = []
    for token in tokens:
        held.append(token)
        content = b"".join(bytes(part["bytes"]) for part in held)
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data":
                continue
            text = content.decode(errors="replace")
        yield text, held
        held = []
    if held:
        yield b"".join(bytes(part["bytes"]) for part in held).decode(errors="replace"), held


def _style(bits: float) -> str:
    return next(style for most, _, style in SCALE if bits <= most or most == float("inf"))
