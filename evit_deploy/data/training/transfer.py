"""Transfers batches to the training device as bytes and converts them to floating point there."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from evit_deploy.data.preprocess import Preprocess

Finish = Callable[..., tuple[Tensor, ...]]
"""Finishes a batch on the device: takes its tensors and returns the final ones."""


class Transfer:
    """Copies batches to a device and finishes them there.

    uint8 images are normalized on the device, so that only a quarter of the bytes are copied. They are normalized only
    here, with the operations of timm's transform in the same order; on a CPU, the result is bitwise the same.

    On a GPU, copies from pinned memory and all finishing operations run on a separate stream, so that they overlap with
    the previous step, provided that the caller does not synchronize with that step before requesting the next batch.
    The stream that is current at the request waits for the batch; the host never waits.

    Args:
        device: Target device of the batches.
        preprocess: Preprocessing with the images' mean and standard deviation.
    """

    def __init__(self, device: torch.device | str, preprocess: Preprocess) -> None:
        self.device = torch.device(device)
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        # Created once, because copying a number from pageable memory waits for the GPU.
        self._largest = torch.tensor(255.0, device=self.device)
        self._mean, self._std = (
            torch.tensor(values, dtype=torch.float32, device=self.device).view(-1, 1, 1)
            for values in (preprocess.mean, preprocess.std)
        )

    @property
    def pins(self) -> bool:
        """Whether batches should be in pinned memory; others are copied there first."""
        return self._stream is not None

    def __call__(self, batch: Sequence[Tensor], finish: Finish | None = None) -> tuple[Tensor, ...]:
        """Transfers a batch.

        Args:
            batch: Tensors on the CPU, the images first: uint8 ``[B, C, H, W]``, or already normalized floating point.
            finish: Called with the tensors on the device, images in FP32, as positional arguments.

        Returns:
            The result of ``finish``, or the tensors on the device.
        """
        if self._stream is None:
            return self._finished([tensor.to(self.device) for tensor in batch], finish)
        asking = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._stream):
            moved = [_pinned(tensor).to(self.device, non_blocking=True) for tensor in batch]
            done = self._finished(moved, finish)
        asking.wait_stream(self._stream)
        for tensor in done:  # otherwise the next batch could reuse its memory before it has been read
            tensor.record_stream(asking)
        return done

    def _finished(self, tensors: list[Tensor], finish: Finish | None) -> tuple[Tensor, ...]:
        if tensors[0].dtype == torch.uint8:
            tensors[0] = tensors[0].float().div_(self._largest).sub_(self._mean).div_(self._std)
        return tuple(tensors) if finish is None else finish(*tensors)


def _pinned(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_pinned() else tensor.pin_memory()
