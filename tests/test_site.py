"""The documentation as a site: it builds without a warning, needs no network, and everything in it leads somewhere."""

import functools
import http.server
import os
import re
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.support.browser import WIDTHS, Browser, Page
from tests.support.paths import ROOT

pytest.importorskip("material", reason="MkDocs is not installed (the dev extra has it)")

FETCHED = {
    ("script", "src"),
    ("link", "href"),
    ("img", "src"),
    ("iframe", "src"),
    ("source", "srcset"),
    ("use", "href"),
}


class Html(HTMLParser):
    """Where a page's links lead, what it fetches, and the places in it that a link may name."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.anchors: set[str] = {""}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        self.links += [values["href"]] if tag == "a" and "href" in values else []
        self.fetched += [value for name, value in values.items() if (tag, name) in FETCHED]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly."""
    place = tmp_path_factory.mktemp("site")
    line = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(place)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return place


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Html]:
    found = {path: Html(path) for path in site.rglob("*.html")}
    assert {"index.html", "docs/choosing.html", "recipes/index.html", "SECURITY.html"} <= {
        path.relative_to(site).as_posix() for path in found
    }
    return found


def leads_nowhere(link: str, page: Path, site: Path, pages: dict[Path, Html]) -> bool:
    """Whether a link within the site names a file or a place in it that does not exist."""
    parts = urllib.parse.urlsplit(link)
    if parts.scheme:
        return parts.scheme not in ("http", "https", "mailto")
    path = urllib.parse.unquote(parts.path)
    target = site / path[1:] if path.startswith("/") else page.parent / path if path else page
    target = Path(os.path.normpath(target / "index.html" if target.is_dir() else target))
    if not target.is_file() or site not in target.parents:
        return True
    return target in pages and urllib.parse.unquote(parts.fragment) not in pages[target].anchors


def test_every_link_leads_somewhere(site: Path, pages: dict[Path, Html]):
    wrong = [
        f"{page.relative_to(site)}: {link}"
        for page, html in pages.items()
        if page.name != "404.html"  # its links begin at the root of wherever the site lies
        for link in (*html.links, *html.fetched)
        if leads_nowhere(link, page, site, pages)
    ]
    assert wrong == []
    page = site / "docs" / "choosing.html"
    assert leads_nowhere("gone.html", page, site, pages)
    assert leads_nowhere("engines.html#gone", page, site, pages)
    assert not leads_nowhere("engines.html#targets", page, site, pages)


def test_nothing_is_fetched_from_elsewhere(site: Path, pages: dict[Path, Html]):
    outside = re.compile(r"(?:https?:)?//", re.ASCII)
    assert [(page.name, one) for page, html in pages.items() for one in html.fetched if outside.match(one)] == []
    for sheet in site.rglob("*.css"):
        assert re.findall(r"url\(\s*[\"']?(?:https?:)?//", sheet.read_text(encoding="utf-8")) == [], sheet.name


def test_figures_can_be_reached(pages: dict[Path, Html], site: Path):
    links = set(pages[site / "docs" / "figures.html"].links)
    names = {path.name for path in (ROOT / "docs" / "results").glob("*.json")}
    assert len(names) > 20
    assert {f"results/{name}" for name in names} <= links
    assert all((site / "docs" / "results" / name).read_bytes() for name in names)


# ---- anchors on the forge


def slugs(text: str) -> set[str]:
    """The anchors that a forge gives to the headings of a page: GitHub's rule."""
    found: list[str] = []
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    for heading in re.findall(r"^#{1,6} +(.+?)\s*$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "")
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        found.append(slug if slug not in found else f"{slug}-{found.count(slug)}")
    return set(found)


PAGES = [*sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("*.md")), ROOT / "recipes" / "README.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_anchors_are_those_of_the_forge_too(page: Path):
    text = page.read_text(encoding="utf-8")
    for path, anchor in re.findall(r"\]\(([^)#:\s]*)#([^)\s]+)\)", text):
        target = page.parent / path if path else page
        assert anchor in slugs(target.read_text(encoding="utf-8")), f"{path}#{anchor}"


def test_slugs_are_githubs():
    text = "# A `b`\n## On a GPU, [twice](x.md)\n```\n# no heading\n```\n## A b\n### q_norm — and, so on\n"
    assert slugs(text) == {"a-b", "on-a-gpu-twice", "a-b-1", "q_norm--and-so-on"}


# ---- in a browser


@pytest.fixture(scope="module")
def served(site: Path) -> Iterator[str]:
    """The site's address on this machine."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=site)
    handler.log_message = lambda *_: None  # type: ignore[attr-defined]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def found_for(words: str, page: Page) -> list[str]:
    box = page.playwright.locator("input.md-search__input").first
    box.focus()
    page.playwright.locator(".md-search-result__meta", has_text="Type to start searching").wait_for(state="attached")
    box.press_sequentially(words)
    page.playwright.locator(".md-search-result__item").first.wait_for()
    return page.playwright.locator(".md-search-result__item h1").all_inner_texts()


@pytest.mark.browser
def test_search_works_in_files_that_are_opened_without_a_server(browser: Browser, site: Path):
    with browser.open(site / "docs" / "concepts.html") as page:
        assert "Choosing a method, a rate and a precision" in found_for("budget", page)
        assert page.console_errors == page.requests == []


@pytest.mark.browser
def test_search_works_on_a_server(browser: Browser, served: str):
    with browser.open(f"{served}/docs/concepts.html", network=True) as page:
        assert "Choosing a method, a rate and a precision" in found_for("budget", page)
        assert page.console_errors == []
        assert {urllib.parse.urlsplit(one).hostname for one in page.requests} == {"127.0.0.1"}


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_pages_are_without_fault(width: int, dark: bool, browser: Browser, site: Path, pages: dict[Path, Html]):
    wrong = []
    for path in sorted(set(pages) - {site / "404.html"}):  # which only a server gives out
        with browser.open(path, width, dark) as page:
            wrong += [
                f"{path.relative_to(site)}: {fault}" for fault in page.faults(keyboard=path.name == "tuning.html")
            ]
    assert wrong == []
