"""What commands leave on a terminal of 80 and of 200 columns, held against text that was looked at.

``python -m tests.cli.test_terminal`` writes that text anew; figures are masked in it.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from evit_deploy.cli import COMMANDS
from tests.support.command_line import CLI
from tests.support.terminal import screens_of

WIDTHS = (80, 200)
RUNTIME = ("--runtime", "onnxruntime", "--threads", "1")
SHOWN = {
    "verify": ("verify", "smallest-evit-k0.6", *RUNTIME),
    "profile": ("profile", "smallest-evit-k0.6", *RUNTIME, "--batch-sizes", "1,8", "--duration", "0.05"),
    "convert": ("convert", "smallest.safetensors", "--keep-rate", "0.6", "--threads", "1", "--out", "a bundle"),
}
GOLDEN = Path(__file__).parents[1] / "support" / "golden" / "terminal"
SPEED = re.compile(
    r"[\d.]+x\s\[[^]]*\]\sas\sfast\sas[^:.]*?(,\swhich\sis\swithin\snoise)?\.\n"
    r"|[Nn]ot\sfaster\sthan\sits\sdense\stwin\s[^:]*:\s[\d.]+x\s\[[^]]*\]\.\n"
)
GAINS = re.compile(
    r"^(Token reduction does not pay|On onnxruntime at batch).*?\n(?=\n|[a-z/])", re.DOTALL | re.MULTILINE
)


def masked(lines):
    """Without figures and what depends on them: how wide columns are, and how fast it was."""
    text = "\n".join(lines) + "\n"
    text = SPEED.sub("SPEED.\n", text)
    text = GAINS.sub("", text)
    text = re.sub(r"(?<![-\w.])[-+]?\d[\d.]*(e[-+]\d+)?(?=[%x×]?([\s,:]|$|\.$))", "#", text)
    text = re.sub("─+", "─", text)
    return "\n".join(re.sub(" {2,}", "  ", line.strip()) for line in text.splitlines()) + "\n"


def on_a_terminal(name, columns, folder):
    screens = screens_of([*CLI, *SHOWN[name]], columns, cwd=folder)
    return screens, screens[-1]


@pytest.fixture
def folder(made, tmp_path):
    return Path(shutil.copytree(made[0].parent, tmp_path / "user"))


@pytest.mark.slow
@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("name", ["verify", "profile", "convert"])
def test_a_command_on_a_terminal(name, columns, folder):
    screens, last = on_a_terminal(name, columns, folder)
    assert masked(last) == (GOLDEN / f"{name}-{columns}.txt").read_text(encoding="utf-8")
    assert any(re.search(r"^. (\d/\d)? ?.*\d:\d\d:\d\d$", line) for screen in screens for line in screen)  # it was live
    assert not any(re.search("[\u2800-\u28ff]|0:00:0", line) for line in last)  # and left nothing
    assert "…" not in "".join(last)


def test_a_table_has_all_its_columns_on_one_line_each(folder):
    _, last = on_a_terminal("profile", 80, folder)
    header = next(line for line in last if line.startswith("runtime "))
    rows = [line for line in last if line.startswith("onnxruntime ")]
    assert len(rows) == 6
    assert {len(line) for line in (header, *(row for row in rows if "model" in row))} == {len(header)}
    assert len(header) <= 80


@pytest.mark.parametrize("options", [("--json",), ("--quiet",)])
def test_nothing_is_suggested_to_programs(options, folder):
    screens = screens_of([*CLI, *SHOWN["verify"], *options], 80, cwd=folder)
    assert not any("next:" in line for line in screens[-1])


def test_nothing_is_suggested_in_a_pipe(folder):
    done = subprocess.run([*CLI, *SHOWN["verify"]], cwd=folder, capture_output=True, text=True, timeout=240)
    assert "next:" not in done.stdout + done.stderr
    assert done.stdout.startswith("Same answers as the PyTorch model")


@pytest.mark.slow
def test_what_is_suggested_can_be_run_as_it_stands(folder):
    """A name with a blank in it, in a shell."""
    (folder / "smallest-evit-k0.6").rename(folder / "it's mine")
    screens = screens_of([*CLI, "verify", "it's mine", *RUNTIME], 80, cwd=folder)
    line = next(line for line in screens[-1] if line.startswith("next: "))
    command = line.removeprefix("next: ").replace("python", sys.executable, 1)
    done = subprocess.run(
        [*("bash", "-c"), f"{command} --duration 0.01 --batch-sizes 1"], cwd=folder, capture_output=True, timeout=240
    )
    assert done.returncode == 0, done.stderr


def test_a_name_that_a_terminal_would_obey_is_not_suggested(folder):
    (folder / "smallest-evit-k0.6").rename(folder / "a\x1b[2Jb")
    screens = screens_of([*CLI, "verify", "a\x1b[2Jb", *RUNTIME], 80, cwd=folder)
    assert screens[-1][-1] == r"verified: a\x1b[2Jb"


@pytest.mark.parametrize("columns", [80, 110])
@pytest.mark.parametrize("name", ["", *COMMANDS, "plugin build", "plugin check"])
def test_help_begins_with_examples_and_fits(name, columns):
    from click.testing import CliRunner

    from evit_deploy.cli import cli

    page = CliRunner().invoke(cli, [*name.split(), "--help"], terminal_width=columns).output
    lines = page.splitlines()
    assert lines[lines.index("") + 1] == "Examples:"
    assert lines[lines.index("") + 2].startswith("  evit-deploy ")
    assert [line for line in lines if len(line) > columns] == []


if __name__ == "__main__":
    import tempfile

    from tests.support.models import write_checkpoint

    GOLDEN.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        write_checkpoint(Path(place) / "smallest.safetensors", "smallest")
        first = ("convert", "smallest.safetensors", "--keep-rate", "0.6", "--threads", "1")
        subprocess.run([*CLI, *first], cwd=place, check=True, capture_output=True)
        for name in SHOWN:
            for columns in WIDTHS:
                text = masked(on_a_terminal(name, columns, Path(place))[1])
                (GOLDEN / f"{name}-{columns}.txt").write_text(text, encoding="utf-8")
                shutil.rmtree(Path(place) / "a bundle", ignore_errors=True)
