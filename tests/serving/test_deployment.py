"""The server of the tests itself, what it makes of every packaged configuration, and the launch line."""

import shutil
import socket
import subprocess
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from evit_deploy.bundle.bundle import Bundle
from evit_deploy.export.card import LOGITS, feeds
from evit_deploy.recipe.options import BatchProfile
from evit_deploy.serving.deployment import Launch, declared_server
from evit_deploy.serving.repository import MODEL_FILES, Serving, write_repository
from evit_deploy.triton.connection import Connection
from evit_deploy.verification.golden import load_golden
from tests.support.triton_models import MODEL, NAME, copied
from tests.support.triton_server import TritonServer, binary, environment

pytestmark = pytest.mark.triton


# ---- a server that does not start


def test_a_server_that_never_gets_ready(packaged, tmp_path):
    repository = copied(packaged, tmp_path / "models", slow_ms=60_000)  # its warm-up never ends
    server = TritonServer(repository, ready=4)
    with pytest.raises(RuntimeError, match=r"was not ready within 4 s; its last words:\n") as caught, server:
        pass
    assert MODEL in str(caught.value)
    assert server.process is None


def test_a_model_that_does_not_load(packaged, tmp_path):
    repository = copied(packaged, tmp_path / "models")
    (repository / MODEL / "1" / "model.onnx").write_bytes(b"no model")
    with pytest.raises(RuntimeError, match=r"ended with 1; its last words:(.|\n)*failed to load all models"):
        TritonServer(repository).start()


def test_a_port_in_use(packaged):
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        server = TritonServer(packaged / "model_repository")
        server.ports = (server.ports[0], port, server.ports[2])
        with pytest.raises(RuntimeError, match=r"ended with 1(.|\n)*failed to start GRPC service(.|\n)*in use"):
            server.start()


# ---- configurations


def served_as(bundle: Bundle, platform: str, tmp_path: Path, **more: object) -> Path:
    """A repository as it is packaged for a platform; the server of the tests has no GPU, so that this is changed."""
    manifest = bundle.manifest
    serving = Serving(
        NAME, platform, manifest.inputs, manifest.outputs, max_batch=8, preprocess=manifest.preprocess,
        labels=[f"class {number}" for number in range(10)],
    )  # fmt: skip
    files = {MODEL_FILES[platform]: bundle.file("model.onnx")}
    write_repository(msgspec.structs.replace(serving, **more), files, tmp_path / "models")
    config = tmp_path / "models" / MODEL / "config.pbtxt"
    config.write_text(config.read_text().replace("KIND_GPU", "KIND_CPU"))
    return tmp_path / "models"


@pytest.mark.parametrize(
    ("platform", "more"),
    [
        ("onnxruntime", {}),
        ("openvino", {}),
        ("tensorrt", {"profiles": (BatchProfile(1, 4, 8),)}),
        ("tensorrt", {"profiles": (BatchProfile(1, 1, 1), BatchProfile(2, 4, 8)), "instances": 2}),
        ("tensorrt", {"profiles": (BatchProfile(1, 4, 8),), "plans": {"8.0": "model.plan", "9.0": "model.plan"}}),
    ],
    ids=["onnxruntime", "openvino", "one profile", "two profiles", "plans for two GPUs"],
)
def test_the_server_accepts_every_packaged_configuration(converted, tmp_path, platform, more):
    """Parsed, checked and served by the real server; the ONNX file stands in for the plan and for OpenVINO's."""
    repository = served_as(converted, platform, tmp_path, **more)
    golden = load_golden(converted.file("golden.npz"), converted.manifest)
    with TritonServer(repository, onnx=converted.file("model.onnx")) as server, Connection(server.http) as connection:
        assert {name: reason for name, reason in connection.models().items() if reason} == {}
        assert connection.describe(MODEL).max_batch == 8
        logits = connection.infer(MODEL, feeds(golden.inputs[:8]))[LOGITS]
        assert abs(logits - golden.logits[:8]).max() <= golden.limit()
        warmed = connection.statistics(MODEL)["batch_stats"]
        assert 8 in {row["batch_size"] for row in warmed}


def test_the_labels_are_given_out(converted, tmp_path):
    golden = load_golden(converted.file("golden.npz"), converted.manifest)
    repository = served_as(converted, "onnxruntime", tmp_path)
    with TritonServer(repository) as server, Connection(server.http) as connection:
        ranked = connection._module.InferRequestedOutput(LOGITS, class_count=1)
        answer = connection.request(MODEL, connection.inputs_of(feeds(golden.inputs[:2])), [ranked])
        best = [text.decode().split(":") for text in answer.as_numpy(LOGITS).ravel()]
    assert [int(number) for _, number, _ in best] == golden.logits[:2].argmax(axis=1).tolist()
    assert [label for *_, label in best] == [f"class {n}" for n in golden.logits[:2].argmax(axis=1)]


# ---- the launch line


@pytest.mark.parametrize("compatible", [False, True])
def test_the_real_binary_understands_the_launch_line(packaged, tmp_path, compatible):
    repository = Path(shutil.copytree(packaged / "model_repository", tmp_path / "models"))
    launch = Launch(
        NAME, declared_server(None, None, None), on_gpu=True, plugin="libevit_token_reorg_plugin.so",
        version_compatible=compatible,
    )  # fmt: skip
    program, *arguments = launch.arguments(str(repository), str(tmp_path))
    assert program == "tritonserver"
    backends = tmp_path / "none"  # of the server's own: it has to end soon, with its options understood
    backends.mkdir()
    line = [str(binary()), *arguments, f"--backend-directory={backends}"]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=60)
    said = done.stdout + done.stderr
    assert done.returncode == 1
    assert "failed to load all models" in said
    assert str(repository) in said
    assert "Usage" not in said
    wrong = subprocess.run([*line, "--no-such-option=x"], env=environment(), capture_output=True, text=True, timeout=60)
    assert "Usage" in wrong.stdout + wrong.stderr  # what it says of an option that it does not have
