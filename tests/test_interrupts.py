"""Ctrl-C and SIGTERM at any stage: the exit code, one sentence, and nothing left."""

import contextlib
import logging
import os
import select
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from evit_deploy import interrupts
from evit_deploy.cli import invoke as run
from evit_deploy.engines.plugin import build
from evit_deploy.files import drafts
from evit_deploy.files.drafts import PREFIX, draft
from tests.support.command_line import CLI, Result
from tests.support.models import tree
from tests.support.paths import ROOT

BOTH = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
SAID = "evit-deploy: interrupted; nothing was left half-written"


def interrupting(folder: Path, module: str, number: int, how: str = "{}") -> dict[str, str]:
    """An environment in which the import of a module is interrupted.

    Args:
        folder: Where what does it is written to; Python runs it before anything else.
        module: Which module.
        number: The signal.
        how: Python, in which ``{}`` is what sends it.
    """
    send = how.format(f"os.kill(os.getpid(), {int(number)})")
    folder.joinpath("sitecustomize.py").write_text(
        textwrap.dedent(f"""
            import os, sys
            class Finder:
                def find_spec(self, name, path=None, target=None):
                    if name == {module!r}:
                        {send}
            sys.meta_path.insert(0, Finder())
        """)
    )
    return os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}


def ended(environment: dict[str, str], *arguments: object) -> Result:
    """Runs the command line, which may be interrupted."""
    done = subprocess.run(
        [*CLI, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=240,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    return Result(done.returncode, done.stdout, done.stderr)


# ---- wherever it comes


@BOTH
@pytest.mark.parametrize(
    "module", ["evit_deploy.cli", "click", "evit_deploy.cli.convert", "torch", "torch._ops", "timm", "onnx"]
)
def test_while_something_is_imported(module, number, checkpoint, tmp_path):
    environment = interrupting(tmp_path, module, number)
    result = ended(environment, "convert", checkpoint, "--keep-rate", "0.5", "--out", checkpoint.parent / "bundle")
    assert (result.code, result.out) == (128 + number, ""), result.err
    assert result.err.splitlines()[-1] == SAID
    assert "Traceback" not in result.err
    assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]


@BOTH
def test_while_text_is_run(number, tmp_path):
    """CPython ends by SIGINT of itself when the text of an `exec` was interrupted last; dataclasses are such texts."""
    result = ended(interrupting(tmp_path, "click", number, how="exec('{}')"), "--version")
    assert (result.code, result.err) == (128 + number, SAID + "\n")


EXPORT = """
import os, sys
import torch.onnx

export, calls = torch.onnx.export, 0

def count(frame, event, called):
    global calls
    calls += 1
    if calls == int(count_to):
        os.write(1, b"sent\\n")  # while it exports, sys.stdout is None
        os.kill(os.getpid(), int(number))

def counted(*arguments, **named):
    sys.setprofile(count)
    try:
        return export(*arguments, **named)
    finally:
        sys.setprofile(None)

torch.onnx.export = counted
number, count_to, *rest = sys.argv[1:]
sys.argv = ["evit-deploy", "convert", *rest]
from evit_deploy.__main__ import main
main()
"""


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("calls", [100, 50_000, 400_000])
def test_inside_the_exporter(calls, number, checkpoint):
    arguments = [checkpoint, "--keep-rate", "0.5", "--out", checkpoint.parent / "bundle"]
    done = subprocess.run(
        [sys.executable, "-c", EXPORT, str(int(number)), str(calls), *map(str, arguments)], cwd=ROOT,
        capture_output=True, text=True, timeout=240,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert done.stdout == "sent\n"
    assert done.returncode == 128 + number, done.stderr
    assert done.stderr.splitlines()[-1] == SAID
    assert "Traceback" not in done.stderr
    assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]


@BOTH
def test_what_comes_when_all_is_done_changes_nothing(number, tmp_path):
    send = f"import atexit, os; atexit.register(os.kill, os.getpid(), {int(number)})"
    tmp_path.joinpath("sitecustomize.py").write_text(send)
    result = ended(os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}, "--version")
    assert (result.code, result.err) == (0, "")


