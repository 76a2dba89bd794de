"""Reads files of ``torch.save``, in the zip format and in the legacy one.

PyTorch's own reader trusts a file's numbers: it allocates storages and tensors of the sizes in the pickle, and
decompresses compressed parts. Here the pickle is read as descriptions (:mod:`evit_deploy.tensor_files.pickled`), and
tensors are views of the mapped file, created only after they were checked.
"""

import io
import os
import pickle
import re
import stat
import struct
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evit_deploy.errors import EvitDeployError, InputError
from evit_deploy.tensor_files.described import Described, Odd, Storage, check, check_name, check_total
from evit_deploy.tensor_files.pickled import Forbidden, read_pickle

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of the legacy format
_LARGEST_DIRECTORY = 16 << 20
"""Limit for a zip file's directory in bytes, more than MOST_TENSORS need; Python uses about ten times as much
memory."""
_DESCRIPTION, _SHARE = 1 << 20, 1024
_ALIGNED = 8
"""Size of the largest element in bytes: a storage that is not aligned to it is copied."""
_SAVE = "Save the weights alone: torch.save(model.state_dict(), 'weights.pth')."


class TorchFile:
    """A file of ``torch.save``.

    Args:
        path: The file.
        content: Content of its pickle, with descriptions in place of tensors.
        regions: Offset and size of each storage in bytes.
        swapped: Whether its byte order differs from this machine's.
        error: Class of the errors to raise.
    """

    def __init__(
        self,
        path: Path,
        content: Any,
        regions: Mapping[str, tuple[int, int]],
        *,
        swapped: bool = False,
        error: type[EvitDeployError] = InputError,
    ) -> None:
        self.path, self.content, self._regions, self._swapped, self._error = path, content, regions, swapped, error

    def tensors(self, described: Mapping[Any, Described | Odd]) -> dict[str, Tensor]:
        """Creates tensors, after checking all of them.

        Args:
            described: Their descriptions by name, from ``content``.

        Raises:
            EvitDeployError: A name is invalid, or a tensor is not supported or exceeds the file.
        """
        held = self.path.stat().st_size
        found = {name: self._checked(name, tensor) for name, tensor in described.items()}
        check_total(len(found), sum(tensor.size for tensor in found.values()), held, self.path, self._error)
        made: dict[Storage, torch.UntypedStorage] = {}
        whole: Any = torch.UntypedStorage.from_file(str(self.path), False, held)
        for tensor in found.values():
            if tensor.storage not in made:
                made[tensor.storage] = self._storage(tensor.storage, whole)
        return {name: _view(tensor, made[tensor.storage]) for name, tensor in found.items()}

    def _checked(self, name: Any, tensor: Described | Odd) -> Described:
        check_name(name, self.path, self._error)
        if isinstance(tensor, Odd):
            raise self._error(f"{name!r} is {tensor.what}", where=self.path, wanted="plain tensors", fix=tensor.fix)
        check(name, tensor, self.path, self._error)
        storage = tensor.storage
        size = self._regions.get(storage.key, (0, -1))[1]
        if storage.start < 0 or storage.size < 0 or storage.start + storage.size > size:
            raise self._error(
                "the file is damaged or cut short", where=self.path,
                seen=f"{max(size, 0):,} bytes for {name!r}", wanted=f"{storage.start + storage.size:,}",
                fix="Download or save it again.",
            )  # fmt: skip
        return tensor

    def _storage(self, storage: Storage, whole: torch.UntypedStorage) -> torch.UntypedStorage:
        if not storage.size:
            return torch.UntypedStorage(0)
        start = self._regions[storage.key][0] + storage.start
        if start % _ALIGNED:
            copy = torch.empty(storage.size, dtype=torch.uint8)
            room: Any = copy.numpy()
            with self.path.open("rb") as file:
                file.seek(start)
                if file.readinto(room) != storage.size:
                    raise self._error("the file is cut short", where=self.path, fix="Download or save it again.")
            made = copy.untyped_storage()
        else:
            made = whole[start : start + storage.size]
        if self._swapped:
            made = made.clone()
            made.byteswap(storage.dtype)
        return made


