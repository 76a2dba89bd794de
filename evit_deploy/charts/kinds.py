"""Chart types of reports: points with a frontier, lines with intervals, grouped bars."""

from collections.abc import Sequence
from typing import Any

import msgspec

from evit_deploy.charts.svg import SERIES, color, drawn
from evit_deploy.report.lines import printable

WIDTH, HEIGHT = 380, 240
_SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right", "triangle-left")
_MOST_INTERVALS = 200  # more whiskers would hide the points


class Point(msgspec.Struct, frozen=True):
    """A point of a chart.

    Args:
        x: Horizontal position; the name of a group in :func:`bars`.
        y: Vertical position.
        label: Text shown for it.
        series: Its series, which determines color and shape.
        low: Lower end of the interval of ``y``.
        high: Upper end.
    """

    x: Any
    y: float
    label: str
    series: str
    low: float | None = None
    high: float | None = None


class Axes(msgspec.Struct, frozen=True):
    """Titles and scales of the axes.

    Args:
        x: Title.
        y: Title.
        logarithmic: Whether ``x`` is logarithmic, with a tick at every value.
        line: A value of ``y`` at which to draw a line, such as a speed-up of 1.
        percent: Whether ``y`` is a fraction, shown in percent.
    """

    x: str
    y: str
    logarithmic: bool = False
    line: float | None = None
    percent: bool = False


def points(values: Sequence[Point], axes: Axes, description: str, *, lower_x: bool | None = None) -> str:
    """A chart of points.

    Args:
        values: The points.
        axes: Titles and scales.
        description: Text alternative.
        lower_x: Whether low (true) or high (false) ``x`` is better, for the frontier; high ``y`` always is. ``None``
            draws no frontier.

    Returns:
        SVG for a page: see :func:`evit_deploy.charts.svg.drawn`.
    """
    layers = [_whiskers(values)]
    best = [] if lower_x is None else frontier(values, lower_x=lower_x)
    if len(best) > 1:
        data = {"values": [{"x": point.x, "y": point.y} for point in best]}
        mark = {"type": "line", "strokeDash": [4, 3], "color": "currentColor", "opacity": 0.6, "aria": False}
        layers.append({"data": data, "mark": mark, "encoding": {}})
    layers.append(_marks(values))
    return drawn(_spec(values, axes, layers), description)


def lines(values: Sequence[Point], axes: Axes, description: str, *, marks: bool = True) -> str:
    """A line chart with one line per series, through its points in order of ``x``.

    Args:
        values: The points.
        axes: Titles and scales.
        description: Text alternative.
        marks: Whether to mark every point, with its interval.

    Returns:
        SVG for a page: see :func:`evit_deploy.charts.svg.drawn`.
    """
    line = {"mark": {"type": "line", "strokeWidth": 1.5, "aria": not marks}, "encoding": {"color": _colors(values)}}
    layers = [_whiskers(values), line, _marks(values)] if marks else [line]
    return drawn(_spec(values, axes, layers), description)


def bars(values: Sequence[Point], axes: Axes, description: str) -> str:
    """A grouped bar chart: for every ``x``, one bar per series.

    Args:
        values: The bars; ``y`` is the height.
        axes: Titles and scales.
        description: Text alternative.

    Returns:
        SVG for a page: see :func:`evit_deploy.charts.svg.drawn`.
    """
    names = list(dict.fromkeys(printable(value.series) for value in values))
    spec = {
        "width": WIDTH,
        "height": HEIGHT,
        "data": {"values": [_record(value) for value in values]},
        "mark": {"type": "bar"},
        "encoding": {
            "x": {"field": "x", "type": "ordinal", "title": printable(axes.x), "axis": {"labelAngle": 0}, "sort": None},
            "xOffset": {"field": "series", "type": "nominal", "sort": names},
            "y": {"field": "y", "type": "quantitative", "title": printable(axes.y)},
            "color": _colors(values),
            "description": {"field": "label"},
        },
    }
    return drawn(spec, description)


