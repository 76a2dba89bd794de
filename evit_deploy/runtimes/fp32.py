"""FP32 in full, or in TF32: how PyTorch multiplies matrices of FP32 tensors on NVIDIA's GPUs.

TF32 has FP32's range and 10 bits of mantissa. PyTorch decides by two switches of the whole process: one for matrix
multiplications, off by default since 1.12, and one for convolutions, on by default, which makes a patch embedding TF32
in an otherwise exact model. Here both are set around each call, and put back after it.
"""

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from evit_deploy.errors import MissingRequirement

TF32 = "tf32"
_AMPERE = (8, 0)


def missing_tf32(device: torch.device) -> MissingRequirement | None:
    """What a device lacks for TF32, as the error to raise; ``None`` when nothing."""
    if device.type != "cuda":
        seen = f"a model on the {device.type.upper()}"
    elif torch.cuda.get_device_capability(device) < _AMPERE:
        seen = torch.cuda.get_device_name(device)
    else:
        return None
    fix = "Use fp32, which is FP32 everywhere."
    return MissingRequirement("tf32 is a precision of NVIDIA's GPUs from Ampere on", seen=seen, fix=fix)


@contextmanager
def fp32_products(*, tf32: bool) -> Iterator[None]:
    """FP32 tensors are multiplied and convolved in FP32, or in TF32, while it is open; it costs a microsecond or two.

    Args:
        tf32: Which.
    """
    _hush()
    # PyTorch has an old and a new set of names for the switches. Inductor up to 2.11 reads the old ones and fails where
    # only the new ones were set; setting the old ones sets both.
    places = _places()
    new = [place.fp32_precision for place in places]
    try:
        old = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError:  # the caller has set the new names alone: what the old ones say is not to be had, nor used
        old = None
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        matmul, convolution = old or ("highest", True)
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = convolution
        if old is None:
            for place, value in zip(places, new, strict=True):
                place.fp32_precision = value


def _places() -> tuple[Any, ...]:
    """Where the new names are that setting the old ones changes."""
    backends: Any = torch.backends
    return backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.matmul


@functools.cache
def _hush() -> None:
    """Lets PyTorch warn of its old names now, once a process, where nobody reads it."""
    with warnings.catch_warnings(), suppress(RuntimeError):
        warnings.simplefilter("ignore")
        torch.set_float32_matmul_precision(torch.get_float32_matmul_precision())
        torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32
