"""Runtimes: everything that can run a model answers to one small contract, :class:`Runner`."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import TracebackType
from typing import Any, ClassVar, Self

import msgspec
import numpy as np

from evit_deploy.engine import BatchProfile
from evit_deploy.errors import MissingRequirement


class TensorSpec(msgspec.Struct, frozen=True):
    """One input or output.

    Args:
        name: Its name in the model.
        dtype: NumPy name, ``float32``.
        shape: Sizes; ``None`` where a dimension is dynamic.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...]


class Runner(ABC):
    """Runs one artifact; a context manager, usable only inside its ``with``.

    Args:
        artifact: What to run; :meth:`accepts` says whether this runner can.
        threads: CPU threads, ``None`` for the runtime's own choice.
        with_indices: Whether to give out the kept candidates as ``kept_<block>`` too.
    """

    name: ClassVar[str]
    files: ClassVar[tuple[str, ...]] = ()
    """Files of a bundle that it can run, the best first; the dense twin's have the same names in ``dense/``."""
    default: ClassVar[bool] = True
    """Whether it is used, where it can be, without being asked for."""
    on_gpu: ClassVar[bool] = False
    """Whether it computes on a GPU, whatever it is given; PyTorch does so where its model's parameters are."""
    served: ClassVar[bool] = False
    """Whether a server computes: it is given a :class:`~evit_deploy.runtimes.triton.Served` instead of a file."""

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
