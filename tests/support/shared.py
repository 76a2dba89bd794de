"""What takes long to make: made once for all the processes of a test run, and read by the others."""

import atexit
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

FOLDER = "EVIT_TESTS_SHARED"  # the processes of pytest-xdist inherit it from the one that starts them


@cache
def folder() -> Path:
    """The folder of this test run; its path has no spaces, for compilers. Whoever makes it removes it at the end."""
    if FOLDER not in os.environ:
        os.environ[FOLDER] = tempfile.mkdtemp(prefix="evit-tests-")
        atexit.register(_remove, os.environ[FOLDER], os.getpid())
    return Path(os.environ[FOLDER])


def _remove(path: str, owner: int) -> None:
    if os.getpid() == owner:  # not a child that was forked
        shutil.rmtree(path, ignore_errors=True)


def made_once(name: str, make: Callable[[Path], None]) -> Path:
    """A file or folder that ``make`` writes at the path it is given, if no process of this run has done so before.

    The path never changes, because some of what is written (CMake's builds) knows its own. Processes wait for others;
    what ``make`` raises (a skip, too) leaves nothing, and the next one tries again.
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
