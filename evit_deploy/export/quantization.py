"""INT8 and FP8: Q/DQ nodes around the linear layers, with ranges learned from real images.

They are laid on top by ONNX Runtime's own quantiser: activations by one scale a tensor, weights by one a channel. What
is not quantised is FP32 where a CPU runs it, FP16 where TensorRT does.
"""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx.numpy_helper
import onnx_ir
from onnx import ModelProto
from onnx_ir import DataType

from evit_deploy.drafts import draft
from evit_deploy.errors import StageError
from evit_deploy.export.card import INPUT

_LINEAR = ("MatMul", "Gemm")
_CALIBRATION_BATCH = 8
_FP8, _FP8_LARGEST = DataType.FLOAT8E4M3FN, 448.0


def quantize(
    proto: ModelProto, precision: str, base: str, calibration: np.ndarray, exact: Sequence[str] = ()
) -> ModelProto:
    """Puts Q/DQ pairs around the linear layers, but for the nodes named as ``exact``.

    Two forms of INT8. TensorRT wants signed activations around zero and biases as they are. CPUs multiply unsigned by
    signed, and ONNX Runtime's kernels take the INT32 biases along: on DeiT-S 2.4 times as fast as the other form there,
    1.1 times in OpenVINO, and more accurate, because what comes out of Gelu is hardly ever negative (figures:
    ``tests/benchmarks/int8_forms.py``, docs/results.md).
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
                    # The sum of a linear layer is not rounded again: what follows is not quantised.
                    "OpTypesToExcludeOutputQuantization": list(_LINEAR),
                    # Not CalibMaxIntermediateOutputs: it throws the ranges of earlier batches away.
                },
            )
        except Exception as error:  # the quantiser raises whatever its parts raise
            text = str(error).strip().splitlines()
            raise StageError(f"ONNX Runtime's quantiser failed: {text[0] if text else type(error).__name__}") from error
        quantized = onnx.load(target)
    return _as_fp8(quantized, proto) if precision == "fp8" else quantized


def array_of(value: onnx_ir.Value) -> np.ndarray:
    """A constant as an array."""
    assert value.const_value is not None
    return value.const_value.numpy()


def _as_fp8(quantized: ModelProto, original: ModelProto) -> ModelProto:
    """The same Q/DQ pairs in FP8 (E4M3), their scales such that the largest value seen becomes the largest of FP8.

    The quantiser's own FP8 takes a scale from the standard deviation instead, which cuts off the outliers of a ViT.
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
        else:  # a weight with a scale for each output: [out, in] of a Gemm, [in, out] of a MatMul
            array = onnx.numpy_helper.to_array(weights[name.removesuffix("_quantized")])
            scale = next(array_of(use.node.inputs[1]) for use in value.uses())  # type: ignore[arg-type]
            axis = next(use.node.attributes["axis"].as_int() for use in value.uses())
            array = array / np.expand_dims(scale, 1 - axis)
        value.const_value = onnx_ir.tensor(array.astype(_FP8.numpy()), name=name)
        value.dtype = _FP8
    return onnx_ir.to_proto(model)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """The quantiser logs to the root logger and prints."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(None):
            yield
    finally:
        root.setLevel(level)
