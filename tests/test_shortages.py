"""A machine that runs out of file descriptors, memory, threads or disk: named, with exit code 4, in any library."""

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from evit_deploy.errors import CheckpointError, GateFailed, InputError, MissingRequirement, StageError, exhausted
from tests.support.command_line import CLI
from tests.support.paths import ROOT

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/a/file")


def caused(error: BaseException, cause: BaseException, *, hidden: bool = False) -> BaseException:
    """An error as it is after ``raise error from cause``, or ``from None`` while the cause was handled."""
    try:
        try:
            raise cause
        except BaseException:
            raise error from (None if hidden else cause)
    except BaseException as raised:
        return raised


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), "out of file descriptors"),
        (OSError(errno.ENFILE, os.strerror(errno.ENFILE), "x"), "out of file descriptors"),
        (InputError("it cannot be read (Too many open files)", where="x"), "out of file descriptors"),
        (RuntimeError("open file m.onnx fail, errcode = 24: Too many open files"), "out of file descriptors"),
        (FULL, "/a/file: no space left to write"),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), "no space left to write"),
        (caused(InputError("cannot write there"), FULL, hidden=True), "/a/file: no space left to write"),
        (MemoryError(), "not enough memory"),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), "not enough memory"),
        (RuntimeError("std::bad_alloc"), "not enough memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), "not enough memory"),
        (caused(ValueError("x"), MemoryError()), "not enough memory"),
        (caused(StageError("the ONNX export failed: MemoryError"), MemoryError()), "not enough memory"),
        (RuntimeError("can't start new thread"), "no more threads"),
    ],
)
def test_what_is_short_is_named(error, what):
    found = exhausted(error)
    assert type(found) is StageError
    assert str(found).startswith(what)
    assert found.fix


@pytest.mark.parametrize(
    "error",
    [
        ValueError("x"),
        OSError(errno.ENOENT, os.strerror(errno.ENOENT)),
        caused(CheckpointError("nested too deeply"), MemoryError()),
        caused(StageError("could not be written (No space left on device)"), FULL),
        MissingRequirement("torch does not load: failed to map segment"),
        caused(GateFailed("other answers"), MemoryError()),
    ],
)
def test_everything_else_stays_what_it_is(error):
    assert exhausted(error) is None


def test_pytorchs_and_numpys_own_words():
    for ask in (lambda: torch.empty(2**60, dtype=torch.uint8), lambda: bytearray(2**60)):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            ask()
        assert str(exhausted(caught.value)).startswith("not enough memory")


# ---- whole commands


def limited(limit: int, value: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs the command line with a limit of the system."""
    return subprocess.run(
        [*CLI, *map(str, arguments)], capture_output=True, text=True, timeout=240,
        preexec_fn=lambda: resource.setrlimit(limit, (value, value)),
    )  # fmt: skip


def refused(done: subprocess.CompletedProcess[str], what: str) -> bool:
    """Whether it failed, in one sentence and for this reason."""
    if done.returncode == 0:
        return False
    last = done.stderr.splitlines()[-1]
    assert (done.returncode, last[:13]) == (4, "evit-deploy: "), done.stderr
    assert what in last
    assert "unexpected" not in last
    assert "Traceback" not in done.stderr
    return True


def test_out_of_file_descriptors(converted):
    """How many are too few differs between versions of libraries; some say only that a file cannot be opened."""
    runs = [limited(resource.RLIMIT_NOFILE, count, "verify", converted.path) for count in (5, 6, 7, 8)]
    assert refused(runs[0], "")
    assert all(run.returncode == 0 or refused(run, "") for run in runs)
    assert any("out of file descriptors" in run.stderr or "Can't open" in run.stderr for run in runs)


def test_none_left_where_a_bundle_is_read(converted):
    code = """
import os, sys
from evit_deploy.cli import invoke as run
import evit_deploy.cli.verify, evit_deploy.verification.verify
try:
    while True:
        os.open(os.devnull, os.O_RDONLY)
except OSError:
    pass
sys.exit(run(["verify", sys.argv[1]]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(converted.path)], capture_output=True, text=True, timeout=240, cwd=ROOT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)),
    )  # fmt: skip
    assert refused(done, "out of file descriptors")


def test_out_of_memory(converted):
    assert refused(limited(resource.RLIMIT_AS, 2_000_000_000, "verify", converted.path), "not enough memory")


def test_a_limit_of_file_size(checkpoint):
    before = list(checkpoint.parent.iterdir())
    done = limited(resource.RLIMIT_FSIZE, 20_000, "convert", checkpoint, "--keep-rate", "0.6", "--threads", "1")
    assert done.returncode == 4, done.stderr
    last = done.stderr.splitlines()[-1]
    assert "File too large" in last or "no space left to write" in last
    assert "unexpected" not in last
    assert list(checkpoint.parent.iterdir()) == before


def test_a_full_disk_that_takes_the_result():
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with open("/dev/full", "w") as full:
        done = subprocess.run([*CLI, "--help"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 4, done.stderr
    assert "no space left to write" in done.stderr
    assert "Traceback" not in done.stderr
