"""Batches on their way to the device that trains: bytes travel, and become numbers where they arrive."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from evit_deploy.data.preprocess import Preprocess

Finish = Callable[..., tuple[Tensor, ...]]
"""What is still to be done with a batch on the device: its tensors in, its tensors out."""


class Transfer:
    """Takes batches to a device, and finishes them there.

    Images that come as uint8 are normalized on arrival: a quarter of the bytes travel, and every image is normalized
    here and nowhere else, by the operations of timm's transform in their order. On a CPU the bits are the same.

    On a GPU copies start from pinned memory and run, like all that finishes a batch, on a stream of their own, so that
    they take place while the step before is computed: whoever computes must only not wait for that step before asking
    for the next batch. The stream that is current when a batch is asked for waits for it; the host never does.

    Args:
        device: Where batches go.
        preprocess: Its mean and standard deviation are the images'.
    """

    def __init__(self, device: torch.device | str, preprocess: Preprocess) -> None:
        self.device = torch.device(device)
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        # Made once: to copy a number that lies in ordinary memory is to wait for the GPU.
        self._largest = torch.tensor(255.0, device=self.device)
        self._mean, self._std = (
            torch.tensor(values, dtype=torch.float32, device=self.device).view(-1, 1, 1)
            for values in (preprocess.mean, preprocess.std)
        )

    @property
    def pins(self) -> bool:
        """Whether batches should lie in pinned memory; those that do not are moved there first."""
        return self._stream is not None

    def __call__(self, batch: Sequence[Tensor], finish: Finish | None = None) -> tuple[Tensor, ...]:
        """Sends a batch.

        Args:
            batch: Tensors on the CPU, the images first: uint8 ``[B, C, H, W]``, or floating point as they are to be.
            finish: Called with the tensors on the device, images in FP32, as positional arguments.

        Returns:
            What ``finish`` gave, or the tensors on the device.
        """
        if self._stream is None:
            return self._finished([tensor.to(self.device) for tensor in batch], finish)
        asking = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._stream):
            moved = [_pinned(tensor).to(self.device, non_blocking=True) for tensor in batch]
            done = self._finished(moved, finish)
        asking.wait_stream(self._stream)
        for tensor in done:  # or its memory would be given to the next batch before it has been read
            tensor.record_stream(asking)
        return done

    def _finished(self, tensors: list[Tensor], finish: Finish | None) -> tuple[Tensor, ...]:
        if tensors[0].dtype == torch.uint8:
            tensors[0] = tensors[0].float().div_(self._largest).sub_(self._mean).div_(self._std)
        return tuple(tensors) if finish is None else finish(*tensors)


def _pinned(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_pinned() else tensor.pin_memory()
