"""Reads safetensors files after checking their header."""

import os
import stat
import struct
from pathlib import Path

from torch import Tensor

from evit_deploy.errors import EvitDeployError, InputError
from evit_deploy.tensor_files.described import check_axes, check_name, check_total

_LARGEST_HEADER = 16 << 20
"""Limit in bytes: about 100 per tensor, plus class names. The library accepts 100 MB, and needs several times as much
memory."""
_DTYPES = frozenset(("F16", "BF16", "F32", "F64", "BOOL", "U8", "I8", "I16", "I32", "I64"))


def read_safetensors(path: Path, error: type[EvitDeployError] = InputError) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads tensors and metadata.

    Args:
        path: The file.
        error: Class of the errors to raise.

    Raises:
        EvitDeployError: Of the class ``error``: not a safetensors file, a damaged one, an invalid name, or an
            unsupported dtype.
    """
    import safetensors
    from safetensors.torch import load_file

    try:
        _check_header(path, error)
        with safetensors.safe_open(path, framework="pt") as file:
            names = list(file.keys())
            check_total(len(names), 0, 0, path, error)
            for name in names:
                check_name(name, path, error)
                part = file.get_slice(name)
                check_axes(name, len(part.get_shape()), path, error)
                _check_dtype(path, name, part.get_dtype(), error)
            metadata = file.metadata() or {}
        return load_file(path), metadata
    except (safetensors.SafetensorError, OSError, ValueError, OverflowError) as failure:
        if isinstance(failure, EvitDeployError):
            raise
        raise error(f"not a whole safetensors file: {failure!s:.200}", where=path, fix="Download it again.") from None


def _check_header(path: Path, error: type[EvitDeployError]) -> None:
    """Checks that it is a regular file whose header is not too long."""
    # Without O_NONBLOCK, opening a pipe waits for a writer.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise error("this is a folder, a pipe, a socket or a device", where=path, wanted="a file")
        head = file.read(8)
    length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
    if _LARGEST_HEADER < length <= status.st_size - 8:
        raise error(
            "the header of this safetensors file is too long", where=path, seen=f"{length:,} bytes",
            wanted=f"at most {_LARGEST_HEADER:,}", fix="Save the weights alone, without what else is in its metadata.",
        )  # fmt: skip


def _check_dtype(path: Path, name: str, dtype: str, error: type[EvitDeployError]) -> None:
    if dtype not in _DTYPES:
        raise error(
            f"{name!r} has elements that weights are not read from", where=path, seen=dtype,
            wanted=", ".join(sorted(_DTYPES)), fix="Convert it with tensor.float() and save it again.",
        )  # fmt: skip
