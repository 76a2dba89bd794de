"""An opened runner that several threads can share, and that is not closed while one of them uses it."""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from evit_deploy.errors import InputError
from evit_deploy.export.card import feeds
from evit_deploy.runtimes.select import opened


class Session:
    """An opened runner.

    Args:
        name: Name of the runtime.
        artifact: The artifact to run.
        threads: CPU threads; ``None`` for the runtime's default.
        with_indices: Whether to also return the choices of its locations.
        where: Path of the bundle, for messages.
        turn: Lock to hold during calls, unless the runner is ``concurrent``; shared by sessions of the same artifact.

    Raises:
        InputError: See :func:`~evit_deploy.runtimes.select.opened`.
        MissingRequirement: Likewise.
    """

    def __init__(
        self, name: str, artifact: Any, threads: int | None, *, with_indices: bool, where: Path, turn: threading.Lock
    ) -> None:
        self._where = where
        self._open = contextlib.ExitStack()
        self.runner = self._open.enter_context(opened(name, artifact, threads, with_indices=with_indices))
        self._turn = contextlib.nullcontext() if self.runner.concurrent else turn
        self._changed = threading.Condition()
        self._users, self._closed = 0, False

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Keeps the runner open until the work inside is done.

        Raises:
            InputError: The session is closed.
        """
        with self._changed:
            if self._closed:
                raise InputError(
                    "the model is closed", where=self._where, fix="Load it again, or ask it inside its `with`."
                )
            self._users += 1
        try:
            yield
        finally:
            with self._changed:
                self._users -= 1
                self._changed.notify_all()

    def infer(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Runs one batch, inside :meth:`used`; threads take turns unless the runner is ``concurrent``.

        Args:
            images: Prepared float32 ``[B, C, H, W]``, with a batch size that the runner supports.

        Returns:
            One array for each output.

        Raises:
            StageError: The runtime failed.
        """
        with self._turn:
            return self.runner.infer(feeds(images))

    def close(self) -> None:
        """Waits for running calls and closes the runner; further calls have no effect."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.wait_for(lambda: not self._users)
        self._open.close()
