"""Precision as part of the graph: typed weights and casts for FP16 and BF16, Q/DQ pairs for INT8 and FP8.

TensorRT 11 supports no other way, and all other runtimes support this one. Input and output stay float32 in every
precision, and a normalized embedding is scaled in FP32. Scores, selection and the fused sum stay in FP32, because half
precision is too coarse to rank patches by; LayerNorm keeps its statistics in FP32 (``stash_type``).

INT8 and FP8 are added by :mod:`evit_deploy.export.quantization`.
"""

import re
from collections.abc import Callable, Collection, Sequence

import ml_dtypes
import msgspec
import numpy as np
import onnx.numpy_helper
import onnx_ir
import torch
from onnx import ModelProto
from onnx_ir import DataType

from evit_deploy.errors import InputError, first_few
from evit_deploy.export.card import read_card, write_card
from evit_deploy.export.quantization import Quantized, array_of, layers_like, quantize
from evit_deploy.tokens.operators.token_reorg import DOMAIN

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")
QUANTIZED = ("int8", "fp8")
_TYPES = {"fp16": DataType.FLOAT16, "bf16": DataType.BFLOAT16}
_EXACT = re.compile(r"blocks\.\d+\.reducer\.exact/")
_NORMALIZE = re.compile(r"normalize/")
_LARGEST = {"fp16": 65504.0, "bf16": float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)}

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def set_precision(
    proto: ModelProto,
    precision: str,
    *,
    base: str = "fp32",
    calibration: np.ndarray | None = None,
    keep: Sequence[str] = (),
) -> ModelProto:
    """Converts an exported FP32 model to another precision; returns a copy.

    Args:
        proto: An FP32 model from :func:`~evit_deploy.export.portable.export_onnx`.
        precision: One of :data:`PRECISIONS`.
        base: For ``int8`` and ``fp8``: precision of everything that is not quantized.
        calibration: For ``int8`` and ``fp8``: real images in the deployment's preprocessing, float32 ``[n, C, H, W]``,
            which determine the ranges of the activations.
        keep: For ``int8`` and ``fp8``: linear layers that stay in the base precision, by their names or by patterns
            such as ``blocks.11.mlp.*``.

    Returns:
        The checked model, with the precision in its card.

    Raises:
        InputError: An unknown precision, weights too large for it, no calibration images, a pattern that matches no
            layer, or a file that evit-deploy did not export in FP32.
        StageError: The quantizer failed.
    """
    return lowered(proto, precision, base, calibration, lambda quantized: layers_like(keep, quantized.layers))


def lowered(
    proto: ModelProto,
    precision: str,
    base: str,
    calibration: np.ndarray | None,
    choose: Callable[[Quantized], Collection[str]],
) -> ModelProto:
    """Like :func:`set_precision`, for layers in the base precision that are chosen after quantizing.

    Args:
        proto: See :func:`set_precision`.
        precision: See :func:`set_precision`.
        base: See :func:`set_precision`.
        calibration: See :func:`set_precision`.
        choose: For ``int8`` and ``fp8``: returns the names of the layers that are not to be quantized.

    Raises:
        EvitDeployError: See :func:`set_precision`; also errors of ``choose``.
    """
    if precision not in PRECISIONS:
        raise InputError("unknown precision", seen=repr(precision), wanted="one of " + ", ".join(PRECISIONS))
    card, unquantized = read_card(proto), ()
    if card is None or card.precision != "fp32":
        seen = "no card" if card is None else card.precision
        raise InputError("not a model that evit-deploy exported in FP32", seen=seen, wanted="fp32")
    if precision in QUANTIZED:
        if base not in ("fp32", *_TYPES):
            raise InputError(
                "not a precision for what stays unquantized", seen=repr(base), wanted="fp32 or " + " or ".join(_TYPES)
            )
        if calibration is None or not len(calibration):
            raise InputError(
                f"{precision} needs real images, from which it learns the range of every activation",
                fix="Give a folder of them with --calibration; 128 or more, like those it will see.",
            )
        exact = [str(node.name) for node in _score_rows(onnx_ir.from_proto(proto).graph)]
        quantized = quantize(proto, precision, base, calibration, exact)
        chosen = choose(quantized)
        unquantized = tuple(layer for layer in quantized.layers if layer in chosen)
        proto = quantized.without(unquantized)
        precision_of_rest = base
    else:
        precision_of_rest = precision
    if precision_of_rest != "fp32":
        proto = _cast(proto, precision_of_rest)
    made = ModelProto()
    made.CopyFrom(proto)
    write_card(made, msgspec.structs.replace(card, precision=precision, unquantized=unquantized))
    onnx.checker.check_model(made)
    return made


