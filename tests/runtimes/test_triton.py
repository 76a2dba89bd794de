"""``verify`` and ``profile`` against a real server: proofs, speed, and everything that can be misnamed."""

import os
import shutil
import subprocess

import msgspec
import numpy as np
import pytest

from evit_deploy.errors import InputError, MissingRequirement
from evit_deploy.export.card import LOGITS, feeds
from evit_deploy.runtimes.triton import TritonRunner
from evit_deploy.triton.connection import Connection, Server
from evit_deploy.triton.find import find_model
from evit_deploy.verification.golden import load_golden
from tests.support.triton_models import MODEL, NAME, copied, perturbed
from tests.support.triton_server import TritonServer

pytestmark = pytest.mark.triton
QUICK = ("--batch-sizes", "1,3")


def addresses(server: TritonServer) -> dict[str, str]:
    return {"http": server.http, "grpc": server.grpc}


@pytest.mark.parametrize("shared", [[], ["--shared-memory"]], ids=["sent", "shared memory"])
@pytest.mark.parametrize("way", ["http", "grpc"])
def test_a_package_is_verified(cli, triton, packaged, way, shared):
    url = addresses(triton)[way]
    result = cli("verify", packaged, "--url", url, "--model-name", NAME, "--json", *QUICK, *shared)
    assert result.code == 0, result.err
    names = [check["name"] for check in result.document["checks"]]
    assert names == [
        "files as written",
        "report.json as the manifest says",
        "golden logits: PyTorch's",
        "golden logits of the dense twin",
        "golden file: tolerance",
        "golden file: tolerance on ties",
        "golden file: tolerance of the dense twin",
        "triton, batch 1: logits",
        "triton, batch 1: same answer at every place",
        "triton, batch 3: logits",
        "triton, batch 3: same answer at every place",
        f"triton, ensemble {NAME}: photographs as files",
    ]
    regions = [name for name in os.listdir("/dev/shm") if name.startswith(f"evit-deploy-{os.getpid()}-")]
    assert regions == []


def test_a_package_far_from_its_checkpoint_says_what_it_was_held_against(cli, triton, packaged, tmp_path):
    alone = shutil.copytree(packaged, tmp_path / "a" / "b" / "c")
    result = cli("verify", alone, "--url", triton.http, "--model-name", NAME, "--json", *QUICK)
    assert result.code == 0, result.err
    assert any("as they were written" in note and "--against" in note for note in result.document["notes"])


def test_the_bundles_own_model_is_found(cli, triton, converted):
    result = cli("verify", converted.path, "--url", triton.http, "--json", *QUICK)
    assert result.code == 0, result.err
    assert not any("ensemble" in check["name"] for check in result.document["checks"])
    assert find_model(Server(triton.http), converted.manifest).served.model == MODEL


def test_by_default_all_that_the_server_allows_is_tried(triton):
    with TritonRunner(Server(triton.http, MODEL)) as runner:
        (profile,) = runner.profiles
        assert (profile.minimum, profile.maximum) == (1, 32)


@pytest.mark.parametrize("way", ["http", "grpc"])
def test_profile(cli, triton, converted, way):
    options = ["--runtime", "triton", "--runtime", "onnxruntime", "--threads", "1", "--duration", "0.1"]
    result = cli("profile", converted.path, "--url", addresses(triton)[way], "--json", *QUICK, *options)
    assert result.code == 0, result.err
    document = result.document
    rows = {(row["runtime"], row["variant"], row["batch"]): row for row in document["rows"]}
    assert {key for key in rows if key[0] == "triton"} == {("triton", "model", 1), ("triton", "model", 3)}
    assert rows["triton", "model", 1]["p50"] > 0
    assert rows["triton", "model", 1]["speedup"] is None  # no dense twin is served
    assert {row["clock"] for row in document["rows"]} == {"wall"}  # a server's time is not in this thread's
    assert [(row["model"], row["batch"], row["clients"]) for row in document["load"]] == [
        (MODEL, 1, 16),
        (MODEL, 3, 16),
    ]
    for row in document["load"]:
        assert row["requests"] >= 32
        assert row["images_a_run"] > row["batch"]  # the server put requests together
        assert row["p99"] >= row["p50"] > 0


# ---- misnamed, missing, other than the bundle's


def test_names_and_versions(cli, triton, converted):
    call = ("verify", converted.path, "--url", triton.http, *QUICK)
    cli(*call, "--model-name", "tinny_model").refused(2, "no such model", "Did you mean 'tiny_model'?")
    cli(*call, "--model-name", MODEL, "--model-version", "7").refused(2, "this version", "got 7, expected 1")
    cli(*call, "--model-name", "tiny_preprocess").refused(2, "it has no input 'input'", "IMAGE bytes")


def test_a_model_of_another_shape(cli, triton, made):
    path, result = made
    assert result.code == 0
    call = ("verify", path, "--url", triton.grpc, *QUICK)
    cli(*call).refused(2, "no model on this server takes this bundle's tensors", "input float32 [?, 3, 64, 64]")
    cli(*call, "--model-name", MODEL).refused(2, "is not this bundle's", "[?, 3, 96, 96]")
    cli(*call, "--model-name", NAME).refused(2, "no step of the ensemble", "[?, 3, 96, 96]")


