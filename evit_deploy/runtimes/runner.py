"""The interface of a runtime: :class:`Runner`, and :class:`EngineRunner` for those that also time parts of a call."""

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
        artifact: The artifact to run; see :meth:`accepts`.
        threads: CPU threads; ``None`` for the runtime's default.
        with_indices: Whether to also return the kept candidates as ``kept_<block>``.
    """

    name: ClassVar[str]
    files: ClassVar[tuple[str, ...]] = ()
    """Files of a bundle that it can run, preferred first; those of the dense twin have the same names in ``dense/``."""
    default: ClassVar[bool] = True
    """Whether it is used by default where it can run."""
    on_gpu: ClassVar[bool] = False
    """Whether it always computes on a GPU. PyTorch's runtimes compute where the model's parameters are."""
    has_tf32: ClassVar[bool] = False
    """Whether it accepts ``tf32=True`` to multiply FP32 tensors in TF32."""
    concurrent: ClassVar[bool] = False
    """Whether several threads may call :meth:`infer` at the same time."""
    served: ClassVar[bool] = False
    """Whether it runs on a server; its artifact is then a :class:`~evit_deploy.triton.connection.Server`."""

    def __init__(self, artifact: Any, *, threads: int | None = None, with_indices: bool = False) -> None:
        self.artifact, self.threads, self.with_indices = artifact, threads, with_indices

    @classmethod
    def missing(cls) -> MissingRequirement | None:
        """Returns the error to raise if this machine lacks something it needs, else ``None``."""
        return None

    @classmethod
    @abstractmethod
    def accepts(cls, artifact: Any) -> list[str]:
        """Returns the reasons why this runner cannot run an artifact; empty if it can."""

    @abstractmethod
    def __enter__(self) -> Self: ...

    @abstractmethod
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    @property
    @abstractmethod
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Inputs of :meth:`infer`."""

    @property
    @abstractmethod
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Outputs of :meth:`infer`."""

    @property
    def profiles(self) -> tuple[BatchProfile, ...]:
        """Supported batch sizes; empty if any is supported."""
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
        """Waits until the device is idle; does nothing on a CPU."""
        return

    def resident(self, feeds: Mapping[str, np.ndarray]) -> "Resident | None":
        """Places one batch on the device, to time the device's work without the copies.

        It is valid until the runner is closed; :meth:`infer` at the same batch size may overwrite its images.

        Args:
            feeds: One float32 array for each input.

        Returns:
            The batch, or ``None`` if the runner can only run whole calls.
        """
        return None


class Mark(Protocol):
    """A point in time between two calls on a device, known once the device has reached it."""

    def seconds_since(self, earlier: Any) -> float:
        """Returns the seconds from an earlier mark of the same resident to this one."""
        ...


class Resident(ABC):
    """One batch on a device, in the type that the model computes in; created by :meth:`Runner.resident`.

    All methods but :meth:`answers` only queue work on the device's stream; the runner's ``synchronize`` waits for it.
    """

    @abstractmethod
    def run(self) -> None:
        """Runs the model on the batch, without copies or conversions; the answers stay on the device."""

    @abstractmethod
    def round_trip(self) -> None:
        """Runs the model end to end.

        From float32 images in pinned host memory: copy to the device, conversion there to the type that the model
        computes in, the model, and copy of the answers to pinned memory.
        """

    @abstractmethod
    def answers(self) -> dict[str, np.ndarray]:
        """Returns the answers of the last :meth:`round_trip`, one array for each output; call ``synchronize`` first."""

    @abstractmethod
    def mark(self) -> Mark:
        """Marks the end of the work queued so far."""


class Timings(msgspec.Struct, frozen=True):
    """Times of many calls in milliseconds, one array element per call.

    Args:
        enqueue: Host time for queueing the work.
        h2d: Copies to the device.
        compute: The engine, between two CUDA events.
        d2h: Copies to the host.
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
    """A runner that can also time the parts and layers of an engine."""

    notes: list[str]

    @property
    def profiles(self) -> tuple[BatchProfile, ...]:
        """Supported batch sizes."""
        ...

    def timings(self, batch: int, *, calls: int, duration: float, warm_up: float) -> Timings:
        """Times the parts of consecutive calls."""
        ...

    def layers(self) -> tuple[Layer, ...]:
        """Returns the engine's layers."""
        ...

    def layer_times(self, batch: int) -> list[tuple[str, float]]:
        """Returns name and milliseconds of each layer."""
        ...
