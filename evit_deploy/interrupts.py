"""Ctrl-C and SIGTERM: a request to stop, and with which signal it came.

Both raise ``KeyboardInterrupt`` in the main thread. What comes within :data:`TOGETHER` seconds of the first belongs to
it, because the same request often comes twice: from the terminal and from a launcher, from a scheduler and from a
shell. So the second one does not disturb the work of tidying up; one that comes later does.

A library may swallow or wrap the exception; the signal is remembered, and :func:`raise_if_asked` raises again.
"""

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

TOGETHER = 2.0
"""Seconds in which several signals are one request."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
SENTENCE = "interrupted; nothing was left half-written"


class _Request:
    number: int | None = None
    since = 0.0
    raised = False
    held = False
    waiting = False


def listen() -> None:
    """Takes SIGINT and SIGTERM over; one that the parent process has set to be ignored stays so.

    Only the main thread may; elsewhere nothing changes.
    """
    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _stop)


@contextmanager
def listening() -> Iterator[None]:
    """Listens for the time of one command, and forgets what came when it ends."""
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    _forget()
    listen()
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)
        _forget()


@contextmanager
def held() -> Iterator[None]:
    """Holds a request back until a short step is done, such as starting a process that has to be ended again.

    Raises:
        KeyboardInterrupt: At the end, if a signal came.
    """
    _Request.held = True
    try:
        yield
    finally:
        _Request.held = False
    if _Request.waiting:
        _Request.waiting = False
        raise KeyboardInterrupt


def ignore() -> None:
    """Lets the process end as it has decided to: what comes from now on changes nothing."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    # CPython ends by SIGINT, whatever the exit code, when the last text it ran was interrupted, as in an import that
    # makes a dataclass. So it runs another.
    exec("")


def note(number: int) -> None:
    """Notes a signal that is a request."""
    _Request.number, _Request.since = number, time.monotonic()


def repeated() -> bool:
    """Whether a signal that comes now is the request that was noted, once again."""
    return asked() and time.monotonic() - _Request.since < TOGETHER


def asked() -> bool:
    """Whether a signal came."""
    return _Request.number is not None


def exit_code() -> int:
    """130 after Ctrl-C, 143 after SIGTERM, as a shell gives it."""
    return 128 + (_Request.number or signal.SIGINT)


def raise_if_asked() -> None:
    """Raises again what a library may have swallowed.

    Not while something is tidied up after an exception: that is not to be disturbed.

    Raises:
        KeyboardInterrupt: It was raised before, and the work did not end.
    """
    if _Request.raised and sys.exception() is None:
        raise KeyboardInterrupt


def _stop(number: int, frame: FrameType | None) -> None:
    if not repeated():
        if not asked():
            note(number)
        _Request.raised = True
        if _Request.held:
            _Request.waiting = True
        else:
            raise KeyboardInterrupt


def _forget() -> None:
    _Request.number, _Request.raised, _Request.waiting = None, False, False