def test_who_is_started_with_interruptions_ignored_ignores_them(tmp_path):
    done = subprocess.run(
        [*CLI, "--version"], env=interrupting(tmp_path, "click", signal.SIGINT), capture_output=True, text=True,
        timeout=60, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


# ---- what libraries make of it


def swallow(*_: object, **__: object) -> None:
    """What a library does that takes an interruption for a failure, and then works on."""
    with contextlib.suppress(BaseException):
        os.kill(os.getpid(), signal.SIGTERM)
    logging.getLogger("evit_deploy.test").info("the next step")
    raise AssertionError("it was not interrupted")


def wrap(*_: object, **__: object) -> None:
    """What a library does that makes another error of it."""
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except BaseException:
        raise RuntimeError("the library failed") from None


@pytest.mark.parametrize("library", [swallow, wrap])
def test_a_library_that_swallows_or_wraps_it(library, cli, bundle, monkeypatch):
    monkeypatch.setattr("evit_deploy.verification.verify.verify", library)
    result = cli("verify", bundle, "--json")
    assert (result.code, result.document["error"]["exit_code"]) == (143, 143)
    assert result.err.splitlines()[-1] == SAID
    monkeypatch.undo()
    assert cli("verify", bundle, "--threads", "1").code == 0  # nothing of it is remembered


def test_handlers_are_given_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert run(["--version"]) == 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_what_comes_while_a_process_starts_comes_afterwards():
    started = []

    def start() -> None:
        with interrupts.held():
            os.kill(os.getpid(), signal.SIGTERM)
            started.append(True)

    with interrupts.listening(), pytest.raises(KeyboardInterrupt):
        start()
    assert started


# ---- twice


def interrupted_while_tidying_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opens a draft, and is interrupted twice while it is removed."""
    remove, numbers = shutil.rmtree, [signal.SIGTERM, signal.SIGINT]

    def interrupted(*arguments: object, **named: object) -> None:
        if numbers:
            os.kill(os.getpid(), numbers.pop(0))
        remove(*arguments, **named)

    with interrupts.listening(), draft(folder) as made:
        (made.folder / "half").write_text("half")
        monkeypatch.setattr(shutil, "rmtree", interrupted)


def test_the_same_request_again_does_not_disturb_the_tidying_up(tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        interrupted_while_tidying_up(tmp_path, monkeypatch)
    assert tree(tmp_path) == {}


def test_one_that_comes_later_does_and_the_next_run_tidies_up(tmp_path, monkeypatch):
    monkeypatch.setattr(interrupts, "TOGETHER", 0.0)
    with pytest.raises(KeyboardInterrupt):
        interrupted_while_tidying_up(tmp_path, monkeypatch)
    assert [path.name[: len(PREFIX)] for path in tmp_path.iterdir()] == [PREFIX]
    monkeypatch.undo()
    drafts.sweep(tmp_path)
    assert tree(tmp_path) == {}


# ---- children


def test_what_a_compiler_has_started_ends_with_it(tmp_path):
    """A tool, as CMake does, starts another one; the user interrupts."""
    pids = tmp_path / "pids"
    os.mkfifo(pids)
    child = os.fork()
    if child == 0:
        try:
            interrupts.listen()
            build._run(["sh", "-c", f"sleep 600 & echo $$ $! > {pids}; wait"], "it failed")
        except KeyboardInterrupt:
            os._exit(143)
        finally:
            os._exit(1)
    started = [int(number) for number in pids.read_text().split()]
    handles = [os.pidfd_open(number) for number in started]
    os.kill(child, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143
    for handle in handles:
        assert select.select([handle], [], [], 60)[0], "it still runs"
        os.close(handle)
