"""Lines of text on a terminal."""

import textwrap


def wrapped(text: str, width: int) -> str:
    """Breaks lines between words only: a path that is longer than the terminal stays whole, to be copied."""
    return "\n".join(
        textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False) for line in text.splitlines()
    )
