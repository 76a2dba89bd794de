"""A batch on a device (GPU or CPU) in PyTorch tensors, for runtimes that can compute on them."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from evit_deploy.runtimes.runner import Mark, Resident

Call = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""Function from inputs to outputs by name, all on the device; it only queues work on the current stream."""


class TensorResident(Resident):
    """A batch in PyTorch tensors.

    Args:
        call: Runs the model; called with the same tensors each time.
        feeds: One float32 array for each input.
        device: Device to compute on.
        dtype: Type of the model's inputs.
        stream: CUDA stream to use. Default: PyTorch's current one.
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
            # copy_ between device and dtype at once would convert on the host; a second tensor keeps it on the device.
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
    """Converts an output in half precision to float32; other types are unchanged."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


class CudaMark:
    """A CUDA event.

    Args:
        stream: Stream to record it on. Default: PyTorch's current one.
    """

    def __init__(self, stream: torch.cuda.Stream | None = None) -> None:
        self._event: Any = torch.cuda.Event(enable_timing=True)
        self._event.record(stream)

    def seconds_since(self, earlier: "CudaMark") -> float:
        """See :class:`~evit_deploy.runtimes.runner.Mark`."""
        return earlier._event.elapsed_time(self._event) / 1e3


class HostMark(msgspec.Struct, frozen=True):
    """The present time: on a CPU the work is done when a call returns."""

    moment: float = msgspec.field(default_factory=time.perf_counter)

    def seconds_since(self, earlier: "HostMark") -> float:
        """See :class:`~evit_deploy.runtimes.runner.Mark`."""
        return self.moment - earlier.moment
