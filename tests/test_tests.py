"""The tests themselves: where they lie, and from whom they import."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT

TESTS = ROOT / "tests"
FILES = sorted(TESTS.rglob("*.py"))
ROOMS = {path.parent.relative_to(ROOT / "evit_deploy") for path in (ROOT / "evit_deploy").rglob("*.py")} - {Path()}


def imported(source: str) -> Iterator[str]:
    """Every module that may be meant by a module's imports, wherever they stand."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


def of_tests(module: str) -> bool:
    """Whether a module is a test or pytest's own."""
    return any(part.startswith("test_") or part == "conftest" for part in module.split("."))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(TESTS).as_posix())
def test_no_test_is_imported(path):
    assert [name for name in imported(path.read_text(encoding="utf-8")) if of_tests(name)] == []


@pytest.mark.parametrize(
    "line",
    ["import test_loop", "from test_loop import tiny", "from tests.training.test_loop import tiny",
     "from tests.training import test_loop", "from . import test_loop", "def f():\n    from tests.conftest import x"],
)  # fmt: skip
def test_such_an_import_is_found(line):
    assert any(map(of_tests, imported(line)))


def test_tests_lie_in_the_rooms_of_the_package():
    rooms = {path.parent.relative_to(TESTS) for path in FILES if path.name.startswith("test_")}
    assert rooms - ROOMS == {Path(), Path("plugins")}  # about the whole project, and the C++ ones
