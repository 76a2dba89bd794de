"""What every registered runtime keeps to, and what a machine without a GPU is told by those that need one."""

import importlib.util
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from evit_deploy.errors import EvitDeployError, MissingRequirement, StageError
from evit_deploy.export.card import INPUT, LOGITS, kept_name
from evit_deploy.export.portable import export_onnx
from evit_deploy.export.variants import with_indices
from evit_deploy.registry import RUNTIMES
from evit_deploy.runtimes import onnxruntime as ort
from evit_deploy.runtimes.onnxruntime import OnnxRuntimeRunner
from evit_deploy.runtimes.resident import TensorResident
from evit_deploy.runtimes.runner import Runner
from evit_deploy.serving.repository import Serving, write_repository
from evit_deploy.tokens.reduce import reduce_tokens_, token_plan
from evit_deploy.triton.connection import Server
from tests.support.models import KEEP, images, of_kind, preprocess_for
from tests.support.triton_server import TritonServer

MARKS = {"eager": [], "onnxruntime": [], "torch.compile": []}
MARKS |= {"openvino": [pytest.mark.openvino], "triton": [pytest.mark.triton]}


def each_runtime(**more: list[pytest.MarkDecorator]) -> pytest.MarkDecorator:
    """A test of every runtime, with the marks of what it needs, and ``more`` by its name."""
    marks = {name: MARKS.get(name, [pytest.mark.gpu]) + more.get(name, []) for name in RUNTIMES.names()}
    return pytest.mark.parametrize("name", [pytest.param(name, marks=marks[name]) for name in marks])


every_runtime = each_runtime()
every_runtime_runs = each_runtime(**{"torch.compile": [pytest.mark.slow]})
GPU_RUNTIMES = {
    "onnxruntime-cuda": ("CUDAExecutionProvider", "onnxruntime-gpu"),
    "onnxruntime-tensorrt": ("TensorrtExecutionProvider", "onnxruntime-gpu"),
}


@pytest.fixture(scope="module")
def model() -> Any:
    return reduce_tokens_(of_kind("plain"), KEEP)


@pytest.fixture(scope="module")
def artifacts(model) -> list[Any]:
    return [model, export_onnx(model, name="vit_tiny_patch16_224", preprocess=preprocess_for(model))]


@pytest.fixture(scope="module")
def served(artifacts, tmp_path_factory) -> Iterator[Server]:
    """The ONNX model with its kept candidates, on a real server."""
    folder = tmp_path_factory.mktemp("served")
    file = folder / "model.onnx"
    with OnnxRuntimeRunner(artifacts[1], with_indices=True) as runner:
        serving = Serving("tiny", "onnxruntime", runner.inputs, runner.outputs, max_batch=8, on_gpu=False)
    onnx.save(with_indices(artifacts[1]), file)
    write_repository(serving, {file.name: file}, folder / "models")
    with TritonServer(folder / "models") as server:
        yield Server(server.http, serving.model)


@pytest.fixture
def usable(artifacts, request) -> Callable[[str], tuple[type[Runner], Any]]:
    """Gives a runtime and what it can run, or skips."""

    def find(name: str) -> tuple[type[Runner], Any]:
        runtime = RUNTIMES.get(name)
        missing = runtime.missing()
        if missing is not None:
            pytest.skip(str(missing))
        if runtime.served:
            return runtime, request.getfixturevalue("served")
        return runtime, _accepted(runtime, artifacts)

    return find


def _accepted(runtime: type[Runner], artifacts: list[Any]) -> Any:
    artifact = next((a for a in artifacts if not runtime.accepts(a)), None)
    if artifact is None:
        pytest.skip("it runs engines only")
    return artifact


# The contract.


@every_runtime
def test_it_can_be_asked_without_being_installed(name):
    runtime = RUNTIMES.get(name)
    assert issubclass(runtime, Runner)
    assert runtime.name == name
    assert runtime.missing() is None or isinstance(runtime.missing(), MissingRequirement)
    assert all(not file.startswith("/") for file in runtime.files)


@every_runtime
@pytest.mark.parametrize("artifact", [3, "model.txt", torch.nn.Linear(1, 1)], ids=["number", "text", "other module"])
def test_it_says_why_it_does_not_accept_something(name, artifact):
    reasons = RUNTIMES.get(name).accepts(artifact)
    assert reasons
    assert all(isinstance(reason, str) for reason in reasons)


