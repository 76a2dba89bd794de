"""The server of the tests itself, what it makes of every packaged configuration, and the launch line."""

import http.client
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest

from evit_deploy.bundle.bundle import Bundle
from evit_deploy.export.card import LOGITS, feeds
from evit_deploy.recipe.options import BatchProfile
from evit_deploy.runtimes.triton import TritonRunner
from evit_deploy.serving.deployment import CLOSED_SCRIPT, Launch
from evit_deploy.serving.releases import declared_server
from evit_deploy.serving.repository import MODEL_FILES, Serving, write_repository
from evit_deploy.triton.client import file_sender
from evit_deploy.triton.connection import Connection, Server
from evit_deploy.triton.failures import InterfaceClosed
from evit_deploy.verification.golden import load_golden
from tests.support.triton_models import MODEL, NAME, copied, encoded, photographs
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


def launch_of(*, compatible: bool = False, **fields: Any) -> Launch:
    return Launch(NAME, declared_server(None, None, None), on_gpu=True, version_compatible=compatible, **fields)


@pytest.mark.parametrize("compatible", [False, True])
def test_the_real_binary_understands_the_launch_line(packaged, tmp_path, compatible):
    repository = Path(shutil.copytree(packaged / "model_repository", tmp_path / "models"))
    launch = launch_of(compatible=compatible, plugin="libevit_token_reorg_plugin.so")
    program, *arguments = launch.arguments(str(repository), str(tmp_path))
    assert program == "tritonserver"
    backends = tmp_path / "none"  # of the server's own: it has to end soon, with its options understood
    backends.mkdir()
    line = [*closed(packaged, launch), str(binary()), *arguments, f"--backend-directory={backends}"]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=60)
    said = done.stdout + done.stderr
    assert done.returncode == 1
    assert "failed to load all models" in said
    assert str(repository) in said
    assert "Usage" not in said
    wrong = subprocess.run([*line, "--no-such-option=x"], env=environment(), capture_output=True, text=True, timeout=60)
    assert "Usage" in wrong.stdout + wrong.stderr  # what it says of an option that it does not have


# ---- closed interfaces


def closed(package: Path, launch: Launch) -> tuple[str, ...]:
    """What the package's image puts before the server's command line."""
    return ("sh", str(package / CLOSED_SCRIPT), ",".join(launch.closed))


@pytest.fixture(scope="module")
def shut(packaged: Path) -> Iterator[TritonServer]:
    """The package's server as its files start it: the same program before it, the same arguments."""
    launch = launch_of()
    with TritonServer(
        packaged / "model_repository", *launch.arguments()[2:], control="none", before=closed(packaged, launch)
    ) as server:
        yield server


CHANGES = [
    ("POST", "/v2/repository/index", "{}"),
    ("POST", f"/v2/repository/models/{MODEL}/load", "{}"),
    ("POST", f"/v2/repository/models/{MODEL}/unload", "{}"),
    ("POST", "/v2/repository/models/evil/load", '{"parameters": {"config": "{}", "file:1/model.py": "cGFzcw=="}}'),
    ("GET", "/v2/systemsharedmemory/status", None),
    ("POST", "/v2/systemsharedmemory/region/x/register", '{"key": "/x", "offset": 0, "byte_size": 4}'),
    ("POST", "/v2/systemsharedmemory/unregister", "{}"),
    ("POST", "/v2/cudasharedmemory/region/x/register", '{"raw_handle": {"b64": ""}, "device_id": 0, "byte_size": 4}'),
    ("GET", "/v2/trace/setting", None),
    ("POST", "/v2/trace/setting", '{"trace_file": "/tmp/trace", "trace_level": ["TENSORS"]}'),
    ("POST", f"/v2/models/{MODEL}/trace/setting", '{"trace_level": ["TENSORS"]}'),
    ("GET", "/v2/logging", None),
    ("POST", "/v2/logging", '{"log_verbose_level": 9}'),
]


@pytest.mark.parametrize(("method", "path", "body"), CHANGES, ids=lambda value: str(value)[:50])
def test_what_changes_the_server_is_refused(shut, method, path, body):
    for headers in ({}, {"evit-key": ""}, {"evit-key": "0" * 64}):
        status, said = exchange(shut, method, path, body, headers)
        assert status == 403
        assert b"is restricted" in said


def test_what_changes_the_server_is_refused_over_grpc_too(shut):
    with Connection(shut.grpc) as connection:
        client = connection._client
        for ask in (
            client.get_model_repository_index,
            partial(client.load_model, MODEL),
            partial(client.unload_model, MODEL),
            client.get_system_shared_memory_status,
            partial(client.register_system_shared_memory, "x", "/x", 4),
            client.unregister_cuda_shared_memory,
            client.get_trace_settings,
            partial(client.update_trace_settings, settings={"trace_level": ["TENSORS"]}),
            client.get_log_settings,
            partial(client.update_log_settings, {"log_verbose_level": 9}),
        ):
            with pytest.raises(InterfaceClosed, match="keeps this interface closed"):
                connection._ask(ask)


