"""Packages for Triton: what is in them, and that it belongs together."""

import hashlib
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import yaml

from evit_deploy.bundle.bundle import changed_files, read_bundle
from evit_deploy.bundle.manifest import ENGINE, GOLDEN, MANIFEST, PACKAGE
from evit_deploy.data.preprocess import Preprocess
from evit_deploy.engines.plugin.library import LIBRARY
from evit_deploy.files import sha256
from evit_deploy.recipe.options import BatchProfile
from evit_deploy.serving.deployment import METRIC_NAMES
from evit_deploy.serving.options import TritonOptions
from evit_deploy.serving.package import Package
from evit_deploy.serving.releases import RELEASES
from evit_deploy.verification.golden import load_golden
from tests.support.models import tree
from tests.support.packages import change_report, make_package, verified_on
from tests.support.plugin_files import library

text_format = pytest.importorskip("google.protobuf.text_format")
pb = pytest.importorskip("tritonclient.grpc.model_config_pb2")


def config(place: Path, name: str, file: str = "config.pbtxt"):
    return text_format.Parse((place / "model_repository" / name / file).read_text(), pb.ModelConfig())


def objects(place: Path) -> dict[str, Any]:
    """What stands in ``kubernetes.yaml``, by kind; the Service of the metrics as ``metrics``."""
    documents = list(yaml.safe_load_all((place / "kubernetes.yaml").read_text()))
    found = {document["kind"]: document for document in documents if "metrics" not in document["metadata"]["name"]}
    (found["metrics"],) = [document for document in documents if document["metadata"]["name"].endswith("-metrics")]
    assert len(found) == len(documents)
    return found


def compose(place: Path) -> dict[str, Any]:
    """The one service in ``compose.yaml``."""
    (service,) = yaml.safe_load((place / "compose.yaml").read_text())["services"].values()
    return service


def docker_line(place: Path) -> list[str]:
    """The words of ``docker run`` in the page."""
    (block,) = [part for part in (place / "README.md").read_text().split("```") if "docker run" in part]
    return shlex.split(block[block.index("docker run") :])


@pytest.fixture(scope="module")
def packaged(converted, tmp_path_factory) -> Path:
    """The tiny model for ONNX Runtime. Read only."""
    place, _ = make_package(
        [converted.path], "triton", name="tiny", out=tmp_path_factory.mktemp("packaged") / "package"
    )
    return place


def test_what_is_in_a_package(packaged, converted):
    folder = "model_repository/tiny"
    assert {name for name, content in tree(packaged).items() if content is not None} == {
        "Dockerfile", "README.md", "closed.sh", "compose.yaml", "golden.npz", "kubernetes.yaml",
        MANIFEST, PACKAGE, "report.json", "sbom.json",
        f"{folder}/config.pbtxt", f"{folder}/1/.keep",
        f"{folder}_preprocess/config.pbtxt", f"{folder}_preprocess/1/model.py",
        f"{folder}_model/config.pbtxt", f"{folder}_model/1/model.onnx",
    }  # fmt: skip
    assert (packaged / folder.replace("tiny", "tiny_model") / "1" / "model.onnx").read_bytes() == converted.file(
        "model.onnx"
    ).read_bytes()


