"""`recipes` as a user runs it, also from an installed wheel."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from evit_deploy.recipe.shipped import folder, names
from tests.support.terminal import screens_of

ROOT = Path(__file__).parents[2]


def test_list(cli):
    result = cli("recipes", "list")
    assert result.code == 0
    assert [line.split()[0] for line in result.out.splitlines()[2:] if not line.startswith(" ")] == names()
    assert "The whole way on a CPU in a few minutes, without a download." in result.out
    items = cli("recipes", "list", "--json").document["items"]
    assert [item["name"] for item in items] == names()
    assert set(items[0]) == {"name", "path", "description"}


def test_the_list_fits_a_terminal():
    lines = screens_of([sys.executable, "-m", "evit_deploy", "recipes", "list"], 80)[-1]
    assert all(any(line.startswith(name) for line in lines) for name in names())
    assert lines[-2:] == ["next: python -m evit_deploy recipes show digits", "      python -m evit_deploy run digits"]
    assert max(map(len, lines)) <= 80


def test_show_is_the_file(cli):
    text = (folder() / "digits.yaml").read_text(encoding="utf-8")
    assert cli("recipes", "show", "digits").out == text
    assert cli("recipes", "show", "digits", "--json").document["text"] == text


def test_copy(cli, tmp_path):
    result = cli("recipes", "copy", "digits", tmp_path)
    assert (result.code, result.out) == (0, f"{tmp_path / 'digits.yaml'}\n")
    cli("recipes", "copy", "digits", tmp_path).refused(2, "already", "--force")
    assert cli("recipes", "copy", "digits", tmp_path, "--force").code == 0


@pytest.mark.parametrize(
    ("arguments", "hints"),
    [
        (("recipes", "show", "digit"), ["no recipe of this name", "Did you mean 'digits'?", "recipes list"]),
        (("recipes", "show"), ["NAME"]),
        (("recipes", "copy", "digits", "absent/x.yaml"), ["absent", "no such folder"]),
        (("recipes", "copy", "digits", "/dev/null"), ["/dev/null", "ends in .yaml"]),
        (("recipes", "lst"), ["lst"]),
        (("run", "digts"), ["no such recipe", "Did you mean 'digits'?", "recipes list"]),
        (("train", "xyz"), ["no such recipe", "recipes list"]),
    ],
)
def test_refusals(cli, arguments, hints):
    cli(*arguments).refused(2, *hints)


@pytest.mark.slow
def test_an_installed_wheel_has_them(tmp_path):
    """Built and unpacked, outside of the checkout."""
    pytest.importorskip("hatchling")
    build = [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    done = subprocess.run([*build, "-q"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}

    def run(*arguments):
        return subprocess.run([sys.executable, "-m", "evit_deploy", *arguments], cwd=tmp_path, env=environment,
                              capture_output=True, text=True, timeout=60, check=True).stdout  # fmt: skip

    assert f'"{tmp_path / "installed" / "evit_deploy" / "recipes"}' in run("recipes", "list", "--json")
    assert run("recipes", "show", "paper/deit-small-0.5") == (folder() / "paper/deit-small-0.5.yaml").read_text()
    assert run("recipes", "copy", "digits") == "digits.yaml\n"
