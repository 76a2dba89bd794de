"""The lock files: every requirement has a pin that satisfies it, every pin has hashes, and no index is named."""

import re
import tomllib
from collections.abc import Iterator

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.support import tensorrt_lean
from tests.support.paths import ROOT

LOCKS = sorted((ROOT / "tests" / "environments").glob("*.lock"))
PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^ ;\\]+)")


def pins(text: str) -> Iterator[tuple[str, str, list[str]]]:
    """Name, version and hashes of each entry."""
    for entry in text.replace("\\\n", " ").splitlines():
        if found := PIN.match(entry):
            yield found[1].lower(), found[2], re.findall(r"--hash=sha256:([0-9a-f]{64})\b", entry)


def required(extra: str = "dev") -> Iterator[Requirement]:
    """What pyproject.toml asks for with an extra, and the extras that it names itself."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    todo = [*project["dependencies"], *project["optional-dependencies"][extra]]
    for requirement in map(Requirement, todo):
        if requirement.name != project["name"]:
            yield requirement
        for inner in requirement.extras if requirement.name == project["name"] else ():
            yield from map(Requirement, project["optional-dependencies"][inner])


def lacking(requirements: Iterator[Requirement], text: str) -> list[str]:
    """Those that no pin satisfies."""
    known: dict[str, list[str]] = {}
    for name, version, _ in pins(text):
        known.setdefault(name.replace("_", "-"), []).append(version)
    return [
        str(one)
        for one in requirements
        if not any(one.specifier.contains(v) for v in known.get(one.name.lower().replace("_", "-"), ()))
    ]


def test_every_requirement_of_the_tests_is_pinned():
    text = (ROOT / "tests" / "environments" / "dev.lock").read_text()
    assert lacking(required(), text) == []
    assert lacking(iter([Requirement("torch<1"), Requirement("not-there")]), text) == ["torch<1", "not-there"]


def test_the_lower_bounds_are_what_the_oldest_environment_has():
    pinned = {name: version for name, version, _ in pins((ROOT / "tests/environments/oldest.lock").read_text())}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in map(Requirement, project["dependencies"]):
        (bound,) = requirement.specifier
        assert bound.operator == ">="
        assert Version(pinned[requirement.name]) == Version(bound.version), requirement


def test_the_triton_servers_requirements_are_pinned():
    folder = ROOT / "tests" / "environments"
    wanted = map(Requirement, (folder / "triton.in").read_text().split())
    assert lacking(wanted, (folder / "triton.lock").read_text()) == []


@pytest.mark.parametrize("release", tensorrt_lean.RELEASES.values())
def test_the_lean_runtimes_are_pinned(release):
    found = list(pins((ROOT / "tests" / "environments" / f"tensorrt-{release}.lock").read_text()))
    assert len(found) == 3
    assert {version for _, version, _ in found} == {release}


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.name)
def test_pins_have_hashes_and_no_index(path):
    text = path.read_text()
    assert all(hashes for _, _, hashes in pins(text))
    assert len(list(pins(text))) == len([line for line in text.splitlines() if line and line[0] not in " #"])
    assert not re.search(r"://|^-", text, re.MULTILINE)
