"""Findings of a search: a file of lines that several processes, here or on other machines, read and append to."""

import os
from pathlib import Path

import msgspec

from evit_deploy.errors import InputError
from evit_deploy.tuning.answers import Nearness
from evit_deploy.tuning.schedules import Schedule


class Shape(msgspec.Struct, frozen=True):
    """Which blocks reduce, and how the removal is divided.

    Args:
        locations: Blocks, 0-based and rising.
        weights: Of each, its part of the removal: the logarithm of its own rate is in proportion to it.
    """

    locations: tuple[int, ...]
    weights: tuple[float, ...]


class Finding(msgspec.Struct, frozen=True):
    """A schedule that was looked at.

    Args:
        goal: Name of the goal that it was looked at for.
        shape: What it was made from.
        schedule: What it is.
        nearness: How near its answers are to the dense model's.
    """

    goal: str
    shape: Shape
    schedule: Schedule
    nearness: Nearness


class Findings:
    """The findings in a file; each is one line, appended in one step.

    Args:
        path: The file, which need not be there.

    Raises:
        InputError: It holds something else.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.all()

    def all(self) -> list[Finding]:
        """All findings, also those that others have appended meanwhile."""
        if not self._path.exists():
            return []
        lines = self._path.read_bytes().split(b"\n")
        try:  # a line without its end was cut off as a process died
            return [msgspec.json.decode(line, type=Finding) for line in lines if line.endswith(b"}}")]
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise InputError(
                f"not a record of a search: {error}", where=self._path, fix="Give --force to start again."
            ) from None

    def of(self, goal: str) -> list[Finding]:
        """Those for one goal, each schedule once."""
        return list({finding.schedule: finding for finding in self.all() if finding.goal == goal}.values())

    def nearness(self, schedule: Schedule) -> Nearness | None:
        """How near a schedule's answers are, if it was looked at for any goal."""
        return next((finding.nearness for finding in self.all() if finding.schedule == schedule), None)

    def add(self, finding: Finding) -> None:
        """Appends a finding."""
        line = msgspec.json.encode(finding) + b"\n"
        handle = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            size = os.fstat(handle).st_size
            whole = size == 0 or os.pread(handle, 1, size - 1) == b"\n"
            os.write(handle, line if whole else b"\n" + line)
        finally:
            os.close(handle)