@every_runtime_runs
@pytest.mark.parametrize("indices", [False, True])
def test_it_gives_what_it_declares_at_every_batch_size(name, indices, model, usable):
    runtime, artifact = usable(name)
    blocks = [row.block for row in token_plan(model).locations]
    with runtime(artifact, threads=1, with_indices=indices) as runner:
        (given,) = runner.inputs
        assert (given.name, given.dtype, given.shape) == (INPUT, "float32", (None, 3, 96, 96))
        assert [spec.name for spec in runner.outputs] == [LOGITS] + indices * [kept_name(b) for b in blocks]
        for batch in (1, 2, 5):
            answers = runner.infer({INPUT: images(model, batch)})
            runner.synchronize()
            assert list(answers) == [spec.name for spec in runner.outputs]
            for spec in runner.outputs:
                assert answers[spec.name].dtype == spec.dtype
                assert answers[spec.name].shape == (batch, *spec.shape[1:])
        with torch.inference_mode():
            wanted = model(torch.from_numpy(images(model, 5))).numpy()
    np.testing.assert_allclose(answers[LOGITS], wanted, rtol=0, atol=1e-4)


@every_runtime_runs
def test_its_answers_are_the_callers_own(name, model, usable):
    runtime, artifact = usable(name)
    with runtime(artifact, threads=1) as runner:
        first = runner.infer({INPUT: images(model, 2)})[LOGITS]
        copy = first.copy()
        runner.infer({INPUT: images(model, 2, seed=1)})
        np.testing.assert_array_equal(first, copy)
        first[:] = 0  # and may be written to


@every_runtime_runs
def test_it_can_be_opened_again(name, model, usable):
    runtime, artifact = usable(name)
    runner, answers = runtime(artifact, threads=1), []
    for _ in range(2):
        with runner:
            answers.append(runner.infer({INPUT: images(model, 1)})[LOGITS])
    np.testing.assert_array_equal(*answers)


@every_runtime_runs
def test_an_input_that_does_not_fit_is_an_error_of_ours_or_of_pytorch(name, model, usable):
    runtime, artifact = usable(name)
    expected = AssertionError if name == "eager" else EvitDeployError  # timm's own check of the image's size
    with runtime(artifact, threads=1) as runner, pytest.raises(expected):
        runner.infer({INPUT: images(model, 1)[:, :, :50]})


# ONNX Runtime's providers for a GPU, on a machine without.


