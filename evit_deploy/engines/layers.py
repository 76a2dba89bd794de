"""Layers of an engine, as listed by the engine inspector.

TensorRT 10 and 11 write different JSON; TensorRT-RTX writes that of 11. Sources: NVIDIA's page "Migrating
IEngineInspector Usage from TensorRT 10.x to 11.x", listings in NVIDIA/TensorRT#3665, #4020 and #4397, and the names of
formats in NVIDIA/TensorRT, tools/experimental/trt-engine-explorer/trex/activations.py.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from evit_deploy.errors import InputError

# The first match counts: "BFloat16" contains "Float16".
_DTYPES = (
    ("bf16", r"bfloat16|\bbf16\b"),
    ("fp8", r"\bfp8|\be4m3"),
    ("fp4", r"\bfp4"),
    ("fp16", r"\bhalf\b|\bfp16\b|\bfloat16\b"),
    ("fp32", r"\bfloat\b|\bfp32\b|\bfloat32\b|\btf32\b"),
    ("fp64", r"\bdouble\b"),
    ("uint8", r"\buint8\b"),
    ("int8", r"\bint8\b"),
    ("int4", r"\bint4\b"),
    ("int32", r"\bint32\b"),
    ("int64", r"\bint64\b"),
    ("bool", r"\bbool"),
)
_FUSED_ATTENTION = re.compile(r"_gem[mv]_mha|fmha|flash_?attention|multi_?head_?attention", re.I)
# Includes convolutions, for the patch embedding (Myelin calls them corrltn).
_MATMUL_KIND = re.compile(r"gemm|matrix_?multiply|fully_?connected|matmul|runtime_fusion|convolution|corrltn", re.I)
_MATMUL_NAME = re.compile(r"__myl_Fc|xmma_gemm|cublas", re.I)
_ATTENTION_NODE = re.compile(r"(?:^|/)Attention(?:_\d+)?$|^node_attention")
_BLOCK = re.compile(r"(?<![\w.])blocks\.(\d+)(?!\d)")


class Tensor(msgspec.Struct, frozen=True):
    """An input or output of a layer.

    Args:
        name: Its name inside the engine.
        dtype: ``fp32``, ``fp16``, ``bf16``, ``fp8``, ``int8``, ...; an unknown type as the inspector wrote it; empty if
            not listed.
        dimensions: Sizes; -1 where dynamic.
    """

    name: str
    dtype: str
    dimensions: tuple[int, ...] = ()


class Layer(msgspec.Struct, frozen=True):
    """A layer of an engine, which may contain many nodes of the model.

    Args:
        name: Its name, also used by the profiler.
        kind: The inspector's ``LayerType``: ``gemm``, ``kgen``, ``CaskConvolution``, ...
        inputs: Tensors that it reads.
        outputs: Tensors that it writes.
        tactic: The kernel, if named.
        metadata: The model's nodes that it comes from.
        weights: dtype of weights that are part of the layer rather than an input; empty without.
    """

    name: str
    kind: str = ""
    inputs: tuple[Tensor, ...] = ()
    outputs: tuple[Tensor, ...] = ()
    tactic: str = ""
    metadata: str = ""
    weights: str = ""

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names of the model's nodes in it; a node inside a function is prefixed with the function's caller."""
        found = []
        for text in re.findall(r"\[ONNX Layer: ([^\]]*)\]", self.metadata):
            # TensorRT's parser writes "inner | caller (Function)", innermost first.
            parts = [re.sub(r" \(\w+\)$", "", part) for part in text.split(" | ")]
            found.append("/".join(reversed(parts)))
        return tuple(dict.fromkeys(found))

    @property
    def blocks(self) -> tuple[int, int] | None:
        """First and last transformer block that it contributes to; ``None`` for the stem, the head, or if unknown."""
        for text in (self.metadata, self.name, " ".join(tensor.name for tensor in (*self.inputs, *self.outputs))):
            numbers = [int(number) for number in _BLOCK.findall(text)]
            if numbers:
                return min(numbers), max(numbers)
        return None

    @property
    def attention(self) -> tuple[str, ...]:
        """The model's ``Attention`` nodes in it."""
        return tuple(node for node in self.nodes if _ATTENTION_NODE.search(node))


def dtype_of(text: str) -> str:
    """Parses a dtype from the inspector's text.

    >>> dtype_of("Half"), dtype_of("Channel major FP16 format where channel % 8 == 0"), dtype_of("BFloat16")
    ('fp16', 'fp16', 'bf16')
    """
    return next((name for name, pattern in _DTYPES if re.search(pattern, text, re.I)), text)


def parse_layers(text: str) -> tuple[Layer, ...]:
    """Parses the output of ``IEngineInspector.get_engine_information`` or ``trtexec --exportLayerInfo``, of 10 or 11.

    Args:
        text: The JSON; for an engine without detailed profiling verbosity it has only the layers' names.

    Raises:
        InputError: The text is not such JSON.
    """
    try:
        document = json.loads(text, strict=False)  # metadata contain control characters, which strict JSON forbids
        rows = document["Layers"]
        return tuple(Layer(row) if isinstance(row, str) else _layer(row) for row in rows)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"not an engine inspector's listing of layers ({type(error).__name__}: {error})") from None


def _layer(row: Mapping[str, Any]) -> Layer:
    weights = row.get("Weights")
    return Layer(
        name=row["Name"],
        kind=row.get("LayerType", ""),
        inputs=tuple(_tensor(tensor) for tensor in row.get("Inputs", ())),
        outputs=tuple(_tensor(tensor) for tensor in row.get("Outputs", ())),
        tactic=str(row.get("TacticName", "")),
        metadata=row.get("Metadata", ""),
        weights=dtype_of(weights["Type"]) if isinstance(weights, dict) and "Type" in weights else "",
    )


def _tensor(row: Mapping[str, Any]) -> Tensor:
    written = next((row[key] for key in ("DataType", "Datatype", "Format/Datatype", "Format") if row.get(key)), "")
    return Tensor(row.get("Name", ""), dtype_of(written), tuple(row.get("Dimensions", ())))


def is_fused_attention(layer: Layer) -> bool:
    """Whether a layer is a single kernel for a whole attention: Q·Kᵀ, softmax and A·V."""
    if _MATMUL_KIND.search(layer.kind):  # a single matmul of an attention, whatever the layer's name
        return False
    if _FUSED_ATTENTION.search(f"{layer.name} {layer.tactic} {layer.kind}"):
        return True
    return layer.kind.lower().replace("_", "") in ("attention", "iattention", "fusedattention")


def is_opaque(layer: Layer) -> bool:
    """Whether a layer is a whole region of the graph without details in the listing."""
    return layer.name.startswith("{ForeignNode[") or layer.kind.lower() in ("myelin", "foreignnode")


def is_matmul(layer: Layer) -> bool:
    """Whether a layer multiplies matrices."""
    return bool(_MATMUL_KIND.search(layer.kind) or _MATMUL_NAME.search(f"{layer.name} {layer.tactic}"))


def compute_dtypes(layer: Layer) -> set[str]:
    """Returns the floating-point and quantized dtypes that a layer reads, without indices and the scalars α and β."""
    read = {tensor.dtype for tensor in layer.inputs if tensor.dimensions != (1,)}
    return (read | {layer.weights}) & {"fp32", "fp16", "bf16", "fp8", "fp4", "int8", "int4", "fp64"}
