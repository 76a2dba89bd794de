"""A batch on a device in PyTorch's tensors, for every runtime that computes on them; a CPU is a device too."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from evit_deploy.runtimes.runner import Mark, Resident

Call = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""Inputs to outputs by name, all on the device; it only puts work on the current stream."""


class TensorResident(Resident):
    """A batch in tensors.

    Args:
        call: What computes it; it is given the same tensors each time.
        feeds: One float32 array for each input.
        device: Where it computes.
        dtype: What it computes in: the type that its inputs are to have.
        stream: A GPU's stream for all of it; by default PyTorch's current one.
    """

    def __init__(
        self,
        call: Call,
        feeds: Mapping[str, np.ndarray],
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        self._call, self._on_gpu, self._stream = call, device.type == "cuda", stream
        self._host = {name: self._pinned(torch.from_numpy(np.ascontiguousarray(a))) for name, a in feeds.items()}
        self._back: dict[str, Tensor] = {}
        with torch.cuda.stream(stream):
            self._arrived = {name: torch.empty_like(tensor, device=device) for name, tensor in self._host.items()}
            # A copy that converts on its way does so on the host; one type after the other keeps that on the device.
            self._inputs = {
                name: tensor if tensor.dtype == dtype else torch.empty_like(tensor, dtype=dtype)
                for name, tensor in self._arrived.items()
            }
            self._bring()

    def run(self) -> None:
        """See :meth:`Resident.run`."""
        with torch.cuda.stream(self._stream):
            self._call(self._inputs)

    def round_trip(self) -> None:
        """See :meth:`Resident.round_trip`."""
        with torch.cuda.stream(self._stream):
            self._bring()
            for name, tensor in self._call(self._inputs).items():
                tensor = as_told(tensor)
                if name not in self._back:
                    self._back[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._on_gpu)
                self._back[name].copy_(tensor, non_blocking=True)

    def answers(self) -> dict[str, np.ndarray]:
        """See :meth:`Resident.answers`."""
        return {name: tensor.clone().numpy() for name, tensor in self._back.items()}

    def mark(self) -> Mark:
        """See :meth:`Resident.mark`."""
        return CudaMark(self._stream) if self._on_gpu else HostMark()

    def _pinned(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if self._on_gpu else tensor.clone()

    def _bring(self) -> None:
        for name, host in self._host.items():
            self._arrived[name].copy_(host, non_blocking=True)
            if self._inputs[name] is not self._arrived[name]:
                self._inputs[name].copy_(self._arrived[name])


def as_told(tensor: Tensor) -> Tensor:
    """An output in the type it is given out in: float32 whatever half precision it was computed in; others stay."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


class CudaMark:
    """A CUDA event.

    Args:
        stream: Where to put it; by default PyTorch's current one.
    """

    def __init__(self, stream: torch.cuda.Stream | None = None) -> None:
        self._event: Any = torch.cuda.Event(enable_timing=True)
        self._event.record(stream)

    def seconds_since(self, earlier: "CudaMark") -> float:
        """See :class:`~evit_deploy.runtimes.runner.Mark`."""
        return earlier._event.elapsed_time(self._event) / 1e3


class HostMark(msgspec.Struct, frozen=True):
    """Now: on a CPU what was called is done when the call returns."""

    moment: float = msgspec.field(default_factory=time.perf_counter)

    def seconds_since(self, earlier: "HostMark") -> float:
        """See :class:`~evit_deploy.runtimes.runner.Mark`."""
        return self.moment - earlier.moment
