"""Tables for notebooks, as plain HTML in the page's own colors; all text is escaped."""

from collections.abc import Sequence
from html import escape

from evit_deploy.report.lines import printable

_LINE = "1px solid rgba(128, 128, 128, 0.35)"  # gray is visible on white and on black
_CELL = f"padding: 0.2em 0.7em; border-bottom: {_LINE}; vertical-align: top"


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str | None = None) -> str:
    """One table; columns of numbers are right-aligned.

    Args:
        header: Column titles; empty for a table without.
        rows: Cells as text.
        caption: A line above it.
    """
    flush = [all(is_number(row[i]) for row in rows) for i in range(len(rows[0]) if rows else len(header))]
    titles = (
        "".join(_cell("th", title.replace("\n", " "), right) for title, right in zip(header, flush, strict=True))
        if header
        else ""
    )
    parts = [f'<table style="border-collapse: collapse; margin: 0.5em 0">{_caption(caption)}']
    parts += [f"<thead><tr>{titles}</tr></thead>"] if titles else []
    parts.append("<tbody>")
    parts += [f"<tr>{''.join(_cell('td', text, flush[i]) for i, text in enumerate(row))}</tr>" for row in rows]
    return "\n".join((*parts, "</tbody></table>"))


def html_line(text: str, *, strong: bool = False) -> str:
    """One paragraph."""
    said = escape(printable(text))
    said = f"<strong>{said}</strong>" if strong else said
    return f'<p style="margin: 0.3em 0">{said}</p>'


def is_number(text: str) -> bool:
    """Whether a cell is a number, or marks a missing one."""
    return not text or text.lstrip("+-")[:1].isdigit()


def _caption(text: str | None) -> str:
    return "" if text is None else f'<caption style="text-align: left">{escape(printable(text))}</caption>'


def _cell(tag: str, text: str, right: bool) -> str:
    side = "right; white-space: nowrap" if right else "left"
    return f'<{tag} style="text-align: {side}; {_CELL}">{escape(printable(text))}</{tag}>'


class Page:
    """Collects the output of :func:`evit_deploy.report.tables.render` as HTML; replaces a console."""

    def __init__(self) -> None:
        self._parts: list[str] = []

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Adds a table."""
        self._parts.append(html_table(header, rows))

    def line(self, text: str, *, strong: bool = False) -> None:
        """Adds a paragraph."""
        self._parts.append(html_line(text, strong=strong))

    def __str__(self) -> str:
        return "\n".join(self._parts)
