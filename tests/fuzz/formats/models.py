"""Models and engines: ONNX files, OpenVINO files and plans; as far as our own code reads them, and OpenVINO its own."""

import functools
import importlib.util
import json
import struct
from collections.abc import Mapping
from pathlib import Path

import onnx
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from onnx import ModelProto, TensorProto

from evit_deploy.bundle.manifest import MODEL, OPENVINO
from evit_deploy.engines.plan_file import read_header
from evit_deploy.export.card import load_onnx, read_card
from evit_deploy.export.openvino import openvino_card, read_openvino
from evit_deploy.export.outline import read_outline
from tests.fuzz.harness import Format
from tests.fuzz.mutations import NUMBERS, TEXTS, as_json, damaged, documents, either
from tests.fuzz.seeds import bundle


@functools.cache
def onnx_file() -> bytes:
    """The portable file of the smallest model, large weights cut short so that most changes hit the rest."""
    proto = onnx.load(bundle() / MODEL)
    for tensor in proto.graph.initializer:
        if len(tensor.raw_data) > 1 << 16:
            del tensor.dims[:]
            tensor.dims.append(1 << 14)
            tensor.raw_data = tensor.raw_data[: 1 << 16]
    return proto.SerializeToString()


@st.composite
def protos(draw: DrawFn) -> bytes:
    """Models with other properties, tensors that lie elsewhere or are of other sizes, graphs within graphs."""
    proto = ModelProto.FromString(onnx_file())
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(("card", "card", "external", "dims", "type", "nodes", "deep", "names")))
        if kind == "card":
            prop = draw(st.sampled_from(list(proto.metadata_props)))
            prop.value = draw(_texts(prop.value))
        elif kind in ("external", "dims", "type"):
            tensor = draw(st.sampled_from(list(proto.graph.initializer)))
            _change(draw, tensor, kind)
        elif kind == "nodes":
            del proto.graph.node[draw(st.integers(0, len(proto.graph.node))) :]
        elif kind == "deep":
            graph = proto.graph
            for _ in range(draw(st.sampled_from((10, 30)))):
                graph = graph.node.add(op_type="If").attribute.add(name="then_branch").g
        else:
            node = draw(st.sampled_from(list(proto.graph.node) or [proto.graph.node.add()]))
            node.op_type = draw(st.sampled_from(TEXTS))
            node.input.append(draw(st.sampled_from(TEXTS)))
    return proto.SerializeToString()


def _change(draw: DrawFn, tensor: TensorProto, kind: str) -> None:
    if kind == "external":
        tensor.data_location = TensorProto.EXTERNAL
        value = draw(st.sampled_from((*TEXTS, "/etc/passwd", "../../../etc/passwd", "model.onnx")))
        tensor.external_data.add(key="location", value=value)
        tensor.external_data.add(key="offset", value=str(draw(st.sampled_from(NUMBERS[:-1]))))
        tensor.external_data.add(key="length", value=str(draw(st.sampled_from(NUMBERS[:-1]))))
    elif kind == "dims":
        tensor.dims.append(draw(st.sampled_from([n for n in NUMBERS if -(2**63) <= n < 2**63])))
    else:
        tensor.data_type = draw(st.integers(0, 40))


@st.composite
def _texts(draw: DrawFn, text: str) -> str:
    try:
        document = json.loads(text)
    except ValueError:
        return draw(st.sampled_from(TEXTS))
    if not isinstance(document, dict | list) or not document:
        return draw(st.sampled_from(TEXTS))
    return as_json(draw(documents([document], (*TEXTS, *NUMBERS)))).decode("utf-8", "replace")


def read_onnx(path: Path) -> None:
    """What a command looks at in a file before a runtime sees it."""
    read_card(read_outline(path).proto)
    read_card(load_onnx(path))


# ---- OpenVINO


@functools.cache
def openvino_files() -> Mapping[str, bytes]:
    """The weights beside the text."""
    return {"model.bin": (bundle() / OPENVINO).with_suffix(".bin").read_bytes()}


@functools.cache
def xml() -> bytes:
    """The text of a valid model."""
    return (bundle() / OPENVINO).read_bytes()


_XML_WORDS = (
    b"<!DOCTYPE x [<!ENTITY a SYSTEM 'file:///etc/passwd'>]>", b"&a;", b"<layer>" * 500, b"<net>", b"</net>",
    b'id="-1"', b"<!--", b"<![CDATA[", b"\0",
    b'<data element_type="f64" shape="999999999999" offset="0" size="99999999999"/>',
)  # fmt: skip


def look_at_openvino(path: Path) -> None:
    """What a command asks an OpenVINO model before it is compiled."""
    openvino_card(read_openvino(path))


# ---- plans


def plans() -> list[bytes]:
    """Headers as TensorRT and TensorRT-RTX write them, with something behind."""
    plain = b"ftrt" + struct.pack("<I", 0) + bytes(16) + bytes((10, 15, 1, 29)) + bytes(200)
    rtx = b"vtrt" + struct.pack("<IQQ", 0, 0, 240) + bytes((1, 7, 1, 3)) + b"vtrt" + struct.pack("<Q", 4) + bytes(200)
    return [plain, rtx, struct.pack("<I", 20) + b'{"stride": 32}      ' + plain]


_PLAN_WORDS = (b"ftrt", b"vtrt", b"version https://git-lfs", b"\x08\x0a\x12", b"{", "é".encode() * 3000, b"a" * 5000)


def _onnx_inputs() -> SearchStrategy[bytes]:
    return either(protos(), damaged([onnx_file()]))


FORMATS = (
    Format("onnx", "model.onnx", _onnx_inputs, read_onnx),
    Format("plan", "engine.plan", lambda: damaged(plans(), _PLAN_WORDS), read_header),
)
if importlib.util.find_spec("openvino") is not None:
    FORMATS += (
        Format(
            "openvino", "model.xml", lambda: damaged([xml()], _XML_WORDS), look_at_openvino, openvino_files, share=0.1
        ),
    )
