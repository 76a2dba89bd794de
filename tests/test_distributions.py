"""What a package index would be given: the wheel and the source distribution."""

import email
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

import evit_deploy
from tests.support.paths import ROOT

pytestmark = pytest.mark.slow

ROOMS = ("cli", "data", "serving", "tokens")


class Built(NamedTuple):
    source: Path
    wheel: Path
    wheel_of_source: Path


def run(*arguments: object) -> str:
    done = subprocess.run([sys.executable, "-m", *map(str, arguments)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Built:
    """Without isolation, so that nothing is downloaded; the second wheel is built of the source distribution alone."""
    pytest.importorskip("build")
    direct, of_source = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("source")
    run("build", "--no-isolation", "--wheel", "--outdir", direct, ROOT)
    run("build", "--no-isolation", "--outdir", of_source, ROOT)  # builds the wheel of the source distribution
    (wheel,), (source,), (again,) = direct.glob("*.whl"), of_source.glob("*.tar.gz"), of_source.glob("*.whl")
    return Built(source, wheel, again)


def files(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_they_are_what_an_index_takes(built):
    assert run("twine", "check", "--strict", built.source, built.wheel).count("PASSED") == 2
    run("check_wheel_contents", built.wheel)


def test_the_wheel_has_all_that_works_without_a_checkout(built):
    found = files(built.wheel)
    package = {name.removeprefix("evit_deploy/") for name in found if name.startswith("evit_deploy/")}
    for folder in ("recipes", "plugins"):
        tracked = subprocess.run(["git", "ls-files", folder], cwd=ROOT, capture_output=True, text=True, check=True)
        assert set(tracked.stdout.split()) == {name for name in package if name.startswith(f"{folder}/")}
    tracked = subprocess.run(["git", "ls-files", "evit_deploy"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {name.removeprefix("evit_deploy/") for name in tracked.stdout.splitlines()} <= package
    assert {"py.typed", "__init__.pyi", "pages/page.css", "serving/server_files/closed.sh"} <= package


def test_the_wheel_has_nothing_else(built):
    tops = {name.split("/")[0] for name in files(built.wheel)}
    assert tops == {"evit_deploy", f"evit_deploy-{evit_deploy.__version__}.dist-info"}


def test_the_source_distribution_builds_the_same_wheel(built):
    assert files(built.wheel_of_source) == files(built.wheel)


def test_the_source_distribution_has_what_it_takes_to_test_it(built):
    with tarfile.open(built.source) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {"pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", ".ci/run", "tests/conftest.py"} <= names


def test_its_metadata_says_what_is_so(built):
    (metadata,) = (text for name, text in files(built.wheel).items() if name.endswith(".dist-info/METADATA"))
    found = email.message_from_bytes(metadata)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert found["Version"] == evit_deploy.__version__
    assert found["License-Expression"] == project["license"] == "Apache-2.0 AND CC-BY-2.0"
    licenses = {name.rpartition("/licenses/")[2] for name in files(built.wheel) if "/licenses/" in name}
    assert set(found.get_all("License-File")) == licenses == {"LICENSE", "evit_deploy/data/photographs/LICENSE"}
