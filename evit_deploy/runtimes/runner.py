"""The contract of a runtime: what runs a model is a :class:`Runner`; one for engines also tells where the time goes."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import TracebackType
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

import msgspec
import numpy as np

from evit_deploy.bundle.manifest import TensorSpec
from evit_deploy.engines.layers import Layer
from evit_deploy.errors import MissingRequirement
from evit_deploy.recipe.options import BatchProfile


class Runner(ABC):
    """Runs one artifact; a context manager, usable only inside its ``with``.

    Args:
        artifact: What to run; :meth:`accepts` says whether this runner can.
        threads: CPU threads, ``None`` for the runtime's own choice.
        with_indices: Whether to return the kept candidates as ``kept_<block>`` too.
    """

    name: ClassVar[str]
    files: ClassVar[tuple[str, ...]] = ()
    """Files of a bundle that it can run, the best first; the dense twin's have the same names in ``dense/``."""
    default: ClassVar[bool] = True
    """Whether it is used, where it can be, without being asked for."""
    on_gpu: ClassVar[bool] = False
    """Whether it computes on a GPU, whatever it is given; PyTorch does so where its model's parameters are."""
    has_tf32: ClassVar[bool] = False
    """Whether it takes ``tf32=True``, with which FP32 tensors are multiplied in TF32."""
    concurrent: ClassVar[bool] = False
    """Whether several threads may call :meth:`infer` at a time."""
    served: ClassVar[bool] = False
    """Whether a server computes: it is given a :class:`~evit_deploy.triton.connection.Server` instead of a file."""

    def __init__(self, artifact: Any, *, threads: int | None = None, with_indices: bool = False) -> None:
        self.artifact, self.threads, self.with_indices = artifact, threads, with_indices

    @classmethod
    def missing(cls) -> MissingRequirement | None:
        """What this machine lacks to run it, as the error to raise; ``None`` when nothing."""
        return None

    @classmethod
    @abstractmethod
    def accepts(cls, artifact: Any) -> list[str]:
        """Why this runner cannot run an artifact; empty when it can."""

    @abstractmethod
    def __enter__(self) -> Self: ...

    @abstractmethod
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    @property
    @abstractmethod
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What :meth:`infer` wants."""

    @property
    @abstractmethod
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What :meth:`infer` gives."""

    @property
    def profiles(self) -> tuple[BatchProfile, ...]:
        """Batch sizes that it takes; empty where it takes any."""
        return ()

    @abstractmethod
    def infer(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs one batch.

        Args:
            feeds: One array for each input.

        Returns:
            One array for each output.
        """

    def synchronize(self) -> None:
        """Waits until the device is idle; nothing to do on a CPU."""
        return

    def resident(self, feeds: Mapping[str, np.ndarray]) -> "Resident | None":
        """One batch placed on the device, to time the device's work apart from the copies.

        It holds until the runner is closed; :meth:`infer` at the same batch size may put other images in its place.

        Args:
            feeds: One float32 array for each input.

        Returns:
            ``None`` where the runner cannot tell them apart: only whole calls can be timed then.
        """
        return None


class Mark(Protocol):
    """A moment between two calls on a device; known only after the device has reached it."""

    def seconds_since(self, earlier: Any) -> float:
        """Seconds from an earlier mark of the same resident to this one."""
        ...


class Resident(ABC):
    """One batch that lies on a device, in the type that the model computes in; made by :meth:`Runner.resident`.

    All methods but :meth:`answers` only put work on the device's stream: the runner's ``synchronize`` waits for it.
    """

    @abstractmethod
    def run(self) -> None:
        """Computes the batch that lies there: nothing is copied or converted, and the answers stay on the device."""

    @abstractmethod
    def round_trip(self) -> None:
        """The same, end to end.

        Float32 images in pinned memory of the host, the copy to the device, the conversion there to the type that the
        model computes in, the work itself, and the copy of the answers into pinned memory.
        """

    @abstractmethod
    def answers(self) -> dict[str, np.ndarray]:
        """What the last :meth:`round_trip` brought back, once the runner was waited for; one array for each output."""

    @abstractmethod
    def mark(self) -> Mark:
        """Marks the end of what was put on the stream so far."""


class Timings(msgspec.Struct, frozen=True):
    """Milliseconds of many calls, one array element a call.

    Args:
        enqueue: Host time that putting the work on the stream took.
        h2d: Copies to the device.
        compute: The engine itself, between two CUDA events.
        d2h: Copies back.
    """

    enqueue: np.ndarray
    h2d: np.ndarray
    compute: np.ndarray
    d2h: np.ndarray

    @property
    def latency(self) -> np.ndarray:
        """Copies and compute of each call, as trtexec defines latency."""
        return self.h2d + self.compute + self.d2h


@runtime_checkable
class EngineRunner(Protocol):
    """A runner that tells more of an engine than how long a call takes."""

    notes: list[str]

    @property
    def profiles(self) -> tuple[BatchProfile, ...]:
        """Batch sizes that it takes."""
        ...

    def timings(self, batch: int, *, calls: int, duration: float, warm_up: float) -> Timings:
        """Parts of calls that follow one another."""
        ...

    def layers(self) -> tuple[Layer, ...]:
        """What the engine is made of."""
        ...

    def layer_times(self, batch: int) -> list[tuple[str, float]]:
        """Milliseconds of each layer."""
        ...
