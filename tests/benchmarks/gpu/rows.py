"""Results as lines of JSON, written immediately.

All processes of a run append to the same file, each line in one write, so that a killed run keeps its results.
"""

import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
LONGEST = 400
"""Maximum length of a reason."""


class Rows:
    """The rows of one part.

    Args:
        path: The run's file.
        part: The part that they belong to.
        seconds: Time limit of the part, from now on.
    """

    def __init__(self, path: Path, part: str, seconds: float) -> None:
        self._path, self._part, self._begun, self._end = path, part, time.monotonic(), time.monotonic() + seconds

    def add(self, **row: Any) -> None:
        """Writes a row, and logs it with the seconds since the start of the part."""
        line = json.dumps({"part": self._part, **row}, default=str)
        append(self._path, line)
        print(f"{time.monotonic() - self._begun:.1f} s: {line}", flush=True)

    @property
    def left(self) -> float:
        """Remaining seconds of the part."""
        return self._end - time.monotonic()

    def in_time(self, keys: Iterable[T], reserve: float = 0.0) -> Iterator[T]:
        """Yields keys until the part's time (minus a reserve) is over; then logs how many are left."""
        keys = list(keys)
        for index, key in enumerate(keys):
            if self.left < reserve:
                rest = [str(other) for other in keys[index:]]
                self.add(left_out=f"no time for {len(rest)} of {len(keys)}: {'; '.join(rest)[:LONGEST]}")
                return
            yield key

    @contextmanager
    def attempt(self, **key: Any) -> Iterator[None]:
        """Records a failure with its key, so that the other rows continue."""
        try:
            yield
        except Exception as error:
            memory = type(error).__name__ == "OutOfMemoryError"
            reason = "out of memory" if memory else f"{type(error).__name__}: {error}"
            self.add(**key, **{"skipped" if memory else "failed": " ".join(reason.split())[:LONGEST]})


def append(path: Path, line: str) -> None:
    """Adds a line to a file that several processes write to."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, f"{line}\n".encode())
    finally:
        os.close(descriptor)


def read(path: Path) -> list[dict[str, Any]]:
    """All rows of a run; a truncated last line is ignored."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows
