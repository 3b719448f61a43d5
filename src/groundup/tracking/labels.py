"""Tokens and texts made visible: what a screen would obey, hide or leave out gets a name."""

import unicodedata

# A joiner shapes its neighbours, and a mark stands on the character before it: they are text.
SHOWN_AS_THEY_ARE = "\u200c\u200d"
SIGNS = {" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍"}


def visible(text: str) -> str:
    """Text whose every character can be seen: controls, direction marks and what has no shape become e.g. ⟨U+202E⟩."""
    return "".join(character if _has_shape(character) else f"⟨U+{ord(character):04X}⟩" for character in text)


def one_line(text: str) -> str:
    """A name from elsewhere for a line of ours: line breaks and controls in it can be seen."""
    return "".join(visible(part) if part not in "\n\t" else f"⟨U+{ord(part):04X}⟩" for part in text)


def token_label(content: bytes, name: str = "") -> str:
    """
    One token for a narrow place: spaces and line breaks as signs, bytes that are no whole character as e.g. ⟨E6⟩.

    Args:
        content: empty for a special token.
        name: of a special token.
    """
    if not content:
        return visible(name) or "⟨empty⟩"
    # Python hands on a byte that is not UTF-8 as one of these characters.
    text = content.decode(errors="surrogateescape")
    shown = (f"⟨{ord(c) - 0xDC00:02X}⟩" if 0xDC80 <= ord(c) <= 0xDCFF else SIGNS[c] if c in SIGNS else visible(c) for c in text)
    return "".join(shown)


def _has_shape(character: str) -> bool:
    if character in SHOWN_AS_THEY_ARE or character in "\n\t":
        return True
    return unicodedata.category(character) not in ("Cc", "Cf", "Co", "Cn", "Cs", "Zl", "Zp")