def frontier(values: Sequence[Point], *, lower_x: bool) -> list[Point]:
    """The Pareto-optimal points, in order of ``x``.

    >>> some = [Point(1, 1, "", "a"), Point(2, 3, "", "a"), Point(3, 2, "", "a")]
    >>> [point.x for point in frontier(some, lower_x=True)]
    [1, 2]
    """
    best: list[Point] = []
    for point in sorted(values, key=lambda value: (value.x if lower_x else -value.x, -value.y)):
        if not best or point.y > best[-1].y:
            best.append(point)
    return best if lower_x else best[::-1]


def _spec(values: Sequence[Point], axes: Axes, layers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    kept = [layer for layer in layers if layer]
    if axes.logarithmic:
        values = [value for value in values if value.x > 0]
    if axes.line is not None:
        rule = {"type": "rule", "strokeDash": [2, 3], "opacity": 0.7, "aria": False}
        kept.insert(0, {"mark": rule, "encoding": {"y": {"datum": axes.line}, "x": None}})
    x: dict[str, Any] = {
        "field": "x",
        "type": "quantitative",
        "title": printable(axes.x),
        "scale": {"zero": False, "nice": False, "padding": 12},
    }
    if axes.logarithmic:
        x |= {"scale": {"type": "log", "nice": False, "padding": 12}}
        x |= {"axis": {"values": sorted({value.x for value in values}), "format": "~g"}}
    y: dict[str, Any] = {
        "field": "y",
        "type": "quantitative",
        "title": printable(axes.y),
        "scale": {"zero": False, "nice": False, "padding": 10},
    }
    if axes.percent:
        y |= {"axis": {"format": ".0%" if _spread(values) > 0.05 else ".1%"}}
    data = {"values": [_record(value) for value in values]}
    return {"width": WIDTH, "height": HEIGHT, "data": data, "layer": kept, "encoding": {"x": x, "y": y}}


def _spread(values: Sequence[Point]) -> float:
    ends = [end for value in values for end in (value.y, value.low, value.high) if end is not None]
    return max(ends) - min(ends)


def _record(value: Point) -> dict[str, Any]:
    found = {name: part for name, part in msgspec.structs.asdict(value).items() if part is not None}
    return found | {"label": printable(value.label), "series": printable(value.series)}


def _whiskers(values: Sequence[Point]) -> dict[str, Any]:
    if len(values) > _MOST_INTERVALS or all(value.low is None for value in values):
        return {}
    encoding = {"y": {"field": "low", "type": "quantitative"}, "y2": {"field": "high"}, "color": _colors(values)}
    return {"mark": {"type": "rule", "aria": False}, "transform": [{"filter": "isValid(datum.low)"}],
            "encoding": encoding}  # fmt: skip


def _marks(values: Sequence[Point]) -> dict[str, Any]:
    encoding = {
        "color": _colors(values),
        "shape": _scale(values, _SHAPES),
        "description": {"field": "label"},
    }
    return {"mark": {"type": "point", "filled": True, "size": 60, "opacity": 1}, "encoding": encoding}


_BESIDE = 26
"""Length of series names, in characters, up to which two fit side by side above a chart."""


def _colors(values: Sequence[Point]) -> dict[str, Any]:
    return _scale(values, [color(i) for i in range(SERIES)])


def _scale(values: Sequence[Point], span: Sequence[str]) -> dict[str, Any]:
    """A scale with one value of ``span`` per series; without a legend for a single series."""
    names = list(dict.fromkeys(printable(value.series) for value in values))
    scale = {"domain": names, "range": [span[i % SERIES] for i in range(len(names))]}
    columns = 1 if max(map(len, names), default=0) > _BESIDE else 2
    legend: dict[str, Any] | None = {"title": None, "columns": columns} if len(names) > 1 else None
    return {"field": "series", "type": "nominal", "scale": scale, "legend": legend}