@pytest.fixture(scope="module")
def several(packaged, tmp_path_factory):
    """A server with the tiny model, one with other weights, and a second ensemble that reads files wrongly."""
    repository = copied(packaged, tmp_path_factory.mktemp("several") / "models")
    shutil.copytree(repository / MODEL, repository / "other")
    for config in (repository / "other").rglob("*.pbtxt"):
        config.write_text(config.read_text().replace(f'"{MODEL}"', '"other"'))
    perturbed(repository / MODEL / "1" / "model.onnx", repository / "other" / "1" / "model.onnx")
    for name, new in ((NAME, "wrong"), ("tiny_preprocess", "wrong_preprocess")):
        shutil.copytree(repository / name, repository / new)
        config = repository / new / "config.pbtxt"
        text = config.read_text().replace(f'"{name}"', f'"{new}"').replace('"tiny_preprocess"', '"wrong_preprocess"')
        config.write_text(text.replace("bicubic", "nearest"))
    with TritonServer(repository) as server:
        yield server


def test_several_models_that_fit(cli, several, converted):
    result = cli("verify", converted.path, "--url", several.http, *QUICK)
    result.refused(2, "several models", MODEL, "other", "--model-name")


def test_other_weights_are_not_verified(cli, several, converted):
    result = cli("verify", converted.path, "--url", several.grpc, "--model-name", "other", "--json", *QUICK)
    assert result.code == 1
    failed = [check["name"] for check in result.document["checks"] if not check["passed"]]
    assert failed == ["triton, batch 1: logits", "triton, batch 3: logits"]


def test_an_ensemble_that_reads_files_wrongly_is_not_verified(cli, several, converted):
    result = cli("verify", converted.path, "--url", several.http, "--model-name", "wrong", "--json", *QUICK)
    assert result.code == 1
    failed = [check for check in result.document["checks"] if not check["passed"]]
    assert [check["name"] for check in failed] == ["triton, ensemble wrong: photographs as files"]
    assert "preprocessing" in failed[0]["reason"]


def test_a_model_that_is_not_loaded(cli, several, converted):
    with Connection(several.http) as connection:
        connection._client.unload_model("other")
        result = cli("verify", converted.path, "--url", several.http, "--model-name", "other", *QUICK)
        result.refused(3, "'other' is not ready", "UNAVAILABLE unloaded", "log")
        assert find_model(Server(several.grpc), converted.manifest).served.model == MODEL  # now the only one
        connection._client.load_model("other")


# ---- the runner


def test_shared_memory_grows_with_the_batch(triton, converted):
    golden = load_golden(converted.file("golden.npz"), converted.manifest)
    images = np.resize(golden.inputs, (32, *golden.inputs.shape[1:]))
    with (
        TritonRunner(Server(triton.grpc, MODEL, shared_memory=True)) as shared,
        TritonRunner(Server(triton.http, MODEL)) as plain,
    ):
        for batch in (1, 32, 2):
            mine, other = (runner.infer(feeds(images[:batch]))[LOGITS] for runner in (shared, plain))
            np.testing.assert_allclose(mine, other, rtol=0, atol=1e-5)
            assert mine.shape == (batch, 10)
        with pytest.raises(InputError, match="batch-size must be <= 32"):
            shared.infer(feeds(np.repeat(images, 2, axis=0)))


def test_a_server_without_our_shared_memory(packaged, converted):
    # As in a container: the same machine, another /dev/shm.
    own = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs tmpfs /dev/shm && exec "$@"', "sh")
    if shutil.which("unshare") is None or subprocess.run([*own, "true"], capture_output=True).returncode:
        pytest.skip("a process with a /dev/shm of its own is not permitted here")
    with TritonServer(packaged / "model_repository", before=own) as server:
        with (
            pytest.raises(MissingRequirement, match=r"--shared-memory: the server cannot open .*Leave the option out"),
            TritonRunner(Server(server.http, MODEL, shared_memory=True)),
        ):
            pass
        with TritonRunner(Server(server.http, MODEL)) as runner:
            golden = load_golden(converted.file("golden.npz"), converted.manifest)
            assert runner.infer(feeds(golden.inputs))[LOGITS].shape == (len(golden.inputs), 10)


@pytest.mark.parametrize("way", ["http", "grpc"])
def test_many_batches_at_a_time(triton, converted, way):
    golden = load_golden(converted.file("golden.npz"), converted.manifest)
    which = [np.arange(start, start + 1 + start % 3) % len(golden.inputs) for start in range(40)]
    with TritonRunner(Server(addresses(triton)[way], MODEL)) as runner:
        answers = runner.infer_many([feeds(golden.inputs[numbers]) for numbers in which])
        for numbers, answer in zip(which, answers, strict=True):
            np.testing.assert_allclose(answer[LOGITS], golden.logits[numbers], rtol=0, atol=golden.limit())
        with pytest.raises(InputError, match="unexpected shape"):
            runner.infer_many([feeds(golden.inputs), feeds(golden.inputs[:, :, 1:])])
        assert runner.infer_many([]) == []


def test_a_bundles_tensors_are_what_is_compared(triton, converted):
    manifest = msgspec.structs.replace(
        converted.manifest, inputs=(msgspec.structs.replace(converted.manifest.inputs[0], dtype="float16"),)
    )
    with pytest.raises(InputError, match=r"its input is input float32 .* the bundle's input float16"):
        find_model(Server(triton.http, MODEL), manifest)
