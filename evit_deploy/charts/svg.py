"""Renders Vega-Lite specifications as SVG, without a browser or network.

Vega and Vega-Lite run inside vl-convert, so a page needs no script to show a chart. Every mark keeps Vega's label for
screen readers and can be reached by keyboard.
"""

import re
from typing import Any

from evit_deploy.report.lines import printable

_VEGA_LITE = "5.20"  # pinned, so that charts do not change with an update of vl-convert
SERIES = 8
"""Number of distinct colors and shapes; further series reuse them."""
_LIGHT = ("#0b5cad", "#b3470c", "#1b7a4d", "#8a3391", "#75600a", "#3f6b7d", "#a3264f", "#555555")
"""Colors with a contrast of at least 4.5 on white."""
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
    "axisY": {"titlePadding": 14},  # a page's font may be wider than the one measured here
    "rule": {"color": "currentColor"},
    "text": {"color": "currentColor", "fontSize": 12},
}  # fmt: skip
# Only marks that represent data are labeled by Vega: points, bars and lines, not axes.
_MARK = re.compile(r'(role="graphics-symbol" aria-roledescription="(?:point|bar|line mark|square|circle)")')


def color(series: int) -> str:
    """A series' color as a CSS variable, which :func:`palette` defines for light and dark pages."""
    return f"var(--series-{series % SERIES + 1})"


def palette(dark: bool = False) -> str:
    """CSS declarations of all series' colors."""
    return " ".join(f"--series-{i + 1}: {value};" for i, value in enumerate(_DARK if dark else _LIGHT))


def drawn(spec: dict[str, Any], description: str) -> str:
    """Draws a chart for embedding in a page, with the page's text color and :func:`palette`.

    Args:
        spec: A Vega-Lite 5 specification including its data. Its texts must be
            :func:`~evit_deploy.report.lines.printable`, because vl-convert aborts the process at a control character.
        description: Text alternative.

    Returns:
        ``<svg …>``; all texts in it are escaped.
    """
    import vl_convert  # 80 MB, so imported only when needed

    whole = {"$schema": f"https://vega.github.io/schema/vega-lite/v{_VEGA_LITE[0]}.json", "config": _CONFIG} | spec
    text = vl_convert.vegalite_to_svg(whole, vl_version=_VEGA_LITE, allowed_base_urls=[])
    text = _MARK.sub(r'\1 tabindex="0"', text)
    return text.replace("<svg ", f'<svg role="group" aria-label="{_attribute(description)}" ', 1)


def standalone(svg: str, dark: bool = False) -> str:
    """The same chart as a standalone file, with its own background and colors.

    Args:
        svg: Result of :func:`drawn`.
        dark: Whether to use a dark background.
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
