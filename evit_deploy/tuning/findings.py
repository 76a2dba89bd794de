"""Findings of a search: a JSON Lines file that several processes, also on other machines, read and append to."""

import os
from pathlib import Path

import msgspec

from evit_deploy.errors import InputError
from evit_deploy.tuning.answers import Nearness
from evit_deploy.tuning.schedules import Schedule


class Shape(msgspec.Struct, frozen=True):
    """Blocks that reduce, and how the removal is divided among them.

    Args:
        locations: 0-based blocks, strictly rising.
        weights: Part of the removal at each location; the logarithm of its keep rate is proportional to it.
    """

    locations: tuple[int, ...]
    weights: tuple[float, ...]


class Finding(msgspec.Struct, frozen=True):
    """An evaluated schedule.

    Args:
        goal: Name of the goal that it was evaluated for.
        shape: Shape that the schedule was fitted from.
        schedule: The schedule.
        nearness: Similarity of its answers to the dense model's.
    """

    goal: str
    shape: Shape
    schedule: Schedule
    nearness: Nearness


class Findings:
    """The findings in a file; each is one line, appended with a single write.

    Args:
        path: The file; it need not exist.

    Raises:
        InputError: The file contains something else.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.all()

    def all(self) -> list[Finding]:
        """Reads all findings, including those that other processes have appended meanwhile."""
        if not self._path.exists():
            return []
        lines = self._path.read_bytes().split(b"\n")
        try:  # an incomplete line was cut off when a process ended
            return [msgspec.json.decode(line, type=Finding) for line in lines if line.endswith(b"}}")]
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise InputError(
                f"not a record of a search: {error}", where=self._path, fix="Give --force to start again."
            ) from None

    def of(self, goal: str) -> list[Finding]:
        """Findings for one goal, without repeated schedules."""
        return list({finding.schedule: finding for finding in self.all() if finding.goal == goal}.values())

    def nearness(self, schedule: Schedule) -> Nearness | None:
        """Nearness of a schedule if it was evaluated for any goal, else ``None``."""
        return next((finding.nearness for finding in self.all() if finding.schedule == schedule), None)

    def add(self, finding: Finding) -> None:
        """Appends a finding to the file."""
        line = msgspec.json.encode(finding) + b"\n"
        handle = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            size = os.fstat(handle).st_size
            whole = size == 0 or os.pread(handle, 1, size - 1) == b"\n"
            os.write(handle, line if whole else b"\n" + line)
        finally:
            os.close(handle)
