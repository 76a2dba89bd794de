import pytest

from evit_deploy.tuning.results.page import as_page
from tests.support.browser import WIDTHS, Browser
from tests.support.tuning import tuning


def test_the_verdict_and_every_finalist_are_in_it():
    found = tuning()
    text = as_page(found)
    assert found.verdict in text
    assert text.count("<tr>") == 1 + len(found.finalists)
    assert "a &lt;b&gt; &amp; c" in text
    for count in found.staircase.counts:
        assert f'aria-label="{count} tokens: ' in text


@pytest.mark.browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_it_is_without_fault(width, dark, browser: Browser, tmp_path):
    path = tmp_path / "tune.html"
    path.write_text(as_page(tuning()), encoding="utf-8")
    with browser.open(path, width, dark) as page:
        assert page.faults() == []
