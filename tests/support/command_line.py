"""Runs the command line in this process or a new one; also its pytest fixtures."""

import json
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest

from evit_deploy.cli import cli as group
from evit_deploy.cli import invoke as run
from evit_deploy.cli.convert import command as convert
from evit_deploy.recipe.options import ProfileOptions
from tests.support import shared
from tests.support.models import write_checkpoint
from tests.support.shared import made_once

CLI = [sys.executable, "-m", "evit_deploy"]
QUICK = ("--threads", "1")


@dataclass
class Result:
    """Result of one call of the command line."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """stdout, which must be one JSON document and nothing else."""
        return json.loads(self.out)

    def refused(self, code: int, *hints: str) -> None:
        """Asserts one sentence on stderr that contains the hints, the exit code, an empty stdout and no traceback."""
        assert (self.code, self.out) == (code, ""), self.err
        assert "Traceback" not in self.err
        lines = self.err.splitlines()
        assert lines[-1].startswith("evit-deploy: ")
        assert sum(line.startswith("evit-deploy: ") for line in lines) == 1
        notes = "These weights were never trained", "Without training it ", "Preprocessing: "
        assert all(line.startswith(("evit-deploy: ", "Usage: ", *notes)) for line in lines)
        assert len(lines[-1]) < 800
        for hint in hints:
            assert hint in lines[-1]


@pytest.fixture
def cli(capfd, monkeypatch) -> Callable[..., Result]:
    """Runs the command line in this process; output of native libraries is captured too."""
    look = ProfileOptions(batch_sizes=(1, 8), duration=0.01)
    monkeypatch.setattr("evit_deploy.pipeline.convert.FIRST_LOOK", look)  # it takes 2 seconds a batch size

    def call(*arguments: object) -> Result:
        capfd.readouterr()
        code = run([str(argument) for argument in arguments])
        return Result(code, *capfd.readouterr())

    return call


def command(*arguments: object) -> Result:
    """Runs the command line in a new process, as a user does."""
    done = subprocess.run([*CLI, *map(str, arguments)], capture_output=True, text=True, timeout=240)
    return Result(done.returncode, done.stdout, done.stderr)


def listen() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # background jobs start with SIGINT ignored


def interrupted(checkpoint: Path, stage: str, number: signal.Signals, more: Sequence[str]) -> Result:
    """Starts a conversion, waits for a stage, and sends a signal."""
    arguments = ["convert", checkpoint, "--keep-rate", "0.5", "--out", checkpoint.with_name("bundle"), "-v", *more]
    process = subprocess.Popen(
        [*CLI, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=listen
    )
    with process:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if f"] {stage}" in line:
                process.send_signal(number)
                break
        out, err = process.communicate(timeout=120)
    return Result(process.returncode, out, "".join(said) + err)


@pytest.fixture(scope="session")
def smallest(tmp_path_factory) -> Path:
    """A checkpoint. Read only."""
    return write_checkpoint(tmp_path_factory.mktemp("cli") / "smallest.safetensors", "smallest")


@pytest.fixture
def checkpoint(tmp_path, smallest) -> Path:
    """A user's folder with a checkpoint."""
    folder = tmp_path / "user"
    folder.mkdir()
    return Path(shutil.copy(smallest, folder / smallest.name))


@pytest.fixture(scope="session")
def made(smallest) -> tuple[Path, Result]:
    """A bundle made by the command ``convert``. Read only."""

    def make(path: Path) -> None:
        folder.mkdir()
        checkpoint = shutil.copy(smallest, folder / smallest.name)
        path.write_bytes(pickle.dumps(command("convert", checkpoint, "--keep-rate", "0.6", "-v", *QUICK)))

    folder = shared.folder() / "made"
    result = pickle.loads(made_once("made.result", make).read_bytes())
    return folder / "smallest-evit-k0.6", result


@pytest.fixture
def bundle(made, tmp_path) -> Path:
    """A bundle and its checkpoint, which a test may modify."""
    shutil.copytree(made[0].parent, tmp_path / "user")
    return tmp_path / "user" / made[0].name


def context_of(arguments: list[str]) -> click.Context:
    """``convert``'s context below the group's: click keeps the help option of the first context a command is given."""
    return convert.make_context("convert", arguments, parent=click.Context(group, **group.context_settings))
