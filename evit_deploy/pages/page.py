"""A web page with paragraphs, tables, charts and pictures in sections, as one HTML file.

The page loads nothing: styles, script, charts and pictures are embedded, and its content security policy allows only
that script. Everything is readable without the script, which sorts tables and shows details of chart points.
"""

import base64
import hashlib
import importlib.resources
from collections.abc import Sequence
from html import escape

from evit_deploy.charts.svg import DARK_PAGE, LIGHT_PAGE, palette
from evit_deploy.report.html import Page, is_number
from evit_deploy.report.lines import printable

GENERATOR = "evit-deploy"
"""Value of the ``generator`` tag near the start of a page."""


class WebPage(Page):
    """Builds a page; also accepts the output of :func:`evit_deploy.report.tables.render`.

    Args:
        title: Title of the page; escaped.
        subtitle: A line below the title.
    """

    def __init__(self, title: str, subtitle: str = "") -> None:
        super().__init__()
        self._title, self._subtitle = title, subtitle
        self._sections: list[tuple[str, str]] = []

    def section(self, title: str) -> None:
        """Starts a section, to which further content is added."""
        self._parts.append(f'{"</section>" * bool(self._sections)}<section id="s{len(self._sections)}">')
        self._parts.append(f"<h2>{_text(title)}</h2>")
        self._sections.append((f"s{len(self._sections)}", title))

    def line(self, text: str, *, strong: bool = False) -> None:
        """Adds a paragraph."""
        said = f"<strong>{_text(text)}</strong>" if strong else _text(text)
        self._parts.append(f"<p>{said}</p>")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> None:
        """Adds a sortable table; columns of numbers are right-aligned."""
        names = [_text(title.replace("\n", " ")) for title in header]
        flush = [' class="n"' if all(is_number(row[i]) for row in rows) else "" for i in range(len(header))]
        titles = "".join(f'<th scope="col"{side}>{name}</th>' for name, side in zip(names, flush, strict=True))
        lines = (
            "<tr>" + "".join(f"<td{side}>{_text(cell)}</td>" for cell, side in zip(row, flush, strict=True)) + "</tr>"
            for row in rows
        )
        label = _text(caption) or "Table: " + ", ".join(name for name in names[:3] if name)
        self._parts.append(
            f'<div class="wide" role="region" aria-label="{label}" tabindex="0"><table>'
            + (f"<caption>{_text(caption)}</caption>" if caption else "")
            + f"<thead><tr>{titles}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
        )

    def cards(self, cards: Sequence[tuple[str, str, str]]) -> None:
        """Adds short verdicts: title, text, and ``good``, ``bad`` or nothing."""
        said = {"good": "✓ ", "bad": "✗ ", "": ""}
        parts = (
            f'<div class="card {kind}"><dt>{said[kind]}{_text(title)}</dt><dd>{_text(text)}</dd></div>'
            for title, text, kind in cards
        )
        self._parts.append(f'<dl class="cards">{"".join(parts)}</dl>')

    def facts(self, facts: Sequence[tuple[str, str]]) -> None:
        """Adds names and values."""
        parts = (f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in facts if value)
        self._parts.append(f'<dl class="facts">{"".join(parts)}</dl>')

    def charts(self, charts: Sequence[tuple[str, str]]) -> None:
        """Adds charts, each with title and SVG, side by side if there is room.

        The SVG is inserted unchanged; see :func:`evit_deploy.charts.svg.drawn`.
        """
        parts = (
            f"<figure><figcaption>{_text(title)}</figcaption>{svg}<output>&nbsp;</output></figure>"
            for title, svg in charts
        )
        self._parts.append(f'<div class="charts">{"".join(parts)}</div>')

    def picture(self, image: bytes, description: str, kind: str = "png") -> None:
        """Adds a picture.

        Args:
            image: The file.
            description: Text alternative.
            kind: ``png`` or ``jpeg``.
        """
        data = base64.b64encode(image).decode()
        self._parts.append(
            f'<figure class="picture"><img alt="{_text(description)}" src="data:image/{kind};base64,{data}">'
            f"<figcaption>{_text(description)}</figcaption></figure>"
        )

    def commands(self, commands: Sequence[str]) -> None:
        """Adds command lines for copying."""
        self._parts.append(f'<pre tabindex="0"><code>{escape(chr(10).join(map(printable, commands)))}</code></pre>')

    def begin_details(self, summary: str) -> None:
        """Starts collapsed content, up to :meth:`end_details`."""
        self._parts.append(f"<details><summary>{_text(summary)}</summary>")

    def end_details(self) -> None:
        """Ends the collapsed content."""
        self._parts.append("</details>")

    def __str__(self) -> str:
        script, style = _asset("page.js"), _asset("page.css")
        light, dark = f"--page: {LIGHT_PAGE}; {palette()}", f"--page: {DARK_PAGE}; {palette(dark=True)}"
        style = style.replace("/* light */", light).replace("/* dark */", dark)
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
        links = "".join(f'<a href="#{place}">{_text(title)}</a>' for place, title in self._sections)
        subtitle = f"<p>{_text(self._subtitle)}</p>" if self._subtitle else ""
        return "\n".join(
            (
                '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
                f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
                f'<meta name="generator" content="{GENERATOR}">',
                '<meta name="viewport" content="width=device-width, initial-scale=1">',
                f"<title>{_text(self._title)}</title>\n<style>\n{style}</style></head>",
                f"<body><header><h1>{_text(self._title)}</h1>{subtitle}",
                f'<nav aria-label="Sections">{links}</nav></header><main>',
                *self._parts,
                f"{'</section>' * bool(self._sections)}</main>\n<script>{script}</script></body></html>\n",
            )
        )


def _text(text: object) -> str:
    return escape(printable(text), quote=True)


def _asset(name: str) -> str:
    return (importlib.resources.files("evit_deploy.pages") / name).read_text(encoding="utf-8")
