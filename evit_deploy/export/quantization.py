"""INT8 and FP8: Q/DQ nodes around the linear layers, with ranges learned from real images.

ONNX Runtime's quantizer inserts them, with one scale per tensor for activations and one per channel for weights. The
rest of the model is FP32 for CPUs and FP16 for TensorRT.
"""

import contextlib
import logging
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import msgspec
import numpy as np
import onnx.numpy_helper
import onnx_ir
from onnx import ModelProto
from onnx_ir import DataType

from evit_deploy.errors import InputError, StageError, did_you_mean, first_few
from evit_deploy.export.card import INPUT
from evit_deploy.files.drafts import draft

_LINEAR = ("MatMul", "Gemm")
_CALIBRATION_BATCH = 8
_FP8, _FP8_LARGEST = DataType.FLOAT8E4M3FN, 448.0
_WRAPPED = re.compile(r"\.inner(?=\.|$)")
"""Wrapper modules that the export inserts and that are not in checkpoints."""


class Quantized(msgspec.Struct, frozen=True):
    """A model with all linear layers quantized, and its FP32 original; the layers between them are FP32.

    Args:
        original: The FP32 file.
        proto: The same model with Q/DQ pairs.
    """

    original: ModelProto
    proto: ModelProto

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the quantized layers, in the order of the graph."""
        made = {node.output[0] for node in self.proto.graph.node if node.op_type == "DequantizeLinear"}
        nodes = (node for node in self.proto.graph.node if node.op_type in _LINEAR and made & set(node.input))
        return tuple(dict.fromkeys(layer_of(node.name) for node in nodes))

    def share(self, layers: Collection[str]) -> float:
        """The fraction of the quantized weights that belongs to the given layers, 0 to 1.

        Args:
            layers: Their names.
        """
        sizes = {tensor.name: math.prod(tensor.dims) for tensor in self.original.graph.initializer}
        held: Counter[str] = Counter()
        for node in self.original.graph.node:
            if node.op_type in _LINEAR:
                held[layer_of(node.name)] += sizes.get(node.input[1], 0)
        total = sum(held[layer] for layer in self.layers)
        return sum(held[layer] for layer in layers) / total if total else 0.0

    def without(self, layers: Collection[str]) -> ModelProto:
        """The model with the given layers not quantized.

        Equal to quantizing without these layers, but does not calibrate again.

        Args:
            layers: Their names.
        """
        if not layers:
            return self.proto
        model = onnx_ir.from_proto(self.proto)
        before = {tensor.name: tensor for tensor in self.original.graph.initializer}
        for node in model.graph:
            if node.op_type in _LINEAR and layer_of(str(node.name)) in layers:
                for index in range(len(node.inputs)):
                    _restore(model.graph, node, index, before)
        return onnx_ir.to_proto(model)


def layer_of(node: str) -> str:
    """The layer that a node computes, under its name in the checkpoint.

    >>> layer_of("blocks.3.mlp.inner.fc1/Gemm")
    'blocks.3.mlp.fc1'

    Args:
        node: Name of the node.
    """
    return _WRAPPED.sub("", node.rpartition("/")[0])


def layers_like(patterns: Sequence[str], layers: Sequence[str]) -> list[str]:
    """The layers that match patterns such as ``blocks.11.mlp.*``, in the order of the graph.

    Args:
        patterns: Names with the shell wildcards ``*``, ``?`` and ``[...]``.
        layers: The quantized layers.

    Raises:
        InputError: A pattern matches no layer, or the patterns match all of them.
    """
    for pattern in patterns:
        if not any(fnmatchcase(layer, pattern) for layer in layers):
            parts = [layer.split(".") for layer in layers]
            groups = {".".join((*part[:length], "*")) for part in parts for length in range(1, len(part))}
            raise InputError(
                "no layer that would be quantized has this name", where="--keep-precision", seen=repr(pattern),
                wanted=f"one of {first_few(layers)}, or a pattern of them",
                fix=did_you_mean(pattern, [*layers, *sorted(groups)]),
            )  # fmt: skip
    found = [layer for layer in layers if any(fnmatchcase(layer, pattern) for pattern in patterns)]
    if len(found) == len(layers):
        raise InputError(
            "these patterns match every layer, so nothing would be quantized", where="--keep-precision",
            seen=", ".join(patterns), fix="Leave a layer out of them, or ask for the base precision.",
        )  # fmt: skip
    return found


def quantize(
    proto: ModelProto, precision: str, base: str, calibration: np.ndarray, exact: Sequence[str] = ()
) -> Quantized:
    """Inserts Q/DQ pairs around the linear layers, except for the nodes in ``exact``.

    There are two forms of INT8. TensorRT requires signed, symmetric activations and floating-point biases. CPUs
    multiply unsigned by signed numbers, and ONNX Runtime's kernels use INT32 biases. On DeiT-S this form is 2.4 times
    as fast as the other in ONNX Runtime and 1.1 times in OpenVINO, and more accurate, because the output of Gelu is
    rarely negative (figures: ``tests/benchmarks/int8_forms.py``, docs/results-precision.md).
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        """Calibration images in batches."""

        def __init__(self) -> None:
            starts = range(0, len(calibration), _CALIBRATION_BATCH)
            self.batches = iter([{INPUT: calibration[start : start + _CALIBRATION_BATCH]} for start in starts])

        def get_next(self) -> Any:
            return next(self.batches, None)

    for_cpu = precision == "int8" and base == "fp32"
    with draft() as scratch, _silent():
        source, target = scratch.folder / "source.onnx", scratch.folder / "target.onnx"
        onnx.save(proto, source)
        try:
            quantize_static(
                source,
                target,
                Reader(),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=list(_LINEAR),
                nodes_to_exclude=list(exact),
                per_channel=True,
                activation_type=QuantType.QUInt8 if for_cpu else QuantType.QInt8,
                weight_type=QuantType.QInt8,
                extra_options={
                    "ActivationSymmetric": not for_cpu,
                    "WeightSymmetric": True,
                    "QuantizeBias": for_cpu,
                    # The output of a linear layer is not quantized, because the next operator is not.
                    "OpTypesToExcludeOutputQuantization": list(_LINEAR),
                    # Not CalibMaxIntermediateOutputs, which discards the ranges of earlier batches.
                },
            )
        except Exception as error:  # the quantizer does not document its exceptions
            text = str(error).strip().splitlines()
            raise StageError(f"ONNX Runtime's quantizer failed: {text[0] if text else type(error).__name__}") from error
        quantized = onnx.load(target)
    return Quantized(proto, _as_fp8(quantized, proto) if precision == "fp8" else quantized)


