"""Reports: what counts as passed, how they add up, and the intervals of shares."""

import io

import numpy as np
import pytest
import scipy.stats
from rich.console import Console

from evit_deploy.errors import GateFailed
from evit_deploy.report.report import AgreementRow, Check, Report
from evit_deploy.report.statistics import accuracy_row, wilson
from evit_deploy.report.tables import render


def test_one_failed_check_fails_the_report():
    right, wrong = Check("a", 1, 2, True), Check("b", 3, 2, False, "too much")
    assert Report().passed
    assert Report(checks=(right,)).passed
    assert not Report(checks=(right, wrong)).passed
    assert Report(checks=(right, wrong)).failed == (wrong,)


RIGHT, WRONG = Check("{a}", 1, 2, True), Check("{b}", 3, 2, False, "Too much of {b}.")


def test_a_report_stops_at_its_first_failed_check():
    report = Report(checks=(RIGHT, WRONG, Check("c", 9, 2, False, "no")))
    with pytest.raises(GateFailed) as raised:
        report.raise_if_failed(where="there")
    assert str(raised.value) == "there: 2 of 3 checks failed, first: {b} (got 3, expected 2). Too much of {b}."
    with pytest.raises(GateFailed) as raised:
        report.raise_if_failed("bad: {name}", seen="{value:.2f}", wanted="at least {limit}", fix="It was {kept}.")
    assert str(raised.value) == "bad: {b} (got 3.00, expected at least 2). It was {kept}."
    Report(checks=(RIGHT,)).raise_if_failed()
    Report().raise_if_failed()


def test_a_failed_check_without_numbers_makes_none_up():
    with pytest.raises(GateFailed) as raised:
        Report(checks=(Check("logits", None, None, False, "no image to compare"),)).raise_if_failed("{name}")
    assert str(raised.value) == "logits. no image to compare"


def test_reports_add_up():
    first = Report(checks=(Check("a", 1, 2, True),), notes=("x", "y"), versions={"v": "1"})
    second = Report(checks=(Check("b", 1, 2, True),), notes=("y", "z"), versions={"w": "2"}, device={"cpu": "c"})
    both = first + second
    assert [check.name for check in both.checks] == ["a", "b"]
    assert both.notes == ("x", "y", "z")  # a note once
    assert (both.versions, both.device) == ({"v": "1", "w": "2"}, {"cpu": "c"})
    row = AgreementRow("one", "other", 3, 1.0, {}, 0.0)
    assert (Report(agreement=(row,)) + Report(agreement=(row,))).agreement == (row, row)


def test_failures_and_agreement_are_printed():
    report = Report(
        checks=(Check("kept patches", "50%", "100%", False, "half of them differ"),),
        agreement=(
            AgreementRow("one", "other", 3, 0.5, {"1": 1.0, "2": 0.25}, 0.125),
            AgreementRow("one", "third", 3, 1.0, {}, 0.5),
        ),
        notes=("a note",),
    )
    console = Console(file=io.StringIO(), width=120)
    render(report, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "FAILED kept patches: half of them differ" in text
    assert "100.0 / 25.0" in text
    assert "not known" in text
    assert text.rstrip().endswith("a note")


def test_accuracy_counts_the_first_and_the_first_five():
    logits = np.tile(np.arange(10, 0, -1.0), (4, 1))  # class 0 first, class 9 last
    row = accuracy_row("x", [(logits[:3], np.array([0, 4, 5])), (logits[3:], np.array([0]))], gmacs=1.5)
    assert (row.top1, row.top5, row.count, row.gmacs) == (0.5, 0.75, 4, 1.5)
    assert (row.low, row.high) == wilson(2, 4)


@pytest.mark.parametrize(("classes", "told"), [(2, False), (5, False), (6, True)])
def test_of_few_classes_there_is_no_top_5(classes, told):
    logits, labels = np.random.default_rng(0).random((12, classes)), np.arange(12) % classes
    row = accuracy_row("x", [(logits, labels)])
    assert (row.top1, row.top5 is not None) == ((logits.argmax(1) == labels).mean(), told)


@pytest.mark.parametrize("count", [1, 5, 9, 360, 50000])
@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.983, 1])
def test_wilson_interval(count, share):
    right = round(share * count)
    wanted = scipy.stats.binomtest(right, count).proportion_ci(0.95, method="wilson")
    assert wilson(right, count) == pytest.approx((wanted.low, wanted.high), abs=1e-12)


def test_wilson_interval_of_nothing():
    assert wilson(0, 0) == (0, 1)
