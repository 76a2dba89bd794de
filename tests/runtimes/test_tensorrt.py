"""The runners for TensorRT and TensorRT-RTX. What needs no GPU is tested on any machine; the rest is marked."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from evit_deploy.engines.plan_file import misfit, read_header
from evit_deploy.environment.requirements import install_line
from evit_deploy.errors import InputError, MissingRequirement, StageError
from evit_deploy.profiling.clocks.latency import summaries
from evit_deploy.recipe.options import BatchProfile
from evit_deploy.registry import RUNTIMES
from evit_deploy.runtimes import tensorrt
from evit_deploy.runtimes.tensorrt import TensorRTRTXRunner, TensorRTRunner, engine_validity
from evit_deploy.runtimes.tensorrt_lane import torch_dtype
from tests.support.plans import TOKENS, WIDTH, rtx_plan, tiny_blocks

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
RUNNERS = [TensorRTRunner, TensorRTRTXRunner]


@pytest.fixture(params=RUNNERS, ids=lambda runner: runner.name)
def runner(request) -> type[TensorRTRunner]:
    return request.param


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    """A header that could be TensorRT's, without an engine behind it."""
    path = tmp_path / "engine.plan"
    path.write_bytes(b"ftrt" + bytes(20) + bytes([11, 4, 0, 106]) + bytes(1000))
    return path


def test_both_are_registered_under_their_names(runner):
    assert RUNTIMES.get(runner.name) is runner
    assert runner.files == ("engine.plan",)


def test_a_plan_is_accepted_by_its_own_library_only(plan):
    assert TensorRTRunner.accepts(plan) == []
    assert TensorRTRunner.accepts(str(plan)) == []
    (reason,) = TensorRTRTXRunner.accepts(plan)
    assert reason.endswith("is a plan of TensorRT; give --runtime tensorrt")


@pytest.mark.tensorrt_rtx
def test_a_real_plan_is_accepted_by_its_own_library_only(tmp_path):
    path = tmp_path / "engine.plan"
    path.write_bytes(rtx_plan(tiny_blocks(1)))
    assert TensorRTRTXRunner.accepts(path) == []
    (reason,) = TensorRTRunner.accepts(path)
    assert reason.endswith("is a plan of TensorRT-RTX; give --runtime tensorrt-rtx")


def test_what_is_no_plan_is_not_accepted(runner, tmp_path):
    text = tmp_path / "engine.plan"
    text.write_text("no plan")
    assert "a text file, not a plan" in runner.accepts(text)[0]
    assert runner.accepts(torch.nn.Linear(1, 1)) == ["it runs plans, not Linear"]
    assert "No such file" in runner.accepts(tmp_path / "none.plan")[0]


@without_gpu
def test_what_is_missing_is_said_with_the_line_that_brings_it(runner):
    missing = runner.missing()
    assert isinstance(missing, MissingRequirement)
    assert missing.exit_code == 3
    if importlib.util.find_spec(runner.module) is None:
        assert missing.fix == install_line(runner.name)
    else:
        assert "CUDA" in str(missing)


@without_gpu
def test_opening_without_a_gpu_is_refused_as_missing(plan):
    with pytest.raises(MissingRequirement), TensorRTRunner(plan):
        pass


def test_a_bad_plan_is_an_input_error_with_or_without_a_gpu(runner, tmp_path):
    empty = tmp_path / "engine.plan"
    empty.touch()
    with pytest.raises(InputError, match="the file is empty"), runner(empty):
        pass


def test_nothing_beside_a_plan_is_loaded_by_itself(plan):
    (plan.parent / "libplugin.so").write_text("no library")
    assert TensorRTRunner(plan).plugin is None


# ---- the library itself, without a GPU


@pytest.fixture
def library():
    return pytest.importorskip("tensorrt_rtx")


API = {
    "Runtime": "deserialize_cuda_engine engine_host_code_allowed get_engine_validity",
    "ICudaEngine": """create_engine_inspector create_execution_context create_runtime_config get_tensor_dtype
        get_tensor_mode get_tensor_name get_tensor_profile_shape get_tensor_shape num_io_tensors
        num_optimization_profiles""",
    "IExecutionContext": """execute_async_v3 get_tensor_shape profiler set_input_shape set_optimization_profile_async
        set_tensor_address""",
    "IRuntimeConfig": "cuda_graph_strategy",
    "EngineInspector": "get_engine_information",
}


