"""Converts the portable file to OpenVINO's own format, ``model.xml`` and ``model.bin``, including the model card.

Two things are added to what OpenVINO's reader returns:

- The kept candidates get the name they have in the portable file, so that they can become outputs later.
- The nodes between a query-key product and the choice, and those that sum the fused token, are marked to stay in FP32.
  Otherwise the CPU plugin computes the scores in BF16, whose 8 bits produce many ties, unless the kept candidates are
  outputs. It then uses FP32, and observing the choice would change it.
"""

import codecs
import re
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree.ElementTree import Element

import msgspec
from onnx import ModelProto
from onnx.inliner import inline_local_functions

from evit_deploy.errors import InputError, StageError
from evit_deploy.export.card import ModelCard, card_fields, kept_name, load_onnx, parse_card, read_card
from evit_deploy.export.variants import with_indices
from evit_deploy.files.drafts import draft

if TYPE_CHECKING:
    import openvino

_SECTION = "evit_deploy"
_KEPT = kept_name(0).removesuffix("0")
_BEFORE_SCORES = {"MatMul", "Add", "Convert", "ConvertLike", "Const", "Parameter", "ShapeOf"}
_NUMBERED = re.compile(r"([A-Z][A-Za-z0-9]*)_\d+")


def import_openvino() -> Any:
    """Imports OpenVINO without its telemetry, which reports every import unless it was switched off."""
    telemetry = "openvino_telemetry"
    if "openvino" not in sys.modules and telemetry not in sys.modules:
        sys.modules[telemetry] = None  # type: ignore[assignment]  # Python's own way to say: not to be imported
        try:
            import openvino
        finally:
            del sys.modules[telemetry]
    import openvino

    return openvino


def save_openvino(model: Path | ModelProto, xml: Path) -> None:
    """Writes a portable file in OpenVINO's format, keeping the types of the weights.

    Input and output are those of the portable file; the model card is in the section ``evit_deploy`` of the model's
    ``rt_info``. The output is deterministic: equal models give equal bytes.

    Args:
        model: The portable file.
        xml: Path to write; the weights go next to it, with the suffix ``.bin``.

    Raises:
        InputError: Not an ONNX model, not exported by evit-deploy, or the name does not end in ``.xml``.
        StageError: OpenVINO does not read it, or the disk is full.
    """
    if xml.suffix != ".xml":
        raise InputError("OpenVINO models are named .xml", where=xml)
    proto = model if isinstance(model, ModelProto) else load_onnx(model)
    where = "model in memory" if isinstance(model, ModelProto) else model
    if read_card(proto) is None:
        raise InputError("evit-deploy did not write this file, so its precision is unknown", where=where)
    try:
        xml.parent.mkdir(parents=True, exist_ok=True)
        with draft(xml.parent) as making:
            written = _write(proto, making.folder, str(where))
            making.publish(written.with_suffix(".bin"), xml.with_suffix(".bin"), replace=True)
            making.publish(written, xml, replace=True)
    except OSError as error:
        raise StageError(f"could not be written ({error.strerror or error})", where=xml) from error


def openvino_model(proto: ModelProto, where: str = "model in memory") -> "openvino.Model":
    """Loads a portable file, or any other ONNX model, as the OpenVINO model that :func:`save_openvino` writes.

    Args:
        proto: The model.
        where: Its name in messages.

    Raises:
        StageError: OpenVINO does not read it, or the disk is full.
    """
    core = import_openvino().Core()
    core.set_property({"ENABLE_MMAP": False})  # mapped weights would be read from a file that is already deleted
    try:
        # OpenVINO has no function that sets the marks; they can only be added to the written file.
        with draft() as scratch:
            return core.read_model(_write(proto, scratch.folder, where))
    except OSError as error:
        raise StageError(f"could not be written ({error.strerror or error})", where=tempfile.gettempdir()) from error


def read_openvino(xml: Path) -> "openvino.Model":
    """Reads ``model.xml`` and the ``model.bin`` next to it.

    Raises:
        InputError: One of the two is missing or damaged.
    """
    for path in (xml, xml.with_suffix(".bin")):
        if not path.is_file():
            raise InputError("no such file", where=path, fix="An OpenVINO model is a .xml and a .bin side by side.")
    with xml.open("rb") as file:
        if b"<net" not in file.read(4096):  # otherwise OpenVINO tries five other formats and prints errors
            raise InputError("not an OpenVINO model (no network in it)", where=xml)
        file.seek(0)
        try:  # OpenVINO does not validate names and rt_info; it fails on first access
            for _ in codecs.iterdecode(iter(lambda: file.read(1 << 20), b""), "utf-8"):
                pass
        except UnicodeDecodeError as error:
            raise InputError(f"not an OpenVINO model (not UTF-8: {error.reason})", where=xml) from None
    try:
        model = import_openvino().Core().read_model(xml)
    except Exception as error:  # OpenVINO raises RuntimeError for everything
        raise InputError(f"not an OpenVINO model: {one_line(error)}", where=xml) from error
    return model


def openvino_card(model: "openvino.Model") -> ModelCard | None:
    """The model card; ``None`` if evit-deploy did not write the model."""
    fields = [field.name for field in msgspec.structs.fields(ModelCard) if model.has_rt_info([_SECTION, field.name])]
    return parse_card({field: model.get_rt_info([_SECTION, field]).astype(str) for field in fields})


