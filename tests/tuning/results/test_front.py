"""What was found, as a front and a picture."""

import xml.etree.ElementTree as ElementTree

import msgspec
import pytest

from evit_deploy.tuning.results.front import as_svg, pareto
from tests.support.tuning import row, tuning


def test_the_front_has_what_nothing_beats():
    rows = [row("slow", 9.0, 0.9), row("a", 8.0, 0.99), row("b", 5.0, 0.9), row("worse", 5.0, 0.8), row("c", 3.0, 0.5)]
    assert [one.name for one in pareto(rows)] == ["a", "b", "c"]
    assert pareto([]) == ()


@pytest.mark.parametrize("count", [1, 2, 9])
def test_no_row_of_a_front_is_beaten_by_any(count):
    rows = [row(str(i), (7 * i) % 11, ((5 * i) % 13) / 13) for i in range(count)]
    front = pareto(rows)
    for one in front:
        assert not any(r.expected <= one.expected and r.cosine > one.cosine for r in rows)
    assert front


def test_the_picture_is_one_and_every_row_is_in_it():
    root = ElementTree.fromstring(as_svg(tuning()))
    names = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert any(name is not None and name.startswith("a <b> & c") for name in names)
    marks = [mark.get("aria-label", "") for mark in root.iter() if mark.get("aria-roledescription") == "point"]
    assert len(marks) == len({row.name for row in (*tuning().front, *tuning().finalists)})
    assert any(mark.startswith("a <b> & c, chosen: ") for mark in marks)
    one = msgspec.structs.replace(tuning(), front=tuning().front[:1], finalists=tuning().finalists[1:])
    ElementTree.fromstring(as_svg(one))  # no two places to put an axis between
