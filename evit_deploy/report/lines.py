"""Lines of text for a terminal."""

import textwrap
import unicodedata

_INVISIBLE = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode categories of control and format characters, surrogates, and line and paragraph separators."""


def printable(text: object) -> str:
    """Escapes text from untrusted sources to a single line of printable characters.

    File names, labels, tensor names and error messages about them may contain anything. Invisible characters (control
    characters, escape sequences, direction marks, zero-width characters, line ends) are shown as in Python, ``\\x1b``;
    a byte of a file name that is not valid UTF-8 as ``\\xff``.
    """
    said = str(text)
    if said.isprintable():
        return said
    return "".join(_escaped(letter) if unicodedata.category(letter) in _INVISIBLE else letter for letter in said)


def printable_lines(text: str) -> str:
    """The same for text of several lines, whose inserted parts went through :func:`printable`."""
    return "\n".join(map(printable, text.split("\n")))


def wrapped(text: str, width: int) -> str:
    """Wraps lines between words only: a path longer than the terminal stays in one piece for copying."""
    return "\n".join(
        textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False) for line in text.splitlines()
    )


_IN_ASCII = str.maketrans("▁▂▃▄▅▆▇█×±·–", "_.-=+*%#x~.-")
"""ASCII replacements for terminals without UTF-8: bars of a curve, lowest first, and signs."""


def shown_in(text: str, encoding: str | None) -> str:
    """Adapts a text to a stream's encoding: in ASCII if the encoding lacks one of the characters."""
    try:
        text.encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return text.translate(_IN_ASCII)
    return text


def _escaped(letter: str) -> str:
    code = ord(letter)
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else letter.encode("unicode_escape").decode()
