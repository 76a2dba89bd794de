"""The command line that is running, as its user could type it again."""

import re
import shlex
from collections.abc import Sequence
from contextvars import ContextVar

_ARGUMENTS: ContextVar[tuple[str, ...] | None] = ContextVar("arguments", default=None)
_PASSWORD = re.compile(r"(?<=//)[^/@\s]+(?=@)")


def note_command(arguments: Sequence[str]) -> None:
    """Takes down what ``evit-deploy`` was called with; reports made from now on have it.

    Args:
        arguments: Without the program's name.
    """
    _ARGUMENTS.set(tuple(arguments))


def commands() -> tuple[str, ...]:
    """The command that is running; empty where Python called the library.

    Names and passwords in addresses (``http://user:password@host``) are left out.
    """
    found = _ARGUMENTS.get()
    return () if found is None else (shlex.join(["evit-deploy", *(_PASSWORD.sub("…", one) for one in found)]),)
