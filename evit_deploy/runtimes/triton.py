"""A model on a running Triton Inference Server: what operations serve, held to the same contract as everything else."""

import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.shared_memory import SharedMemory
from types import TracebackType
from typing import Any, Self

import numpy as np

from evit_deploy.bundle.manifest import TensorSpec
from evit_deploy.errors import EvitDeployError, InputError, MissingRequirement, StageError
from evit_deploy.export.card import kept_name
from evit_deploy.recipe.options import BatchProfile
from evit_deploy.runtimes.runner import Runner
from evit_deploy.triton.connection import IN_FLIGHT, Connection, Server, client_missing, split_url

_KEPT = kept_name(0).rstrip("0")


class TritonRunner(Runner):
    """Sends batches to a server.

    Kept candidates (``kept_<block>``) are given out when the served model was exported with them; without them
    :attr:`outputs` has the logits alone.

    Args:
        artifact: A :class:`Server`.
        threads: Not used: the server's configuration says how many it has.
        with_indices: See above.
    """

    name = "triton"
    default = False
    served = True

    @classmethod
    def missing(cls) -> MissingRequirement | None:
        """``tritonclient``."""
        return client_missing()

    @classmethod
    def accepts(cls, artifact: Any) -> list[str]:
        """A :class:`Server` with a model's name."""
        if not isinstance(artifact, Server):
            what = artifact if isinstance(artifact, str) else type(artifact).__name__
            return [f"it runs what a server serves (--url), not {what}"]
        try:
            split_url(artifact.url)
        except InputError as error:
            return [str(error).rstrip(".")]
        return [] if artifact.model else ["no model was named"]

    def __enter__(self) -> Self:
        served: Server = self.artifact
        self._regions: list[_Region] = []
        self._connection = Connection(served.url, served.timeout, IN_FLIGHT)
        try:
            self._connection.wait_ready()
            self._model = self._connection.describe(served.model, served.version)
            # One region for each direction; they grow when a larger batch comes.
            if served.shared_memory:
                self._regions = [_Region(self._connection, kind) for kind in ("input", "output")]
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for region in self._regions:
            region.close()
        self._connection.__exit__(None, None, None)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """As the server declares them, the batch included."""
        return self._model.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """As the server declares them; the kept candidates only if they were asked for."""
        return tuple(spec for spec in self._model.outputs if self.with_indices or not spec.name.startswith(_KEPT))

    @property
    def profiles(self) -> tuple[BatchProfile, ...]:
        """From 1 to the server's ``max_batch_size``; what it collects by preference counts as the optimum."""
        largest = max(self._model.max_batch, 1)
        return (BatchProfile(1, min(max(self._model.preferred, default=largest), largest), largest),)

    def infer(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs one batch.

        Raises:
            InputError: The server refuses it.
            MissingRequirement: The server is not there.
            StageError: The server failed, or went away before it answered.
        """
        served: Server = self.artifact
        if served.shared_memory:
            return self._infer_shared(feeds)
        return self._connection.infer(served.model, feeds, [spec.name for spec in self.outputs], served.version)

    def infer_many(self, batches: Sequence[Mapping[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
        """Sends several batches without waiting for each, so that the server can put them together.

        Args:
            batches: For each batch, one array for each input.

        Returns:
            For each batch, in the same order, one array for each output.

        Raises:
            InputError: See :meth:`infer`; answers that were still under way are not waited for.
        """
        served: Server = self.artifact
        names = [spec.name for spec in self.outputs]
        running: deque[Callable[[], dict[str, np.ndarray]]] = deque()
        answers: list[dict[str, np.ndarray]] = []
        for feeds in batches:
            if len(running) == IN_FLIGHT:
                answers.append(running.popleft()())
            running.append(self._connection.start(served.model, feeds, names, served.version))
        return answers + [wait() for wait in running]

    def _infer_shared(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        incoming, outgoing = self._regions
        batch = len(next(iter(feeds.values())))
        shapes = {spec.name: (batch, *(int(n or 1) for n in spec.shape[1:])) for spec in self.outputs}
        sizes = {spec.name: np.dtype(spec.dtype).itemsize * int(np.prod(shapes[spec.name])) for spec in self.outputs}
        incoming.reserve(sum(array.nbytes for array in feeds.values()))
        outgoing.reserve(sum(sizes.values()))
        inputs, outputs, start = [], [], 0
        for name, array in feeds.items():
            tensor = self._connection.input(name, array.shape, array.dtype)
            tensor.set_shared_memory(incoming.name, array.nbytes, start)
            incoming.view(array.shape, array.dtype, start)[:] = array
            start += array.nbytes
            inputs.append(tensor)
        starts: dict[str, int] = {}
        for name, size in sizes.items():
            starts[name] = sum(sizes[other] for other in starts)
            output = self._connection.output(name)
            output.set_shared_memory(outgoing.name, size, starts[name])
            outputs.append(output)
        served: Server = self.artifact
        self._connection.request(served.model, inputs, outputs, served.version)
        return {s.name: outgoing.view(shapes[s.name], s.dtype, starts[s.name]).copy() for s in self.outputs}


class _Region:
    """A piece of the system's shared memory that the server knows too."""

    def __init__(self, connection: Connection, kind: str) -> None:
        self._connection, self._memory, self._count = connection, None, 0
        self._base = f"evit-deploy-{os.getpid()}-{os.urandom(4).hex()}-{kind}"
        self.reserve(1 << 20)  # finds out at once whether the server can open it

    @property
    def name(self) -> str:
        """What the server calls it."""
        return f"{self._base}-{self._count}"

    def reserve(self, size: int) -> None:
        """Makes it at least ``size`` bytes large.

        Raises:
            StageError: The machine has no room for it.
            MissingRequirement: The server cannot open it.
        """
        if self._memory is not None and self._memory.size >= size:
            return
        self.close()
        self._count += 1
        try:
            self._memory = SharedMemory(self.name, create=True, size=size)
        except OSError as error:
            raise StageError(f"no shared memory of {size} bytes ({error.strerror})", where="--shared-memory") from error
        try:
            self._connection.share(self.name, f"/{self.name}", size)
        except EvitDeployError as error:
            self._free()
            raise MissingRequirement(
                f"the server cannot open this machine's shared memory: {error.what}", where="--shared-memory",
                fix="Leave the option out, or start the server on this machine with the same /dev/shm (--ipc=host).",
            ) from error  # fmt: skip

    def view(self, shape: tuple[int, ...], dtype: Any, start: int) -> np.ndarray:
        """A part of it as an array."""
        assert self._memory is not None
        return np.ndarray(shape, dtype, self._memory.buf, start)

    def close(self) -> None:
        """Gives it back."""
        if self._memory is not None:
            self._connection.unshare(self.name)
            self._free()

    def _free(self) -> None:
        assert self._memory is not None
        with suppress(BufferError):  # an array of the caller's still looks at it; the name goes all the same
            self._memory.close()
        self._memory.unlink()
        self._memory = None
