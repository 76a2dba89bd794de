"""docs/troubleshooting.md quotes messages that exist: each text in bold and code is in the source."""

import re
from functools import cache

import pytest

from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
# Packages in bold are names, not messages.
QUOTED = [text for bold in re.findall(r"\*\*(.+?)\*\*", PAGE, re.DOTALL) for text in re.findall(r"`([^`]+)`", bold)]
MESSAGES = sorted({text for text in QUOTED if not text.startswith("onnxruntime")})


@cache
def source() -> str:
    """All modules of the package, with texts that are written over several lines in one piece."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "evit_deploy").rglob("*.py"))
    return re.sub(r"\"\s*\n\s*f?\"", "", text)


def test_the_page_quotes_many():
    assert len(MESSAGES) > 25


@pytest.mark.parametrize("message", MESSAGES)
def test_a_quoted_message_exists(message: str):
    assert message in source(), "no module of evit_deploy says this any more"


def test_a_message_that_does_not_exist_is_missed():
    assert "the moon is in the wrong quarter" not in source()
