"""What is printed while a command works: on a terminal, in a pipe, for programs, and from several processes."""

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Mapping

import pytest

from evit_deploy.cli.output import Output
from evit_deploy.progress import Progress, doing, stage, stages, step
from tests.support.terminal import screens_of

WORK = """
import json, logging, sys, time
from evit_deploy import progress
from evit_deploy.cli.output import Output

log = logging.getLogger("evit_deploy.work")
with Output(**json.loads(sys.argv[1])) as output:
    with progress.stages(2):
        progress.stage(log, "reading the checkpoint")
        time.sleep(0.3)
        log.warning("an assumption about the-weights-in /a/folder/whose/name/is/longer/than/the/narrow/terminal/is.pth")
        progress.stage(log, "training")
        for done in range(1, 5):
            progress.step(log, f"step {done}", done, 4, images_per_second=123.456, loss=0.5)
            time.sleep(0.2)
        log.info("top-1 is 97 % ▁█")
    output.result(None, "the result")
"""


STRANGE = """
import json, logging, sys, time
from evit_deploy import progress
from evit_deploy.cli.output import Output

log = logging.getLogger("evit_deploy.work")
name = "[red]:bug:\\x1b[2J\\u202egpj"
with Output(**json.loads(sys.argv[1])) as output:
    with progress.stages(1):
        progress.stage(log, f"reading {name}")
        time.sleep(0.5)
        log.warning(f"{name} is strange")
    output.result(None, f"made {name}")
"""
"""Work on what has a name that a terminal would obey."""


def on_a_terminal(
    columns: int, environment: Mapping[str, str] = {}, work: str = WORK, **options: bool
) -> list[list[str]]:
    """Runs the work on a terminal; what its screen shows, at many moments and at the end."""
    return screens_of([sys.executable, "-c", work, json.dumps(options)], columns, environment)


def in_a_pipe(*, rank: str | None = None, **options: bool) -> tuple[str, str]:
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    done = subprocess.run(
        [sys.executable, "-c", WORK, json.dumps(options)], capture_output=True, text=True, check=True,
        env=environment | ({"RANK": rank} if rank is not None else {}),
    )  # fmt: skip
    return done.stdout, done.stderr


def test_a_terminal_shows_the_stage_and_what_training_measures():
    screens = on_a_terminal(100)
    live = {line for screen in screens for line in screen if "/2 " in line}
    assert any("1/2 reading the checkpoint" in line for line in live)
    whole = [line for line in live if re.search(r" \d:\d\d:\d\d$", line)]  # others were read while they were drawn
    measured = [line for line in whole if "2/2 step 3" in line]
    assert measured
    assert all(re.search(r"123\.5 images/s, loss 0\.5, \d:\d\d:\d\d left \d:\d\d:\d\d$", line) for line in measured)


@pytest.mark.parametrize("columns", [30, 60, 100])
def test_messages_stand_above_the_live_line_and_words_are_whole(columns):
    screens = on_a_terminal(columns)
    path = "/a/folder/whose/name/is/longer/than/the/narrow/terminal/is.pth"
    assert path in "".join(screens[-1])
    lines = [line for screen in screens for line in screen]
    assert not any("assumption" in line and ("/2" in line or "0:00" in line) for line in lines)
    assert any(line.endswith("the-weights-in") or "the-weights-in " in line for line in screens[-1])
    assert screens[-1][-2:] == ["top-1 is 97 % ▁█", "the result"]  # the live line is gone
    assert not any("/2 " in line for line in screens[-1])


@pytest.mark.parametrize("options", [{"quiet": True}, {"quiet": True, "verbose": True}])
def test_a_quiet_terminal_shows_the_result_alone(options):
    assert on_a_terminal(80, **options)[-1] == ["the result"]


def test_a_dumb_terminal_is_like_a_pipe():
    screens = on_a_terminal(200, {"TERM": "dumb"})
    assert len(screens[-1]) == 3
    assert not any("/2 " in line for screen in screens for line in screen)


def test_a_name_is_shown_and_not_obeyed():
    screens = on_a_terminal(100, work=STRANGE)
    shown = r"[red]:bug:\x1b[2J\u202egpj"
    assert screens[-1] == [f"{shown} is strange", f"made {shown}"]
    assert any(f"reading {shown}" in line for screen in screens for line in screen)


def test_no_color_is_heeded():
    master = subprocess.run(
        [sys.executable, "-c", "import json; from evit_deploy.cli.output import _Display; d = _Display();"
         "print(json.dumps(d._console.no_color)); d.stop()"],
        capture_output=True, text=True, check=True, env=os.environ | {"NO_COLOR": "1"},
    )  # fmt: skip
    assert json.loads(master.stdout) is True


def test_a_pipe_has_messages_and_no_progress():
    out, err = in_a_pipe()
    assert out == "the result\n"
    assert [line[:5] for line in err.splitlines()] == ["an as", "top-1"]
    assert "\x1b" not in err


def test_a_verbose_pipe_has_every_step_as_a_line():
    _, err = in_a_pipe(verbose=True)
    assert err.splitlines()[0] == "[1/2] reading the checkpoint"
    assert "[2/2] training" in err
    assert [line for line in err.splitlines() if "step" in line] == [
        f"[2/2] step {n}, 123.5 images/s, loss 0.5" for n in range(1, 5)
    ]


def test_a_pipe_has_a_line_of_progress_after_a_silence():
    silent = f"from evit_deploy.cli import output\noutput.SILENCE = 0.0\n{WORK}"
    done = subprocess.run([sys.executable, "-c", silent, "{}"], capture_output=True, text=True, check=True)
    assert "[2/2] step 4, 123.5 images/s, loss 0.5" in done.stderr.splitlines()


def test_json_is_one_document():
    out, err = in_a_pipe(as_json=True)
    assert json.loads(out) == {"items": None}
    assert "an assumption" in err


def test_of_several_processes_the_first_one_prints():
    assert in_a_pipe(rank="1")[1] == ""
    assert "an assumption" in in_a_pipe(rank="0")[1]


def test_the_logger_is_left_as_it_was():
    log = logging.getLogger("evit_deploy")
    before = (list(log.handlers), log.level, log.propagate)
    with Output(verbose=True):
        assert (log.level, log.propagate) == (logging.DEBUG, False)
    assert (list(log.handlers), log.level, log.propagate) == before


def records(caplog) -> list[Progress]:
    return [record.progress for record in caplog.records]


def test_of_nested_stages_the_outermost_counts(caplog):
    log = logging.getLogger("evit_deploy.test")
    with caplog.at_level(logging.DEBUG, "evit_deploy"):
        doing(log, "before")
        with stages(2):
            stage(log, "one")
            with stages(5):
                stage(log, "one of five")
                stage(log, "two of five")
            stage(log, "two")
            step(log, "a step", 3, 10, loss=0.5)
        doing(log, "after")
    assert [(found.stage, found.stages) for found in records(caplog)] == [
        (None, None), (1, 2), (1, 2), (1, 2), (2, 2), (2, 2), (None, None),
    ]  # fmt: skip
    assert records(caplog)[-2] == Progress(2, 2, 3, 10, {"loss": 0.5})
