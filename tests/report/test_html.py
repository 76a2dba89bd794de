"""What a notebook shows: the numbers of the terminal's tables, escaped, in the page's colors."""

import io
import re
from html.parser import HTMLParser

import numpy as np
from rich.console import Console

from evit_deploy.report.html import html_table
from evit_deploy.report.report import AgreementRow, Check, Report
from evit_deploy.report.statistics import accuracy_row
from evit_deploy.report.tables import render, text_table
from evit_deploy.tokens.plan import TokenSpec, make_plan


class Read(HTMLParser):
    """Cells of all tables, and whether every tag is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        assert tag in ("table", "thead", "tbody", "caption", "tr", "th", "td", "p", "strong")
        assert {name for name, _ in attrs} <= {"style"}
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data


REPORT = Report(
    checks=(Check("a <b>", 0.123456, 1, True), Check("[red]b", "3 %", None, False, "too <much>")),
    accuracy=(accuracy_row("onnxruntime", [(np.eye(10), np.arange(10))]),),
    agreement=(AgreementRow("eager", "onnxruntime", 8, 1.0, {"1": 0.5, "2": 1.0}, 1e-6),),
    notes=("Mind & matter.",),
)


def test_a_report_begins_with_its_verdict_and_has_the_terminals_numbers():
    page = Read(REPORT._repr_html_())
    assert page.text[0].strip() == "FAILED: 1 of 2 checks"
    console = Console(file=io.StringIO(), width=300)
    render(REPORT, console)
    printed = console.file.getvalue()
    shown = [cell for cell in page.cells if cell]
    assert len(shown) > 20
    for cell in shown:
        assert all(word in printed for word in cell.split())  # a title may have two lines there
    assert {"a <b>", "[red]b", "0.123", "50.0 / 100.0", "100.00"} <= set(shown)
    assert "FAILED [red]b: too <much>" in page.text
    assert "Mind & matter." in page.text


def test_a_report_is_a_short_line_of_text():
    assert repr(REPORT) == "Report(FAILED: 1 of 2 checks, 1 accuracy, 1 agreement, 1 notes)"
    assert repr(Report(checks=(REPORT.checks[0],))) == "Report(passed: 1 check)"
    assert repr(Report()) == "Report(no checks)"
    assert Report(notes=("Slow.",))._repr_html_().count("<p") == 1  # no verdict without a check


def test_a_plan_is_a_line_and_a_table():
    plan = make_plan(TokenSpec(keep_rate=0.7), prefix=1, patches=196, depth=12)
    assert repr(plan) == "TokenPlan(197 → 140 → 100 → 72 tokens at blocks 3, 6, 9)"
    cells = Read(plan._repr_html_()).cells
    assert cells[: len(plan.header)] == list(plan.header)
    assert cells[len(plan.header) :] == [cell for row in plan.rows() for cell in row]


def test_a_plan_with_costs_says_what_is_saved(converted):
    plan = converted.manifest.plan
    assert repr(plan) == f"TokenPlan(37 → 24 → 16 → 11 tokens at blocks 1, 2, 3, {plan.total})"
    page = Read(plan._repr_html_())
    assert page.text[-1].strip() == plan.total
    assert "MMACs" in page.cells


def test_a_bundle_says_what_it_is(converted):
    assert repr(converted) == f"Bundle('{converted.path}': vit_tiny_patch16_224, evit at keep rate 0.6, fp32)"
    cells = Read(converted._repr_html_()).cells
    facts = dict(zip(cells[::2], cells[1::2], strict=False))
    assert facts["model"] == "vit_tiny_patch16_224"
    assert facts["precision"] == "fp32"
    assert "model.onnx" in facts["files"]
    assert set(converted.manifest.plan.header) <= set(cells)


def test_a_table_has_no_colors_of_its_own_and_loads_nothing():
    page = html_table(("name", "n"), [("<script>alert(1)</script>", "+3 %"), ("b", "")], caption="a & b")
    assert Read(page).cells == ["name", "n", "<script>alert(1)</script>", "+3 %", "b", ""]
    assert "<script>" not in page
    for source in (page, REPORT._repr_html_()):
        styles = " ".join(re.findall(r'style="([^"]*)"', source))
        assert not re.search(r"background|(^|[; ])color|url|#[0-9a-f]{3}", styles)
        assert "http" not in source
    assert page.count("text-align: right") == 3  # numbers and their title


def test_a_table_as_text_takes_names_as_they_are_and_loses_columns_rather_than_letters():
    rows = [("a[1].png", "x" * 30, "1"), ("[bold]", "y", "2")]
    whole = text_table(("image", "label", "n"), rows, 80)
    assert "a[1].png" in whole
    assert "[bold]" in whole
    narrow = text_table(("image", "label", "n"), rows, 20, ["label"])
    assert "label" not in narrow
    assert "a[1].png" in narrow


def test_a_notebook_shows_control_characters_as_escapes():
    page = html_table(("a\nb",), [("\x1b[31m<script>\u202e\n",)], caption="\x1b")
    assert Read(page).cells == ["a b", "\\x1b[31m<script>\\u202e\\n"]
    assert "\x1b" not in page
