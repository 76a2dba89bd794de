"""Triton model repositories, with the configurations created as Triton's own protocol buffers.

A repository has up to three models: an ensemble for image files, its preprocessing, and the model itself. The fields
are documented in https://github.com/triton-inference-server/server, docs/user_guide/model_configuration.md, and in the
README of each backend.
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
"""Platform -> file name of the model in its version folder."""
LABELS, CONFIG, VERSION = "labels.txt", "config.pbtxt", "1"
MAX_BATCH = {"onnxruntime": 32, "openvino": 1}
"""Default maximum where the file sets no limit. Triton's OpenVINO backend pads every batch to the maximum."""
PREPROCESS_INSTANCES = 4
_PREPROCESSED = "preprocessed"
_TYPES = {"float32": "TYPE_FP32", "int32": "TYPE_INT32"}


class Serving(msgspec.Struct, frozen=True):
    """How Triton serves a model.

    Args:
        name: Name of the ensemble; the other models are named after it.
        platform: ``tensorrt``, ``onnxruntime`` or ``openvino``.
        inputs: Inputs of the model.
        outputs: Outputs of the model.
        max_batch: Maximum images per call.
        preprocess: How an image file becomes an input; ``None`` serves the model alone.
        decoder: Preprocessing backend: ``python`` (Pillow, on the CPU) or ``dali`` (on the GPU).
        on_gpu: Whether the model runs on GPUs.
        cpus: Processors of the server.
        labels: Class names, if known.
        profiles: Batch sizes that each optimization profile of a plan covers.
        plans: Compute capability (``8.0``) -> file name, if there are plans for several GPUs.
        instances: Instances of the model, on each GPU or on the CPU.
        queue_delay: Microseconds that a request may wait to be batched with others.
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
        """Name of the model."""
        return f"{self.name}_model"

    @property
    def preprocessing(self) -> str:
        """Name of the preprocessing model."""
        return f"{self.name}_preprocess"

    @property
    def batches(self) -> tuple[int, ...]:
        """Batch sizes to prefer, warm up and capture as CUDA graphs: those that plans are tuned for and the largest."""
        tuned = {profile.optimum for profile in self.profiles} or {self.max_batch // 4}
        return tuple(sorted({size for size in tuned if 1 < size < self.max_batch} | {self.max_batch}))


def covered(profiles: Sequence[BatchProfile]) -> int:
    """Returns the largest batch size up to which profiles cover every size, since Triton may form any of them.

    >>> covered([BatchProfile(1, 1, 1), BatchProfile(2, 8, 16), BatchProfile(20, 32, 32)])
    16
    """
    largest = 0
    for profile in sorted(profiles, key=lambda profile: profile.minimum):
        if profile.minimum <= largest + 1:
            largest = max(largest, profile.maximum)
    return largest


def configurations(serving: Serving) -> dict[str, Any]:
    """Returns the configuration of every model in a repository.

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
        serving: The model and its settings.
        files: Name in the model's version folder -> file to copy there.
        folder: Folder to create.

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
        (folder / serving.name / VERSION).mkdir()  # Triton requires a version folder, though empty
        (folder / serving.name / VERSION / ".keep").touch()  # Git, object stores and images drop empty folders
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
    """Configuration of the model: input ``input``, output ``logits`` or ``embedding``."""
    pb = _protocol()
    config = _config(serving.model, serving.max_batch)
    if serving.platform == "openvino":  # a backend without a platform name
        config.backend = "openvino"
    else:
        config.platform = {"tensorrt": "tensorrt_plan", "onnxruntime": "onnxruntime_onnx"}[serving.platform]
    config.default_model_filename = MODEL_FILES[serving.platform]
    for tensor in serving.inputs:
        config.input.add(name=tensor.name, data_type=_TYPES[tensor.dtype], dims=_dims(tensor))
    _add_outputs(config, serving)
    kind = pb.ModelInstanceGroup.KIND_GPU if serving.on_gpu else pb.ModelInstanceGroup.KIND_CPU
    # Triton uses only the first profile, unless several are listed.
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
        # The model was verified in FP32, but ONNX Runtime uses TF32 by default.
        accelerator = config.optimization.execution_accelerators.gpu_execution_accelerator.add(name="cuda")
        accelerator.parameters["use_tf32"] = "0"
    elif serving.platform == "onnxruntime":
        # The default is a thread for every processor of the machine, whatever the container's limit.
        config.parameters["intra_op_thread_count"].string_value = str(max(serving.cpus // serving.instances, 1))
    return config


def _use_cuda_graphs(config: Any, serving: Serving) -> None:
    """Captures CUDA graphs for one image and every preferred batch; Triton replays a graph only at its exact size."""
    config.optimization.cuda.graphs = True
    config.optimization.cuda.output_copy_stream = True
    for batch in sorted({1, *serving.batches}):
        graph = config.optimization.cuda.graph_spec.add(batch_size=batch)
        for tensor in serving.inputs:
            graph.input[tensor.name].dim.extend(_dims(tensor))


def preprocess_config(serving: Serving) -> Any:
    """Configuration of the preprocessing: with DALI, or in Python with all settings in one parameter.

    It has no batching queue: requests are distributed among its instances, which in Python are separate processes.
    """
    pb, preprocess = _protocol(), serving.preprocess
    assert preprocess is not None
    config = _config(serving.preprocessing, serving.max_batch)
    config.backend = serving.decoder
    _add_image(config, serving)
    (tensor,) = serving.inputs
    config.output.add(name=triton_preprocess.INPUT, data_type=_TYPES[tensor.dtype], dims=_dims(tensor))
    if serving.decoder == "dali":
        config.instance_group.add(count=1, kind=pb.ModelInstanceGroup.KIND_GPU)  # more would only use more memory
        return config
    config.instance_group.add(count=PREPROCESS_INSTANCES, kind=pb.ModelInstanceGroup.KIND_CPU)
    limits = {"max_pixels": triton_preprocess.MAX_PIXELS, "max_bytes": triton_preprocess.MAX_BYTES}
    settings = msgspec.json.encode(msgspec.to_builtins(preprocess) | limits).decode()
    config.parameters[triton_preprocess.PARAMETER].string_value = settings
    return config


def ensemble_config(serving: Serving) -> Any:
    """Configuration of the ensemble: input ``IMAGE`` (the bytes of a JPEG or PNG file), outputs of the model."""
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
    """Adds the input for image files: strings, or for DALI rows of bytes padded to the longest file."""
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
    """Returns a tensor's sizes without the batch, as Triton expects them.

    Raises:
        InputError: Another dimension is dynamic.
    """
    sizes = [size for size in tensor.shape[1:] if size is not None]
    if len(sizes) != len(tensor.shape) - 1:
        raise InputError("only the batch may be dynamic", where=tensor.name, seen=list(tensor.shape))
    return sizes