def test_the_package_says_what_it_was_made_of(packaged, converted):
    made = msgspec.json.decode((packaged / PACKAGE).read_bytes(), type=Package)
    assert (made.target, made.name, made.platform, made.verified, made.doubts) == (
        "triton",
        "tiny",
        "onnxruntime",
        True,
        [],
    )
    (parent,) = made.parents
    assert (packaged / parent.source).resolve() == converted.path.resolve()
    assert not os.path.isabs(parent.source)
    assert parent.sha256 == sha256(converted.path / MANIFEST)
    assert made.server.release == max(RELEASES)
    assert made.notes == []
    contents = {name: content for name, content in tree(packaged).items() if content is not None and name != PACKAGE}
    assert made.files == {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    assert made.launch == [
        "tritonserver", "--model-repository=/models", "--model-control-mode=none", "--exit-timeout-secs=30"
    ]  # fmt: skip


def test_a_package_is_a_bundle_of_golden_answers(packaged, converted):
    """So that a roll-out is checked with nothing but the package."""
    bundle = read_bundle(packaged)
    assert changed_files(bundle) == []
    golden = load_golden(bundle.file(GOLDEN), bundle.manifest)
    np.testing.assert_array_equal(golden.logits, load_golden(converted.file(GOLDEN), converted.manifest).logits)
    parent, original = bundle.manifest.parents[0], converted.manifest.parents[0]
    assert parent.sha256 == original.sha256
    assert (packaged / parent.source).resolve() == (converted.path / original.source).resolve()


def test_the_model_is_served_as_its_manifest_says(packaged, converted):
    model = config(packaged, "tiny_model")
    (image,), (logits,) = converted.manifest.inputs, converted.manifest.outputs
    assert [(tensor.name, tuple(tensor.dims)) for tensor in model.input] == [(image.name, image.shape[1:])]
    assert [(tensor.name, tuple(tensor.dims)) for tensor in model.output] == [(logits.name, logits.shape[1:])]
    assert model.max_batch_size == 32


def test_the_same_package_twice(packaged, converted, tmp_path):
    again, _ = make_package([converted.path], "triton", name="tiny", out=packaged.with_name("again"))
    try:
        assert tree(again) == tree(packaged)
    finally:
        shutil.rmtree(again)


def test_force_replaces_a_package_and_nothing_else(own, tmp_path):
    place, _ = make_package([own.path], "triton", name="first")
    assert place == own.path.with_name("first-triton")
    second, _ = make_package([own.path], "triton", name="second", out=place, force=True)
    assert second == place
    assert not (place / "model_repository" / "first").exists()
    (place / "model_repository" / "second" / "1" / "notes.txt").write_text("mine")
    before = tree(place.parent)
    with pytest.raises(ValueError, match=r"do not belong to a bundle.*notes\.txt"):
        make_package([own.path], "triton", name="third", out=place, force=True)
    assert tree(place.parent) == before


def test_labels(own):
    names = [f"class {index}" for index in range(10)]
    file = own.path.with_name("labels.txt")
    file.write_text("".join(f"{name}\n" for name in names))
    place, _ = make_package([own.path], "triton", labels=file, name="tiny")
    for model in ("tiny", "tiny_model"):
        assert (place / "model_repository" / model / "labels.txt").read_text().splitlines() == names
        assert config(place, model).output[0].label_filename == "labels.txt"
    assert read_bundle(place).manifest.labels == names


def test_without_preprocessing(own):
    place, _ = make_package([own.path], "triton", name="tiny", triton=TritonOptions(preprocess="none", max_batch=5))
    assert [path.name for path in (place / "model_repository").iterdir()] == ["tiny_model"]
    assert config(place, "tiny_model").max_batch_size == 5
    assert "pip3" not in (place / "Dockerfile").read_text()
    assert "tiny_model" in (place / "README.md").read_text()


def test_dali(own):
    place, made = make_package([own.path], "triton", name="tiny", triton=TritonOptions(preprocess="dali"))
    assert any("near those it was verified with" in note for note in made.notes)
    preprocessing, ensemble = config(place, "tiny_preprocess"), config(place, "tiny")
    assert preprocessing.backend == "dali"
    for model in (preprocessing, ensemble):
        assert [(t.name, t.data_type, list(t.dims)) for t in model.input] == [("IMAGE", pb.TYPE_UINT8, [-1])]
    folder = place / "model_repository" / "tiny_preprocess" / "1"
    settings = msgspec.json.decode((folder / "preprocess.json").read_bytes())
    assert settings.pop("max_batch") == 32
    assert msgspec.convert(settings, Preprocess) == own.manifest.preprocess
    compile((folder / "dali.py").read_text(), "dali.py", "exec")
    assert "UINT8" in (place / "README.md").read_text()
    assert "pillow" not in (place / "Dockerfile").read_text()


def test_options_reach_the_configuration(own):
    options = TritonOptions(max_batch=7, instances=3, queue_delay=50, server="26.01")
    place, made = make_package([own.path], "triton", name="tiny", triton=options)
    model = config(place, "tiny_model")
    assert (model.max_batch_size, model.instance_group[0].count) == (7, 3)
    assert model.dynamic_batching.max_queue_delay_microseconds == 50
    assert (made.server.release, made.server.onnxruntime) == ("26.01", "1.23.2")
    assert any("keeps the memory of compressed bodies" in note for note in made.notes)
    assert "tritonserver:26.01-py3" in (place / "Dockerfile").read_text()


def test_openvino(own):
    (own.path / "openvino").mkdir()
    for name in ("model.xml", "model.bin"):
        (own.path / "openvino" / name).write_text(name)
    bundle = change_report(own, verified_on("openvino"))
    place, _ = make_package([bundle.path], "triton", platform="openvino", name="tiny")
    folder = place / "model_repository" / "tiny_model"
    assert {path.name for path in (folder / "1").iterdir()} == {"model.xml", "model.bin"}
    model = config(place, "tiny_model")
    assert (model.backend, model.max_batch_size) == ("openvino", 1)
    assert "--gpus" not in (place / "README.md").read_text()
    assert "nvidia" not in (place / "compose.yaml").read_text() + (place / "kubernetes.yaml").read_text()


# ---- plans


def test_a_plan_is_preferred(planned):
    bundle = planned()
    place, made = make_package([bundle.path], "triton", name="tiny", gpus=["sm80"])
    assert made.platform == "tensorrt"
    model = config(place, "tiny_model")
    assert (model.platform, model.max_batch_size) == ("tensorrt_plan", 8)
    assert (place / "model_repository" / "tiny_model" / "1" / "model.plan").read_bytes() == bundle.file(
        ENGINE
    ).read_bytes()
    assert not (place / "model_repository" / "tiny_model" / "configs").exists()
    assert made.server.release == "26.07"
    assert any("not the exact version" in note for note in made.notes)
    assert make_package([bundle.path], "triton", platform="onnxruntime", unverified=True)[1].platform == "onnxruntime"


def test_plans_for_several_gpus(planned):
    bundles = [planned("sm80"), planned("sm90"), planned("sm120")]
    place, made = make_package([b.path for b in bundles], "triton", name="tiny", gpus=["sm120", "SM80", "sm90"])
    files = dict(config(place, "tiny_model").cc_model_filenames)
    assert files == {"8.0": "model_sm80.plan", "9.0": "model_sm90.plan", "12.0": "model_sm120.plan"}
    for gpu, bundle in zip(("8.0", "9.0", "12.0"), bundles, strict=True):
        version = place / "model_repository" / "tiny_model" / "1"
        assert (version / files[gpu]).read_bytes() == bundle.file(ENGINE).read_bytes()
    assert [parent.sha256 for parent in made.parents] == [sha256(b.path / MANIFEST) for b in bundles]


def test_the_server_s_tensorrt_may_be_told_exactly(planned):
    options = TritonOptions(server="26.10", server_tensorrt="11.1.0")
    _, made = make_package([planned().path], "triton", triton=options)
    assert made.server.tensorrt == "11.1.0"
    assert made.notes == []


def test_a_version_compatible_plan_runs_on_later_servers(planned):
    bundle = planned(version="10.15.1.29", options={"version_compatible": True})
    place, made = make_package([bundle.path], "triton", triton=TritonOptions(server="26.07"))
    assert made.launch[-1] == "--backend-config=tensorrt,version-compatible=true"
    assert made.launch[-1] in (place / "README.md").read_text()


def test_a_hardware_compatible_plan_serves_other_gpus(planned):
    bundle = planned("sm80", options={"hardware_compatible": True})
    make_package([bundle.path], "triton", gpus=["sm80", "sm90"])


def test_the_plugin_comes_along_and_is_loaded(planned, tmp_path):
    (tmp_path / "built").mkdir()
    built = library(tmp_path / "built" / "any name.so")
    bundle = planned(plugin=sha256(built))
    place, made = make_package([bundle.path], "triton", name="tiny", plugin=built)
    assert (place / "plugins" / LIBRARY).read_bytes() == built.read_bytes()
    assert made.plugin == sha256(built)
    assert made.launch[-1] == f"--backend-config=tensorrt,plugins=/plugins/{LIBRARY}"
    assert "COPY --chown=0:0 --chmod=755 plugins /plugins" in (place / "Dockerfile").read_text()
    assert made.launch[-1] in (place / "README.md").read_text()
    for document in ("compose.yaml", "kubernetes.yaml"):
        assert made.launch[-1] in (place / document).read_text()


# ---- who reaches it, and what it may do


def test_nothing_but_this_machine_reaches_the_ports_unless_asked(packaged):
    ports = compose(packaged)["ports"]
    assert ports == [f"127.0.0.1:{port}:{port}" for port in (8000, 8001, 8002)]
    words = docker_line(packaged)
    assert [words[at + 1] for at, word in enumerate(words) if word == "-p"] == ports
    found = objects(packaged)
    assert found["Service"]["spec"]["type"] == found["metrics"]["spec"]["type"] == "ClusterIP"
    policy = found["NetworkPolicy"]["spec"]
    assert (policy["policyTypes"], policy["egress"]) == (["Ingress", "Egress"], [])
    requests, metrics = policy["ingress"]
    assert requests["from"] == [{"podSelector": {}}]  # of the same namespace: no namespaceSelector beside it
    assert [port["port"] for port in requests["ports"]] == [8000, 8001]
    assert metrics["from"][0]["podSelector"]["matchLabels"] == {"app.kubernetes.io/name": "prometheus"}
    assert [port["port"] for port in metrics["ports"]] == [8002]


def test_published_where_it_was_asked_and_metrics_never(own):
    place, _ = make_package([own.path], "triton", name="tiny", triton=TritonOptions(publish="network"))
    ports = ["8000:8000", "8001:8001", "127.0.0.1:8002:8002"]
    assert compose(place)["ports"] == ports
    words = docker_line(place)
    assert [words[at + 1] for at, word in enumerate(words) if word == "-p"] == ports
    found = objects(place)
    assert (found["Service"]["spec"]["type"], found["metrics"]["spec"]["type"]) == ("LoadBalancer", "ClusterIP")
    requests, metrics = found["NetworkPolicy"]["spec"]["ingress"]
    assert "from" not in requests
    assert metrics["from"]
    assert "put a gateway" in (place / "README.md").read_text()


def test_the_container_has_no_rights_and_no_files_to_write(packaged):
    service, words = compose(packaged), docker_line(packaged)
    assert (service["read_only"], service["user"], service["cap_drop"]) == (True, "1000:1000", ["ALL"])
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["deploy"]["resources"]["limits"] == {"cpus": "4", "memory": "7G"}
    assert {"--read-only", "no-new-privileges", "ALL", "7g"} <= set(words)
    pod = objects(packaged)["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"] == {
        "runAsNonRoot": True, "runAsUser": 1000, "runAsGroup": 1000, "fsGroup": 1000,
        "seccompProfile": {"type": "RuntimeDefault"},
    }  # fmt: skip
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}
    }  # fmt: skip
    assert container["resources"]["limits"] == container["resources"]["requests"]
    assert container["resources"]["limits"] == {"cpu": "4", "memory": "7Gi", "nvidia.com/gpu": 1}
    assert pod["automountServiceAccountToken"] is False
    written = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert written == {"/tmp", "/dev/shm"}
    assert all("emptyDir" in volume and "sizeLimit" in volume["emptyDir"] for volume in pod["volumes"])
    lines = (packaged / "Dockerfile").read_text().splitlines()
    assert lines[0] == f"FROM nvcr.io/nvidia/tritonserver:{max(RELEASES)}-py3"
    assert lines.index("USER 1000:1000") > max(at for at, line in enumerate(lines) if line.startswith(("COPY", "RUN")))


