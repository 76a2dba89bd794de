"""What a reader may do with a hostile input: read it, or refuse it in words; and what is watched while it does.

A reader is called in this process, as the commands call it. It may not raise anything but an
:class:`~evit_deploy.errors.EvitDeployError`, write outside the folder of the try, start a program or reach out, take
more memory than twice its input and 1 GB, or compute for more than a minute. Python's own audit events see writes, but
not those of C libraries.
"""

import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from hypothesis.strategies import SearchStrategy

from evit_deploy.errors import EvitDeployError

LONGEST_MESSAGE = 2000
ROOM = 1 << 30
"""Bytes of memory that a reader may take besides twice its input."""
LONGEST = 60
"""Seconds of this process's CPU time, which do not pass while others use the machine; none takes more than two."""
CORPUS = Path(__file__).parent / "corpus"
_PAGE = resource.getpagesize()


class Format(msgspec.Struct, frozen=True):
    """One kind of file that others may have written.

    Args:
        name: Also of the folder of its corpus.
        file: Name of the file in the folder of a try.
        inputs: Makes what to draw hostile contents from; called when first needed.
        read: Reads that file as the commands do.
        beside: Makes what has to lie beside the file, by name.
        share: Of the number of tries asked for; below 1 where one try takes long.
    """

    name: str
    file: str
    inputs: Callable[[], SearchStrategy[bytes]]
    read: Callable[[Path], Any]
    beside: Callable[[], Mapping[str, bytes]] = dict
    share: float = 1.0


class Violation(AssertionError):  # noqa: N818 -- of a rule
    """A reader did what it may not do."""


class Outcome(msgspec.Struct, frozen=True):
    """What became of one input.

    Args:
        kind: ``read``, or the class of the error.
        seconds: How long it took.
    """

    kind: str
    seconds: float


def corpus(form: Format) -> list[Path]:
    """Inputs that once were trouble."""
    return sorted(file for file in (CORPUS / form.name).glob("*") if file.is_file())


def attempt(form: Format, content: bytes, folder: Path) -> Outcome:
    """Lets a reader have an input.

    Args:
        form: The format.
        content: The input.
        folder: An empty folder for the try; what lies beside the file stays there for the next one.

    Raises:
        Violation: The reader did what it may not do.
    """
    for name, other in form.beside().items():
        place = folder / name
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(other)
    path = folder / form.file
    path.write_bytes(content)
    _WATCH.found.clear()
    _WATCH.folder = os.fspath(folder)
    before, kind = time.perf_counter(), "read"
    try:
        with limited_time(LONGEST), limited_memory(ROOM + 2 * len(content)):
            form.read(path)
    except EvitDeployError as error:
        kind = type(error).__name__
        if not 0 < len(str(error)) <= LONGEST_MESSAGE:
            raise Violation(f"a message of {len(str(error))} characters: {str(error)[:300]}") from error
        if error.exit_code not in (1, 2, 3, 4):
            raise Violation(f"exit code {error.exit_code}") from error
    except Violation:
        raise
    except Exception as error:
        raise Violation(f"{type(error).__name__}: {str(error)[:300]}") from error
    finally:
        _WATCH.folder = None
    if _WATCH.found:
        raise Violation("; ".join(_WATCH.found[:5]))
    return Outcome(kind, time.perf_counter() - before)


@contextmanager
def limited_time(seconds: float) -> Iterator[None]:
    """What computes for longer is a violation.

    pytest-timeout is no help here: Hypothesis runs once more what failed, and by then its time limit is spent.
    """

    def stop(number: int, frame: Any) -> None:
        raise Violation(f"still not done after {seconds} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextmanager
def limited_memory(more: int) -> Iterator[None]:
    """This process may map so many bytes more than it has; what asks for more gets a ``MemoryError`` or its like."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * _PAGE
    resource.setrlimit(resource.RLIMIT_AS, (mapped + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


class _Watch:
    """Takes note of what a reader may not do, while there is a folder to keep to; an audit hook, which stays."""

    _CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.truncate")
    _STARTS = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect", "socket.getaddrinfo")

    def __init__(self) -> None:
        self.folder: str | None = None
        self.found: list[str] = []
        self.hooked = False

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
                self._keep_to(event, path)
        elif event in self._CHANGES:
            for path in arguments[:2]:
                self._keep_to(event, path)
        elif event in self._STARTS:
            self.found.append(f"{event} {arguments[:1]!r:.200}")

    def _keep_to(self, event: str, path: Any) -> None:
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        if not isinstance(path, str) or path.endswith(".pyc") or path == os.devnull:
            return
        if not os.path.realpath(path).startswith(os.path.realpath(str(self.folder))):
            self.found.append(f"{event} {path!r:.200} outside the folder")


_WATCH = _Watch()


def watch() -> None:
    """Begins to look at what readers do besides reading; once a process, because Python forgets no audit hook."""
    if not _WATCH.hooked:
        sys.addaudithook(_WATCH)
        _WATCH.hooked = True
