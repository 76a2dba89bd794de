"""The words of the documentation: those that we avoid, and what to write instead."""

import re
from pathlib import Path

import pytest

from tests.support.paths import ROOT

AVOIDED = {
    "told": "logged, reported or shown",
    "nobody": "no one is meant by software: say what does not happen",
    "somebody": "who?",
    "of its own": "its own X, a separate X",
    "of their own": "their own X, separate X",
    "of one's own": "your own X",
    "that is none": "invalid, or what it is instead",
    "there is none": "say what is missing",
    "whither": "where to",
    "in order to": "to",
    "utilize": "use",
    "leverage": "use",
    "seamless": "say what happens",
    "blazing": "a figure, with its command",
    "state-of-the-art": "a figure, with its command",
    "simply": "leave it out",
    "obviously": "leave it out",
}
PAGES = [
    *sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), ROOT / "recipes" / "README.md",
    *sorted((ROOT / "plugins").rglob("README.md")), ROOT / "tests" / "benchmarks" / "README.md",
]  # fmt: skip


def prose(page: Path) -> list[str]:
    """A page's lines, where they are prose: without blocks of code and code in lines."""
    text = re.sub(r"^```.*?^```", lambda block: "\n" * block[0].count("\n"), page.read_text(encoding="utf-8"),
                  flags=re.DOTALL | re.MULTILINE)  # fmt: skip
    return re.sub(r"`[^`\n]*`", "`…`", text).splitlines()


def avoided(lines: list[str]) -> list[str]:
    """What is to be written otherwise, line by line."""
    found = []
    for number, line in enumerate(lines, 1):
        for words, instead in AVOIDED.items():
            if re.search(rf"\b{re.escape(words)}\b", line, re.IGNORECASE):
                found.append(f"line {number}: {words!r} (better: {instead})")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_words_that_we_avoid(page: Path):
    assert avoided(prose(page)) == []


def test_an_avoided_word_is_found(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text("You are told so.\n```\ntold\n```\n`told` is code. Nobody\n", encoding="utf-8")
    found = avoided(prose(page))
    assert [line.split(" (")[0] for line in found] == ["line 1: 'told'", "line 5: 'nobody'"]
