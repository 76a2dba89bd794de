"""One batch size of one engine: an execution context with fixed shapes, buffers and CUDA graph.

A captured graph contains the context's addresses and shapes, so each batch size needs its own context. Also, plugins
compiled ahead of time leak memory at every change of shape (NVIDIA/TensorRT#4849). Since TensorRT 10 several contexts
can share an optimization profile.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from evit_deploy.bundle.manifest import TensorSpec
from evit_deploy.errors import InputError, StageError

_DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT8": torch.int8,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "UINT8": torch.uint8,
    "BOOL": torch.bool,
}


class Lane:
    """Runs batches of one size through an engine, on one stream.

    Args:
        engine: The library's engine.
        context: An execution context with its optimization profile set.
        stream: CUDA stream to use.
        inputs: The engine's inputs.
        outputs: Its outputs.
        batch: Images per call.
    """

    def __init__(
        self,
        engine: Any,
        context: Any,
        stream: torch.cuda.Stream,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        batch: int,
    ) -> None:
        self.context, self._stream = context, stream
        self._inputs, self._outputs = [spec.name for spec in inputs], [spec.name for spec in outputs]
        self._device: dict[str, torch.Tensor] = {}
        self._host: dict[str, torch.Tensor] = {}
        self._graph: torch.cuda.CUDAGraph | None = None
        for spec in inputs:
            context.set_input_shape(spec.name, (batch, *[int(n or 1) for n in spec.shape[1:]]))
        for name in (*self._inputs, *self._outputs):
            shape, dtype = tuple(context.get_tensor_shape(name)), torch_dtype(engine.get_tensor_dtype(name))
            with torch.cuda.stream(stream):  # so that the caching allocator reuses the memory in this stream's order
                self._device[name] = torch.empty(shape, dtype=dtype, device=stream.device)
            self._host[name] = torch.empty(shape, dtype=dtype, pin_memory=True)
            context.set_tensor_address(name, self._device[name].data_ptr())

    def capture(self) -> str | None:
        """Captures the work into a CUDA graph, which :meth:`launch` replays from then on.

        Returns:
            ``None``, or why it could not be captured; :meth:`launch` then enqueues the engine at every call.
        """
        self.launch()  # the first call makes allocations that cannot be captured
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                self.launch()
        except (RuntimeError, StageError) as error:  # such as a plugin that allocates or synchronizes
            return (str(error).strip() or type(error).__name__).splitlines()[0]
        self._graph = graph
        return None

    def fill(self, feeds: Mapping[str, np.ndarray]) -> None:
        """Copies a batch into the pinned buffers."""
        for name in self._inputs:
            self._host[name].copy_(torch.from_numpy(np.ascontiguousarray(feeds[name])))

    def copy_in(self) -> None:
        """Queues the copies to the device on the current stream."""
        for name in self._inputs:
            self._device[name].copy_(self._host[name], non_blocking=True)

    def launch(self) -> None:
        """Queues the engine's work on the stream.

        Raises:
            StageError: The library refused.
        """
        if self._graph is not None:
            self._graph.replay()
        elif not self.context.execute_async_v3(self._stream.cuda_stream):
            raise StageError("the engine could not be run")

    def copy_out(self) -> None:
        """Queues the copies to the host on the current stream."""
        for name in self._outputs:
            self._host[name].copy_(self._device[name], non_blocking=True)

    def answers(self) -> dict[str, np.ndarray]:
        """Returns copies of the outputs, since the next call overwrites them; bfloat16 becomes float32 for NumPy."""
        hosts = ((name, self._host[name]) for name in self._outputs)
        return {name: (t.float() if t.dtype == torch.bfloat16 else t.clone()).numpy() for name, t in hosts}


def torch_dtype(dtype: Any) -> torch.dtype:
    """Converts a TensorRT data type to PyTorch's.

    Raises:
        InputError: PyTorch has no such type.
    """
    try:
        return _DTYPES[dtype.name]
    except KeyError:
        raise InputError("an input or output of the plan has an unsupported type", seen=dtype.name) from None
