"""The *outline* of an ONNX file: the model without its weights, which it references by their position in the file.

A file of a gigabyte is inspected, changed and opened through an outline of a few hundred kilobytes. The outline is an
ordinary model whose large initializers are ONNX external data, located in the file that it was read from. Conversely,
:func:`write_onnx` writes a single file from a model without its weights, tensor by tensor, without copying them all.
"""

import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec
import numpy as np
from onnx import GraphProto, ModelProto, TensorProto
from torch import Tensor

from evit_deploy.errors import InputError

_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9
"""Field numbers in onnx.proto."""
_INLINE = 2**15
"""Tensors up to this many bytes stay in the outline: shapes and scalars must, and vectors are cheap."""
_BYTES = 2  # protobuf's wire type for length-delimited fields


class Outline(msgspec.Struct, frozen=True):
    """A model whose weights are in a file.

    Args:
        proto: The model; its large initializers are external data.
        folder: Folder of the file that contains them.
    """

    proto: ModelProto
    folder: Path


def read_outline(path: Path) -> Outline:
    """Reads an ONNX file without its weights.

    Raises:
        InputError: The file is missing or is not an ONNX model.
    """
    if not path.is_file():
        raise InputError("no such file", where=path, fix="Give the path of an ONNX model.")
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            proto = _without_weights(content, path.name)
    except Exception as error:  # protobuf's own errors differ between its implementations
        raise InputError(f"not an ONNX model ({type(error).__name__})", where=path) from error
    if not proto.graph.node:
        raise InputError("not an ONNX model (no graph in it)", where=path)
    return Outline(proto, path.parent)


def _without_weights(content: mmap.mmap, location: str) -> ModelProto:
    around, graph, tensors = bytearray(), bytearray(), []
    for number, start, begin, end in _fields(content, 0, len(content)):
        if number != _GRAPH:
            around += content[start:end]
            continue
        for inner, inner_start, inner_begin, inner_end in _fields(content, begin, end):
            if inner == _INITIALIZER:
                tensors.append(_tensor(content, inner_begin, inner_end, location))
            else:
                graph += content[inner_start:inner_end]
    proto = ModelProto.FromString(bytes(around))
    proto.graph.CopyFrom(GraphProto.FromString(bytes(graph)))
    proto.graph.initializer.extend(tensors)
    return proto


def _tensor(content: mmap.mmap, begin: int, end: int, location: str) -> TensorProto:
    """A tensor; its data is included if it is small."""
    if end - begin <= _INLINE:
        return TensorProto.FromString(content[begin:end])
    rest, place = bytearray(), None
    for number, start, inside, stop in _fields(content, begin, end):
        if number == _RAW_DATA:
            place = inside, stop - inside
        else:
            rest += content[start:stop]
    tensor = TensorProto.FromString(bytes(rest))
    if place is not None:
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", str(place[0])), ("length", str(place[1]))):
            tensor.external_data.add(key=key, value=value)
    return tensor


def _fields(content: mmap.mmap, place: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """The fields of a protobuf message: number, start of the field, start and end of its content."""
    while place < end:
        start = place
        tag, place = _varint(content, place)
        kind = tag & 7
        if kind == _BYTES:
            length, place = _varint(content, place)
        elif kind == 0:
            length = _varint(content, place)[1] - place
        else:
            length = {1: 8, 5: 4}[kind]
        if place + length > end:
            raise ValueError("a field is longer than its message")
        yield tag >> 3, start, place, place + length
        place += length


def _varint(content: mmap.mmap, place: int) -> tuple[int, int]:
    number, shift = 0, 0
    while True:
        byte = content[place]
        number |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return number, place


def write_onnx(proto: ModelProto, weights: Mapping[str, Tensor], path: Path) -> None:
    """Writes a model as one file, without copying its weights in memory.

    Args:
        proto: The model; initializers may be missing.
        weights: The missing initializers by name, float32.
        path: The file to write.
    """
    around, graph = ModelProto(), proto.graph.SerializeToString()
    for field, value in proto.ListFields():
        if field.name != "graph":
            if field.is_repeated:
                getattr(around, field.name).extend(value)
            else:
                setattr(around, field.name, value)
    heads = {name: _head(name, tensor) for name, tensor in weights.items()}
    length = len(graph) + sum(len(head) + 4 * weights[name].numel() for name, head in heads.items())
    with path.open("wb") as file:
        file.write(around.SerializeToString())
        file.write(_prefix(_GRAPH, length) + graph)
        for name, head in heads.items():
            file.write(head)
            # One at a time, because transposed and sliced tensors are copied here to be contiguous.
            file.write(np.ascontiguousarray(weights[name].numpy()).data)


def _head(name: str, tensor: Tensor) -> bytes:
    """The bytes of an initializer that precede its data, which is the last field."""
    described = TensorProto(name=name, dims=tensor.shape, data_type=TensorProto.FLOAT).SerializeToString()
    described += _prefix(_RAW_DATA, 4 * tensor.numel())
    return _prefix(_INITIALIZER, len(described) + 4 * tensor.numel()) + described


def _prefix(number: int, length: int) -> bytes:
    """Tag and length of a field."""
    made = bytearray()
    for value in (number << 3 | _BYTES, length):
        while value > 127:
            made.append(value & 127 | 128)
            value >>= 7
        made.append(value)
    return bytes(made)
