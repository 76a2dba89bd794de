"""The checks of ``tests/support/browser.py`` find what is wrong with a page, and nothing where nothing is."""

from pathlib import Path

import pytest

from tests.support.browser import Browser, png_size

pytestmark = pytest.mark.browser

GOOD = """<!doctype html><html lang="en"><meta charset="utf-8"><title>good</title>
<style>:root { color-scheme: light dark } body { margin: 8px } .wide { overflow-x: auto }
.drawn { opacity: 0; position: absolute } .drawn:focus-visible + span { outline: 2px solid }
.white { color: #fff; background: #000 } button:focus-visible { outline: 2px solid }</style>
<p>Text <a href="#end">link</a> <button>press</button> <input aria-label="name"></p>
<p class="white">white on <b style="color: rgb(255 255 255 / .9)">black</b></p>
<label><input type="radio" name="one" checked>a</label><label><input type="radio" name="one">b</label>
<div class="wide" tabindex="0"><div style="width: 3000px">scrolls by itself</div></div>
<label><input type="checkbox" class="drawn"><span>switch</span></label>
<svg width="90" height="30"><rect width="90" height="30" fill="#123"/><text x="5" y="20" fill="#fff">drawn</text></svg>
<p hidden style="color: #fff; background: #fff">not to be seen</p><p id="end">end</p></html>"""


@pytest.fixture
def written(tmp_path: Path):
    def write(added: str = "") -> Path:
        path = tmp_path / "page.html"
        path.write_text(GOOD.replace("</html>", f"{added}</html>"), encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [400, 1600])
def test_a_good_page_has_no_faults(width: int, dark: bool, browser: Browser, written, tmp_path: Path):
    with browser.open(written(), width, dark) as page:
        assert page.faults() == []
        assert page.width == page.scroll_width == width
        assert page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches") is dark
        assert png_size(page.screenshot(tmp_path / "page.png", whole=False)) == (width, 900)
        assert page.pdf(tmp_path / "page.pdf").read_bytes().startswith(b"%PDF-")


def test_tab_stops_at_everything_once_and_in_order(browser: Browser, written):
    with browser.open(written()) as page:
        keyboard = page.tab_through()
    names = [name.split(" > ")[-1].split(":")[0] for name in keyboard.reached]
    assert names == ["a", "button", "input", "input", "div.wide", "input.drawn"]


@pytest.mark.parametrize(
    ("added", "fault"),
    [
        ('<script>console.error("broken")</script>', "console: broken"),
        ('<script>throw new Error("broken")</script>', "console: broken"),
        ('<img src="gone.png" alt="gone">', "console: not loaded: file:"),
        ('<link rel="stylesheet" href="https://example.org/a.css">', "network: https://example.org/a.css"),
        ('<pre style="width: 2000px">wide</pre>', "too wide: pre ends at 2008 of 400 px"),
        ('<p style="color: #888; background: #fff">gray</p>', "contrast: 3.54 p: gray"),
        ('<p style="color: #777; background: #fff">gray</p>', "contrast: 4.48 p: gray"),
        ('<p style="background: #fff"><b style="opacity: .4; color: #000">pale</b></p>', "contrast: 2.85 p > b: pale"),
        ('<svg><rect width="300" height="99" fill="#fff"/><text x="9" y="20" fill="#ccc">pale</text></svg>',
         "contrast: 1.61 svg > text: pale"),
        ('<button onfocus="this.blur()">shy</button>', "not reached by Tab: button: shy"),
        ('<button style="outline: none">plain</button>', "focus not visible: button: plain"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_found(added: str, fault: str, browser: Browser, written):
    with browser.open(written(added), 400) as page:
        assert [line for line in page.faults() if line.startswith(fault)] != [], page.faults()


def test_a_gray_of_just_enough_contrast_is_no_fault(browser: Browser, written):
    with browser.open(written('<p style="color: #767676; background: #fff">gray</p>')) as page:
        assert page.low_contrast() == []