def test_there_is_time_to_drain(packaged):
    """Out of the Service first, asked to end then, ended by force last."""
    pod = objects(packaged)["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    sleep, drain = container["lifecycle"]["preStop"]["exec"]["command"]
    (waits,) = [int(word.split("=")[1]) for word in container["args"] if word.startswith("--exit-timeout-secs")]
    assert sleep == "sleep"
    assert int(drain) >= 2 * container["readinessProbe"]["periodSeconds"]
    assert pod["terminationGracePeriodSeconds"] > int(drain) + waits
    assert int(compose(packaged)["stop_grace_period"].removesuffix("s")) > waits


def test_interfaces_are_closed(packaged):
    entrypoint = next(
        line for line in (packaged / "Dockerfile").read_text().splitlines() if line.startswith("ENTRYPOINT")
    )
    words = msgspec.json.decode(entrypoint.removeprefix("ENTRYPOINT "))
    assert words[1:] == ["/closed.sh", "model-repository,shared-memory,trace,logging"]
    assert "COPY --chown=0:0 --chmod=755 closed.sh /closed.sh" in (packaged / "Dockerfile").read_text()


def test_shared_memory_where_it_was_asked(own, packaged):
    assert "ipc" not in compose(packaged)
    assert compose(packaged)["shm_size"] == "1gb"  # the server's own, for its Python processes
    place, _ = make_package([own.path], "triton", name="tiny", triton=TritonOptions(shared_memory=True))
    assert '"model-repository,trace,logging"' in (place / "Dockerfile").read_text()
    assert compose(place)["ipc"] == "host"
    assert "--ipc host" in " ".join(docker_line(place))


def test_no_shared_memory_where_nothing_needs_it(own):
    place, _ = make_package([own.path], "triton", name="tiny", triton=TritonOptions(preprocess="none"))
    assert "shm" not in (place / "compose.yaml").read_text() + (place / "kubernetes.yaml").read_text()
    assert "--shm-size" not in docker_line(place)


def test_the_variant_for_the_cpu_asks_for_no_gpu(own):
    options = TritonOptions(device="cpu", cpus=6, memory=5)
    place, _ = make_package([own.path], "triton", name="tiny", triton=options)
    for name in ("README.md", "compose.yaml", "kubernetes.yaml"):
        text = (place / name).read_text().split("## Monitor it")[0]
        assert "gpu" not in text.lower().replace("and, if used, a gpu", "")
    model = config(place, "tiny_model")
    assert model.instance_group[0].kind == pb.ModelInstanceGroup.KIND_CPU
    assert model.parameters["intra_op_thread_count"].string_value == "6"
    assert compose(place)["deploy"] == {"resources": {"limits": {"cpus": "6", "memory": "5G"}}}


def test_the_server_s_image_can_be_pinned_by_its_digest(own):
    digest = "sha256:" + "a1" * 32
    place, made = make_package(
        [own.path], "triton", name="tiny", triton=TritonOptions(server="26.01", server_digest=digest)
    )
    assert (place / "Dockerfile").read_text().startswith(f"FROM nvcr.io/nvidia/tritonserver:26.01-py3@{digest}\n")
    assert made.server.digest == digest


def test_a_whole_batch_goes_over_http(planned):
    """Triton takes 64 MiB of a request unless it is said to take more."""
    bundle = planned(profiles=(BatchProfile(1, 8, 2000),))
    _, made = make_package([bundle.path], "triton", name="tiny")
    side = bundle.manifest.inputs[0].shape[-1]
    (limit,) = [int(word.split("=")[1]) for word in made.launch if word.startswith("--http-max-input-size")]
    assert limit == 2000 * 3 * side * side * 4 + (1 << 20)


@pytest.mark.parametrize(
    "options",
    [
        TritonOptions(),
        TritonOptions(device="cpu"),
        TritonOptions(publish="network", shared_memory=True),
        TritonOptions(preprocess="none"),
    ],
    ids=["default", "cpu", "network", "inputs"],
)
def test_the_files_hold_to_their_schemas(own, options):
    """Kubernetes' own schemas, unknown fields refused, and that of the Compose specification."""
    kubernetes = pytest.importorskip("kubernetes_validate")
    jsonschema = pytest.importorskip("jsonschema")
    vendored = pytest.importorskip("check_jsonschema.builtin_schemas")
    place, _ = make_package([own.path], "triton", name="tiny", triton=options)
    for document in yaml.safe_load_all((place / "kubernetes.yaml").read_text()):
        kubernetes.validate(document, "1.30", strict=True)
    schema = vendored.get_builtin_schema("vendor.compose-spec")
    jsonschema.validate(yaml.safe_load((place / "compose.yaml").read_text()), schema)


# ---- what starts it


def test_the_launch_line_is_the_same_everywhere(packaged):
    made = msgspec.json.decode((packaged / PACKAGE).read_bytes(), type=Package)
    words = docker_line(packaged)
    assert words[words.index("evit-tiny") + 1 :] == made.launch
    assert msgspec.json.decode((packaged / "Dockerfile").read_text().split("CMD ")[1]) == made.launch
    assert compose(packaged)["command"] == made.launch
    (container,) = objects(packaged)["Deployment"]["spec"]["template"]["spec"]["containers"]
    assert container["args"] == made.launch


def test_probes_ports_and_metrics(packaged):
    found = objects(packaged)
    deployment = found["Deployment"]
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    paths = {name: container[name]["httpGet"]["path"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    ready, live = "/v2/health/ready", "/v2/health/live"
    assert paths == {"startupProbe": ready, "readinessProbe": ready, "livenessProbe": live}
    assert {port["containerPort"] for port in container["ports"]} == {8000, 8001, 8002}
    assert [port["targetPort"] for port in found["Service"]["spec"]["ports"]] == ["http", "grpc"]
    assert [port["targetPort"] for port in found["metrics"]["spec"]["ports"]] == ["metrics"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == found["Service"]["spec"]["selector"] == labels
    assert found["metrics"]["spec"]["selector"] == labels
    for kind in ("NetworkPolicy", "PodDisruptionBudget"):
        spec = found[kind]["spec"]
        assert (spec.get("podSelector") or spec["selector"])["matchLabels"] == labels
    readme = (packaged / "README.md").read_text()
    assert all(name in readme for name in (*METRIC_NAMES, ready, live))


@pytest.mark.parametrize("name", ["deit_s-evit-k0.7", "7.B", "A" * 100, "x_" * 40])
def test_names_suit_images_and_kubernetes(name, own):
    place, made = make_package([own.path], "triton", name=name)
    assert (place / "model_repository" / f"{made.name}_model").is_dir()
    for document in objects(place).values():
        tag = document["metadata"]["name"]
        assert len(tag) <= 63
        assert tag[0].isalpha()
        assert tag[-1].isalnum()
        assert set(tag) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


def test_a_name_comes_from_the_folder(own):
    moved = own.path.rename(own.path.with_name("my model (2)"))
    _, made = make_package([moved], "triton")
    assert made.name == "my_model__2_"
