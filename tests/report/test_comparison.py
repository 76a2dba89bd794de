"""A comparison as CSV, Markdown and JSON: the same numbers in all three."""

import csv
import io
import json
import re

import msgspec
import numpy as np
import pytest
from rich.console import Console

from evit_deploy.report.comparison import as_csv, as_markdown, rounded
from evit_deploy.report.report import ComparedRow, Difference, ProfileRow, Report
from evit_deploy.report.statistics import difference, paired_interval
from evit_deploy.report.tables import render


def report(**changes) -> Report:
    dense = ComparedRow("dense", "dense", "", "fp32", 1.2537123, 1.0, 197, images=30, runtime="onnxruntime",
                        top1=2 / 3, top1_low=0.488, top1_high=0.808, top5=1.0)  # fmt: skip
    first = msgspec.structs.replace(
        dense, name="a|b", method="evit", settings="keep_rate=0.7", gmacs=0.8207123456, mac_ratio=1.527, tokens=72,
        dense="dense", agreement=0.96666667, to_dense=Difference("dense", -1 / 30, 0.0327, -0.13, 0.0612345678),
    )  # fmt: skip
    second = msgspec.structs.replace(
        first, name="tome", to_reference=Difference("a|b", 1 / 30, 0.0327, -0.06, 0.12345678)
    )
    rows = [
        ProfileRow("onnxruntime", name, batch, 50, 100 / 3, 30.0 * batch, 31.0, 32.0, 0.00123456789, **ratios)
        for batch in (1, 8)
        for name, ratios in (
            ("dense", {}),
            ("a|b", {"speedup": 0.93333333, "speedup_low": 0.9, "speedup_high": 0.95, "computed_mac_ratio": 1.5,
                     "mac_efficiency": 1.1 / 3, "overhead": -0.0012345678}),
            ("tome", {"speedup": 4 / 3, "speedup_low": 1.3, "speedup_high": 1.4}),
        )
    ]  # fmt: skip
    made = Report(compared=(dense, first, second), rows=tuple(rows), notes=("A note.",), versions={"torch": "2"})
    made = msgspec.structs.replace(made, **changes)
    return msgspec.structs.replace(
        made, compared=tuple(map(rounded, made.compared)), rows=tuple(map(rounded, made.rows))
    )


def test_numbers_are_rounded_once_and_in_differences_too():
    row = report().compared[2]
    assert (row.gmacs, row.agreement, row.tokens) == (0.82071, 0.96667, 72)
    assert row.to_reference == Difference("a|b", 0.033333, 0.0327, -0.06, 0.12346)
    assert rounded(row) == row


def test_the_csv_has_a_line_for_every_bundle_runtime_and_batch_size():
    found = list(csv.DictReader(io.StringIO(as_csv(report()))))
    assert [(line["name"], line["batch"]) for line in found] == [
        (name, batch) for batch in ("1", "8") for name in ("dense", "a|b", "tome")
    ]
    slow = found[1]  # slower than its dense twin, and there
    assert (slow["speedup"], slow["overhead"], slow["settings"]) == ("0.93333", "-0.0012346", "keep_rate=0.7")
    assert (slow["runtime"], slow["answered_by"], slow["dense"]) == ("onnxruntime", "onnxruntime", "dense")
    assert (slow["to_dense"], slow["to_dense_low"], slow["to_dense_high"]) == ("-0.033333", "-0.13", "0.061235")
    assert [slow[f"to_reference{part}"] for part in ("", "_error", "_low", "_high")] == [""] * 4
    assert found[2]["to_reference_high"] == "0.12346"
    assert found[0]["speedup"] == found[0]["agreement"] == ""


def test_csv_json_and_markdown_hold_the_same_numbers():
    made = report()
    document = json.loads(msgspec.json.encode(made))
    lines = list(csv.DictReader(io.StringIO(as_csv(made))))
    rows = {(row["variant"], row["batch"]): row for row in document["rows"]}
    compared = {row["name"]: row for row in document["compared"]}
    checked = 0
    for line in lines:
        both = compared[line["name"]] | rows[line["name"], int(line["batch"])]
        for column, text in line.items():
            if column.startswith(("to_dense", "to_reference")):
                name = "to_dense" if column.startswith("to_dense") else "to_reference"
                part = column.removeprefix(name).lstrip("_") or "value"
                value = (both[name] or {}).get(part)
            else:
                value = compared[line["name"]][{"answered_by": "runtime"}.get(column, column)] if column in (
                    *compared["dense"], "answered_by") and column != "runtime" else both[column]  # fmt: skip
            wanted = None if value is None else value if isinstance(value, str) else float(value)
            assert (text if isinstance(value, str) else float(text) if text else None) == wanted, column
            checked += value is not None
    assert checked > 150
    written = as_markdown(made)
    in_markdown = {float(number) for number in re.findall(r"-?\d+\.\d+(?:e-?\d+)?", written)}
    in_csv = {float(text) for line in lines for text in line.values() if re.fullmatch(r"-?\d+(\.\d+)?(e-?\d+)?", text)}
    assert in_markdown - {0.7} <= in_csv  # 0.7 is a setting
    assert {made.rows[1].speedup, made.rows[1].p99, made.compared[1].agreement, made.compared[1].gmacs} <= in_markdown


