"""Lines of text on a terminal."""

import textwrap
import unicodedata

_INVISIBLE = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode's categories of control characters, marks of format and direction, halves of characters, line separators."""


def printable(text: object) -> str:
    """A name or a sentence on one line, in characters that a terminal shows and does not obey.

    File names, labels, names of tensors and what libraries say of them may hold anything. What is invisible (control
    characters, escape sequences, marks of direction, zero widths, line ends) is shown as Python writes it, ``\\x1b``;
    a byte of a file name that is no UTF-8 as ``\\xff``.
    """
    said = str(text)
    if said.isprintable():
        return said
    return "".join(_escaped(letter) if unicodedata.category(letter) in _INVISIBLE else letter for letter in said)


def printable_lines(text: str) -> str:
    """The same for a text of ours that has lines: what was put into it has none, see :func:`printable`."""
    return "\n".join(map(printable, text.split("\n")))


def wrapped(text: str, width: int) -> str:
    """Breaks lines between words only: a path that is longer than the terminal stays whole, to be copied."""
    return "\n".join(
        textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False) for line in text.splitlines()
    )


_IN_ASCII = str.maketrans("▁▂▃▄▅▆▇█×±·–", "_.-=+*%#x~.-")
"""What stands in for characters of ours on a terminal without UTF-8: bars of a curve, the lowest first, and signs."""


def shown_in(text: str, encoding: str | None) -> str:
    """A text of ours as a stream shows it: in ASCII where its encoding lacks a character, as other locales' do."""
    try:
        text.encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return text.translate(_IN_ASCII)
    return text


def _escaped(letter: str) -> str:
    code = ord(letter)
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else letter.encode("unicode_escape").decode()
