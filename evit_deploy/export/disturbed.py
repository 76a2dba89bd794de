"""Perturbs a file's weights within their rounding error, to bound how much its precision can change its outputs.

The tolerance follows from the file's own tensors and types, so no number has to be chosen. Weights become inputs of the
graph, so that one session runs every random draw of them.

Two forms of the file are computed, both in FP32: *exact*, in which activations are not rounded at all, and *rounded*,
in which they are rounded wherever the file rounds them. A weight in the file is the rounded value of an unknown number;
that number is drawn at random from the values that round to it.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
import onnx_ir
import onnxruntime
from onnx import ModelProto
from onnx_ir import DataType

from evit_deploy.errors import EvitDeployError, InputError, StageError
from evit_deploy.export.outline import Outline, read_outline
from evit_deploy.export.variants import with_choice, with_indices
from evit_deploy.tokens.choices import FLOOR

_LOW = (DataType.FLOAT16, DataType.BFLOAT16)
_FLOATS = (DataType.FLOAT, *_LOW)


class _Weight(msgspec.Struct, frozen=True):
    """A weight as stored in the file.

    Args:
        values: float32.
        spacing: Largest rounding error, in either direction; has the shape of ``values`` or broadcasts to it.
    """

    values: np.ndarray
    spacing: Callable[[np.ndarray], np.ndarray]

    def drawn(self, random: np.random.Generator) -> np.ndarray:
        """A random value that rounds to this weight."""
        moved = random.random(self.values.shape, np.float32)
        moved *= 2
        moved -= 1
        moved *= self.spacing(self.values)
        moved += self.values
        return moved


class OwnArithmetic:
    """Runs a file in FP32.

    Args:
        path: An ONNX file that evit-deploy exported.
        rounded: Whether to round activations where the file does; an FP32 file rounds nowhere.
        chosen: Whether choices are inputs, ``choice_<block>``, and scores outputs; otherwise choices are outputs.

    Raises:
        InputError: The file is missing, is not an ONNX model, or cannot be run by ONNX Runtime.
    """

    def __init__(self, path: Path, *, rounded: bool, chosen: bool) -> None:
        outline = read_outline(path)
        self._path, self._weights = path, dict[str, _Weight]()
        try:
            proto = with_choice(outline.proto) if chosen else with_indices(outline.proto)
            model = onnx_ir.from_proto(proto)
            _take_out_weights(model.graph, outline, self._weights)
            _in_fp32(model.graph, rounded)
            changed = onnx_ir.to_proto(model)
        except EvitDeployError:
            raise
        except Exception as error:  # the file is untrusted; protobuf accepts more than ONNX Runtime does
            raise InputError(f"not a model that evit-deploy exported ({type(error).__name__})", where=path) from error
        self._session = _session(changed, path, plain=rounded)

    def answers(self, feeds: Mapping[str, np.ndarray], draw: int | None = None) -> dict[str, np.ndarray]:
        """Computes the file's outputs.

        Args:
            feeds: Its inputs, including the choices if ``chosen``.
            draw: Seed of the weights to draw; ``None`` for the file's own weights.

        Raises:
            StageError: ONNX Runtime failed.
        """
        random = np.random.default_rng(draw)
        weights = {name: w.values if draw is None else w.drawn(random) for name, w in self._weights.items()}
        names = [output.name for output in self._session.get_outputs()]
        try:
            found: Any = self._session.run(names, dict(feeds) | weights)
        except Exception as error:  # ONNX Runtime raises its own undocumented classes
            raise StageError(f"ONNX Runtime failed: {_first_line(error)}", where=self._path) from error
        return dict(zip(names, found, strict=True))


def _session(proto: ModelProto, path: Path, *, plain: bool) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if plain:  # optimizations remove roundings, or use kernels that round elsewhere
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise InputError(f"the model cannot be run: {_first_line(error)}", where=path) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _take_out_weights(graph: onnx_ir.Graph, outline: Outline, weights: dict[str, _Weight]) -> None:
    """Turns every floating-point initializer into an input, and records its values and rounding error."""
    scales = {
        node.inputs[1].name
        for node in graph
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.inputs[1] is not None
    }
    for node in list(graph):
        value = node.inputs[0] if node.op_type == "DequantizeLinear" else None
        if value is not None and value.is_initializer():
            made = node.outputs[0]
            weights[str(made.name)] = _dequantized(node, outline)
            _feed(graph, made, weights[str(made.name)].values)
            graph.remove(node)
    for name, value in list(graph.initializers.items()):
        if value.dtype not in _FLOATS:
            continue
        array = _array(value, outline)
        if name in scales:
            value.const_value, value.dtype = onnx_ir.tensor(array.astype(np.float32), name=name), DataType.FLOAT
            continue
        rounding = _float_roundings if value.dtype == DataType.FLOAT else _half_steps(ml_dtypes.finfo(array.dtype))
        weights[name] = _Weight(array.astype(np.float32, copy=False), rounding)
        graph.initializers.pop(name)
        _feed(graph, value, array)


def _feed(graph: onnx_ir.Graph, value: onnx_ir.Value, array: np.ndarray) -> None:
    """Replaces a value with an input."""
    given = onnx_ir.Value(name=value.name, shape=onnx_ir.Shape(array.shape), type=onnx_ir.TensorType(DataType.FLOAT))
    value.replace_all_uses_with(given)
    graph.inputs.append(given)


def _float_roundings(values: np.ndarray) -> np.ndarray:
    """FP32 weights are exact, but their products round: as much as if each weight were off by a few units."""
    return np.abs(values) * np.float32(FLOOR * np.finfo(np.float32).eps / 2)


def _half_steps(kind: Any) -> Callable[[np.ndarray], np.ndarray]:
    """A function that returns half the distance to the next representable number of a type."""
    epsilon, least = np.float32(kind.eps / 2), np.float32(float(kind.smallest_subnormal) / 2)

    def spacing(values: np.ndarray) -> np.ndarray:
        return np.maximum(np.abs(values) * epsilon, np.where(values == 0, 0, least))

    return spacing


def _dequantized(node: onnx_ir.Node, outline: Outline) -> _Weight:
    """The weight that a ``DequantizeLinear`` computes from an initializer."""
    given: Any = (*node.inputs, None)
    values, scale, zero = (None if value is None else _array(value, outline) for value in given[:3])
    assert values is not None
    assert scale is not None
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
    shape = [-1 if dim == axis % max(values.ndim, 1) else 1 for dim in range(values.ndim)]
    scale = scale.astype(np.float32).reshape(shape) if scale.size > 1 else scale.astype(np.float32).reshape(())
    offset = 0 if zero is None else zero.astype(np.float32).reshape(shape if zero.size > 1 else ())
    real = ((values.astype(np.float32) - offset) * scale).astype(np.float32)
    if np.issubdtype(values.dtype, np.integer):
        half = np.broadcast_to(scale / 2, real.shape)
        return _Weight(real, lambda values: half)
    steps = _half_steps(ml_dtypes.finfo(values.dtype))
    return _Weight(real, lambda values: steps(values / scale) * np.abs(scale))


def _array(value: onnx_ir.Value, outline: Outline) -> np.ndarray:
    """An initializer as an array; large ones are memory-mapped."""
    tensor = value.const_value
    if isinstance(tensor, onnx_ir.ExternalTensor):
        assert tensor.length is not None
        shape = tuple(tensor.shape.numpy())
        return np.memmap(outline.folder / tensor.location, tensor.dtype.numpy(), "r", tensor.offset or 0, shape)
    if tensor is None:
        raise InputError("an initializer has no content", where=outline.folder, seen=repr(value.name))
    return tensor.numpy()


def _in_fp32(graph: onnx_ir.Graph, rounded: bool) -> None:
    """Converts lower-precision values to FP32; with ``rounded``, a pair of casts rounds them where the file does."""
    for node in list(graph):
        if node.op_type == "QuantizeLinear" and not rounded:
            given: Any = node.inputs[0]
            for use in list(node.outputs[0].uses()):  # the pair is an identity now
                use.node.outputs[0].replace_all_uses_with(given)
    for node in list(graph):
        low = {value: value.dtype for value in node.outputs if value.dtype is not None and value.dtype in _LOW}
        if node.op_type == "Constant" and low:
            tensor = node.attributes["value"].as_tensor()
            node.attributes["value"] = onnx_ir.AttrTensor("value", onnx_ir.tensor(tensor.numpy().astype(np.float32)))
        if node.op_type == "Cast" and node.attributes["to"].as_int() in _LOW:
            node.attributes["to"] = onnx_ir.AttrInt64("to", DataType.FLOAT)
        for value, kind in low.items():
            value.dtype = DataType.FLOAT
            if rounded and node.op_type != "Constant":
                _round(graph, node, value, kind)


def _round(graph: onnx_ir.Graph, node: onnx_ir.Node, value: onnx_ir.Value, kind: DataType) -> None:
    name = str(value.name)
    value.name = f"{name}.exact"
    down = onnx_ir.node("Cast", [value], {"to": kind}, name=f"{name}.down")
    up = onnx_ir.node("Cast", [down.outputs[0]], {"to": DataType.FLOAT}, name=f"{name}.up")
    down.outputs[0].name, up.outputs[0].name = f"{name}.low", name
    for use in list(value.uses()):
        if use.node is not down:
            use.node.replace_input_with(use.idx, up.outputs[0])
    for index, output in enumerate(graph.outputs):
        if output is value:
            graph.outputs[index] = up.outputs[0]
    graph.insert_after(node, [down, up])
