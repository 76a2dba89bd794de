"""docs/tour.md: its commands run, in order, and print what the page shows, figures aside."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

FENCES = re.compile(r"^```(bash|python|text)\n(.*?)^```", re.DOTALL | re.MULTILINE)
PAGE = ROOT / "docs" / "tour.md"


def shape(line: str) -> str:
    """A line without what differs between machines: figures, and how wide the columns are."""
    return " ".join(re.sub(r"─+", "─", re.sub(r"[+-]?\d[\d.]*(?:e[+-]\d+)?[x%]?", "#", line)).split())


def not_shown(wanted: str, printed: str) -> list[str]:
    """The lines of a page that a command did not print in that order; the sentence on speed depends on the machine."""
    lines = iter([shape(line) for line in printed.splitlines()])
    asked = [line for line in map(shape, wanted.splitlines()) if line not in ("", "...") and "as fast as" not in line]
    return [line for line in asked if line not in lines]


def run(line: str, folder: Path) -> str:
    """A command of the page, as a reader would give it; measuring is cut short."""
    arguments = shlex.split(line)[1:] + (["--duration", "0.1"] if " profile " in line else [])
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from evit_deploy.__main__ import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=folder, capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0, f"{line}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_tour_shows_what_its_commands_print(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    commands, printed = [], ""
    for language, block in FENCES.findall(PAGE.read_text(encoding="utf-8")):
        if language == "python":
            exec(compile(block, "tour.md", "exec"), {})
        elif language == "bash":
            commands += block.splitlines()
            printed = "".join(run(line, tmp_path) for line in block.splitlines())
        elif commands:
            assert not_shown(block, printed) == [], commands[-1]
    assert [line.split()[1] for line in commands] == ["convert", "verify", "profile", "predict", "package"]
    assert (tmp_path / "deit_s-evit-k0.7-triton" / "model_repository").is_dir()


def test_a_page_that_shows_something_else_is_found():
    printed = "check   value\n─────────────\nlogits  1.46e-06   ok\ntotal 3.03 GMACs\n"
    assert not_shown("check value\n...\nlogits  9.99e-07  ok\n", printed) == []
    assert not_shown("logits 1e-6 failed\n", printed) == ["logits # failed"]
    assert not_shown("total 3.03 GMACs\ncheck value\n", printed) == ["check value"]