def _cast(proto: ModelProto, precision: str) -> ModelProto:
    """Converts the graph to FP16 or BF16, except for the scores; ``TokenReorg`` accepts tokens of either type."""
    model = onnx_ir.from_proto(proto)
    graph, low = model.graph, _TYPES[precision]
    exact = _score_rows(graph)
    widened: dict[onnx_ir.Value, onnx_ir.Value] = {}
    narrowed: dict[onnx_ir.Value, onnx_ir.Value] = {}
    _refuse_too_large(graph, exact, precision)
    for value in list(graph.initializers.values()):
        if value.dtype == DataType.FLOAT and not all(use.node in exact for use in value.uses()):
            value.const_value = _as_type(value, low)
            value.dtype = low
    for node in list(graph):
        if node in exact:
            for index, value in enumerate(node.inputs):
                if value is not None and not _is_exact(value, exact) and _is_float(value):
                    node.replace_input_with(index, _widen(graph, value, node, widened))
            continue
        for index, value in enumerate(node.inputs):
            given = node.domain == DOMAIN and index > 0  # scores and sizes
            if value is not None and value.dtype == DataType.FLOAT and _is_exact(value, exact) and not given:
                node.replace_input_with(index, _narrow(graph, value, low, narrowed))
        if node.op_type == "Cast" and node.attributes["to"].as_int() == DataType.FLOAT:
            node.attributes["to"] = onnx_ir.AttrInt64("to", low)
        for value in node.outputs:
            if value.dtype == DataType.FLOAT and not _is_exact(value, exact):
                value.dtype = low
    for value in graph.inputs:
        if value.dtype == DataType.FLOAT:
            _narrow_input(graph, value, low)
    for index, value in enumerate(graph.outputs):
        if value.dtype == low:
            graph.outputs[index] = _widen_output(graph, value, low)
    return onnx_ir.to_proto(model)


def _score_rows(graph: onnx_ir.Graph) -> set[onnx_ir.Node]:
    """The nodes that compute the choice: producers of a location's inputs other than its tokens, and what only they
    use.

    Also included: nodes that a reducer marks as exact by their name, with what only they use, and nodes computed only
    from such values, such as the logarithms of sizes. Linear layers and the nodes before them are excluded: a method's
    own layers run in the model's precision.
    """
    found = {node for node in graph if _EXACT.match(node.name or "")}
    locations = {node for node in graph if node.domain == DOMAIN}
    # A merge's sizes, choice and evidence stay exact, like a reorganization's scores; its tokens may be evidence too.
    given = [value for node in locations for value in node.inputs[1:] if value is not node.inputs[0]]
    made = {value.producer() for value in given if value is not None}
    found |= {node for node in made if node is not None and node not in locations and not _is_linear(node)}
    pending = [value for node in found for value in node.inputs]
    while pending:
        value = pending.pop()
        node = value.producer() if value is not None else None
        if node is None or node in found or node in locations or _is_linear(node):
            continue
        uses = [use for output in node.outputs if _is_float(output) for use in output.uses()]
        if all(use.node in found or (use.node in locations and use.idx > 0) for use in uses):
            found.add(node)
            pending.extend(node.inputs)
    for node in graph:
        numbers = [v for v in node.inputs if v is not None and _is_float(v) and not v.is_initializer()]
        # A value that is expanded, such as a mask for every query, can be rounded before that.
        if (
            node not in locations
            and node.op_type != "Expand"
            and numbers
            and all(_is_exact(value, found) for value in numbers)
        ):
            found.add(node)
    # Added last, so that nothing before it is included: an embedding is computed in the model's precision, then scaled.
    return found | {node for node in graph if _NORMALIZE.match(node.name or "")}


def _is_linear(node: onnx_ir.Node) -> bool:
    weight = node.inputs[1] if node.op_type in ("Gemm", "MatMul") else None
    return weight is not None and weight.is_initializer()