def test_the_markdown_has_two_tables_whose_lines_have_as_many_cells():
    text = as_markdown(report())
    tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]
    assert [len(table) for table in tables] == [2 + 3, 2 + 6]
    for table in tables:
        assert len({len(re.split(r"(?<!\\)\|", line)) for line in table}) == 1
    assert "| a\\|b |" in text
    assert "top-1 less that of a\\|b" in text
    assert "- A note." in text
    assert text.rstrip().endswith("torch 2")


def test_what_was_not_measured_takes_no_column():
    bare = [ComparedRow(name, "evit", "", "fp32", 1.0, 1.0, 9) for name in ("dense", "a|b", "tome")]
    text = as_markdown(report(compared=tuple(bare)))
    assert "top-1" not in text
    assert "images |" not in text
    console = Console(file=io.StringIO(), width=300)
    render(report(compared=tuple(bare)), console)
    assert "top-1" not in console.file.getvalue()


def test_the_terminal_has_differences_in_points_with_their_intervals():
    console = Console(file=io.StringIO(), width=300)
    render(report(), console)
    text = console.file.getvalue()
    assert "30 images, answered by onnxruntime" in text
    assert "the reference is a|b" in text
    assert "-3.33 (-13.0 to +6.1)" in text
    assert "+3.33 (-6.0 to +12.3)" in text
    assert "0.93x" in text  # a losing row
    assert "96.67" in text


def test_a_narrow_terminal_loses_columns_and_no_letters():
    console = Console(file=io.StringIO(), width=80)
    render(report(), console)
    text = console.file.getvalue()
    assert "…" not in text
    assert "-3.33 (-13.0 to +6.1)" in text
    assert "top-5" not in text


@pytest.mark.parametrize(
    ("only_one", "only_other", "count", "ends"),
    [  # by hand: ((b+1)-(c+1))/(n+2) ± 1.96 sqrt(((b+1+c+1)/(n+2) - difference²)/(n+2))
        (10, 0, 100, (0.034252, 0.161826)),
        (0, 0, 60, (-0.044707, 0.044707)),
        (0, 0, 50_000, (-5.54e-5, 5.54e-5)),
        (700, 200, 50_000, (0.008825, 0.011175)),
    ],
)
def test_the_interval_of_a_paired_difference(only_one, only_other, count, ends):
    right, other = np.zeros(count, bool), np.zeros(count, bool)
    right[:only_one] = True
    other[only_one : only_one + only_other] = True
    assert paired_interval(right, other) == pytest.approx(ends, rel=1e-3)
    low, high = paired_interval(other, right)
    assert (-high, -low) == pytest.approx(ends, rel=1e-3)
    found = difference("other", right, other)
    assert (found.low, found.high) == paired_interval(right, other)
    assert found.low < found.value < found.high


def test_the_interval_holds_the_difference_as_often_as_it_says():
    """Of a thousand samples of 200 images, about 95 % hold the difference that they were drawn from."""
    rng = np.random.default_rng(0)
    both = rng.random((1000, 200))
    right, other = both < 0.80, (both < 0.72) | (both > 0.97)  # 0.80 against 0.75
    held = 0
    for one, two in zip(right, other, strict=True):
        low, high = paired_interval(one, two)
        held += low <= 0.05 <= high
    assert 930 <= held <= 980


def test_a_name_is_neither_a_formula_nor_markup_in_the_files():
    name = '=HYPERLINK("http://x")\n[a](b)|<b>`\x1b[31m'
    dense, first, _ = report().compared
    rows = [msgspec.structs.replace(row, variant=name) for row in report().rows if row.variant == "a|b"]
    made = report(compared=(dense, msgspec.structs.replace(first, name=name)), rows=tuple(rows), notes=(name,))
    found = list(csv.DictReader(io.StringIO(as_csv(made))))
    assert len(found) == len(rows)
    assert {line["name"] for line in found} == {'\'=HYPERLINK("http://x")\\n[a](b)|<b>`\\x1b[31m'}
    assert {line["overhead"] for line in found} == {"-0.0012346"}  # a number stays one
    page = as_markdown(made, title=name)
    assert "\x1b" not in page
    for line in page.splitlines():
        assert not re.search(r"(?<!\\)[<`]|(?<!\\)\[a\]", line)
    table = [line for line in page.splitlines() if "HYPERLINK" in line and line.startswith("| ")]
    assert len(table) == 1 + len(rows)
    assert json.loads(msgspec.json.encode(made))["notes"] == [name]
