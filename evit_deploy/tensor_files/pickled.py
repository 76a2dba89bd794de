"""Reads a PyTorch pickle as descriptions: nothing in it is executed, and no tensor is created.

Uses Python's pure unpickler, restricted to the operations that ``torch.save`` writes and to a fixed table of names. The
faster one in C allocates whatever a memo index claims: 5 bytes can request 32 GB. PyTorch's own (``weights_only=True``)
creates tensors of any size named in the pickle while reading.
"""

import argparse
import io
import pickle
import re
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch

from evit_deploy.tensor_files.described import Described, Odd, Storage

_STORAGES = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ShortStorage": torch.int16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "UntypedStorage": torch.uint8,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "QInt8Storage": torch.qint8,
    "QInt32Storage": torch.qint32,
    "QUInt8Storage": torch.quint8,
    "QUInt4x2Storage": torch.quint4x2,
    "QUInt2x4Storage": torch.quint2x4,
}
_STORAGE = re.compile(r"torch(?:\.cuda|\.storage)?\.(\w+Storage)")
_LARGEST_KEY = 1 << 63


class Forbidden(pickle.UnpicklingError):
    """A pickle refers to something other than tensors.

    Args:
        name: Qualified name, including its module.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise pickle.UnpicklingError("a size is not a whole number")
    return value


def _sizes(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple | list):
        raise pickle.UnpicklingError("a shape is not a list of sizes")
    return tuple(_whole(value) for value in values[:64])  # more axes than any tensor has; refused later


def _tensor(
    storage: Any, offset: Any, shape: Any, stride: Any, grad: Any = None, hooks: Any = None, metadata: Any = None
) -> Any:
    return _tensor_of(storage, offset, (shape, stride), getattr(storage, "dtype", None), metadata)


def _tensor_v3(
    storage: Any, offset: Any, shape: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, metadata: Any = None
) -> Any:
    return _tensor_of(storage, offset, (shape, stride), dtype, metadata)


def _tensor_of(storage: Any, offset: Any, layout: tuple[Any, Any], dtype: Any, metadata: Any) -> Any:
    if not isinstance(storage, Storage) or not isinstance(dtype, torch.dtype):
        raise pickle.UnpicklingError("a tensor without a storage")
    if metadata:  # for conjugated and negated views
        return Odd("a view that negates its elements", "Save tensor.resolve_neg().")
    shape, stride = map(_sizes, layout)
    return Described(storage, dtype, _whole(offset), shape, stride)


def _parameter(data: Any, *about: Any) -> Any:
    return data


def _with_type(make: Any, kind: Any, arguments: Any, state: Any) -> Any:
    if not isinstance(make, types.FunctionType) or not isinstance(arguments, tuple):
        raise pickle.UnpicklingError("a tensor of an unsupported class")
    return make(*arguments)


def _odd(what: str, fix: str = Odd("").fix) -> types.FunctionType:
    value = Odd(what, fix)

    def make(*arguments: Any) -> Odd:
        return value

    return make


def _encoded(text: Any, encoding: Any = "latin1") -> bytes:
    """Decodes bytes as written by protocol 2."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1", "utf-8", "ascii"):
        raise pickle.UnpicklingError("bytes in an encoding that no pickler writes")
    return text.encode(encoding)


def _size(values: Any = ()) -> tuple[int, ...]:
    return _sizes(values)


def _dictionary(items: Any = ()) -> dict[Any, Any]:
    made: dict[Any, Any] = {}
    for key, value in items.items() if isinstance(items, Mapping) else items:
        made[_key(key)] = value
    return made


def _key(key: Any) -> Any:
    # Large numbers and tuples can be crafted to have colliding hashes, which make a dictionary quadratic.
    if not isinstance(key, str | bytes | float | None) and not (isinstance(key, int) and abs(key) < _LARGEST_KEY):
        raise pickle.UnpicklingError(f"a dictionary with a key that is neither text nor a number, {type(key).__name__}")
    return key


_SOMETHING = _odd("no tensor")
_DENSE = "Save tensor.to_dense()."
# Functions that may be called, by their names in a pickle. They return descriptions, or nothing useful.
_CALLED: dict[str, types.FunctionType] = {
    "collections.OrderedDict": _dictionary,
    "collections.Counter": _dictionary,
    "torch.Size": _size,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _with_type,
    "torch._utils._rebuild_sparse_tensor": _odd("a sparse tensor", _DENSE),
    "torch._utils._rebuild_nested_tensor": _odd("a nested tensor", "Save its tensors one by one."),
    "torch._utils._rebuild_qtensor": _odd("a quantized tensor", "Save tensor.dequantize()."),
    "torch._utils._rebuild_meta_tensor_no_storage": _odd("a tensor without values (meta)", "Save the real one."),
    "torch._utils._rebuild_wrapper_subclass": _odd("a tensor of a class of its own"),
    "torch._utils._rebuild_device_tensor_from_numpy": _odd("a tensor of another device", "Save tensor.cpu()."),
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _odd("a tensor of another device", "Save tensor.cpu()."),
    "torch.serialization._get_layout": _SOMETHING,
    "torch.device": _SOMETHING,
    "_codecs.encode": _encoded,
    "builtins.set": _SOMETHING,
    "builtins.bytearray": _SOMETHING,
    "builtins.complex": _SOMETHING,
}
# Names that may occur without being called, in addition to dtypes and storage classes.
_NAMED = {"torch.Tensor": Odd("a tensor of an old format"), "torch.nn.parameter.Parameter": Odd("an empty parameter")}


