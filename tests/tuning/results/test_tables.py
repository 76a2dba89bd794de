"""What was found as a table and as CSV."""

import csv
import io

import msgspec
import pytest

from evit_deploy.report.report import ComparedRow, Difference
from evit_deploy.tuning.results.tables import as_csv, as_markdown, table
from tests.support.tuning import tuning


def test_csv_has_finalists_and_front_once_each():
    lines = list(csv.DictReader(io.StringIO(as_csv(tuning()))))
    assert [line["name"] for line in lines] == ["dense", "a <b> & c", "s1", "s9"]
    final = lines[1]
    assert (final["locations"], final["tokens"], final["keep_rate"]) == ("2 5", "150 80", "0.8 0.5")
    assert (final["speedup"], final["speedup_low"], final["cosine"], final["images"]) == ("1.5", "1.48", "0.94", "128")
    assert [line["winner"] for line in lines] == ["0", "1", "0", "0"]
    assert [line["finalist"] for line in lines] == ["1", "1", "0", "0"]


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