@pytest.mark.tensorrt_rtx
@pytest.mark.parametrize("name", API)
def test_the_library_has_what_the_runner_uses(library, name):
    assert [member for member in API[name].split() if not hasattr(getattr(library, name), member)] == []
    assert {"INPUT", "OUTPUT"} <= library.TensorIOMode.__members__.keys()
    assert {"WHOLE_GRAPH_CAPTURE", "DISABLED"} <= library.CudaGraphStrategy.__members__.keys()


@pytest.mark.tensorrt_rtx
def test_host_code_in_a_plan_is_not_allowed(library):
    assert library.Runtime(tensorrt._logger(library)).engine_host_code_allowed is False


@pytest.mark.tensorrt_rtx
def test_every_type_has_pytorch_s_name_or_an_input_error(library):
    named = {"FLOAT", "HALF", "BF16", "INT8", "INT32", "INT64", "BOOL", "UINT8"}
    for name, dtype in library.DataType.__members__.items():
        if name in named:
            assert torch_dtype(dtype).itemsize == dtype.itemsize
        else:
            with pytest.raises(InputError, match=name):
                torch_dtype(dtype)


@pytest.mark.tensorrt_rtx
@pytest.mark.parametrize("content", [b"x" * 100, rb"vtrt"], ids=["junk", "cut"])
def test_a_damaged_plan_is_called_so_before_it_is_loaded(library, content):
    runtime = library.Runtime(tensorrt._logger(library))
    assert engine_validity(library, runtime, content) == ("INVALID", ["malformed engine"])


@pytest.mark.tensorrt_rtx
def test_what_the_library_says_of_a_plan_it_refuses_is_kept(library):
    logger = tensorrt._logger(library)
    assert library.Runtime(logger).deserialize_cuda_engine(b"x" * 100) is None
    assert logger.errors


@pytest.mark.tensorrt_rtx
def test_layer_times_add_up(library):
    profiler = tensorrt._profiler(library)
    for name, milliseconds in (("a", 1.0), ("b", 2.0), ("a", 3.0)):
        profiler.report_layer_time(name, milliseconds)
    assert profiler.totals == {"a": 4.0, "b": 2.0}


# ---- with a GPU


@pytest.fixture
def rtx(tmp_path: Path) -> Iterator[TensorRTRTXRunner]:
    """A tiny plan for the GPU here, opened."""
    from evit_deploy.environment.nvidia import compute_capability

    pytest.importorskip("tensorrt_rtx")
    capability = (compute_capability() or "").upper()
    trt = importlib.import_module("tensorrt_rtx")
    if capability not in trt.ComputeCapability.__members__:
        pytest.skip(f"TensorRT-RTX does not build for {capability}")
    path = tmp_path / "engine.plan"
    path.write_bytes(rtx_plan(tiny_blocks(2), (capability,)))
    with TensorRTRTXRunner(path) as opened:
        yield opened


def images(batch: int) -> dict[str, np.ndarray]:
    return {"input": np.random.default_rng(batch).standard_normal((batch, TOKENS, WIDTH)).astype(np.float16)}


