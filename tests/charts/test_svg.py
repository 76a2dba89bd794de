import re

import pytest

from evit_deploy.charts.kinds import Axes, Point, points
from evit_deploy.charts.svg import DARK_PAGE, LIGHT_PAGE, palette, standalone


def luminance(color: str) -> float:
    """Relative luminance, WCAG 2.2."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize(("dark", "page"), [(False, LIGHT_PAGE), (True, DARK_PAGE)])
def test_every_series_stands_out_from_the_page(dark, page):
    colors = re.findall(r"#[0-9a-f]{6}", palette(dark))
    assert len(set(colors)) == 8
    for color in colors:
        light, deep = sorted((luminance(color), luminance(page)), reverse=True)
        assert (light + 0.05) / (deep + 0.05) >= 4.5, color


@pytest.mark.parametrize("dark", [False, True])
def test_a_file_needs_no_page(dark):
    svg = points([Point(1, 1, "a", "one"), Point(2, 2, "b", "two")], Axes("x", "y"), "d")
    assert "var(--series-2)" in svg
    assert "currentColor" in svg
    alone = standalone(svg, dark)
    assert "var(" not in alone
    assert "currentColor" not in alone
    assert (DARK_PAGE if dark else LIGHT_PAGE) in alone
