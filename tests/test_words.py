"""Words that we avoid, on pages (help and public docstrings among them) and in messages, and what to write instead."""

import re
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.prose import PAGES, messages, of_page

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
    "anew": "again",
    "be had": "is available",
    "gives out": "returns",
    "is said": "a note says so",
    "held against": "compared with",
    "for want of": "because there is no",
    "mends": "fixes",
    "goes on with": "continues with",
    "go on with": "continue with",
    "begins anew": "starts again",
    "this is no": "not a",
    "are no weights": "are not weights",
    "who runs": "which runtime runs",
}


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
    assert avoided(of_page(page)) == []


MODULES = sorted((ROOT / "evit_deploy").rglob("*.py"))


def test_messages_avoid_them_too():
    found = [
        f"{module.relative_to(ROOT)}:{number}: {words!r}"
        for module in MODULES
        for number, words in messages(module.read_text(encoding="utf-8"))
        if avoided([words])
    ]
    assert found == []


def test_the_messages_are_many():
    assert sum(1 for module in MODULES for _ in messages(module.read_text(encoding="utf-8"))) > 1000


def test_a_message_is_found_wherever_it_stands():
    source = (
        'raise errors.InputError(f"you are {x} told", where="a place", fix="Nobody.  ")\n_LOG.warning("it is said")'
    )
    assert [(number, avoided([words]) != []) for number, words in messages(source)] == [
        (1, True), (1, False), (1, True), (2, True),
    ]  # fmt: skip


def test_an_avoided_word_is_found(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text("You are told so.\n```\ntold\n```\n`told` is code. Nobody\n", encoding="utf-8")
    found = avoided(of_page(page))
    assert [line.split(" (")[0] for line in found] == ["line 1: 'told'", "line 5: 'nobody'"]
