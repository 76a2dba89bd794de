"""What was found, as a front, a table, CSV, and a picture."""

import csv
import io
import xml.etree.ElementTree as ElementTree

import msgspec
import pytest

from evit_deploy.report.report import ComparedRow, Difference
from evit_deploy.tuning.front import as_csv, as_markdown, as_svg, pareto, table
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


def test_csv_has_finalists_and_front_once_each():
    lines = list(csv.DictReader(io.StringIO(as_csv(tuning()))))
    assert [line["name"] for line in lines] == ["dense", "a <b> & c", "s1", "s9"]
    final = lines[1]
    assert (final["locations"], final["tokens"], final["keep_rate"]) == ("2 5", "150 80", "0.8 0.5")
    assert (final["speedup"], final["speedup_low"], final["cosine"], final["images"]) == ("1.5", "1.48", "0.94", "128")
    assert [line["winner"] for line in lines] == ["0", "1", "0", "0"]
    assert [line["finalist"] for line in lines] == ["1", "1", "0", "0"]


def test_the_picture_is_one_and_every_row_is_in_it():
    root = ElementTree.fromstring(as_svg(tuning()))
    names = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert any(name is not None and name.startswith("a <b> & c") for name in names)
    marks = [mark.get("aria-label", "") for mark in root.iter() if mark.get("aria-roledescription") == "point"]
    assert len(marks) == len({row.name for row in (*tuning().front, *tuning().finalists)})
    assert any(mark.startswith("a <b> & c, chosen: ") for mark in marks)
    one = msgspec.structs.replace(tuning(), front=tuning().front[:1], finalists=tuning().finalists[1:])
    ElementTree.fromstring(as_svg(one))  # no two places to put an axis between


def test_the_table_marks_the_winner_and_leaves_out_what_is_unknown():
    header, rows = table(tuning())
    assert "top-1 to dense, points" not in header
    assert [cells[0] for cells in rows] == ["dense", "a <b> & c *"]
    assert all(len(cells) == len(header) for cells in rows)
    assert "| 1.48 - 1.52 |" in as_markdown(tuning())


@pytest.mark.parametrize(("share", "name"), [({"top1": 0.5}, "top-1"), ({"recall": 0.5}, "recall@1")])
def test_the_table_says_which_share_is_held_against_the_dense_model(share, name):
    cost = Difference("dense", -0.02, 0.01, -0.04, 0.0)
    answers = ComparedRow("a", "evit", "", "fp32", 1.0, 1.0, 9, to_dense=cost, **share)
    dense, own = tuning().finalists
    finalists = (dense, msgspec.structs.replace(own, answers=answers))
    header, rows = table(msgspec.structs.replace(tuning(), finalists=finalists))
    assert header[-1] == f"{name} to dense, points"
    assert [cells[-1] for cells in rows] == ["", "-2.0 [-4.0, 0.0]"]


@pytest.mark.parametrize(("field", "other"), [("top1", "recall"), ("recall", "top1")])
def test_a_column_of_the_csv_is_named_after_the_share_that_it_holds(field, other):
    cost = Difference("dense", -0.02, 0.01, -0.04, 0.0)
    answers = ComparedRow("a", "evit", "", "fp32", 1.0, 1.0, 9, to_dense=cost, **{field: 0.5})
    dense, own = tuning().finalists
    finalists = (dense, msgspec.structs.replace(own, answers=answers))
    lines = list(csv.DictReader(io.StringIO(as_csv(msgspec.structs.replace(tuning(), finalists=finalists)))))
    columns = (field, other, "to_dense", "to_dense_low", "to_dense_high")
    assert [lines[1][name] for name in columns] == ["0.5", "", "-0.02", "-0.04", "0"]
    assert [lines[0][name] for name in columns] == [""] * 5
