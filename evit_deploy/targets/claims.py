"""Checks that the files of a bundle agree with its manifest: preprocessing, token counts, precision, versions.

Hashes only prove that files belong to a manifest, not that the manifest describes them correctly.
"""

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from evit_deploy.bundle.bundle import Bundle
from evit_deploy.bundle.manifest import DENSE, ENGINE, MODEL, OPENVINO, REPORT, TWIN, Manifest
from evit_deploy.documents import read_json
from evit_deploy.engines.plan_file import read_header
from evit_deploy.errors import InputError
from evit_deploy.export.card import ModelCard, parse_card, read_card
from evit_deploy.export.outline import read_outline
from evit_deploy.export.variants import block_of, reorganizations
from evit_deploy.report.report import Check, Report
from evit_deploy.tokens.plan import BlockPlan

_TYPES = {1: "float32", 6: "int32"}
"""Element types of ONNX's ``TensorProto``."""


def check_claims(bundle: Bundle) -> Report:
    """Compares the metadata in every file of a bundle with the manifest.

    Args:
        bundle: The bundle.

    Returns:
        A check for each file with metadata.

    Raises:
        InputError: A file cannot be read.
    """
    manifest, checks = bundle.manifest, []
    for name in manifest.files:
        contradictions = _CLAIMS.get(name)
        if contradictions is not None:
            found = list(contradictions(bundle.file(name), manifest))
            reason = f"{name} and the manifest contradict each other: {'; '.join(found)}" if found else ""
            checks.append(Check(f"{name} as the manifest says", len(found), 0, not found, reason))
    return Report(checks=tuple(checks))


def _of_onnx(path: Path, manifest: Manifest) -> Iterator[str]:
    proto = read_outline(path).proto
    yield from _of_card(read_card(proto), manifest, dense=False)
    given = [_tensor(info) for info in proto.graph.output]
    if [_tensor(info) for info in proto.graph.input] != _listed(manifest.inputs):
        yield "inputs"
    if given != _listed(manifest.outputs):
        yield "outputs"
    counts = [(block_of(node), *_counts(node)) for node in reorganizations(proto)]
    planned = [(row.block, *_planned(row)) for row in manifest.plan.locations]
    if counts != planned:
        yield f"token counts {counts} of the graph, {planned} of the plan"


def _of_dense(path: Path, manifest: Manifest) -> Iterator[str]:
    proto = read_outline(path).proto
    yield from _of_card(read_card(proto), manifest, dense=True)
    if reorganizations(proto):
        yield "the dense twin reduces tokens"


def _of_openvino(path: Path, manifest: Manifest, *, dense: bool = False) -> Iterator[str]:
    fields: dict[str, str] = {}
    try:
        for _, element in ElementTree.iterparse(path):
            if element.tag == "evit_deploy":
                fields = {child.tag: child.get("value", "") for child in element}
    except (ElementTree.ParseError, OSError) as error:
        raise InputError(f"not an OpenVINO model ({error})", where=path) from None
    yield from _of_card(parse_card(fields), manifest, dense=dense)


def _of_dense_openvino(path: Path, manifest: Manifest) -> Iterator[str]:
    yield from _of_openvino(path, manifest, dense=True)


def _of_card(card: ModelCard | None, manifest: Manifest, *, dense: bool) -> Iterator[str]:
    """Yields the contradictions between a model's card and the manifest."""
    if card is None:
        yield "it does not say what it is"
        return
    plan = manifest.plan.dense() if dense else manifest.plan
    expected: dict[str, Any] = {
        "kind": "reduced" if plan.locations else "dense",
        "model": manifest.model,
        "plan": plan,
        "preprocess": manifest.preprocess,
        "precision": manifest.precision,
    }
    if not dense:
        expected |= {"tokens": manifest.tokens, "unquantized": manifest.unquantized}
    for field, value in expected.items():
        own = getattr(card, field)
        if own != value:
            short = field in ("kind", "model", "precision", "preprocess", "tokens")
            yield f"{field} {own!r}, in the manifest {value!r}" if short else field


def _of_engine(path: Path, manifest: Manifest) -> Iterator[str]:
    engine = manifest.engine
    if engine is None:
        yield "the manifest does not say what it was built with"
        return
    try:
        header = read_header(path)
    except InputError as error:
        yield error.what
        return
    family = "tensorrt-rtx" if engine.target == "tensorrt-rtx" else "tensorrt"
    if header.family != family:
        yield f"a plan of {header.family}, in the manifest {family}"
    if header.version.split(".")[:3] != engine.version.split(".")[:3]:
        yield f"built with {header.version}, in the manifest {engine.version}"
    if header.gpus and set(header.gpus) != set(engine.gpus):
        yield f"for {', '.join(header.gpus)}, in the manifest {', '.join(engine.gpus)}"


def _of_report(path: Path, manifest: Manifest) -> Iterator[str]:
    report = read_json(path, Report)
    if "passed" in manifest.results and report.passed != manifest.results["passed"]:
        yield f"passed is {report.passed}, in the manifest {manifest.results['passed']}"


_CLAIMS: Mapping[str, Any] = {
    MODEL: _of_onnx,
    DENSE: _of_dense,
    OPENVINO: _of_openvino,
    TWIN + OPENVINO: _of_dense_openvino,
    ENGINE: _of_engine,
    TWIN + ENGINE: _of_engine,
    REPORT: _of_report,
}


def _tensor(info: Any) -> tuple[str, str, tuple[int | None, ...]]:
    kind = info.type.tensor_type
    shape = tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in kind.shape.dim)
    return info.name, _TYPES.get(kind.elem_type, "another type"), shape


def _listed(tensors: Any) -> list[tuple[str, str, tuple[int | None, ...]]]:
    return [(tensor.name, tensor.dtype, tuple(tensor.shape)) for tensor in tensors]


def _counts(node: Any) -> tuple[int, ...]:
    counts = {attribute.name: attribute.i for attribute in node.attribute}
    return counts.get("keep", -1), counts.get("fuse", 0)


def _planned(row: BlockPlan) -> tuple[int, ...]:
    kept = row.choice_length if row.choice == "kept" else row.keep or 0
    return kept, int(row.fused and not row.aside)