@pytest.mark.gpu
@needs_gpu
def test_a_plan_answers_like_onnx_runtime_at_every_batch_size_and_place(rtx):
    import onnxruntime

    session = onnxruntime.InferenceSession(
        tiny_blocks(2, np.float32).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    for batch in (1, 3, 8, 1):  # back to a batch size whose graph is captured already
        feeds = images(batch)
        expected = session.run(None, {"input": feeds["input"].astype(np.float32)})[0]
        found = rtx.infer(feeds)["logits"].astype(np.float32)
        assert np.abs(found - expected).max() <= 4 * np.finfo(np.float16).eps * np.abs(expected).max() * WIDTH**0.5


@pytest.mark.gpu
@needs_gpu
def test_answers_stay_when_the_next_call_runs(rtx):
    first = rtx.infer(images(2))["logits"]
    kept = first.copy()
    rtx.infer({"input": np.zeros((2, TOKENS, WIDTH), np.float16)})
    np.testing.assert_array_equal(first, kept)


@pytest.mark.gpu
@needs_gpu
def test_a_resident_batch_is_answered_like_any_other(rtx):
    feeds = images(4)
    expected = rtx.infer(feeds)["logits"]
    resident = rtx.resident(feeds)
    resident.run()
    resident.round_trip()
    rtx.synchronize()
    np.testing.assert_array_equal(resident.answers()["logits"], expected)
    before = resident.mark()
    resident.run()
    after = resident.mark()
    rtx.synchronize()
    assert after.seconds_since(before) > 0


@pytest.mark.gpu
@needs_gpu
def test_a_batch_outside_the_profile_is_an_input_error(rtx):
    assert rtx.profiles == (BatchProfile(1, 4, 8),)
    with pytest.raises(InputError, match=r"got 9, expected 1 to 8"):
        rtx.infer(images(9))


@pytest.mark.gpu
@needs_gpu
def test_times_of_calls_and_of_layers_are_positive_and_belong_together(rtx):
    found = summaries(rtx.timings(8, calls=20, warm_up=0.05))
    assert found["compute"].count >= 20
    assert 0 < found["compute"].median <= found["latency"].median
    layers = rtx.layer_times(8, calls=5)
    assert sum(milliseconds for _, milliseconds in layers) > 0
    listed = {layer.name for layer in rtx.layers()}
    assert listed


@pytest.mark.gpu
@needs_gpu
def test_what_it_takes_and_gives(rtx):
    assert [(spec.name, spec.dtype, spec.shape) for spec in (*rtx.inputs, *rtx.outputs)] == [
        ("input", "float16", (None, TOKENS, WIDTH)),
        ("logits", "float16", (None, TOKENS, WIDTH)),
    ]


@pytest.mark.gpu
@needs_gpu
def test_a_plan_for_another_gpu_is_refused_with_both(tmp_path):
    from evit_deploy.environment.nvidia import compute_capability

    path = tmp_path / "engine.plan"
    other = "SM75" if compute_capability() != "sm75" else "SM80"
    path.write_bytes(rtx_plan(tiny_blocks(1, np.float16), (other,)))
    assert misfit(path, read_header(path), version=read_header(path).version, gpu=compute_capability())
    with pytest.raises(InputError, match=f"expected {other.lower()}"), TensorRTRTXRunner(path):
        pass


@pytest.mark.gpu
@pytest.mark.tensorrt
@needs_gpu
@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "no graphs"])
def test_tensorrt_answers_like_onnx_runtime(tmp_path, graphs):
    import onnxruntime

    trt = pytest.importorskip("tensorrt")
    model = tiny_blocks(2)
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    flags = trt.NetworkDefinitionCreationFlag.__members__
    network = builder.create_network(1 << int(flags["STRONGLY_TYPED"]) if "STRONGLY_TYPED" in flags else 0)
    assert trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR)).parse(model.SerializeToString())
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    for sizes in ((1, 1, 1), (1, 4, 8)):
        profile = builder.create_optimization_profile()
        profile.set_shape("input", *((batch, TOKENS, WIDTH) for batch in sizes))
        config.add_optimization_profile(profile)
    path = tmp_path / "engine.plan"
    path.write_bytes(bytes(builder.build_serialized_network(network, config)))
    assert read_header(path).family == "tensorrt"
    assert trt.__version__.startswith(".".join(read_header(path).version.split(".")[:3]))
    session = onnxruntime.InferenceSession(
        tiny_blocks(2, np.float32).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    with TensorRTRunner(path, graphs=graphs) as opened:
        assert opened.profiles == (BatchProfile(1, 1, 1), BatchProfile(1, 4, 8))
        for batch in (1, 8, 3, 1):
            feeds = images(batch)
            expected = session.run(None, {"input": feeds["input"].astype(np.float32)})[0]
            found = opened.infer(feeds)["logits"].astype(np.float32)
            assert np.abs(found - expected).max() <= 4 * np.finfo(np.float16).eps * np.abs(expected).max() * WIDTH**0.5
        assert opened.notes == []
        from evit_deploy.engines.audit import dtype_check, fusion_check

        layers = opened.layers()
        assert fusion_check(layers, 2).passed, fusion_check(layers, 2)
        assert dtype_check(layers, "fp16").passed, dtype_check(layers, "fp16")
        names = {layer.name for layer in layers}
        assert {name for name, _ in opened.layer_times(4)} <= names


@pytest.mark.gpu
@pytest.mark.tensorrt
@needs_gpu
def test_a_damaged_plan_of_tensorrt_is_refused_without_a_crash(plan):
    pytest.importorskip("tensorrt")
    with pytest.raises((InputError, MissingRequirement, StageError)), TensorRTRunner(plan):
        pass
