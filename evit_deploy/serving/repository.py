"""A Triton model repository: the configuration of each model in it, as Triton's own protocol buffers.

Up to three models: an ensemble that takes image files, the preprocessing behind it, and the model itself. What Triton
does with each field: https://github.com/triton-inference-server/server, docs/user_guide/model_configuration.md, and
the README of each backend.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from evit_deploy.bundle.manifest import TensorSpec
from evit_deploy.data.preprocess import Preprocess
from evit_deploy.environment.requirements import install_line
from evit_deploy.errors import InputError, MissingRequirement
from evit_deploy.export.card import INPUT
from evit_deploy.recipe.options import BatchProfile
from evit_deploy.serving.options import QUEUE_DELAY
from evit_deploy.serving.server_files import preprocess as triton_preprocess

MODEL_FILES = {"tensorrt": "model.plan", "onnxruntime": "model.onnx", "openvino": "model.xml"}
"""Platform -> name of the model's file, in the folder of its version."""
LABELS, CONFIG, VERSION = "labels.txt", "config.pbtxt", "1"
MAX_BATCH = {"onnxruntime": 32, "openvino": 1}
"""Where the file sets no limit. Triton's OpenVINO backend fills every batch up to the maximum and computes it whole."""
PREPROCESS_INSTANCES = 4
_PREPROCESSED = "preprocessed"
_TYPES = {"float32": "TYPE_FP32", "int32": "TYPE_INT32"}


class Serving(msgspec.Struct, frozen=True):
    """One model as Triton is to serve it.

    Args:
        name: Of the ensemble; the others are named after it.
        platform: ``tensorrt``, ``onnxruntime`` or ``openvino``.
        inputs: The model's.
        outputs: The model's.
        max_batch: Maximum images per call.
        preprocess: From image file to input; ``None`` for the model alone.
        decoder: What does it: ``python`` (with Pillow, on the CPU) or ``dali`` (on the GPU).
        on_gpu: Whether the model runs on GPUs.
        cpus: Processors that the server has.
        labels: Class names, if known.
        profiles: Batch sizes that each optimization profile of a plan covers.
        plans: Compute capability (``8.0``) -> file, when there is a plan for each of several GPUs.
        instances: Of the model, on each GPU or on the CPU.
        queue_delay: Microseconds that a request may wait for others.
    """

    name: str
    platform: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch: int
    preprocess: Preprocess | None = None
    decoder: str = "python"
    on_gpu: bool = True
    cpus: int = 4
    labels: list[str] | None = None
    profiles: tuple[BatchProfile, ...] = ()
    plans: dict[str, str] = {}
    instances: int = 1
    queue_delay: int = QUEUE_DELAY

    @property
    def model(self) -> str:
        """Name of the model itself."""
        return f"{self.name}_model"

    @property
    def preprocessing(self) -> str:
        """Name of the model that makes inputs of image files."""
        return f"{self.name}_preprocess"

    @property
    def batches(self) -> tuple[int, ...]:
        """Batch sizes that the server prefers, warms up and captures: what plans are tuned for, and the largest."""
        tuned = {profile.optimum for profile in self.profiles} or {self.max_batch // 4}
        return tuple(sorted({size for size in tuned if 1 < size < self.max_batch} | {self.max_batch}))


def covered(profiles: Sequence[BatchProfile]) -> int:
    """The largest batch such that it and every smaller one is covered by a profile: what a queue may be cut into.

    >>> covered([BatchProfile(1, 1, 1), BatchProfile(2, 8, 16), BatchProfile(20, 32, 32)])
    16
    """
    largest = 0
    for profile in sorted(profiles, key=lambda profile: profile.minimum):
        if profile.minimum <= largest + 1:
            largest = max(largest, profile.maximum)
    return largest


def configurations(serving: Serving) -> dict[str, Any]:
    """Every configuration of a repository.

    Returns:
        Path in the repository -> ``inference.ModelConfig``.

    Raises:
        MissingRequirement: ``tritonclient``, which brings the protocol buffers, is not installed.
    """
    configs = {f"{serving.model}/{CONFIG}": model_config(serving)}
    if serving.preprocess is not None:
        configs[f"{serving.preprocessing}/{CONFIG}"] = preprocess_config(serving)
        configs[f"{serving.name}/{CONFIG}"] = ensemble_config(serving)
    return configs


def write_repository(serving: Serving, files: Mapping[str, Path], folder: Path) -> None:
    """Writes a model repository.

    Args:
        serving: What it is to serve.
        files: Name in the model's version folder -> the file to copy there.
        folder: A folder that is not there yet.

    Raises:
        MissingRequirement: See :func:`configurations`.
    """
    from google.protobuf import text_format

    for name, config in configurations(serving).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text_format.MessageToString(config), encoding="utf-8")
    for name, source in files.items():
        path = folder / serving.model / VERSION / name
        path.parent.mkdir(exist_ok=True)
        shutil.copyfile(source, path)
    if serving.preprocess is not None:
        _write_preprocessing(serving.preprocess, serving, folder / serving.preprocessing / VERSION)
        (folder / serving.name / VERSION).mkdir()  # an ensemble's version is an empty folder; Triton wants it there
        (folder / serving.name / VERSION / ".keep").touch()  # and Git, object stores and images drop empty ones
    if serving.labels is not None:
        for name in {serving.model, serving.name} if serving.preprocess is not None else {serving.model}:
            (folder / name / LABELS).write_text("".join(f"{label}\n" for label in serving.labels), encoding="utf-8")


