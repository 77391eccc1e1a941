"""Make text safe to print: control characters of titles and file names are escaped, so that none steers a terminal."""

from __future__ import annotations

import unicodedata

UNSAFE = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))  # controls, formats (also of direction), halves of pairs, line ends
KEPT = frozenset("\n\t\u200c\u200d")  # lines and columns; the joiners that some scripts and emoji need
LONGEST = 4000  # characters of a message


def printable(text: str) -> str:
    r"""Return the text with control characters as escapes, such as \x1b; new lines and tabs stay."""
    if text.isprintable():
        return text
    return "".join(_escaped(character) for character in text)


def one_line(message: str) -> str:
    """Return a message on one line, safe to print; the middle of one beyond LONGEST characters is left out."""
    if len(message) > LONGEST:
        half = LONGEST // 2
        message = f"{message[:half]} … ({len(message) - 2 * half:,} characters left out) … {message[-half:]}"
    return printable(" ".join(message.split()))


def _escaped(character: str) -> str:
    """Return a character, or its escape if it is unsafe."""
    if character in KEPT or unicodedata.category(character) not in UNSAFE:
        return character
    return character.encode("unicode_escape").decode("ascii")
