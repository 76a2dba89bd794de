"""Descriptions of tensors in a file, and their checks.

A description allocates nothing, whatever size it claims. Names, dtypes, shapes, strides and bytes are checked on it,
and a tensor is created only if it stays within its file.
"""

import msgspec
import torch

from evit_deploy.errors import EvitDeployError, InputError

DTYPES = frozenset(
    (
        torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool, torch.uint8, torch.int8, torch.int16,
        torch.int32, torch.int64,
    )
)  # fmt: skip
"""Accepted dtypes: those of weights and buffers."""
_LONGEST_NAME = 512
_MOST_AXES = 16
_LARGEST = 1 << 40
"""Limit for sizes and strides: no file is that large, and PyTorch's arithmetic does not overflow."""
MOST_TENSORS = 100_000
"""Limit for the tensors of one set of weights. The largest vision transformers have about a thousand."""


class Storage(msgspec.Struct, frozen=True):
    """A range of bytes in a file, of which tensors are views.

    Args:
        key: Its name in the file.
        dtype: Element type according to its class.
        start: Offset in bytes within the file's entry of that name.
        size: Size in bytes.
    """

    key: str
    dtype: torch.dtype
    start: int
    size: int


class Described(msgspec.Struct, frozen=True):
    """Description of a tensor in a file.

    Args:
        storage: The storage that it is a view of.
        dtype: Type of its elements.
        offset: Number of elements before its first one.
        shape: Length of each axis.
        stride: Distance in elements along each axis.
    """

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def size(self) -> int:
        """Size of its elements in bytes."""
        count = 1
        for length in self.shape:
            count *= length
        return count * self.dtype.itemsize


class Odd(msgspec.Struct, frozen=True):
    """A value in the position of a tensor that is not supported.

    Args:
        what: Description, such as ``a sparse tensor``.
        fix: What to do about it.
    """

    what: str
    fix: str = "Save it as a plain tensor."


def check_name(name: object, where: object, error: type[EvitDeployError] = InputError) -> None:
    """Checks that a tensor's name is a printable string.

    Args:
        name: Key of the dictionary that holds the tensor.
        where: The file, for messages.
        error: Class of the errors to raise.

    Raises:
        EvitDeployError: Of the class ``error``.
    """
    if not isinstance(name, str):
        raise error(
            "a tensor whose name is no text", where=where, seen=f"{type(name).__name__} {name!r:.60}",
            wanted="a name such as 'blocks.0.norm1.weight'", fix="Save the weights under their names: a state_dict.",
        )  # fmt: skip
    if not name or len(name) > _LONGEST_NAME or not name.isprintable():
        raise error(
            "a tensor with a name that cannot be shown", where=where, seen=f"{name!a:.60}, {len(name):,} characters",
            wanted=f"1 to {_LONGEST_NAME} printable characters", fix="Save the weights under their names.",
        )  # fmt: skip


def check_dtype(name: str, dtype: object, where: object, error: type[EvitDeployError] = InputError) -> None:
    """Checks that a dtype is supported for weights.

    Args:
        name: Name of the tensor.
        dtype: Its ``torch.dtype``.
        where: The file, for messages.
        error: Class of the errors to raise.

    Raises:
        EvitDeployError: Of the class ``error``: the dtype is FP8, complex, quantized or smaller than a byte.
    """
    if dtype not in DTYPES:
        raise error(
            f"{name!r} has elements that weights are not read from", where=where,
            seen=str(dtype).removeprefix("torch."), wanted="float32, float16, bfloat16, float64 or whole numbers",
            fix="Convert it with tensor.float() and save it again.",
        )  # fmt: skip


def check_axes(name: str, axes: int, where: object, error: type[EvitDeployError] = InputError) -> None:
    """Checks that a tensor does not have too many axes.

    Args:
        name: Name of the tensor.
        axes: Number of its axes.
        where: The file, for messages.
        error: Class of the errors to raise.

    Raises:
        EvitDeployError: Of the class ``error``.
    """
    if axes > _MOST_AXES:
        raise error(
            f"{name!r} has a shape that no tensor has", where=where, seen=f"{axes:,} axes",
            wanted=f"at most {_MOST_AXES}", fix="Save the file again.",
        )  # fmt: skip


def check(name: str, tensor: Described, where: object, error: type[EvitDeployError] = InputError) -> None:
    """Checks that every element of a tensor has its own position inside the storage.

    Args:
        name: Name of the tensor.
        tensor: Its description.
        where: The file, for messages.
        error: Class of the errors to raise.

    Raises:
        EvitDeployError: Of the class ``error``: an unsupported dtype, an expanded or overlapping tensor, or one that
            exceeds its storage.
    """
    check_dtype(name, tensor.dtype, where, error)
    shape, stride = tensor.shape, tensor.stride
    check_axes(name, len(shape), where, error)
    if len(shape) != len(stride) or not all(0 <= number <= _LARGEST for number in (*shape, *stride, tensor.offset)):
        raise error(
            f"{name!r} has a shape that no tensor has", where=where,
            seen=f"{len(shape)} axes {list(shape)!r:.80}, {len(stride)} strides {list(stride)!r:.80}",
            wanted=f"a stride for each axis, and nothing larger than {_LARGEST}", fix="Save the file again.",
        )  # fmt: skip
    reach = 0 if 0 in shape else 1  # number of elements from the tensor's first to its last
    for step, length in sorted((step, length) for step, length in zip(stride, shape, strict=True) if length > 1):
        if reach and step < reach:
            raise error(
                f"{name!r} is expanded: several of its elements are one and the same", where=where,
                seen=f"shape {list(shape)}, strides {list(stride)}", wanted="a place in the file for each element",
                fix="Save tensor.contiguous().",
            )  # fmt: skip
        reach += step * (length - 1) if reach else 0
    end = (tensor.offset + reach) * tensor.dtype.itemsize if reach else 0
    if end > tensor.storage.size:
        raise error(
            f"{name!r} asks for more than the file holds of it", where=where,
            seen=f"shape {list(shape)}, {end:,} bytes", wanted=f"{tensor.storage.size:,} bytes",
            fix="Save the file again.",
        )  # fmt: skip


def check_total(count: int, size: int, held: int, where: object, error: type[EvitDeployError] = InputError) -> None:
    """Checks that tensors that share storages do not together need far more memory than the file's size.

    Args:
        count: Number of tensors.
        size: Size of all their elements in bytes.
        held: Size of the file in bytes.
        where: The file, for messages.
        error: Class of the errors to raise.

    Raises:
        EvitDeployError: Of the class ``error``.
    """
    if count > MOST_TENSORS:
        raise error("too many tensors", where=where, seen=f"{count:,}", wanted=f"at most {MOST_TENSORS:,}")
    if size > 2 * held:
        raise error(
            "its tensors share their bytes: together they are larger than the file", where=where,
            seen=f"{size:,} bytes in a file of {held:,}", wanted="at most twice the file",
            fix="Save the tensors that a model has, each once.",
        )  # fmt: skip
