"""docs/architecture.md says what the import contract says: the drawing, and what a room never imports."""

import importlib.util
import re
import tomllib
from types import ModuleType

import pytest

from tests.support.paths import ROOT

PAGE = ROOT / "docs" / "architecture.md"


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_architecture", ROOT / "docs" / "generate_architecture.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_drawing_is_current(generator: ModuleType):
    written = (ROOT / "docs" / "architecture.svg").read_text(encoding="utf-8")
    assert written == generator.drawing(), "run: python docs/generate_architecture.py"


def test_the_drawing_has_every_room_once(generator: ModuleType):
    drawn = re.findall(r'text-anchor="middle">([^<]+)<', generator.drawing())
    package = ROOT / "evit_deploy"
    rooms = {path.stem if path.is_file() else path.name for path in package.iterdir() if not path.name.startswith("__")}
    rooms -= {"py"}  # py.typed
    assert sorted(drawn) == sorted({*rooms, "__main__"})


def test_what_the_table_forbids_is_forbidden(generator: ModuleType):
    """Beyond its floor, each room's column on the right names what the contracts forbid it."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    forbidden = {
        (source.split(".")[-1], target.split(".")[-1])
        for contract in contracts
        if contract["type"] == "forbidden"
        for source in contract["source_modules"]
        for target in contract["forbidden_modules"]
    }
    forbidden |= {(one, other) for rooms in generator.floors() for one in rooms for other in rooms if one != other}
    text = PAGE.read_text(encoding="utf-8")
    named = {
        (room, other)
        for room, others in re.findall(r"^\| \d+ \| `(\w+)` \|[^|]*\|([^|]*)\|$", text, re.MULTILINE)
        for other in re.findall(r"`(\w+)`", others)
    }
    assert len(named) > 5
    assert named <= forbidden
