"""A page: sections of paragraphs, tables, charts and pictures, in one HTML file.

It loads nothing: styles, the script, charts and pictures are in it, and its content security policy lets a browser run
that script and no other. Everything can be read without the script, which sorts tables and shows what a point of a
chart stands for.
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
"""What a page says of itself near its beginning."""


class WebPage(Page):
    """A page in the making; it also takes what :func:`evit_deploy.report.tables.render` prints.

    Args:
        title: Of the page; any text.
        subtitle: A line below it.
    """

    def __init__(self, title: str, subtitle: str = "") -> None:
        super().__init__()
        self._title, self._subtitle = title, subtitle
        self._sections: list[tuple[str, str]] = []

    def section(self, title: str) -> None:
        """Begins a section; what is added from now on belongs to it."""
        self._parts.append(f'{"</section>" * bool(self._sections)}<section id="s{len(self._sections)}">')
        self._parts.append(f"<h2>{_text(title)}</h2>")
        self._sections.append((f"s{len(self._sections)}", title))

    def line(self, text: str, *, strong: bool = False) -> None:
        """Adds a paragraph."""
        said = f"<strong>{_text(text)}</strong>" if strong else _text(text)
        self._parts.append(f"<p>{said}</p>")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> None:
        """Adds a table that its reader can sort; columns of numbers are flush right."""
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
        """Adds answers in a few words: of each its title, what it says, and ``good``, ``bad`` or nothing."""
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
        """Adds charts side by side where there is room: of each the title and the SVG.

        The SVG is taken as it is: see :func:`evit_deploy.charts.svg.drawn`.
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
            description: What it shows.
            kind: ``png`` or ``jpeg``.
        """
        data = base64.b64encode(image).decode()
        self._parts.append(
            f'<figure class="picture"><img alt="{_text(description)}" src="data:image/{kind};base64,{data}">'
            f"<figcaption>{_text(description)}</figcaption></figure>"
        )

    def commands(self, commands: Sequence[str]) -> None:
        """Adds lines to be copied."""
        self._parts.append(f'<pre tabindex="0"><code>{escape(chr(10).join(map(printable, commands)))}</code></pre>')

    def begin_details(self, summary: str) -> None:
        """What follows, up to :meth:`end_details`, is shown when its reader asks for it."""
        self._parts.append(f"<details><summary>{_text(summary)}</summary>")

    def end_details(self) -> None:
        """See :meth:`begin_details`."""
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