def _write_preprocessing(preprocess: Preprocess, serving: Serving, folder: Path) -> None:
    folder.mkdir()
    source = Path(triton_preprocess.__file__)
    if serving.decoder == "python":
        shutil.copyfile(source, folder / "model.py")
        return
    shutil.copyfile(source.with_name("dali.py"), folder / "dali.py")  # cannot be imported without DALI
    settings = msgspec.to_builtins(preprocess) | {"max_batch": serving.max_batch}
    (folder / "preprocess.json").write_text(json.dumps(settings), encoding="utf-8")


def model_config(serving: Serving) -> Any:
    """The model itself: input ``input``, output ``logits`` or ``embedding``."""
    pb = _protocol()
    config = _config(serving.model, serving.max_batch)
    if serving.platform == "openvino":  # has a backend, and no name among the platforms
        config.backend = "openvino"
    else:
        config.platform = {"tensorrt": "tensorrt_plan", "onnxruntime": "onnxruntime_onnx"}[serving.platform]
    config.default_model_filename = MODEL_FILES[serving.platform]
    for tensor in serving.inputs:
        config.input.add(name=tensor.name, data_type=_TYPES[tensor.dtype], dims=_dims(tensor))
    _add_outputs(config, serving)
    kind = pb.ModelInstanceGroup.KIND_GPU if serving.on_gpu else pb.ModelInstanceGroup.KIND_CPU
    # Of several profiles Triton uses the first, unless they are named.
    profiles = [str(index) for index in range(len(serving.profiles))] if len(serving.profiles) > 1 else []
    config.instance_group.add(count=serving.instances, kind=kind, profile=profiles)
    if serving.max_batch > 1:
        config.dynamic_batching.preferred_batch_size.extend(serving.batches)
        config.dynamic_batching.max_queue_delay_microseconds = serving.queue_delay
    for batch in sorted({1, *serving.batches}):
        warmup = config.model_warmup.add(name=f"batch_{batch}", batch_size=batch, count=1)
        for tensor in serving.inputs:
            warm = warmup.inputs[tensor.name]
            warm.data_type, warm.random_data = pb.DataType.Value(_TYPES[tensor.dtype]), True
            warm.dims.extend(_dims(tensor))
    if serving.platform == "tensorrt":
        _use_cuda_graphs(config, serving)
        for capability, name in serving.plans.items():
            config.cc_model_filenames[capability] = name
    elif serving.platform == "openvino" and serving.max_batch > 1:
        config.parameters["ENABLE_BATCH_PADDING"].string_value = "YES"
    elif serving.platform == "onnxruntime" and serving.on_gpu:
        # FP32 means FP32, as it did when the model was verified; ONNX Runtime takes TF32 if it may.
        accelerator = config.optimization.execution_accelerators.gpu_execution_accelerator.add(name="cuda")
        accelerator.parameters["use_tf32"] = "0"
    elif serving.platform == "onnxruntime":
        # By itself it starts a thread for every processor of the machine, not of the container.
        config.parameters["intra_op_thread_count"].string_value = str(max(serving.cpus // serving.instances, 1))
    return config


def _use_cuda_graphs(config: Any, serving: Serving) -> None:
    """A graph for one image and for every preferred batch: Triton replays one only for exactly its size."""
    config.optimization.cuda.graphs = True
    config.optimization.cuda.output_copy_stream = True
    for batch in sorted({1, *serving.batches}):
        graph = config.optimization.cuda.graph_spec.add(batch_size=batch)
        for tensor in serving.inputs:
            graph.input[tensor.name].dim.extend(_dims(tensor))


def preprocess_config(serving: Serving) -> Any:
    """Image files to inputs: in DALI, or in Python, where everything it has to know stands in one parameter.

    It has no queue of its own to batch from: requests are shared out among its instances, in Python each a process.
    """
    pb, preprocess = _protocol(), serving.preprocess
    assert preprocess is not None
    config = _config(serving.preprocessing, serving.max_batch)
    config.backend = serving.decoder
    _add_image(config, serving)
    (tensor,) = serving.inputs
    config.output.add(name=triton_preprocess.INPUT, data_type=_TYPES[tensor.dtype], dims=_dims(tensor))
    if serving.decoder == "dali":
        config.instance_group.add(count=1, kind=pb.ModelInstanceGroup.KIND_GPU)  # more of them cost memory alone
        return config
    config.instance_group.add(count=PREPROCESS_INSTANCES, kind=pb.ModelInstanceGroup.KIND_CPU)
    limits = {"max_pixels": triton_preprocess.MAX_PIXELS, "max_bytes": triton_preprocess.MAX_BYTES}
    settings = msgspec.json.encode(msgspec.to_builtins(preprocess) | limits).decode()
    config.parameters[triton_preprocess.PARAMETER].string_value = settings
    return config


def ensemble_config(serving: Serving) -> Any:
    """What clients call: input ``IMAGE`` (the bytes of a JPEG or PNG file), outputs the model's."""
    config = _config(serving.name, serving.max_batch)
    config.platform = "ensemble"
    _add_image(config, serving)
    _add_outputs(config, serving)
    step = config.ensemble_scheduling.step.add(model_name=serving.preprocessing, model_version=-1)
    step.input_map[triton_preprocess.IMAGE] = triton_preprocess.IMAGE
    step.output_map[triton_preprocess.INPUT] = _PREPROCESSED
    step = config.ensemble_scheduling.step.add(model_name=serving.model, model_version=-1)
    step.input_map[INPUT] = _PREPROCESSED
    for tensor in serving.outputs:
        step.output_map[tensor.name] = tensor.name
    return config


def _protocol() -> Any:
    try:
        from tritonclient.grpc import model_config_pb2
    except ImportError as error:
        raise MissingRequirement(
            "Triton's configuration is written with tritonclient's protocol buffers",
            where="package --for triton", seen=str(error), fix=f"Run: {install_line('triton')}",
        ) from None  # fmt: skip
    return model_config_pb2


def _config(name: str, max_batch: int) -> Any:
    config = _protocol().ModelConfig(name=name, max_batch_size=max_batch)
    config.version_policy.latest.num_versions = 1
    return config


def _add_image(config: Any, serving: Serving) -> None:
    """A file for each image; DALI takes no strings, but rows of bytes that are as long as the longest."""
    pb = _protocol()
    if serving.decoder == "dali":
        config.input.add(name=triton_preprocess.IMAGE, data_type=pb.TYPE_UINT8, dims=[-1])
    else:
        config.input.add(name=triton_preprocess.IMAGE, data_type=pb.TYPE_STRING, dims=[1])


def _add_outputs(config: Any, serving: Serving) -> None:
    for index, tensor in enumerate(serving.outputs):
        output = config.output.add(name=tensor.name, data_type=_TYPES[tensor.dtype], dims=_dims(tensor))
        if index == 0 and serving.labels is not None:
            output.label_filename = LABELS


def _dims(tensor: TensorSpec) -> list[int]:
    """A tensor's sizes without its batch, as Triton counts.

    Raises:
        InputError: One of them is dynamic.
    """
    sizes = [size for size in tensor.shape[1:] if size is not None]
    if len(sizes) != len(tensor.shape) - 1:
        raise InputError("only the batch may be dynamic", where=tensor.name, seen=list(tensor.shape))
    return sizes
