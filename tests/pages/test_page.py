import re
from html.parser import HTMLParser

import pytest

from evit_deploy.charts.kinds import Axes, Point, lines
from evit_deploy.pages.page import WebPage
from tests.support.browser import WIDTHS, Browser

HOSTILE = "<img src=x onerror=alert(1)>\"'&\x1b[31m"


def example() -> str:
    page = WebPage("A page", "of everything")
    page.section("Verdict")
    page.cards((("Same answers?", "Yes.", "good"), ("How much faster?", "No.", "bad"), ("Cost?", "Unknown.", "")))
    page.facts([("Method", "evit"), ("Empty", "")])
    page.section("Numbers")
    page.table(("name", "ms"), [("ten", "10.0"), ("two", "2.0"), ("three", "3.0")], "Times")
    values = [Point(1, 1.2, "batch 1: 1.2", "a"), Point(8, 1.5, "batch 8: 1.5", "a"), Point(8, 1.1, "b 8", "b")]
    page.charts((("Speed-up", lines(values, Axes("batch", "speed-up", logarithmic=True, line=1.0), "Speed-up")),))
    page.begin_details("More")
    page.line("Hidden at first.")
    page.end_details()
    page.commands(["evit-deploy convert a.pth --keep-rate 0.7"])
    return str(page)


class Tags(HTMLParser):
    """Which elements there are, and that each is closed where it should be."""

    VOID = ("meta", "img", "br", "input", "link")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_elements_are_closed_and_sections_have_their_links():
    seen = Tags(example()).seen
    places = {attributes["id"] for tag, attributes in seen if tag == "section"}
    assert {attributes["href"] for tag, attributes in seen if tag == "a"} == {f"#{place}" for place in places}
    assert len(places) == 2


def test_nothing_of_others_is_markup():
    page = WebPage(HOSTILE, HOSTILE)
    page.section(HOSTILE)
    page.line(HOSTILE)
    page.table((HOSTILE,), [(HOSTILE,)], HOSTILE)
    page.cards(((HOSTILE, HOSTILE, ""),))
    page.facts([(HOSTILE, HOSTILE)])
    page.picture(b"", HOSTILE)
    page.begin_details(HOSTILE)
    page.end_details()
    page.commands([HOSTILE])
    page.charts(((HOSTILE, lines([Point(1, 1, HOSTILE, HOSTILE), Point(2, 1, "", "b")], Axes("x", "y"), HOSTILE)),))
    seen = Tags(str(page)).seen
    assert [attributes["alt"] for tag, attributes in seen if tag == "img"] == [HOSTILE.replace("\x1b", "\\x1b")]
    assert not any(name.startswith("on") for _, attributes in seen for name in attributes)
    assert "\x1b" not in str(page)


def test_a_browser_may_run_its_script_and_load_nothing():
    text = example()
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    assert "default-src 'none'" in policy
    assert not re.findall(r'(?:src|href)="(?!#|data:)', text)


@pytest.mark.browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_it_is_without_fault(width, dark, browser: Browser, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(example(), encoding="utf-8")
    with browser.open(path, width, dark) as page:
        assert page.faults() == []
        page.pdf(tmp_path / "page.pdf")
        assert (tmp_path / "page.pdf").stat().st_size > 10_000


@pytest.mark.browser
def test_tables_are_sorted_by_mouse_and_by_keyboard(browser: Browser, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(example(), encoding="utf-8")
    order = "[...document.querySelectorAll('tbody tr td:first-child')].map(cell => cell.textContent)"
    with browser.open(path, 1600) as page:
        assert page.evaluate(order) == ["ten", "two", "three"]
        page.playwright.get_by_role("button", name="ms").click()
        assert page.evaluate(order) == ["two", "three", "ten"]
        page.playwright.get_by_role("button", name="name").focus()
        page.playwright.keyboard.press("Enter")
        assert page.evaluate(order) == ["ten", "three", "two"]
        page.playwright.keyboard.press("Enter")
        assert page.evaluate(order) == ["two", "three", "ten"]


@pytest.mark.browser
def test_a_point_says_what_it_stands_for(browser: Browser, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(example(), encoding="utf-8")
    with browser.open(path, 1600) as page:
        said = page.playwright.locator("figure output")
        page.playwright.locator("[aria-label='batch 8: 1.5']").hover()
        assert said.text_content() == "batch 8: 1.5"
        page.playwright.locator("[aria-label='batch 1: 1.2']").focus()
        assert said.text_content() == "batch 1: 1.2"
