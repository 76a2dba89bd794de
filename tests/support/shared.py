"""Expensive files, created once and shared by all processes of a test run."""

import atexit
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

FOLDER = "EVIT_TESTS_SHARED"  # inherited by the worker processes of pytest-xdist


@cache
def folder() -> Path:
    """The folder of this test run, without spaces in its path for compilers. The process that created it removes it."""
    if FOLDER not in os.environ:
        os.environ[FOLDER] = tempfile.mkdtemp(prefix="evit-tests-")
        atexit.register(_remove, os.environ[FOLDER], os.getpid())
    return Path(os.environ[FOLDER])


def _remove(path: str, owner: int) -> None:
    if os.getpid() == owner:  # not a forked child
        shutil.rmtree(path, ignore_errors=True)


def made_once(name: str, make: Callable[[Path], None]) -> Path:
    """A file or folder that ``make`` writes to the given path, unless a process of this run has already done so.

    The path never changes, because some content (CMake builds) contains it. Processes wait for each other; if ``make``
    raises (or skips), nothing is left and the next process tries again.
    """
    path, state = folder() / name, folder() / "state" / name.replace("/", " ")
    state.parent.mkdir(exist_ok=True)
    with state.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if state.stat().st_size == 0:
            shutil.rmtree(path, ignore_errors=True)
            path.parent.mkdir(exist_ok=True)
            make(path)
            lock.write("made")
    return path