def kept_outputs(model: "openvino.Model") -> list[str]:
    """Names of the kept candidates in a model that :func:`save_openvino` wrote, by block."""
    names = {name for node in model.get_ops() for output in node.outputs() for name in output.get_names()}
    blocks = [name.removeprefix(_KEPT) for name in names if name.startswith(_KEPT)]
    return [kept_name(block) for block in sorted(int(block) for block in blocks if block.isdigit())]


def one_line(error: Exception) -> str:
    """OpenVINO's error message, without the source locations at its start."""
    lines = [line.strip() for line in str(error).splitlines()]
    telling = [line for line in lines if line and not line.startswith(("Exception from", "Check '"))]
    return " ".join(telling)[:300] or type(error).__name__


def _write(proto: ModelProto, folder: Path, where: str) -> Path:
    """Writes ``model.xml`` and ``model.bin`` into a folder."""
    openvino = import_openvino()
    card = read_card(proto)
    bare = inline_local_functions(with_indices(proto))  # OpenVINO's reader does not support functions
    del bare.metadata_props[:]
    try:
        model = openvino.Core().read_model(bare.SerializeToString())
    except Exception as error:
        raise StageError(f"OpenVINO cannot read the model: {one_line(error)}", where=where) from error
    asked_for = {output.name for output in proto.graph.output}
    for result in model.get_results():
        _name_choice(model, result, asked_for)
    for field, value in card_fields(card).items() if card else ():
        model.set_rt_info(value, [_SECTION, field])
    xml = folder / "model.xml"
    try:
        openvino.save_model(model, xml, compress_to_fp16=False)
        text = ElementTree.parse(xml)
    except Exception as error:  # a full disk may appear as a truncated file
        raise StageError(f"OpenVINO cannot write the model: {one_line(error)}", where=where) from error
    root = text.getroot()
    end = max([int(data.get("offset", 0)) + int(data.get("size", 0)) for data in root.iter("data")], default=0)
    if xml.with_suffix(".bin").stat().st_size < end:
        raise StageError("OpenVINO wrote only part of the weights", where=where, fix="Free some disk space.")
    _mark_scores(root)
    for layer in root.iter("layer"):  # OpenVINO's generated names are numbered per process, not per model
        made_up = _NUMBERED.fullmatch(layer.get("name", ""))
        if made_up:
            layer.set("name", f"{made_up[1]}_{layer.get('id')}")
    text.write(xml, encoding="utf-8", xml_declaration=True)
    return xml


def _name_choice(model: "openvino.Model", result: "openvino.Node", asked_for: set[str]) -> None:
    """Moves the name ``kept_<block>`` from an output to the choice itself, and takes the output away."""
    names = result.input_value(0).get_names()
    name = next((name for name in names if name.startswith(_KEPT)), None)
    if name is None or name in asked_for:
        return
    model.remove_result(result)
    choice = result.input_value(0)
    while choice.get_node().get_type_name() == "Convert":  # to int32
        choice = choice.get_node().input_value(0)
    choice.set_names({name})  # must be the only name, or runtimes may use another


def _mark_scores(root: Element) -> None:
    layers = {layer.get("id"): layer for layer in root.iter("layer")}
    before: dict[str | None, list[str | None]] = {number: [] for number in layers}
    after: dict[str | None, list[str | None]] = {number: [] for number in layers}
    for edge in root.iter("edge"):
        before[edge.get("to-layer")].append(edge.get("from-layer"))
        after[edge.get("from-layer")].append(edge.get("to-layer"))
    kinds = {number: str(layer.get("type")) for number, layer in layers.items()}

    def constant(number: str | None) -> bool:
        return kinds[number] == "Const" or any(constant(o) for o in before[number] if kinds[number] == "Convert")

    def compares(number: str | None) -> bool:  # compares tokens with each other, without weights
        return kinds[number] == "MatMul" and not any(map(constant, before[number]))

    def scoring(number: str | None) -> Iterator[str | None]:
        yield number
        for other in before[number]:
            if kinds[other] not in _BEFORE_SCORES or compares(other):
                yield from scoring(other)

    def summing(number: str | None) -> Iterator[str | None]:
        yield number
        for other in after[number] if kinds[number] not in ("MatMul", "Divide") else ():
            yield from summing(other)

    def floats(number: str | None) -> bool:
        port = layers[number].find("output/port")
        return port is not None and str(port.get("precision")).startswith(("FP", "BF"))

    choices = [number for number, kind in kinds.items() if kind == "TopK"]
    marked = {number for choice in choices for number in scoring(choice)}
    rests = [number for number, kind in kinds.items() if kind == "ScatterElementsUpdate" and floats(number)]
    marked |= {number for rest in rests for number in summing(rest)} if choices else set()
    for number, layer in layers.items():
        if number in marked:
            _keep_fp32(layer)


def _keep_fp32(layer: Element) -> None:
    data, info = layer.find("data"), layer.find("rt_info")
    if info is None:
        info = Element("rt_info")
        layer.insert(0 if data is None else 1, info)
    ElementTree.SubElement(info, "attribute", name="precise", version="0")
    # The plugin converts newer Softmax versions to the first one and loses the mark; with a nonnegative axis they are
    # equal.
    if layer.get("type") == "SoftMax" and data is not None and int(data.get("axis", -1)) >= 0:
        layer.set("version", "opset1")
