"""Collects log lines of the library; also the pytest fixture that stops collecting."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

_LOG = logging.getLogger("evit_deploy")
_LISTENERS: list[logging.Handler] = []


class _Listener(logging.Handler):
    def __init__(self, hear: Callable[[str], object], *, progress: bool) -> None:
        super().__init__()
        self._hear, self._progress = hear, progress

    def emit(self, record: logging.LogRecord) -> None:
        if hasattr(record, "progress") is self._progress:
            self._hear(record.getMessage())


def listen(hear: Callable[[str], object], *, progress: bool) -> logging.Handler:
    """Calls a function with every notice, or with every line on progress, until the test ends."""
    listener = _Listener(hear, progress=progress)
    _LISTENERS.append(listener)
    _LOG.addHandler(listener)
    _LOG.setLevel(logging.DEBUG)
    return listener


@contextmanager
def listening(hear: Callable[[str], object]) -> Iterator[None]:
    """Calls a function with every line on progress; its exceptions stop the work."""
    listener = listen(hear, progress=True)
    try:
        yield
    finally:
        _LOG.removeHandler(listener)


def notices() -> list[str]:
    """Notices from now on, until the test ends."""
    lines: list[str] = []
    listen(lines.append, progress=False)
    return lines


def progress_lines() -> list[str]:
    """Lines on progress from now on, until the test ends."""
    lines: list[str] = []
    listen(lines.append, progress=True)
    return lines


@pytest.fixture(autouse=True)
def _listening_ends() -> Iterator[None]:
    yield
    for listener in _LISTENERS:
        _LOG.removeHandler(listener)
    _LISTENERS.clear()
    _LOG.setLevel(logging.NOTSET)
