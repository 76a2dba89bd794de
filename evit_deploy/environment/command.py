"""The command line of this process, in a form that can be run again."""

import re
import shlex
from collections.abc import Sequence
from contextvars import ContextVar

_ARGUMENTS: ContextVar[tuple[str, ...] | None] = ContextVar("arguments", default=None)
_PASSWORD = re.compile(r"(?<=//)[^/@\s]+(?=@)")


def note_command(arguments: Sequence[str]) -> None:
    """Records the command line, for reports.

    Args:
        arguments: Arguments without the program's name.
    """
    _ARGUMENTS.set(tuple(arguments))


def commands() -> tuple[str, ...]:
    """The command line of this process; empty if the library was called from Python.

    User names and passwords in addresses (``http://user:password@host``) are removed.
    """
    found = _ARGUMENTS.get()
    return () if found is None else (shlex.join(["evit-deploy", *(_PASSWORD.sub("…", one) for one in found)]),)
