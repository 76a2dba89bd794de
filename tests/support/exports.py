"""Exported files, one per kind of model because exporting takes seconds, and functions to inspect them."""

import copy
from typing import Any

import msgspec
import numpy as np
import onnx
import onnx.numpy_helper
import pytest
import torch
from onnx import ModelProto

from evit_deploy.export.card import INPUT, read_card, write_card
from evit_deploy.export.portable import export_onnx
from evit_deploy.export.precision import QUANTIZED, set_precision
from evit_deploy.runtimes.onnxruntime import OnnxRuntimeRunner
from evit_deploy.tokens.choices import FLOOR
from evit_deploy.tokens.plan import TokenSpec
from evit_deploy.tokens.reduce import reduce_tokens_
from tests.support.models import KEEP, KINDS, images, of_kind, preprocess_for

DROP = TokenSpec(keep_rate=(0.8, 0.5), locations=(0, 2), fuse=False)

# Cache of exports, which take seconds each.
EXPORTED = [(kind, KEEP) for kind in KINDS] + [("distilled", DROP)]
each = pytest.mark.parametrize(
    ("kind", "spec"), EXPORTED, ids=[f"{kind}{'' if spec is KEEP else ', no fusion'}" for kind, spec in EXPORTED]
)


_files: dict[tuple[str, ...], ModelProto] = {}


def exported(kind: str, spec: TokenSpec | None = KEEP) -> ModelProto:
    """A model's portable file; ``None`` for the dense twin. Shared: copy it to change it."""
    key = kind, repr(spec)
    if key not in _files:
        model = of_kind(kind) if spec is None else reduced(kind, spec)
        _files[key] = export_onnx(model, name=KINDS[kind][0], preprocess=preprocess_for(model))
    return _files[key]


def lowered(kind: str, precision: str, base: str = "fp32", spec: TokenSpec | None = KEEP) -> ModelProto:
    """The same in another precision. Shared: copy it to change it."""
    key = kind, repr(spec), precision, base
    if key not in _files:
        calibration = calibration_of(kind) if precision in QUANTIZED else None
        _files[key] = set_precision(exported(kind, spec), precision, base=base, calibration=calibration)
    return _files[key]


def calibration_of(kind: str) -> np.ndarray:
    """Calibration inputs: distributed like test inputs, but different; three batches of the quantizer."""
    return images(of_kind(kind), 24, seed=1)


def reduced(kind: str, spec: TokenSpec = KEEP) -> Any:
    return reduce_tokens_(of_kind(kind), spec)


def copied(proto: ModelProto) -> ModelProto:
    other = ModelProto()
    other.CopyFrom(proto)
    return other


def widened(proto: ModelProto) -> ModelProto:
    """Converts a BF16 file to FP32 arithmetic with rounded weights, because ONNX Runtime's CPU provider has no BF16."""
    wide = copied(proto)
    low, high = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT
    for tensor in wide.graph.initializer:
        if tensor.data_type == low:
            array = onnx.numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    for info in wide.graph.value_info:
        if info.type.tensor_type.elem_type == low:
            info.type.tensor_type.elem_type = high
    for node in nodes(wide, "Cast"):
        for attribute in node.attribute:
            attribute.i = high if attribute.i == low else attribute.i
    card = read_card(proto)
    assert card is not None
    write_card(wide, msgspec.structs.replace(card, precision="fp32"))
    onnx.checker.check_model(wide, full_check=True)
    return wide


def operators(proto: ModelProto) -> list[str]:
    return [node.op_type for node in proto.graph.node]


def nodes(proto: ModelProto, operator: str) -> list[onnx.NodeProto]:
    return [node for node in proto.graph.node if node.op_type == operator]


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    found = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in found.items()}


def shape(info: onnx.ValueInfoProto) -> list[int | str]:
    return [size.dim_param or size.dim_value for size in info.type.tensor_type.shape.dim]


def answers(proto: ModelProto, inputs: np.ndarray, *, indices: bool = False) -> dict[str, np.ndarray]:
    with OnnxRuntimeRunner(proto, threads=1, with_indices=indices) as runner:
        return runner.infer({INPUT: inputs})


def assert_close(answer: np.ndarray, model: Any, inputs: np.ndarray) -> None:
    """Asserts an error of at most twice PyTorch's own in FP32, relative to the model in FP64."""
    with torch.inference_mode():
        eager = model(torch.from_numpy(inputs)).numpy()
        exact = copy.deepcopy(model).double()(torch.from_numpy(inputs).double()).numpy()
    floor = FLOOR * np.finfo(np.float32).eps * np.abs(exact).max()
    assert answer.shape == exact.shape
    assert np.abs(answer - exact).max() <= max(2 * np.abs(eager - exact).max(), floor)
