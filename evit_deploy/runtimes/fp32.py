"""Full FP32 or TF32: how PyTorch multiplies matrices of FP32 tensors on NVIDIA GPUs.

TF32 has FP32's range and 10 bits of mantissa. PyTorch has two global settings: for matrix multiplications, where TF32
is off by default since 1.12, and for convolutions, where it is on by default and makes the patch embedding of an FP32
model use TF32. :func:`fp32_products` sets both around each call and restores them afterwards.
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
    """Returns the error to raise if a device does not support TF32, else ``None``."""
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
    """Multiplies and convolves FP32 tensors in FP32 or in TF32 inside the context; costs a microsecond or two.

    Args:
        tf32: Whether to use TF32.
    """
    _hush()
    # PyTorch has an old and a new API for these settings. Inductor up to 2.11 reads the old one and fails if only the
    # new one was used; the old one sets both.
    places = _places()
    new = [place.fp32_precision for place in places]
    try:
        old = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError:  # the caller used only the new API, so the old values are undefined
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
    """Settings of the new API that the old one changes."""
    backends: Any = torch.backends
    return backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.matmul


@functools.cache
def _hush() -> None:
    """Triggers PyTorch's one-time deprecation warning of the old API while warnings are ignored."""
    with warnings.catch_warnings(), suppress(RuntimeError):
        warnings.simplefilter("ignore")
        torch.set_float32_matmul_precision(torch.get_float32_matmul_precision())
        torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32
