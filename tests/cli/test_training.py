"""The command line around a training: going on with it, and what is said when it is stopped."""

import os
import shlex
import signal
import sys

import pytest

from evit_deploy.recipe.recipe import dump_recipe
from evit_deploy.training.state import state_path
from evit_deploy.training.step import TrainingRun
from tests.support.paths import RECIPES
from tests.support.training import recipe


@pytest.mark.parametrize("command", ["train", "run"])
def test_anew_and_on_at_once_is_refused(cli, command):
    cli(command, RECIPES / "digits.yaml", "--force", "--resume").refused(
        2, "--force starts again and --resume continues"
    )


@pytest.mark.parametrize("name", ["compare", "a100"])
def test_a_recipe_that_trains_nothing_cannot_be_gone_on_with(cli, name):
    cli("run", RECIPES / f"{name}.yaml", "--resume").refused(2, "--resume", "this recipe trains nothing")


@pytest.fixture
def stopped_at_five(monkeypatch):
    """Sends a signal to this process in the fifth step of every training until :func:`test` undoes it."""
    advance = TrainingRun.advance

    def stopping(self, *arguments, **named):
        if self.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return advance(self, *arguments, **named)

    monkeypatch.setattr(TrainingRun, "advance", stopping)
    return monkeypatch


@pytest.mark.parametrize("command", ["train", "run"])
def test_the_line_that_is_printed_goes_on(cli, command, stopped_at_five, tmp_path):
    file, out = tmp_path / "tiny recipe.yaml", tmp_path / "out"
    file.write_text(dump_recipe(recipe()))
    stopped_at_five.setattr(sys, "argv", ["/usr/bin/evit-deploy"])
    more = ["--set", "profile.duration=0.01", "--set", "profile.batch_sizes=[1]"]
    result = cli(command, file, "--force", "--out", out, *more)
    said = (
        f"evit-deploy: interrupted: dense stopped after step 5 of 12, saved as {state_path(out, 'dense')}. Go on with: "
    )
    last = result.err.splitlines()[-1]
    assert (result.code, last[: len(said)]) == (143, said)
    line = shlex.split(last[len(said) :])
    assert line == ["evit-deploy", command, str(file), "--out", str(out), *more, "--resume"]

    stopped_at_five.undo()
    again = cli(*line[1:])
    assert again.code == 0, again.err
    assert "dense: goes on at step 6 of 12" in again.err
    assert (out / "evit.safetensors").exists()


def test_json_has_what_is_said(cli, stopped_at_five, tmp_path):
    (tmp_path / "tiny.yaml").write_text(dump_recipe(recipe()))
    stopped_at_five.setenv("WORLD_SIZE", "1")
    result = cli("train", tmp_path / "tiny.yaml", "--out", tmp_path / "out", "--json")
    error = result.document["error"]
    assert (result.code, error["exit_code"], error["type"]) == (143, 143, "Interrupted")
    assert "stopped after step 5 of 12" in error["message"]
    assert error["message"].endswith("--json --resume")
