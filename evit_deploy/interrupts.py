"""Ctrl-C and SIGTERM: handling a request to stop.

Both raise ``KeyboardInterrupt`` in the main thread. Signals that arrive within :data:`TOGETHER` seconds of the first
count as the same request, because a request often arrives twice: from the terminal and a launcher, or from a scheduler
and a shell. They are ignored, so that they do not interrupt the cleanup; a later signal does.

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
"""Seconds within which several signals count as one request."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
SENTENCE = "interrupted; nothing was left half-written"


class _Request:
    number: int | None = None
    since = 0.0
    raised = False
    held = False
    waiting = False


def listen() -> None:
    """Installs the handlers of SIGINT and SIGTERM, except for a signal that the parent process has set to be ignored.

    Only the main thread can install handlers; in other threads this does nothing.
    """
    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _stop)


@contextmanager
def listening() -> Iterator[None]:
    """Installs the handlers for the duration of one command, then restores the previous ones and resets the state."""
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
    """Defers a request until a short step is done, such as starting a process that must be ended later.

    Raises:
        KeyboardInterrupt: At the end, if a signal arrived.
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
    """Ignores all further signals, so that the process ends with the exit code it has chosen."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    # CPython exits by SIGINT, whatever the exit code, if its last `exec` was interrupted, as in an import that creates
    # a dataclass. Another `exec` resets that.
    exec("")


def note(number: int) -> None:
    """Records a signal as the request to stop."""
    _Request.number, _Request.since = number, time.monotonic()


def repeated() -> bool:
    """Whether a signal that arrives now counts as the same request."""
    return asked() and time.monotonic() - _Request.since < TOGETHER


def asked() -> bool:
    """Whether a signal has arrived."""
    return _Request.number is not None


def exit_code() -> int:
    """130 after Ctrl-C, 143 after SIGTERM, as shells report it."""
    return 128 + (_Request.number or signal.SIGINT)


def raise_if_asked() -> None:
    """Raises ``KeyboardInterrupt`` again if a library has swallowed it.

    Does nothing while an exception is being handled, so that cleanup is not interrupted.

    Raises:
        KeyboardInterrupt: It was raised before, and the work continued.
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
