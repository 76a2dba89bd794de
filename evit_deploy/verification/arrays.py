"""Reads ``.npz`` files with known arrays; names, types and shapes are checked before the data is read."""

import math
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from evit_deploy.errors import InputError, first_few

_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_FIX = "Convert again."


class ArraySpec(msgspec.Struct, frozen=True):
    """Expected type and shape of an array.

    Args:
        dtypes: Allowed NumPy type names, such as ``float32``; ``str`` for text.
        shape: Expected sizes; a string names a size that must be equal wherever the name appears.
        infinite: Whether infinite values are allowed; NaN never is.
    """

    dtypes: tuple[str, ...]
    shape: tuple[int | str, ...]
    infinite: bool = False


def read_arrays(path: Path, wanted: Mapping[str, ArraySpec], most: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Reads the arrays of an uncompressed ``.npz`` file, using no more memory than the file's size.

    Args:
        path: The file.
        wanted: Expected arrays, by name.
        most: Largest allowed value of each named size.

    Raises:
        InputError: The file cannot be read, or an array is missing, unexpected, compressed, of the wrong type or shape,
            or contains values that are not finite.
    """
    try:
        status = path.stat()
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            names = [entry.filename.removesuffix(".npy") for entry in entries]
            missing = sorted(wanted.keys() - set(names))
            if missing:
                raise InputError("arrays are missing", where=path, seen=f"no {first_few(missing)}", fix=_FIX)
            if len(names) > len(wanted):
                other = next((name for name in names if name not in wanted), "one twice")
                raise InputError("arrays that do not belong there", where=path, seen=other[:100], fix=_FIX)
            sizes: dict[str, int] = {}
            found = {}
            for entry, name in zip(entries, names, strict=True):
                _check_entry(entry, path, status.st_size)
                found[name] = _read(archive, entry, wanted[name], sizes, most, f"{path}: {name}")
    except InputError:
        raise
    except (OSError, zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        what = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        raise InputError(f"not an array file ({what[:200]})", where=path, fix=_FIX) from None
    except Exception as error:  # zipfile and NumPy's header parser also raise SyntaxError, struct.error and others
        raise InputError(f"the array file is damaged ({type(error).__name__})", where=path, fix=_FIX) from None
    return found


def _check_entry(entry: zipfile.ZipInfo, path: Path, size: int) -> None:
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > size:
        raise InputError(
            "an array is compressed", where=path, seen=repr(entry.filename), wanted="arrays as they are", fix=_FIX
        )


def _read(
    archive: zipfile.ZipFile,
    entry: zipfile.ZipInfo,
    wanted: ArraySpec,
    sizes: dict[str, int],
    most: Mapping[str, int],
    where: str,
) -> np.ndarray:
    with archive.open(entry) as file:
        version = np.lib.format.read_magic(file)
        if version not in _HEADERS:
            raise InputError("an array in the wrong format", where=where, seen=version, wanted="(1, 0)", fix=_FIX)
        shape, by_columns, dtype = _HEADERS[version](file)
        _check_type(dtype, wanted, where)
        _check_shape(shape, wanted, sizes, most, where)
        size = math.prod(shape) * dtype.itemsize
        content = bytearray(size) if size <= entry.file_size else bytearray()
        raw: Any = file  # the type of zipfile's file objects lacks readinto
        found = raw.readinto(content) + len(file.read(1))
    if found != size:
        raise InputError(
            "the length of an array does not match its header", where=where, seen=f"{entry.file_size} bytes",
            wanted=f"{size} and the header", fix=_FIX,
        )  # fmt: skip
    array = np.frombuffer(content, dtype).reshape(shape, order="F" if by_columns else "C")
    if dtype.kind == "f":
        good = ~np.isnan(array) if wanted.infinite else np.isfinite(array)
        if not good.all():
            bad = float(array[~good].flat[0])
            raise InputError("a number that is not finite", where=where, seen=bad, fix=_FIX)
    return array


def _check_type(dtype: np.dtype[Any], wanted: ArraySpec, where: str) -> None:
    fits = dtype.name in wanted.dtypes or ("str" in wanted.dtypes and dtype.kind == "U" and dtype.itemsize <= 4 * 64)
    if not fits or dtype.hasobject:
        raise InputError(
            "an array of the wrong type", where=where, seen=dtype.name, wanted=" or ".join(wanted.dtypes), fix=_FIX
        )


def _check_shape(
    shape: tuple[int, ...], wanted: ArraySpec, sizes: dict[str, int], most: Mapping[str, int], where: str
) -> None:
    """Checks the sizes of an array, and records named sizes in ``sizes``."""
    fits = len(shape) == len(wanted.shape) and all(isinstance(size, int) and size >= 0 for size in shape)
    for size, expected in zip(shape, wanted.shape, strict=False) if fits else ():
        if isinstance(expected, str):
            fits = fits and size == sizes.setdefault(expected, size) and 0 < size <= most[expected]
        else:
            fits = fits and size == expected
    if not fits:
        expected = ", ".join(str(sizes.get(s, s) if isinstance(s, str) else s) for s in wanted.shape)
        raise InputError("an array of the wrong shape", where=where, seen=shape, wanted=f"({expected})", fix=_FIX)
