"""Every word of the documentation is in an English dictionary or in tests/words.txt. Names and code are left out.

codespell (`.ci/run`) looks for common misspellings everywhere, code included; this finds the others, in prose.
"""

import re
from pathlib import Path

import pytest
from spellchecker import SpellChecker

from tests.support.paths import ROOT
from tests.support.prose import PAGES, of_page

DICTIONARY = SpellChecker(distance=1)
FIELD = (ROOT / "tests" / "words.txt").read_text(encoding="utf-8").split()


def unknown(text: str) -> list[str]:
    """Words in lower case that neither list has; addresses, code and what has digits or capitals in it are left out."""
    text = re.sub(r"`[^`]*`|\]\([^)]*\)|https?://\S+|\$\{?\w+|[\w.*/-]*[./_*][\w./*-]+", " ", text)
    words = re.findall(r"(?<![\w<-])[a-z][a-z'’]*[a-z](?![\w>])", text)
    found = {word.removesuffix("'s").removesuffix("’s") for word in words}
    return sorted(word for word in found if word not in DICTIONARY and word not in FIELD)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_spelling(page: Path):
    assert unknown("\n".join(of_page(page))) == []


def test_a_misspelt_word_is_found():
    assert unknown("The recieved logits of `a nmae` are in dir/fiel.txt, an abbreviaton of ViTs") == [
        "abbreviaton",
        "recieved",
    ]


def test_the_list_is_sorted_and_has_no_word_of_the_dictionary():
    assert sorted(set(FIELD)) == FIELD
    assert [word for word in FIELD if word in DICTIONARY] == []