class _Reader(pickle._Unpickler):
    """Supports only the operations that ``torch.save`` writes."""

    stack: list[Any]
    readline: Callable[[], bytes]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, encoding="utf-8")
        self.itemsizes: dict[str, int] = {}
        """Element size of each storage in bytes, from its first reference."""

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module.replace('__builtin__', 'builtins')}.{name}".replace("torch.tensor._", "torch._tensor._")
        if full in _CALLED:
            return _CALLED[full]
        if full == "argparse.Namespace":  # official EViT checkpoints store their keep rate in one
            return argparse.Namespace
        storage = _STORAGE.fullmatch(full)
        if storage is not None and storage[1] in _STORAGES:
            return _STORAGES[storage[1]]
        if full in _NAMED:
            return _NAMED[full]
        value = vars(torch).get(name) if module == "torch" else None
        if isinstance(value, torch.dtype):
            return value
        if isinstance(value, torch.qscheme):
            return Odd("a way of quantizing")
        raise Forbidden(full)

    def persistent_load(self, pid: Any) -> Storage:
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] not in ("storage", b"storage"):
            raise pickle.UnpicklingError("a reference to something that is not a storage")
        _, dtype, key, _, count, *view = pid
        if not isinstance(dtype, torch.dtype) or not isinstance(key, str | int):
            raise pickle.UnpicklingError("a storage without a type or a name")
        item = dtype.itemsize
        self.itemsizes.setdefault(str(key), item)
        if not view or view[0] is None:
            return Storage(str(key), dtype, 0, _whole(count) * item)
        _, first, count = view[0]  # for files from before PyTorch 0.4
        return Storage(str(key), dtype, _whole(first) * item, _whole(count) * item)

    def read_global(self) -> None:
        """Reads a name, which must be complete: the file may be truncated."""
        lines = [self.readline(), self.readline()]
        if not all(line.endswith(b"\n") for line in lines):
            raise EOFError
        module, name = (line[:-1].decode() for line in lines)
        self.append(self.find_class(module, name))

    def reduce(self) -> None:
        """Calls a function from the table."""
        arguments, make = self.stack.pop(), self.stack[-1]
        self.stack[-1] = _with_type(make, None, arguments, None)

    def new_object(self) -> None:
        """Creates a namespace, the only class that is allowed."""
        arguments, made = self.stack.pop(), self.stack.pop()
        if made is not argparse.Namespace or arguments != ():
            raise pickle.UnpicklingError("an object of an unsupported class")
        self.append(argparse.Namespace())

    def build(self) -> None:
        """Sets the values of a namespace; ignores attributes that PyTorch adds to dictionaries and tensors."""
        state, made = self.stack.pop(), self.stack[-1]
        if isinstance(made, argparse.Namespace):
            vars(made).update({str(name): value for name, value in _dictionary(state).items()})
        elif not isinstance(made, dict | Described | Odd):
            raise pickle.UnpicklingError("an object of a class that has no state")

    def set_item(self) -> None:
        """Puts one value into a dictionary."""
        value, key = self.stack.pop(), self.stack.pop()
        self.stack[-1][_key(key)] = value

    def set_items(self) -> None:
        """Puts values into a dictionary."""
        items, made = self.pop_mark(), self.stack[-1]
        for key, value in zip(items[::2], items[1::2], strict=True):
            made[_key(key)] = value

    dispatch: Any = {
        code: pickle._Unpickler.dispatch[code]
        for code in b"".join(
            (
                pickle.PROTO, pickle.STOP, pickle.MARK, pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT,
                pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.BINFLOAT, pickle.BINUNICODE,
                pickle.SHORT_BINSTRING, pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3,
                pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS, pickle.EMPTY_DICT, pickle.BINPERSID, pickle.BINGET,
                pickle.LONG_BINGET, pickle.BINPUT, pickle.LONG_BINPUT,
            )
        )
    } | {
        pickle.GLOBAL[0]: read_global,
        pickle.REDUCE[0]: reduce,
        pickle.NEWOBJ[0]: new_object,
        pickle.BUILD[0]: build,
        pickle.SETITEM[0]: set_item,
        pickle.SETITEMS[0]: set_items,
    }  # fmt: skip


_FAILURES = (
    EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError, OverflowError, MemoryError, RecursionError,
)  # fmt: skip


def read_pickle(file: io.BytesIO) -> tuple[Any, dict[str, int]]:
    """Reads one pickle.

    Args:
        file: Positioned at its start; afterwards, at its end.

    Returns:
        Its content, with a :class:`~evit_deploy.tensor_files.described.Described` or an
            :class:`~evit_deploy.tensor_files.described.Odd` in place of each tensor; and the element size of each
            storage in bytes.

    Raises:
        Forbidden: It refers to something other than tensors, which was not executed.
        pickle.UnpicklingError: It is damaged.
    """
    reader = _Reader(file)
    try:
        return reader.load(), reader.itemsizes
    except pickle.UnpicklingError:
        raise
    except _FAILURES as error:
        raise pickle.UnpicklingError(str(error)[:100] or type(error).__name__) from None
