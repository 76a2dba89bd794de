"""Pages in a real Chromium, without a screen and without a network.

Reports console errors, clipped elements, low contrast, and elements that cannot be reached by keyboard.

    def test_page(browser, tmp_path):
        with browser.open(tmp_path / "report.html", width=400, dark=True) as page:
            assert page.faults() == []
            page.screenshot(tmp_path / "report.png")

Tests that use the fixture carry the marker ``browser``. They are skipped without Chromium or Playwright.
"""

import os
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDTHS = (400, 1600)
CONTRAST = 4.5  # WCAG 2.2, 1.4.3 (AA); required for large text too
SCRIPT = Path(__file__).with_suffix(".js").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Keyboard:
    """Result of pressing Tab from the top of a page to its end."""

    reached: list[str]
    """Elements that had the focus, in order."""

    missed: list[str]
    """Focusable elements that were not reached."""

    unmarked: list[str]
    """Elements without a visible focus style."""


@dataclass
class Page:
    """An open page. ``console_errors`` and ``requests`` grow while it is open."""

    playwright: Any
    """Playwright's page object, for clicks, locators and keys."""

    console_errors: list[str] = field(default_factory=list)
    """Console errors and warnings, exceptions, and failed requests."""

    requests: list[str] = field(default_factory=list)
    """Requested addresses other than ``file:`` and ``data:``."""

    def evaluate(self, expression: str, argument: Any = None) -> Any:
        """Evaluates JavaScript in the page."""
        return self.playwright.evaluate(expression, argument)

    def _ask(self, question: str, argument: Any = None) -> Any:
        if not self.evaluate("'__page' in window"):
            self.evaluate(SCRIPT)
        return self.evaluate(f"argument => window.__page.{question}(argument)", argument)

    @property
    def scroll_width(self) -> int:
        """Width of the content in CSS pixels; if larger than the window's, the page scrolls sideways."""
        return self.evaluate("document.documentElement.scrollWidth")

    @property
    def width(self) -> int:
        """Width of the window in CSS pixels, without the scroll bar."""
        return self.evaluate("document.documentElement.clientWidth")

    def too_wide(self) -> list[str]:
        """Elements that extend beyond the window's right edge, except inside scrollable elements."""
        return self._ask("tooWide")

    def low_contrast(self, minimum: float = CONTRAST) -> list[str]:
        """Visible texts with a lower contrast to their background, with the contrast; text on pictures is ignored."""
        return self._ask("lowContrast", minimum)

    def tab_through(self, most: int = 2000) -> Keyboard:
        """Presses Tab until the focus leaves the page or comes round, ``most`` times at most."""
        self._ask("begin")
        for _ in range(most):
            self.playwright.keyboard.press("Tab")
            if not self._ask("reached"):
                break
        return Keyboard(**self._ask("end"))

    def faults(self, keyboard: bool = True) -> list[str]:
        """All faults of the page in its current state, one line each; with ``keyboard``, also those of the Tab
        order."""
        found = [f"console: {line}" for line in self.console_errors]
        found += [f"network: {address}" for address in self.requests]
        if self.scroll_width > self.width:
            found.append(f"{self.scroll_width} px wide in a window of {self.width}")
            found += [f"too wide: {line}" for line in self.too_wide()]
        found += [f"contrast: {line}" for line in self.low_contrast()]
        if keyboard:
            tabbed = self.tab_through()
            found += [f"not reached by Tab: {name}" for name in tabbed.missed]
            found += [f"focus not visible: {name}" for name in tabbed.unmarked]
        return found

    def screenshot(self, path: Path, whole: bool = True) -> Path:
        """Writes a PNG of the whole page, or of the visible part."""
        self.playwright.screenshot(path=path, full_page=whole)
        return path

    def pdf(self, path: Path) -> Path:
        """Prints it on A4 with the ``@media print`` styles and backgrounds."""
        self.playwright.pdf(path=path, format="A4", print_background=True)
        return path


class Browser:
    """Chromium. Every page has a separate profile, and no network unless requested."""

    def __init__(self, chromium: Any) -> None:
        self.chromium = chromium
        self.version: str = chromium.version

    @contextmanager
    def open(
        self, place: Path | str, width: int = 1600, dark: bool = False, *, height: int = 900, network: bool = False
    ) -> Iterator[Page]:
        """Opens a file or an address in a window of this width in CSS pixels, and waits until it is loaded and idle."""
        address = place if isinstance(place, str) else place.resolve().as_uri()
        context = self.chromium.new_context(
            viewport={"width": width, "height": height},
            color_scheme="dark" if dark else "light",
            reduced_motion="reduce",
            offline=not network,
        )
        try:
            page = Page(context.new_page())
            page.playwright.on("console", lambda line: _note(page, line))
            page.playwright.on("pageerror", lambda error: page.console_errors.append(str(error)))
            page.playwright.on("requestfailed", lambda one: page.console_errors.append(f"not loaded: {one.url[:200]}"))
            page.playwright.on("request", lambda one: _remember(page, one.url))
            page.playwright.goto(address, wait_until="load")
            page.evaluate("document.fonts.ready.then(() => new Promise(done => setTimeout(done, 50)))")
            yield page
        finally:
            context.close()


def _note(page: Page, line: Any) -> None:
    if line.type in ("error", "warning"):
        page.console_errors.append(line.text)


def _remember(page: Page, address: str) -> None:
    if not address.startswith(("file:", "data:", "blob:", "about:")):
        page.requests.append(address)


def executable() -> str | None:
    """Path of the system's Chromium, or of ``EVIT_CHROMIUM``."""
    return os.environ.get("EVIT_CHROMIUM") or next(filter(None, map(shutil.which, CHROMIUMS)), None)


@contextmanager
def started() -> Iterator[Browser]:
    """Runs Chromium until the end of the ``with`` block."""
    from playwright.sync_api import sync_playwright

    arguments = ["--hide-scrollbars", "--force-color-profile=srgb"]
    if os.geteuid() == 0:
        arguments.append("--no-sandbox")  # required when running as root, as in containers
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=executable(), args=arguments)
        try:
            yield Browser(chromium)
        finally:
            chromium.close()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """One Chromium for all tests of a process."""
    pytest.importorskip("playwright", reason="Playwright is not installed (the dev extra has it)")
    if executable() is None:
        pytest.skip("no Chromium on this system (apt-get install chromium)")
    with started() as found:
        yield found


def png_size(path: Path) -> tuple[int, int]:
    """Width and height of a PNG in pixels."""
    return struct.unpack(">II", path.read_bytes()[16:24])
