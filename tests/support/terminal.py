"""Runs programs on a terminal of a given width, and records the screen."""

import fcntl
import os
import pty
import struct
import subprocess
import termios
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyte

ROWS = 120
"""Number of lines; more than any program prints, so that nothing scrolls off."""


def screens_of(
    arguments: Sequence[str], columns: int, environment: Mapping[str, str] = {}, cwd: Path | None = None
) -> list[list[str]]:
    """Runs a program on a terminal.

    Args:
        arguments: The program and its arguments.
        columns: Width of the terminal.
        environment: Additional environment variables.
        cwd: Working directory.

    Returns:
        The nonempty lines of the screen, at many moments and at the end.
    """
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, columns, 0, 0))
    names = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "RANK")}
    process = subprocess.Popen(
        arguments, stdin=slave, stdout=slave, stderr=slave, env=names | {"TERM": "xterm-256color"} | environment,
        cwd=cwd,
    )  # fmt: skip
    os.close(slave)
    screen = pyte.Screen(columns, ROWS)
    stream, screens = pyte.ByteStream(screen), []
    while True:
        try:
            content = os.read(master, 4096)
        except OSError:  # the program has closed the terminal
            break
        if not content:
            break
        stream.feed(content)
        screens.append([line.rstrip() for line in screen.display if line.strip()])
    os.close(master)
    assert process.wait() == 0, "\n".join(screens[-1])
    return screens