def _restore(graph: onnx_ir.Graph, node: onnx_ir.Node, index: int, before: dict[str, Any]) -> None:
    """Reconnects a node's input to the unquantized value, and removes nodes that become unused."""
    value = node.inputs[index]
    dequantize = value.producer() if value is not None else None
    if dequantize is None or dequantize.op_type != "DequantizeLinear":
        return
    stored = dequantize.inputs[0]
    assert stored is not None
    quantize = stored.producer()
    if quantize is not None:
        node.replace_input_with(index, quantize.inputs[0])
    else:
        name = str(stored.name).removesuffix("_quantized")
        exact = graph.initializers.get(name)
        if exact is None:
            tensor = onnx_ir.from_proto(before[name])
            exact = onnx_ir.Value(name=name, shape=tensor.shape, type=onnx_ir.TensorType(tensor.dtype))
            exact.const_value = tensor
        node.replace_input_with(index, exact)
        _remove(graph, dequantize)  # first, because the dequantized bias has the name of the bias
        graph.initializers.setdefault(name, exact)
        return
    _remove(graph, dequantize)
    _remove(graph, quantize)


def _remove(graph: onnx_ir.Graph, node: onnx_ir.Node) -> None:
    """Removes a node and its constants, except those still in use."""
    if any(output.uses() for output in node.outputs):
        return
    given = [value for value in node.inputs if value is not None]
    graph.remove(node, safe=True)
    for value in given:
        if value.is_initializer() and not value.uses():
            graph.initializers.pop(str(value.name), None)


def array_of(value: onnx_ir.Value) -> np.ndarray:
    """A constant as an array."""
    assert value.const_value is not None
    return value.const_value.numpy()


def _as_fp8(quantized: ModelProto, original: ModelProto) -> ModelProto:
    """The same Q/DQ pairs in FP8 (E4M3), scaled so that the largest value seen maps to the largest FP8 number.

    The quantizer's own FP8 derives the scale from the standard deviation, which clips the outliers of a ViT.
    """
    model = onnx_ir.from_proto(quantized)
    weights = {tensor.name: tensor for tensor in original.graph.initializer}
    wider = np.float32(127 / _FP8_LARGEST)
    initializers = model.graph.initializers
    scales, zeros = set[str](), set[str]()
    for node in model.graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            scales.add(str(node.inputs[1].name))  # type: ignore[union-attr]
            zeros.add(str(node.inputs[2].name))  # type: ignore[union-attr]
        for value in node.outputs:
            if value.dtype == DataType.INT8:
                value.dtype = _FP8
    for name in scales:
        initializers[name].const_value = onnx_ir.tensor(array_of(initializers[name]) * wider, name=name)
    for name, value in initializers.items():
        if value.dtype != DataType.INT8:
            continue
        if name in zeros:
            array = np.zeros(array_of(value).shape, np.float32)
        else:  # per-channel scales: [out, in] for a Gemm, [in, out] for a MatMul
            array = onnx.numpy_helper.to_array(weights[name.removesuffix("_quantized")])
            scale = next(array_of(use.node.inputs[1]) for use in value.uses())  # type: ignore[arg-type]
            axis = next(use.node.attributes["axis"].as_int() for use in value.uses())
            array = array / np.expand_dims(scale, 1 - axis)
        value.const_value = onnx_ir.tensor(array.astype(_FP8.numpy()), name=name)
        value.dtype = _FP8
    return onnx_ir.to_proto(model)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Silences the quantizer, which prints and logs to the root logger."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(None):
            yield
    finally:
        root.setLevel(level)
