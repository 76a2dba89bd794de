"""The project's prose (pages, help, errors and notices), for the tests of words and spelling."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests.support.paths import ROOT

PAGES = [
    *sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), ROOT / "recipes" / "README.md",
    *sorted((ROOT / "plugins").rglob("README.md")), *sorted((ROOT / "tests").rglob("README.md")),
]  # fmt: skip
HELP = ROOT / "docs" / "cli.md"
"""Every help page, as the commands print it (`docs/generate_cli.py`)."""
_SPEAKING = {"warning", "info", "note", "notice", "refusal", "Check"}
"""Names of functions, in addition to errors, whose arguments are prose."""


def of_page(page: Path) -> list[str]:
    """The prose of a page, without code blocks and with `…` in place of inline code.

    The blocks of the command reference are help, which is prose, so they are kept except for their examples.
    """
    text = page.read_text(encoding="utf-8")
    if page == HELP:
        text = re.sub(r"^  evit-deploy .*$|^  accelerate .*$|^Usage: .*$|^```.*$", "", text, flags=re.MULTILINE)
    else:
        text = re.sub(r"^```.*?^```", lambda block: "\n" * block[0].count("\n"), text, flags=re.DOTALL | re.MULTILINE)
        text = re.sub(r"^    .*$", "", text, flags=re.MULTILINE)  # indented blocks
    return re.sub(r"`[^`\n]*`", "`…`", text).splitlines()


def _words_of(node: ast.AST) -> str:
    """The text of a string, with … in place of inserted values; empty for other nodes."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)  # type: ignore[misc]
    return ""


def messages(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of each message of errors, checks, warnings and notices in a module."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in _SPEAKING or name.endswith(("Error", "Failed", "Requirement")):
            for given in (*node.args, *(keyword.value for keyword in node.keywords)):
                if " " in (words := _words_of(given)):
                    yield given.lineno, words