@pytest.mark.parametrize("name", GPU_RUNTIMES)
def test_an_onnx_runtime_without_the_provider(name, monkeypatch):
    provider, package = GPU_RUNTIMES[name]
    monkeypatch.setattr(ort.onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    missing = RUNTIMES.get(name).missing()
    assert str(missing) == (
        f"ONNX Runtime was installed without its {provider} (got CPUExecutionProvider). "
        f"Run: pip uninstall --yes onnxruntime && pip install --force-reinstall {package}"
    )
    with pytest.raises(MissingRequirement, match=provider), RUNTIMES.get(name)("model.onnx"):
        pass


@pytest.mark.parametrize("name", GPU_RUNTIMES)
def test_no_gpu(name, monkeypatch):
    monkeypatch.setattr(ort.onnxruntime, "get_available_providers", lambda: [GPU_RUNTIMES[name][0]])
    monkeypatch.setattr(ort, "_cuda_devices", lambda: 0)
    assert "no GPU" in str(RUNTIMES.get(name).missing())
    monkeypatch.setattr(ort, "_cuda_devices", lambda: 1)
    assert RUNTIMES.get(name).missing() is None


def test_the_provider_for_tensorrt_rtx(monkeypatch):
    runtime = RUNTIMES.get("onnxruntime-tensorrt-rtx")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert str(runtime.missing()).endswith("(got not installed). Run: pip install onnxruntime-ep-nv-tensorrt-rtx")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(ort, "_cuda_devices", lambda: 0)
    assert "no GPU" in str(runtime.missing())
    monkeypatch.setattr(ort, "_cuda_devices", lambda: 1)
    monkeypatch.setattr(ort, "_rtx_devices", list)
    assert "a GPU that TensorRT-RTX runs on" in str(runtime.missing())
    monkeypatch.setattr(ort, "_rtx_devices", lambda: ["device"])
    assert runtime.missing() is None

    def broken() -> list[Any]:
        raise RuntimeError("cannot open libtensorrt_rtx.so\nand more")

    monkeypatch.setattr(ort, "_rtx_devices", broken)
    assert "does not load: cannot open libtensorrt_rtx.so." in str(runtime.missing()).replace(" (", ".")


def test_a_provider_that_did_not_load_is_refused(artifacts, monkeypatch):
    # The real ONNX Runtime, told to use what it does not have: it warns and takes the CPU.
    runtime = RUNTIMES.get("onnxruntime-cuda")
    monkeypatch.setattr(runtime, "missing", classmethod(lambda cls: None))
    with (
        pytest.warns(UserWarning, match="not in available provider names"),
        pytest.raises(StageError, match="did not load its CUDAExecutionProvider"),
        runtime(artifacts[1]),
    ):
        pass


class Session:
    """What a session says about itself when a provider leaves some operators to the CPU."""

    def __init__(self, *left: str) -> None:
        self.left = left

    def get_providers(self) -> list[str]:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def get_provider_graph_assignment_info(self) -> list[Any]:
        parts = {"CUDAExecutionProvider": ("Gemm", "Conv"), "CPUExecutionProvider": self.left}
        return [
            SimpleNamespace(ep_name=name, get_nodes=lambda ops=ops: [SimpleNamespace(op_type=o) for o in ops])
            for name, ops in parts.items()
        ]


def test_work_that_was_left_to_the_cpu_is_refused():
    ort.refuse_cpu(Session("Shape", "Concat", "Unsqueeze"), "CUDAExecutionProvider", "model.onnx")
    with pytest.raises(StageError, match=r"leaves a part of the model to the CPU \(got Attention, FusedMatMul\)"):
        ort.refuse_cpu(Session("Shape", "FusedMatMul", "Attention"), "CUDAExecutionProvider", "model.onnx")


def test_the_record_of_who_computes_what_is_what_we_take_it_for(artifacts):
    options = ort.onnxruntime.SessionOptions()
    options.add_session_config_entry(ort._RECORD, "1")
    session = ort.OnnxRuntimeRunner(artifacts[1])._open(artifacts[1].SerializeToString(), options)
    with pytest.raises(StageError, match="Attention, Conv"):
        ort.refuse_cpu(session, "CPUExecutionProvider", "model.onnx")


# A batch on a device; a CPU is one too.


@pytest.mark.parametrize("indices", [False, True])
@pytest.mark.parametrize("name", ["eager", "onnxruntime"])
def test_a_resident_batch_is_answered_like_any_other(name, indices, model, artifacts):
    runtime = RUNTIMES.get(name)
    with runtime(_accepted(runtime, artifacts), threads=1, with_indices=indices) as runner:
        feeds = {INPUT: images(model, 3)}
        expected = runner.infer(feeds)
        place = torch.device("cpu")
        resident = runner.resident(feeds) if name == "eager" else runner._bound(feeds, place)
        assert resident.answers() == {}
        resident.run()
        assert resident.answers() == {}  # nothing comes back
        feeds[INPUT][:] = 0  # it has a copy
        resident.round_trip()
        first = resident.answers()
        assert list(first) == [spec.name for spec in runner.outputs]
        for spec in runner.outputs:
            assert first[spec.name].dtype == spec.dtype
            np.testing.assert_array_equal(first[spec.name], expected[spec.name])
        before = resident.mark()
        resident.run()
        assert resident.mark().seconds_since(before) > 0
        resident.round_trip()
        np.testing.assert_array_equal(resident.answers()[LOGITS], first[LOGITS])
        resident.answers()[LOGITS][:] = 0
        np.testing.assert_array_equal(resident.answers()[LOGITS], first[LOGITS])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_resident_batch_is_converted_where_it_lies(dtype):
    seen: list[torch.Tensor] = []

    def call(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen.append(inputs[INPUT])
        return {LOGITS: inputs[INPUT] + 1}

    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    resident = TensorResident(call, {INPUT: values}, torch.device("cpu"), dtype)
    resident.run()
    seen[0].zero_()
    resident.round_trip()  # brings them again, into the same place
    assert seen[0] is seen[1]
    assert seen[0].dtype == dtype
    answer = resident.answers()[LOGITS]
    assert answer.dtype == (np.float64 if dtype == torch.float64 else np.float32)
    np.testing.assert_array_equal(answer, values + 1)


def test_runners_without_a_device_of_their_own_have_no_resident_batch(artifacts):
    with OnnxRuntimeRunner(artifacts[1], threads=1) as runner:
        assert runner.resident({INPUT: np.zeros((1, 3, 96, 96), np.float32)}) is None


def test_all_providers_put_their_work_on_one_stream():
    assert ort.with_stream(("TensorrtExecutionProvider", ("CUDAExecutionProvider", {"use_tf32": "0"})), 77) == [
        ("TensorrtExecutionProvider", {"user_compute_stream": "77"}),
        ("CUDAExecutionProvider", {"use_tf32": "0", "user_compute_stream": "77"}),
    ]
    assert ort.OnnxRuntimeCudaRunner.providers == (("CUDAExecutionProvider", {"use_tf32": "0"}),)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["onnxruntime-cuda", "onnxruntime-tensorrt"])
def test_a_resident_batch_on_a_gpu_is_answered_like_any_other(name, model, usable):
    runtime, artifact = usable(name)
    with runtime(artifact) as runner:
        feeds = {INPUT: images(model, 3)}
        resident = runner.resident(feeds)
        if resident is None:
            pytest.skip("this PyTorch is for CPUs")
        resident.run()
        resident.round_trip()
        runner.synchronize()
        np.testing.assert_allclose(resident.answers()[LOGITS], runner.infer(feeds)[LOGITS], rtol=0, atol=1e-5)