def _is_exact(value: onnx_ir.Value, exact: set[onnx_ir.Node]) -> bool:
    """Whether a value stays in FP32, as the sizes of merged tokens do."""
    node = value.producer()
    return node in exact or (node is not None and node.domain == DOMAIN and value.index() == 1)


def _is_float(value: onnx_ir.Value) -> bool:
    return value.dtype in (DataType.FLOAT, *_TYPES.values())


def _refuse_too_large(graph: onnx_ir.Graph, exact: set[onnx_ir.Node], precision: str) -> None:
    """Raises for a weight outside the type's range: it would become infinite, and so would the logits."""
    large = []
    for value in graph.initializers.values():
        if value.dtype == DataType.FLOAT and not all(use.node in exact for use in value.uses()):
            greatest = float(np.abs(array_of(value)).max(initial=0.0))
            if not greatest <= _LARGEST[precision]:
                large.append(f"{value.name} ({greatest:.3g})")
    if large:
        raise InputError(
            f"weights that {precision} cannot hold: {first_few(large, 5)}",
            seen=len(large),
            wanted=f"at most {_LARGEST[precision]:g}",
            fix="Use --precision bf16, whose range is that of FP32."
            if precision == "fp16"
            else "Use --precision fp32.",
        )


def _as_type(value: onnx_ir.Value, low: DataType) -> onnx_ir.TensorProtocol:
    array = array_of(value)
    narrow = array.astype(low.numpy())
    scales = any(use.node.op_type in ("QuantizeLinear", "DequantizeLinear") and use.idx == 1 for use in value.uses())
    if scales:  # a scale below the type's smallest number would become 0, and division by it infinite
        narrow = np.where((array != 0) & (narrow == 0), ml_dtypes.finfo(low.numpy()).smallest_subnormal, narrow)
        narrow = narrow.astype(low.numpy())
    return onnx_ir.tensor(narrow, name=value.name)


def _widen(
    graph: onnx_ir.Graph, value: onnx_ir.Value, before: onnx_ir.Node, widened: dict[onnx_ir.Value, onnx_ir.Value]
) -> onnx_ir.Value:
    """The same value in FP32, by a ``Cast`` that all its uses share; weights of the scores are FP32 already."""
    if value.is_initializer() and value.dtype == DataType.FLOAT:
        return value
    if value not in widened:
        cast = onnx_ir.node("Cast", [value], {"to": DataType.FLOAT}, name=f"{value.name}.fp32")
        cast.outputs[0].name, cast.outputs[0].dtype = cast.name, DataType.FLOAT
        cast.outputs[0].shape = value.shape
        graph.insert_before(before, cast)
        widened[value] = cast.outputs[0]
    return widened[value]


def _narrow(
    graph: onnx_ir.Graph, value: onnx_ir.Value, low: DataType, narrowed: dict[onnx_ir.Value, onnx_ir.Value]
) -> onnx_ir.Value:
    """An FP32 value in the lower type, by a ``Cast`` after its producer that all its uses share."""
    if value not in narrowed:
        cast = onnx_ir.node("Cast", [value], {"to": low}, name=f"{value.name}.cast")
        cast.outputs[0].name, cast.outputs[0].dtype, cast.outputs[0].shape = cast.name, low, value.shape
        producer = value.producer()
        assert producer is not None
        graph.insert_after(producer, cast)
        narrowed[value] = cast.outputs[0]
    return narrowed[value]


def _narrow_input(graph: onnx_ir.Graph, value: onnx_ir.Value, low: DataType) -> None:
    cast = onnx_ir.node("Cast", [value], {"to": low}, name=f"{value.name}.cast")
    cast.outputs[0].name, cast.outputs[0].dtype = cast.name, low
    cast.outputs[0].shape = value.shape
    for use in list(value.uses()):
        if use.node is not cast and use.node.op_type != "Shape":
            use.node.replace_input_with(use.idx, cast.outputs[0])
    graph.insert_before(graph[0], cast)


def _widen_output(graph: onnx_ir.Graph, value: onnx_ir.Value, low: DataType) -> onnx_ir.Value:
    name, value.name = value.name, f"{value.name}.{low.name.lower()}"
    cast = onnx_ir.node("Cast", [value], {"to": DataType.FLOAT}, name=f"{name}.cast")
    output = cast.outputs[0]
    output.name, output.dtype, output.shape = name, DataType.FLOAT, value.shape
    graph.append(cast)
    return output