def _view(tensor: Described, storage: torch.UntypedStorage) -> Tensor:
    if not tensor.size:
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    return torch.empty(0, dtype=tensor.dtype).set_(storage, tensor.offset, tensor.shape, tensor.stride)  # type: ignore[arg-type]  # PyTorch's stubs lack untyped storages


def open_torch(path: Path, error: type[EvitDeployError] = InputError) -> TorchFile:
    """Reads the descriptions in a file, without reading any tensor.

    Args:
        path: The file.
        error: Class of the errors to raise.

    Raises:
        EvitDeployError: Of the class ``error``: not a file of ``torch.save``, a damaged one, or one that contains
            objects other than tensors.
    """
    try:
        # Without O_NONBLOCK, opening a pipe waits for a writer.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise error("this is a folder, a pipe, a socket or a device", where=path, wanted="a file")
            head = file.read(4)
            file.seek(0)
            read = _read_zip if head == b"PK\x03\x04" else _read_legacy
            content, regions, swapped = read(file, os.fstat(file.fileno()).st_size)
    except OSError as failure:
        raise error(f"cannot be read ({failure.strerror or failure})", where=path) from None
    except Forbidden as failure:
        raise _forbidden(path, failure.name, error) from None
    except _TooLargeError as failure:
        raise error(str(failure), where=path, seen=failure.seen, wanted=failure.wanted, fix=_SAVE) from None
    except _NotWeightsError as failure:
        raise error(str(failure), where=path, fix=failure.fix) from None
    except (pickle.UnpicklingError, zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as failure:
        reason = re.sub(r"\s+", " ", str(failure)).strip() or type(failure).__name__
        raise error(
            f"the file is damaged or cut short, or not a PyTorch checkpoint ({reason[:120]!s})", where=path,
            fix="Download or save it again.",
        ) from None  # fmt: skip
    return TorchFile(path, content, regions, swapped=swapped, error=error)


class _TooLargeError(Exception):
    """A part of the file is larger than allowed."""

    def __init__(self, what: str, seen: str, wanted: str) -> None:
        super().__init__(what)
        self.seen, self.wanted = seen, wanted


class _NotWeightsError(Exception):
    """A PyTorch file with other content than weights."""

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(what)
        self.fix = fix


_Read = tuple[Any, dict[str, tuple[int, int]], bool]


def _largest_description(size: int) -> int:
    """Limit for a pickle in bytes; Python may use 75 times as much memory. A ViT-B's with its optimizer has 100,000."""
    return _DESCRIPTION + size // _SHARE


class _Bounded:
    """Wraps a file so that no single read exceeds the limit for a zip file's directory."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def seekable(self) -> bool:
        """Whether the file is seekable."""
        return True

    def read(self, size: int = -1) -> bytes:
        """Reads bytes, up to the limit."""
        if size > _LARGEST_DIRECTORY:
            raise _TooLargeError(
                "too many parts in this zip file", f"{size:,} bytes of names", f"{_LARGEST_DIRECTORY:,}"
            )
        return self._file.read(size if size >= 0 else _LARGEST_DIRECTORY)


def _read_zip(file: Any, size: int) -> _Read:
    bounded: Any = _Bounded(file)
    with zipfile.ZipFile(bounded) as archive:
        members = archive.infolist()
        names = [member.filename for member in members]
        if len(set(names)) < len(names):
            raise zipfile.BadZipFile("two parts have one name")
        if not names or "/" not in names[0]:
            raise zipfile.BadZipFile("it is no archive of PyTorch")
        root = names[0].partition("/")[0] + "/"
        parts = {member.filename.removeprefix(root): member for member in members if member.filename.startswith(root)}
    if "constants.pkl" in parts:
        raise _NotWeightsError("a TorchScript program, not weights", "Save the original model's state_dict().")
    if "data.pkl" not in parts:
        raise zipfile.BadZipFile("it has no data.pkl")
    regions = {name: _region(file, member, size) for name, member in parts.items()}
    if sum(length for _, length in regions.values()) > size:
        raise zipfile.BadZipFile("its parts overlap")
    start, length = regions["data.pkl"]
    if length > _largest_description(size):
        raise _description_too_large(length, size)
    order = _bytes(file, *regions["byteorder"], most=16).decode("ascii") if "byteorder" in parts else "little"
    if order not in ("little", "big"):
        raise zipfile.BadZipFile("it has no known order of bytes")
    content, _ = read_pickle(io.BytesIO(_bytes(file, start, length, most=length)))
    storages = {name.removeprefix("data/"): region for name, region in regions.items() if name.startswith("data/")}
    return content, storages, order != sys.byteorder


def _description_too_large(seen: int, size: int) -> _TooLargeError:
    return _TooLargeError(
        "it holds too much besides tensors", f"{seen:,} bytes of description", f"at most {_largest_description(size):,}"
    )


def _bytes(file: Any, start: int, length: int, most: int) -> bytes:
    file.seek(start)
    return file.read(min(length, most))


def _region(file: Any, member: zipfile.ZipInfo, size: int) -> tuple[int, int]:
    """Offset and size of a part's data; the local header must be consistent with the directory."""
    if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size or member.flag_bits & 1:
        raise zipfile.BadZipFile("a part of it is compressed or encrypted; torch.save writes none")
    header = _bytes(file, member.header_offset, 30, most=30)
    if header[:4] != b"PK\x03\x04" or len(header) < 30:
        raise zipfile.BadZipFile("its list of parts leads elsewhere")
    start = member.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
    if start + member.file_size > size:
        raise zipfile.BadZipFile("a part of it is cut off")
    return start, member.file_size


def _read_legacy(file: Any, size: int) -> _Read:
    """Reads the legacy format: five pickles, then for each storage the number of its elements and their bytes."""
    most = _largest_description(size)
    head = file.read(min(size, most))
    stream = io.BytesIO(head)
    try:
        magic, protocol = (read_pickle(stream)[0] for _ in range(2))
        if (magic, protocol) != (_MAGIC, _PROTOCOL):
            raise pickle.UnpicklingError("it does not begin like a file of torch.save")
        read_pickle(stream)  # byte order and type sizes of the machine
        content, itemsizes = read_pickle(stream)
        keys, _ = read_pickle(stream)
    except pickle.UnpicklingError:
        if len(head) == most < size and not isinstance(sys.exception(), Forbidden) and stream.tell() >= most:
            raise _description_too_large(most, size) from None
        raise
    if not isinstance(keys, list) or not all(isinstance(key, str | int) for key in keys):
        raise pickle.UnpicklingError("it has no list of storages")
    regions: dict[str, tuple[int, int]] = {}
    start = stream.tell()
    for key in map(str, keys):
        counted = _bytes(file, start, 8, most=8)
        if key not in itemsizes or key in regions or len(counted) < 8:
            raise pickle.UnpicklingError("its storages do not match its tensors")
        length = struct.unpack("<q", counted)[0] * itemsizes[key]
        if not 0 <= length <= size - start - 8:
            raise pickle.UnpicklingError("a storage of it is cut off")
        regions[key] = (start + 8, length)
        start += 8 + length
    return content, regions, sys.byteorder == "big"


def _forbidden(path: Path, name: str, error: type[EvitDeployError]) -> EvitDeployError:
    shown = name if name.isprintable() and len(name) <= 200 else f"{name!a:.100}"
    if name.startswith(("timm.", "torch.nn.", "torchvision.", "__main__")) or "VisionTransformer" in name:
        return error(
            f"a whole pickled model ({shown}), which would have to run code to be read",
            where=path,
            fix="Where it was made, run torch.save(model.state_dict(), 'weights.pth') and give that file.",
        )
    return error(
        f"it wants to run {shown} while being read; it was not run", where=path, wanted="tensors only",
        fix=f"{_SAVE} Do not trust this file.",
    )  # fmt: skip
