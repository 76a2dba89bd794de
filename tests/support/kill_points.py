"""Kills processes at every system call of the publishing code, and inspects what they leave.

    python -m tests.support.kill_points FOLDER MANIFEST WHAT HOW

``WHAT`` is published repeatedly by a child process, which ends itself by SIGKILL before and after its first system
call, its second, and so on, until a child completes:

- ``fresh``: a new bundle
- ``forced``: a bundle that replaces another
- ``file``: one file, by :func:`evit_deploy.files.write_atomically`

``HOW`` is ``exchange``, or ``aside`` for a kernel or file system that cannot exchange. Prints JSON: what each child
left visible (``old``, ``new`` or ``nothing``), what :func:`evit_deploy.bundle.bundle.read_bundle` then found, and all
faults: an incomplete bundle, or hidden files that remain after the next run.
"""

import ctypes
import errno
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec

from evit_deploy.bundle.bundle import Staging, changed_files, read_bundle, write_manifest
from evit_deploy.bundle.manifest import Manifest
from evit_deploy.errors import InputError
from evit_deploy.files import drafts, write_atomically

# C functions of these modules are system calls; `_renameat2` uses ctypes, which profilers do not see.
_SYSTEM, _THROUGH_CTYPES = ("posix", "fcntl", "_io"), "_renameat2"
_PURE = ("fspath", "fsencode", "fsdecode", "getpid")


class Killer:
    """A profiler that kills the process at the n-th system call, counting before and after each.

    Args:
        point: n, from 0.
    """

    def __init__(self, point: int) -> None:
        self.left = point

    def __call__(self, frame: FrameType, event: str, called: Any) -> None:
        if event.startswith("c_"):
            of = getattr(called, "__module__", None) or type(getattr(called, "__self__", None)).__module__
            counts = of in _SYSTEM and called.__name__ not in _PURE
        else:
            counts = frame.f_code.co_name == _THROUGH_CTYPES
        if counts:
            self.left -= 1
            if self.left < 0:
                os.kill(os.getpid(), signal.SIGKILL)


def cannot(*_: object) -> int:
    """A ``renameat2`` that does not support flags, as on some file systems."""
    ctypes.set_errno(errno.EINVAL)
    return -1


def publish(out: Path, manifest: Manifest, what: str, content: str) -> None:
    """The work to kill: publishes a bundle or a file with this content."""
    if what == "file":
        write_atomically(out, content.encode() * 1000)
        return
    with Staging(out, force=what == "forced") as staging:
        (staging.path / "dense").mkdir()
        (staging.path / "dense" / "model.onnx").write_text(f"dense {content}")
        (staging.path / "model.onnx").write_text(content)
        write_manifest(staging.path, manifest)
        staging.publish(out)


def seen(out: Path, what: str) -> str:
    """The visible state: ``old``, ``new``, ``nothing``, or a description of something incomplete, which is a fault."""
    if what == "file":
        found = out.read_text() if out.exists() else "nothing"
        return found[: len(found) // 1000] if found in ("old" * 1000, "new" * 1000, "nothing" * 1000) else found
    try:
        bundle = read_bundle(out)
    except InputError as error:
        return "nothing" if "no such bundle" in str(error) else str(error)
    changed = changed_files(bundle)
    return f"changed: {changed}" if changed else bundle.file("model.onnx").read_text()


def child(point: int, *arguments: Any) -> bool:
    """Publishes in a child process that is killed at a point; returns whether it completed."""
    number = os.fork()
    if number == 0:
        try:
            sys.setprofile(Killer(point))
            publish(*arguments)
        finally:
            sys.setprofile(None)
            os._exit(0)
    _, status = os.waitpid(number, 0)
    return os.WIFEXITED(status)


def main() -> None:
    """Goes through all the points."""
    folder, manifest, what, how = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4]
    known = msgspec.json.decode(manifest.read_bytes(), type=Manifest)
    if how == "aside":
        drafts._system_call = lambda: cannot
    in_view, found, wrong, point, alive = [], [], [], 0, False
    while not alive:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        out = folder / "out"
        if what != "fresh":
            publish(out, known, what, "old")
        alive = child(point, out, known, what, "new")
        in_view.append("nothing" if not os.path.lexists(out) else "something")
        found.append(seen(out, what))
        if in_view[-1] == "something":
            in_view[-1] = found[-1]
        try:
            publish(out, known, what, "new")
        except InputError as error:
            if what != "fresh" or found[-1] != "new" or "it exists already" not in str(error):
                wrong.append([point, str(error)])
        names = sorted(os.listdir(folder))
        if names != ["out"] or seen(out, what) != "new":
            wrong.append([point, names, seen(out, what)])
        point += 1
    print(json.dumps({"in_view": in_view, "found": found, "wrong": wrong}))


if __name__ == "__main__":
    main()
