"""The model card of a portable ONNX file, the names of its tensors, and reading such files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
from onnx import ModelProto, helper

import evit_deploy
from evit_deploy.data.preprocess import Preprocess
from evit_deploy.errors import InputError
from evit_deploy.tokens.plan import TokenPlan, TokenSpec

INPUT, LOGITS, EMBEDDING = "input", "logits", "embedding"
_PROPERTY = "evit_deploy."


class ModelCard(msgspec.Struct, frozen=True):
    """Metadata of a portable file, one model property per field.

    Args:
        kind: ``reduced``, ``dense`` or ``slice`` (the twins).
        model: timm name.
        tokens: The requested reduction.
        plan: The token counts.
        preprocess: From image file to input tensor.
        precision: Of weights and matrix products: ``fp32``, ``fp16``, ``bf16``, ``int8`` or ``fp8``.
        versions: Packages that made the file.
        linear: Form of the linear layers that see tokens: ``gemm``, 2-D with the bias inside, or ``matmul``, 3-D and an
            ``Add``. Files of earlier versions lack this field and use ``gemm``.
        unquantized: Names of a quantized model's linear layers that are in the base precision.
    """

    kind: str
    model: str
    tokens: TokenSpec
    plan: TokenPlan
    preprocess: Preprocess
    precision: str
    versions: dict[str, str]
    linear: str = "gemm"
    unquantized: tuple[str, ...] = ()


def kept_name(block: int) -> str:
    """Name of the output with the candidates that a block kept, int32 ``[B, K]``."""
    return f"kept_{block}"


def write_card(proto: ModelProto, card: ModelCard) -> None:
    """Writes the card into a file's metadata properties."""
    helper.set_model_props(proto, {_PROPERTY + field: value for field, value in card_fields(card).items()})
    proto.producer_name, proto.producer_version = "evit-deploy", evit_deploy.__version__


def read_card(proto: ModelProto) -> ModelCard | None:
    """Reads a file's card; ``None`` if evit-deploy did not export the file."""
    return parse_card({p.key.removeprefix(_PROPERTY): p.value for p in proto.metadata_props})


def card_fields(card: ModelCard) -> dict[str, str]:
    """Converts a card to text fields, which :func:`parse_card` reads."""
    return {
        field: value if isinstance(value, str) else msgspec.json.encode(value).decode()
        for field, value in msgspec.structs.asdict(card).items()
    }


def parse_card(found: Mapping[str, str]) -> ModelCard | None:
    """Parses a card from its text fields; ``None`` if some are missing or invalid."""
    fields = msgspec.structs.fields(ModelCard)
    if any(field.required and field.name not in found for field in fields):
        return None
    types = {field.name: field.type for field in fields if field.name in found}
    try:
        values: dict[str, Any] = {
            field: found[field] if kind is str else msgspec.json.decode(found[field], type=kind)
            for field, kind in types.items()
        }
    except msgspec.DecodeError:
        return None
    return ModelCard(**values)


def load_onnx(path: Path) -> ModelProto:
    """Reads an ONNX file.

    Raises:
        InputError: The file is missing or is not an ONNX model.
    """
    if not path.is_file():
        raise InputError("no such file", where=path, fix="Give the path of an ONNX model.")
    try:
        proto = onnx.load(path)
    except Exception as error:  # protobuf's own errors differ between its implementations
        raise InputError(f"not an ONNX model ({type(error).__name__})", where=path) from error
    if not proto.graph.node:
        raise InputError("not an ONNX model (no graph in it)", where=path)
    return proto


def feeds(images: np.ndarray) -> dict[str, np.ndarray]:
    """The input of a runner's ``infer`` for these images."""
    return {INPUT: images}
