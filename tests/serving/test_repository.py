"""Model repositories: golden configurations of three models, and what must hold for any."""

import json
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evit_deploy.bundle.manifest import TensorSpec, choose_profile
from evit_deploy.errors import InputError
from evit_deploy.recipe.options import BatchProfile
from evit_deploy.serving.repository import Serving, configurations, covered, model_config, write_repository
from tests.support.models import tree
from tests.support.paths import GOLDEN
from tests.support.served_models import MODELS, image

text_format = pytest.importorskip("google.protobuf.text_format")
pb = pytest.importorskip("tritonclient.grpc.model_config_pb2")


def parsed(text: str):
    return text_format.Parse(text, pb.ModelConfig())  # refuses fields and values that Triton does not know


@pytest.mark.parametrize("name", MODELS)
def test_configurations_are_the_golden_ones(name):
    folder = GOLDEN / "triton" / name
    golden = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.pbtxt")}
    found = configurations(MODELS[name])
    assert found.keys() == golden.keys()
    for path, config in found.items():
        text = golden[path].read_text()
        assert parsed(text) == config, path
        assert text_format.MessageToString(config) == text, path


@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_is_what_was_configured(name, tmp_path):
    serving = MODELS[name]
    (tmp_path / "file").write_bytes(b"the model")
    write_repository(serving, {"model.file": tmp_path / "file"}, tmp_path / "repository")
    for path, config in configurations(serving).items():
        assert parsed((tmp_path / "repository" / path).read_text()) == config
    folder = tmp_path / "repository" / serving.model
    assert (folder / "1" / "model.file").read_bytes() == b"the model"
    # Triton takes a folder's name for the model's, and wants a numbered folder in each.
    for config_path in (tmp_path / "repository").glob("*/config.pbtxt"):
        assert parsed(config_path.read_text()).name == config_path.parent.name
        assert (config_path.parent / "1").is_dir()
    if serving.labels is not None:
        assert (folder / "labels.txt").read_text().splitlines() == serving.labels
        assert model_config(serving).output[0].label_filename == "labels.txt"


def test_the_same_repository_twice(tmp_path):
    for name in ("one", "two"):
        (tmp_path / "file").write_bytes(b"the model")
        write_repository(MODELS["digits"], {"model.onnx": tmp_path / "file"}, tmp_path / name)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_the_ensemble_fits_together():
    serving = MODELS["digits"]
    configs = {Path(path).parent.name: config for path, config in configurations(serving).items()}
    ensemble = configs["digits"]
    tensors = {tensor.name: tensor.name for tensor in ensemble.input}
    for step in ensemble.ensemble_scheduling.step:
        model = configs[step.model_name]
        assert {tensor.name for tensor in model.input} == set(step.input_map)
        assert set(step.input_map.values()) <= set(tensors.values())
        assert set(step.output_map) <= {tensor.name for tensor in model.output}
        tensors |= dict(step.output_map)
        assert model.max_batch_size == ensemble.max_batch_size
    assert {tensor.name for tensor in ensemble.output} <= set(tensors.values())


def test_the_preprocessing_is_told_everything():
    config = configurations(MODELS["digits"])["digits_preprocess/config.pbtxt"]
    told = json.loads(config.parameters["preprocess"].string_value)
    assert told.items() >= json.loads(msgspec.json.encode(MODELS["digits"].preprocess)).items()
    assert told["max_pixels"] > 0
    assert told["max_bytes"] > 0


def test_a_processor_takes_the_place_of_a_gpu_and_nothing_else_changes():
    serving = MODELS["digits"]
    on_gpu, on_cpu = model_config(serving), model_config(msgspec.structs.replace(serving, on_gpu=False, cpus=3))
    assert on_gpu.instance_group[0].kind == pb.ModelInstanceGroup.KIND_GPU
    assert on_cpu.instance_group[0].kind == pb.ModelInstanceGroup.KIND_CPU
    (accelerator,) = on_gpu.optimization.execution_accelerators.gpu_execution_accelerator
    assert (accelerator.name, dict(accelerator.parameters)) == ("cuda", {"use_tf32": "0"})
    on_cpu.instance_group[0].kind = pb.ModelInstanceGroup.KIND_GPU
    on_gpu.ClearField("optimization")
    assert on_cpu.parameters["intra_op_thread_count"].string_value == "3"  # the container's, not the machine's
    on_cpu.ClearField("parameters")
    assert on_cpu == on_gpu


profiles = st.lists(
    st.tuples(st.integers(1, 20), st.integers(0, 20), st.integers(0, 20)).map(
        lambda n: BatchProfile(n[0], n[0] + n[1], n[0] + n[1] + n[2])
    ),
    min_size=1,
    max_size=4,
)


@given(profiles)
def test_a_queue_is_never_cut_into_what_no_profile_takes(profiles):
    most = covered(profiles)
    for batch in range(1, most + 1):
        choose_profile(profiles, batch)  # raises where none covers it
    with pytest.raises(InputError):
        choose_profile(profiles, most + 1)


@given(profiles.filter(covered), st.sampled_from(["tensorrt", "onnxruntime", "openvino"]))
def test_what_is_preferred_is_warmed_up_and_captured(profiles, platform):
    most = covered(profiles)
    serving = Serving(
        "model", platform, (image(32),), (), most, profiles=tuple(profiles), on_gpu=platform != "openvino"
    )
    config = model_config(serving)
    warmed = {warmup.batch_size for warmup in config.model_warmup}
    assert set(config.dynamic_batching.preferred_batch_size) | {1, most} == warmed
    assert all(1 <= batch <= most for batch in warmed)
    assert bool(config.dynamic_batching.preferred_batch_size) == (most > 1)
    captured = {graph.batch_size for graph in config.optimization.cuda.graph_spec}
    assert captured == (warmed if platform == "tensorrt" else set())
    assert config.optimization.cuda.graphs == (platform == "tensorrt")


def test_a_lone_profile_needs_no_name_and_several_do():
    one = msgspec.structs.replace(MODELS["deit_s-evit-k0.7"], profiles=(BatchProfile(1, 8, 32),))
    assert list(model_config(one).instance_group[0].profile) == []
    assert list(model_config(MODELS["deit_s-evit-k0.7"]).instance_group[0].profile) == ["0", "1"]


def test_only_the_batch_may_be_dynamic():
    serving = msgspec.structs.replace(
        MODELS["digits"], inputs=(TensorSpec("input", "float32", (None, 3, None, 32)),), preprocess=None
    )
    with pytest.raises(InputError, match="only the batch may be dynamic"):
        model_config(serving)