def test_a_closed_server_answers_verifies_and_says_what_it_keeps_closed(shut, packaged, cli):
    for url in (shut.http, shut.grpc):
        done = cli("verify", packaged, "--url", url, "--model-name", NAME, "--json", "--batch-sizes", "1,3")
        assert done.code == 0, done.err
        cli("verify", packaged, "--url", url).refused(2, "does not list its models", "--model-name")
        cli("verify", packaged, "--url", url, "--model-name", "tinny").refused(2, "tinny")
        with Connection(url) as connection, pytest.raises(InterfaceClosed, match="--shared-memory"):
            connection.share("region", "/key", 4)


def test_shared_memory_that_was_asked_for(packaged, converted):
    launch = launch_of(shared_memory=True)
    golden = load_golden(converted.file("golden.npz"), converted.manifest)
    with TritonServer(
        packaged / "model_repository", *launch.arguments()[2:], control="none", before=closed(packaged, launch)
    ) as server:
        with TritonRunner(Server(server.http, MODEL, shared_memory=True)) as runner:
            logits = runner.infer(feeds(golden.inputs[:2]))[LOGITS]
        assert abs(logits - golden.logits[:2]).max() <= golden.limit()
        assert exchange(server, "GET", "/v2/trace/setting", None, {})[0] == 403


def test_an_operator_s_key_opens_and_one_that_is_short_does_not_start(packaged):
    key = "k" * 32
    launch = launch_of()
    before = ("env", f"EVIT_KEY={key}", *closed(packaged, launch))
    with TritonServer(packaged / "model_repository", control="none", before=before) as server:
        assert exchange(server, "GET", "/v2/logging", None, {"evit-key": key})[0] == 200
        status, said = exchange(server, "POST", f"/v2/repository/models/{MODEL}/unload", "{}", {"evit-key": key})
        assert (status, b"not allowed" in said) == (503, True)  # model control is off, whoever asks
        assert key not in server.log
    line = ["env", f"EVIT_KEY={key[:31]}", *closed(packaged, launch), "tritonserver"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert (done.returncode, "31 characters" in done.stderr) == (1, True)


def test_two_starts_have_two_keys(packaged, tmp_path):
    said = set()
    (tmp_path / "tritonserver").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "tritonserver").chmod(0o755)
    for _ in range(2):
        line = [*closed(packaged, launch_of()), str(tmp_path / "tritonserver"), "--model-repository=/models"]
        done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=True)
        first, http, grpc = done.stdout.splitlines()
        assert first == "--model-repository=/models"
        kept = "model-repository,shared-memory,trace,logging:evit-key="
        assert http.startswith(f"--http-restricted-api={kept}")
        assert grpc == f"--grpc-restricted-protocol={http.removeprefix('--http-restricted-api=')}"
        said.add(http.removeprefix(f"--http-restricted-api={kept}"))
    assert len(said) == 2
    assert all(len(key) == 64 and set(key) <= set("0123456789abcdef") for key in said)


def exchange(
    server: TritonServer, method: str, path: str, body: str | None, headers: dict[str, str]
) -> tuple[int, bytes]:
    """Status and body of an answer over HTTP."""
    with closing(http.client.HTTPConnection("127.0.0.1", server.ports[0], timeout=30)) as connection:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()


# ---- without rights


def test_it_serves_without_rights_and_with_a_root_that_it_cannot_write(packaged, converted):
    """As the files start it: no capabilities, none to be had, nothing writable but /tmp and /dev/shm."""
    take = (
        "set -e; mount --make-rprivate /; mount --bind /tmp /tmp; mount -o remount,bind,ro /; "
        'exec setpriv --no-new-privs --bounding-set=-all --inh-caps=-all "$@"'
    )
    before = ("unshare", "--mount", "sh", "-c", take, "sh")
    tried = subprocess.run([*before, "true"], capture_output=True, text=True, timeout=60)
    if tried.returncode:
        pytest.skip(f"rights cannot be taken away here: {tried.stderr.strip()}")
    launch = launch_of()
    server = TritonServer(
        packaged / "model_repository", *launch.arguments()[2:], control="none",
        before=(*before, *closed(packaged, launch)),
    )  # fmt: skip
    golden = load_golden(converted.file("golden.npz"), converted.manifest)
    with server, Connection(server.grpc) as connection:
        assert server.process is not None
        process = Path(f"/proc/{server.process.pid}")
        root = next(line.split() for line in (process / "mountinfo").read_text().splitlines() if line.split()[4] == "/")
        assert root[5].split(",")[0] == "ro"
        status = (process / "status").read_text()
        assert re.search(r"^CapEff:\t0+$", status, re.MULTILINE)
        assert re.search(r"^CapBnd:\t0+$", status, re.MULTILINE)
        assert re.search(r"^NoNewPrivs:\t1$", status, re.MULTILINE)
        logits = connection.infer(MODEL, feeds(golden.inputs[:2]))[LOGITS]
        assert abs(logits - golden.logits[:2]).max() <= golden.limit()
        send = file_sender(connection.describe(NAME))
        assert send(connection, encoded(photographs()[0], "JPEG")).shape == (10,)
