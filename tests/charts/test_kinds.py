import re
import xml.etree.ElementTree as ElementTree

import pytest

from evit_deploy.charts.kinds import Axes, Point, bars, frontier, lines, points

SVG = "{http://www.w3.org/2000/svg}"
AXES = Axes("milliseconds", "top-1", percent=True)
SOME = [
    Point(1.0, 0.70, "a", "evit", 0.68, 0.72),
    Point(2.0, 0.80, "b", "evit", 0.78, 0.82),
    Point(3.0, 0.75, "c", "merge", 0.73, 0.77),
]


def marks(svg: str, kind: str) -> list[ElementTree.Element]:
    found = ElementTree.fromstring(svg).iter()
    return [element for element in found if element.get("aria-roledescription") == kind]


def where(mark: ElementTree.Element) -> tuple[float, float]:
    x, y = re.findall(r"[\d.]+", mark.get("transform", ""))[:2]
    return float(x), float(y)


def test_points_stand_where_their_values_say():
    svg = points(SOME, AXES, "accuracy against time")
    a, b, c = (where(mark) for mark in marks(svg, "point"))
    assert b[0] - a[0] == pytest.approx(c[0] - b[0], abs=0.01)  # equal steps of x
    assert (a[1] - c[1]) == pytest.approx(c[1] - b[1], abs=0.01)  # and of y, which grows upwards
    assert b[1] < c[1] < a[1]


def test_every_point_can_be_reached_by_keyboard_and_says_what_it_is():
    svg = points(SOME, AXES, "accuracy against time")
    assert [mark.get("aria-label") for mark in marks(svg, "point")] == ["a", "b", "c"]
    assert all(mark.get("tabindex") == "0" for mark in marks(svg, "point"))
    assert ElementTree.fromstring(svg).get("aria-label") == "accuracy against time"


def test_series_differ_in_color_and_in_shape():
    first, _, third = marks(points(SOME, AXES, "d"), "point")
    assert first.get("fill") != third.get("fill")
    assert first.get("d") != third.get("d")
    legend = [text.text for text in ElementTree.fromstring(points(SOME, AXES, "d")).iter(f"{SVG}text")]
    assert {"evit", "merge"} <= set(legend)
    assert "evit" not in [t.text for t in ElementTree.fromstring(points(SOME[:2], AXES, "d")).iter(f"{SVG}text")]


def test_names_are_text_and_no_markup():
    hostile = "<script>alert(1)</script>&\"'"
    svg = points([Point(1, 1, hostile, hostile), Point(2, 2, "b", "b")], AXES, hostile)
    assert "<script" not in svg
    assert marks(svg, "point")[0].get("aria-label") == hostile
    assert hostile in [text.text for text in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_the_frontier_has_what_no_other_point_beats():
    assert [point.label for point in frontier(SOME, lower_x=True)] == ["a", "b"]
    assert [point.label for point in frontier(SOME, lower_x=False)] == ["b", "c"]
    assert frontier([], lower_x=True) == []


def test_a_bar_is_as_high_as_its_value():
    values = [Point(0, 10.0, "dense 0", "dense"), Point(0, 5.0, "evit 0", "evit"), Point(1, 10.0, "dense 1", "dense")]
    svg = bars(values, Axes("block", "MMACs"), "multiply-adds")
    heights = [float(re.search(r"v([\d.]+)h", mark.get("d", ""))[1]) for mark in marks(svg, "bar")]  # type: ignore[index]
    assert heights[0] == pytest.approx(2 * heights[1])
    assert heights[0] == pytest.approx(heights[2])


def test_lines_go_through_their_points_in_order_of_x():
    values = [Point(8, 1.5, "8", "onnxruntime"), Point(1, 1.2, "1", "onnxruntime"), Point(2, 1.3, "2", "onnxruntime")]
    svg = lines(values, Axes("batch", "speed-up", logarithmic=True, line=1.0), "speed-up")
    (path,) = re.findall(r'd="(M[^"]*)"[^>]*stroke="var\(--series-1\)"[^>]*stroke-width="1.5"', svg)
    across = [float(place.split(",")[0]) for place in re.split("[ML]", path) if place]
    assert across == sorted(across)
    # Spaced by ratios: from 2 to 8 it is twice as far as from 1 to 2.
    assert across[2] - across[1] == pytest.approx(2 * (across[1] - across[0]), rel=1e-3)


@pytest.mark.parametrize("draw", [points, lines, bars])
def test_control_characters_are_shown_as_escapes(draw):
    svg = draw([Point(1, 1, "a\x1b[31m\0", "b\u202e\x07"), Point(2, 2, "", "c")], Axes("x\x1b", "y\x1b"), "d\x1b")
    ElementTree.fromstring(svg)
    assert "a\\x1b[31m\\x00" in svg


@pytest.mark.parametrize("count", [1, 1000])
def test_one_point_and_a_thousand(count):
    many = [Point(float(i + 1), 0.5 + i / 10_000, f"p{i}", f"s{i % 20}", 0.4, 0.9) for i in range(count)]
    svg = points(many, AXES, "d", lower_x=True)
    assert len(marks(svg, "point")) == count
    assert len(svg) < 800_000


def test_long_names_stand_below_one_another():
    def height(*names: str) -> float:
        svg = lines([Point(x, 1.0 + x, name, name) for name in names for x in (1.0, 2.0)], AXES, "a")
        (found,) = re.findall(r'mark-group role-legend".*?d="M0,0h[\d.]+v([\d.]+)h', svg)
        return float(found)

    assert height("evit", "merge") < 20
    assert height("merge at 0.81 in fp16, dense, onnxruntime", "merge") > 20
