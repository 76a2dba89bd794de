"""A model on a running Triton Inference Server, with the interface of the other runtimes."""

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

    Kept candidates (``kept_<block>``) are returned with ``with_indices`` if the served model was exported with them;
    otherwise :attr:`outputs` has only the answer.

    Args:
        artifact: A :class:`Server`.
        threads: Not used; set by the server's configuration.
        with_indices: See above.
    """

    name = "triton"
    default = False
    served = True

    @classmethod
    def missing(cls) -> MissingRequirement | None:
        """Checks for ``tritonclient``."""
        return client_missing()

    @classmethod
    def accepts(cls, artifact: Any) -> list[str]:
        """Accepts a :class:`Server` with a model name."""
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
            # One region for each direction; they grow with the batch size.
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
        """Inputs declared by the server, including the batch dimension."""
        return self._model.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Outputs declared by the server; the kept candidates only with ``with_indices``."""
        return tuple(spec for spec in self._model.outputs if self.with_indices or not spec.name.startswith(_KEPT))

    @property
    def profiles(self) -> tuple[BatchProfile, ...]:
        """From 1 to the server's ``max_batch_size``, with its largest preferred batch size as the optimum."""
        largest = max(self._model.max_batch, 1)
        return (BatchProfile(1, min(max(self._model.preferred, default=largest), largest), largest),)

    def infer(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs one batch.

        Raises:
            InputError: The server refused the request.
            MissingRequirement: The server is unreachable.
            StageError: The server failed, or went away before it answered.
        """
        served: Server = self.artifact
        if served.shared_memory:
            return self._infer_shared(feeds)
        return self._connection.infer(served.model, feeds, [spec.name for spec in self.outputs], served.version)

    def infer_many(self, batches: Sequence[Mapping[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
        """Sends several batches without waiting for each, so that the server can batch them together.

        Args:
            batches: For each batch, one array for each input.

        Returns:
            For each batch, in order, one array for each output.

        Raises:
            InputError: See :meth:`infer`; pending answers are not waited for.
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
    """A region of system shared memory that is registered with the server."""

    def __init__(self, connection: Connection, kind: str) -> None:
        self._connection, self._memory, self._count = connection, None, 0
        self._base = f"evit-deploy-{os.getpid()}-{os.urandom(4).hex()}-{kind}"
        self.reserve(1 << 20)  # checks at once whether the server can open it

    @property
    def name(self) -> str:
        """Its name on the server."""
        return f"{self._base}-{self._count}"

    def reserve(self, size: int) -> None:
        """Grows the region to at least ``size`` bytes.

        Raises:
            StageError: There is not enough shared memory.
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
        """Returns a part of the region as an array."""
        assert self._memory is not None
        return np.ndarray(shape, dtype, self._memory.buf, start)

    def close(self) -> None:
        """Unregisters and frees the region."""
        if self._memory is not None:
            self._connection.unshare(self.name)
            self._free()

    def _free(self) -> None:
        assert self._memory is not None
        with suppress(BufferError):  # an array of the caller still refers to it; unlink frees the name
            self._memory.close()
        self._memory.unlink()
        self._memory = None
