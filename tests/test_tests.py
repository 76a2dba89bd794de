"""The tests themselves: where they lie, from whom they import, and what they share."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from evit_deploy.tokens.plan import TokenSpec
from evit_deploy.tokens.reduce import reduce_tokens_
from tests.support.exporter import key_of
from tests.support.models import KEEP, of_kind
from tests.support.paths import ROOT
from tests.support.shared import made_once

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
    assert rooms - ROOMS == {Path(), Path("fuzz"), Path("plugins")}  # about the whole project, and the C++ ones


def test_what_is_made_once_is_made_again_after_a_failure_only():
    calls = []

    def make(path: Path) -> None:
        calls.append(path.exists())
        path.write_text("half")
        if len(calls) == 1:
            raise OSError("full")
        path.write_text("whole")

    with pytest.raises(OSError, match="full"):
        made_once("tests/example", make)
    assert made_once("tests/example", make) == made_once("tests/example", make)
    assert made_once("tests/example", make).read_text() == "whole"
    assert len(calls) == 2


def test_an_export_is_shared_by_equal_models_and_no_others():
    def key(change=lambda model: None, spec=KEEP, **options):
        model = reduce_tokens_(of_kind("smallest"), spec)
        change(model)
        return key_of(model, (torch.zeros(2, 3, 64, 64),), options)

    def one_weight(model):
        with torch.no_grad():
            model.blocks[1].mlp.fc2.bias[3] += 1e-6

    found = [key(), key(one_weight), key(lambda model: model.train()), key(spec=TokenSpec(keep_rate=0.5))]
    found += [key(lambda model: setattr(model.blocks[0].norm1, "eps", 1e-5)), key(opset_version=20)]
    assert None not in found
    assert len(set(found)) == len(found)
    assert key() == found[0]
    assert key(lambda model: model.register_forward_hook(lambda *_: None)) is None
