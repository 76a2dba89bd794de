"""The bill of materials of a package: it holds to CycloneDX's schema, and says what is in the package."""

import json
from pathlib import Path
from typing import Any

import pytest

from evit_deploy.bundle.manifest import MANIFEST, PACKAGE
from evit_deploy.files import sha256
from evit_deploy.serving.options import TritonOptions
from tests.support.models import tree
from tests.support.packages import change_report, make_package, verified_on

pytest.importorskip("tritonclient.grpc.model_config_pb2")
DIGEST = "sha256:" + "0f" * 32


def bill(place: Path) -> dict[str, Any]:
    """``sbom.json``, once CycloneDX's own schema has taken it."""
    validation = pytest.importorskip("cyclonedx.validation.json")
    schema = pytest.importorskip("cyclonedx.schema")
    text = (place / "sbom.json").read_text()
    assert validation.JsonStrictValidator(schema.SchemaVersion.V1_6).validate_str(text) is None
    return json.loads(text)


def by_name(document: dict[str, Any]) -> dict[str, Any]:
    return {component["name"]: component for component in document["components"]}


def test_a_wrong_bill_is_refused_by_the_schema(own, tmp_path):
    """That what the other tests ask says anything."""
    place, _ = make_package([own.path], "triton", name="tiny")
    document = bill(place)
    document["components"][0]["type"] = "model"
    (tmp_path / "sbom.json").write_text(json.dumps(document))
    with pytest.raises(AssertionError):
        bill(tmp_path)


def test_the_bill_of_a_package_for_triton(own):
    options = TritonOptions(server="26.01", server_digest=DIGEST)
    place, made = make_package([own.path], "triton", name="tiny", triton=options)
    document = bill(place)
    found = by_name(document)
    files = {name: part["hashes"][0]["content"] for name, part in found.items() if part["type"] == "file"}
    there = {name for name, content in tree(place).items() if content is not None} - {PACKAGE, "sbom.json"}
    assert files == {name: sha256(place / name) for name in there}
    assert made.files["sbom.json"] == sha256(place / "sbom.json")
    image = found["nvcr.io/nvidia/tritonserver"]
    assert (image["type"], image["version"]) == ("container", "26.01-py3")
    assert image["hashes"] == [{"alg": "SHA-256", "content": "0f" * 32}]
    assert {part["name"]: part["version"] for part in image["components"]} == {
        "tensorrt": "10",
        "onnxruntime": "1.23.2",
    }
    assert f"pillow=={found['pillow']['version']}" in (place / "Dockerfile").read_text()
    ancestors = found["tiny"]["pedigree"]["ancestors"]
    (checkpoint,) = own.manifest.parents
    assert [part["hashes"][0]["content"] for part in ancestors] == [checkpoint.sha256, sha256(own.path / MANIFEST)]
    assert not any("/" in part["name"] for part in ancestors)  # no paths of the machine that made it
    tools = {tool["name"]: tool["version"] for tool in document["metadata"]["tools"]["components"]}
    assert tools == own.manifest.versions


def test_the_bill_of_a_package_without_preprocessing_has_no_pillow(own):
    place, _ = make_package([own.path], "triton", name="tiny", triton=TritonOptions(preprocess="none"))
    assert "pillow" not in by_name(bill(place))


def test_the_bill_of_a_package_for_cpp(own, planned):
    (own.path / "openvino").mkdir()
    for name in ("model.xml", "model.bin"):
        (own.path / "openvino" / name).write_text(name)
    place, _ = make_package([change_report(own, verified_on("openvino")).path], "cpp", platform="openvino")
    found = by_name(bill(place))
    assert {"openvino", "nlohmann-json", "openssl", "libpng", "libjpeg-turbo"} <= set(found)
    assert "bundle/openvino/model.bin" in found
    plan = planned()
    place, _ = make_package([plan.path], "cpp")
    assert by_name(bill(place))["tensorrt"]["version"] == plan.manifest.engine.version
