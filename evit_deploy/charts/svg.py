"""From a Vega-Lite specification to SVG, without a browser and without a network.

Vega and Vega-Lite run inside vl-convert, so a page needs no script to show a chart. Every mark keeps the label that
Vega gives it for screen readers, and can be reached by keyboard.
"""

import re
from typing import Any

from evit_deploy.report.lines import printable

_VEGA_LITE = "5.20"  # of those that vl-convert has; charts look the same after an update of it
SERIES = 8
"""How many series have a color and a shape each; further ones begin again."""
_LIGHT = ("#0b5cad", "#b3470c", "#1b7a4d", "#8a3391", "#75600a", "#3f6b7d", "#a3264f", "#555555")
"""Colors with a contrast of 4.5 and more on white."""
_DARK = ("#6cb6ff", "#ff9f5a", "#5fd39a", "#e09be6", "#d8c25a", "#8fc4d8", "#ff8fae", "#c4c4c4")
"""The same on :data:`DARK_PAGE`."""
LIGHT_PAGE, DARK_PAGE = "#ffffff", "#15181d"

_CONFIG: dict[str, Any] = {
    "background": None,
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "domainColor": "currentColor", "tickColor": "currentColor", "gridColor": "currentColor", "gridOpacity": 0.15,
        "labelColor": "currentColor", "titleColor": "currentColor", "labelFontSize": 12, "titleFontSize": 12,
        "titleFontWeight": "normal", "labelLimit": 220, "labelOverlap": "greedy", "tickCount": 6,
    },
    "legend": {
        "labelColor": "currentColor", "titleColor": "currentColor", "labelFontSize": 12, "titleFontSize": 12,
        "titleFontWeight": "normal", "orient": "top", "labelLimit": 320, "columns": 2,
        "columnPadding": 40,
    },
    "axisY": {"titlePadding": 14},  # a page's font may be wider than the one that is measured here
    "rule": {"color": "currentColor"},
    "text": {"color": "currentColor", "fontSize": 12},
}  # fmt: skip
# Vega marks up what it draws of the data: points, bars and lines, not axes.
_MARK = re.compile(r'(role="graphics-symbol" aria-roledescription="(?:point|bar|line mark|square|circle)")')


def color(series: int) -> str:
    """A series' color as a CSS variable, which :func:`palette` gives a value on light pages and on dark ones."""
    return f"var(--series-{series % SERIES + 1})"


def palette(dark: bool = False) -> str:
    """CSS declarations of all series' colors."""
    return " ".join(f"--series-{i + 1}: {value};" for i, value in enumerate(_DARK if dark else _LIGHT))


def drawn(spec: dict[str, Any], description: str) -> str:
    """Draws a chart for a page that takes it in as it is: in the page's text color and :func:`palette`.

    Args:
        spec: A Vega-Lite 5 specification with its data in it. Its texts have to be
            :func:`~evit_deploy.report.lines.printable`: at a control character vl-convert ends the process.
        description: What the chart shows, for those who do not see it.

    Returns:
        ``<svg …>``; all texts in it are escaped.
    """
    import vl_convert  # 80 MB: only where something is drawn

    whole = {"$schema": f"https://vega.github.io/schema/vega-lite/v{_VEGA_LITE[0]}.json", "config": _CONFIG} | spec
    text = vl_convert.vegalite_to_svg(whole, vl_version=_VEGA_LITE, allowed_base_urls=[])
    text = _MARK.sub(r'\1 tabindex="0"', text)
    return text.replace("<svg ", f'<svg role="group" aria-label="{_attribute(description)}" ', 1)


def standalone(svg: str, dark: bool = False) -> str:
    """The same chart as a file: with a background and colors instead of a page's.

    Args:
        svg: What :func:`drawn` returned.
        dark: Whether on a dark background.
    """
    values = {f"var(--series-{i + 1})": value for i, value in enumerate(_DARK if dark else _LIGHT)}
    for name, value in values.items():
        svg = svg.replace(name, value)
    svg = svg.replace("currentColor", "#e6e6e6" if dark else "#1a1a1a").replace(' tabindex="0"', "")
    background = f'<rect width="100%" height="100%" fill="{DARK_PAGE if dark else LIGHT_PAGE}"/>'
    return re.sub(r"(<svg [^>]*>)", rf"\1{background}", svg, count=1)


def _attribute(text: str) -> str:
    from html import escape

    return escape(printable(text), quote=True)
