"""ONNX Runtime: runs the portable file on CPUs, and on NVIDIA GPUs with the execution providers for them.

ONNX Runtime silently continues without a provider that does not load, and runs what a provider does not support on the
CPU. Here both are errors.
"""

import contextlib
import ctypes
import functools
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

import numpy as np
import onnx
import onnxruntime
import torch

from evit_deploy.bundle.manifest import TensorSpec
from evit_deploy.errors import MissingRequirement, StageError
from evit_deploy.export.card import load_onnx, read_card
from evit_deploy.export.outline import Outline, read_outline
from evit_deploy.export.variants import with_indices
from evit_deploy.runtimes.resident import TensorResident
from evit_deploy.runtimes.runner import Resident, Runner

_FOLDER = "session.model_external_initializers_file_folder_path"
_NUMPY_NAMES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int32)": "int32"}


class OnnxRuntimeRunner(Runner):
    """Runs an ONNX file, its outline, or a model in memory, on the CPU provider."""

    name = "onnxruntime"
    files = ("model.onnx",)
    providers: ClassVar[tuple[str | tuple[str, dict[str, str]], ...]] = ("CPUExecutionProvider",)
    """Execution providers in order of preference, with options."""
    has_bf16: ClassVar[bool] = False
    """Whether the provider has kernels for bfloat16."""
    takes_outlines: ClassVar[bool] = True
    """Whether it opens files by their outline: weights are then memory-mapped, not read and copied three times."""
    concurrent = True  # InferenceSession.run is documented to be thread-safe

    @classmethod
    def accepts(cls, artifact: Any) -> list[str]:
        """Accepts ONNX models, by path or in memory."""
        model = artifact
        if isinstance(artifact, str | Path) and Path(artifact).suffix == ".onnx":
            model = read_outline(Path(artifact)).proto
        if isinstance(artifact, Outline):
            if not cls.takes_outlines:
                return ["it takes a model in one piece"]
            model = artifact.proto
        if isinstance(model, onnx.ModelProto):
            card = read_card(model)
            low = card is not None and card.precision == "bf16" and not cls.has_bf16
            return ["its CPU provider has no bf16"] if low else []
        return [f"it runs ONNX models, not {artifact if isinstance(artifact, str | Path) else type(artifact).__name__}"]

    def __enter__(self) -> Self:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # Interleaved measurements run several sessions in one process. By default idle threads spin and take cores from
        # the session that is running: on two cores everything takes twice as long.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if self.threads:
            options.intra_op_num_threads = self.threads
        try:
            self._session = self._open(self._source(options), options)
        except Exception as error:  # ONNX Runtime raises undocumented classes
            raise StageError(
                f"ONNX Runtime refuses the model: {_first_line(error)}", where=_name(self.artifact)
            ) from error
        return self

    def _source(self, options: onnxruntime.SessionOptions) -> str | bytes:
        """Returns the model for the session; for an outline, sets the folder of its weights in the options."""
        model = self.artifact
        if isinstance(model, str | Path):
            if not self.takes_outlines and not self.with_indices:
                return str(model)
            model = read_outline(Path(model)) if self.takes_outlines else load_onnx(Path(model))
        if isinstance(model, Outline):
            options.add_session_config_entry(_FOLDER, str(model.folder))
            model = model.proto
        return (with_indices(model) if self.with_indices else model).SerializeToString()

    def _open(self, source: str | bytes, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
        return onnxruntime.InferenceSession(source, options, providers=list(self.providers), enable_fallback=0)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._session

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Inputs declared by the file."""
        return tuple(_spec(node) for node in self._session.get_inputs())

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Outputs declared by the file, then with ``with_indices`` the kept candidates."""
        return tuple(_spec(node) for node in self._session.get_outputs())

    def infer(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs one batch."""
        names = [node.name for node in self._session.get_outputs()]
        try:
            answers: Any = self._session.run(names, dict(feeds))
            return dict(zip(names, answers, strict=True))
        except Exception as error:
            raise StageError(f"ONNX Runtime failed: {_first_line(error)}", where=_name(self.artifact)) from error

    def _bound(self, feeds: Mapping[str, np.ndarray], device: torch.device, stream: Any = None) -> Resident:
        """Places a batch in PyTorch tensors on a device, which the session reads and writes directly."""
        batch = len(next(iter(feeds.values())))
        with torch.cuda.stream(stream):
            outputs = {
                spec.name: torch.empty(
                    (batch, *(int(size or 1) for size in spec.shape[1:])),
                    dtype=getattr(torch, spec.dtype),
                    device=device,
                )
                for spec in self.outputs
            }
        return TensorResident(_Bound(self._session, outputs), feeds, device, stream=stream)


class _Bound:
    """Runs a session on PyTorch tensors; always returns the same output tensors.

    Args:
        session: The session.
        outputs: Tensors to write the outputs to.
    """

    def __init__(self, session: onnxruntime.InferenceSession, outputs: dict[str, torch.Tensor]) -> None:
        self._session, self._outputs = session, outputs
        self._binding = session.io_binding()
        self._taken: Mapping[str, torch.Tensor] | None = None
        self._options = onnxruntime.RunOptions()
        # Calls are ordered on the stream; the caller synchronizes before reading the answers.
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if inputs is not self._taken:
            for bind, tensors in ((self._binding.bind_input, inputs), (self._binding.bind_output, self._outputs)):
                for name, tensor in tensors.items():
                    kind = np.dtype(str(tensor.dtype).removeprefix("torch."))
                    where = tensor.device.type, tensor.device.index or 0
                    bind(name, *where, kind, tuple(tensor.shape), tensor.data_ptr())
            self._taken = inputs
        self._session.run_with_iobinding(self._binding, self._options)
        return self._outputs


class _GpuRunner(OnnxRuntimeRunner):
    """Base of the GPU providers; refuses sessions that would run part of the work on the CPU."""

    provider: ClassVar[str]
    has_bf16 = True
    takes_outlines = False
    on_gpu = True
    concurrent = False  # all work is queued on one stream
    _stream: torch.cuda.Stream | None = None

    @classmethod
    def missing(cls) -> MissingRequirement | None:
        """Checks for the provider and a GPU."""
        available = onnxruntime.get_available_providers()
        if cls.provider not in available:
            return MissingRequirement(
                f"ONNX Runtime was installed without its {cls.provider}",
                seen=", ".join(available),
                fix="Run: pip uninstall --yes onnxruntime && pip install --force-reinstall onnxruntime-gpu",
            )
        return None if _cuda_devices() else _no_gpu()

    def __enter__(self) -> Self:
        missing = self.missing()
        if missing is not None:
            raise missing
        # PyTorch can only time work on its own streams.
        self._stream = torch.cuda.Stream() if self.takes_stream and torch.cuda.is_available() else None
        super().__enter__()
        try:
            self._refuse_cpu()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    takes_stream: ClassVar[bool] = True
    """Whether its providers can use a given CUDA stream."""

    def resident(self, feeds: Mapping[str, np.ndarray]) -> Resident | None:
        """Places the batch on the GPU; ``None`` with a CPU build of PyTorch or a provider that takes no stream."""
        if self._stream is None:
            return None
        return self._bound(feeds, self._stream.device, self._stream)

    def synchronize(self) -> None:
        """Waits for the stream."""
        if self._stream is not None:
            self._stream.synchronize()

    def _open(self, source: str | bytes, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
        options.add_session_config_entry(_RECORD, "1")
        providers = with_stream(self.providers, self._stream.cuda_stream) if self._stream else list(self.providers)
        return onnxruntime.InferenceSession(source, options, providers=providers, enable_fallback=0)

    def _refuse_cpu(self) -> None:
        refuse_cpu(self._session, self.provider, _name(self.artifact))


def with_stream(providers: tuple[Any, ...], stream: int) -> list[tuple[str, dict[str, str]]]:
    """Adds a CUDA stream to the options of providers.

    Args:
        providers: Names, with or without options.
        stream: CUDA's handle of the stream.
    """
    named = ((entry, {}) if isinstance(entry, str) else entry for entry in providers)
    return [(name, options | {"user_compute_stream": str(stream)}) for name, options in named]


class OnnxRuntimeCudaRunner(_GpuRunner):
    """Runs an ONNX file, or a model in memory, on the CUDA provider."""

    name = "onnxruntime-cuda"
    provider = "CUDAExecutionProvider"
    # The provider's default is TF32.
    providers = (("CUDAExecutionProvider", {"use_tf32": "0"}),)


class OnnxRuntimeTensorRTRunner(_GpuRunner):
    """Runs an ONNX file, or a model in memory, on the TensorRT provider, with the CUDA provider as fallback."""

    name = "onnxruntime-tensorrt"
    provider = "TensorrtExecutionProvider"
    providers = ("TensorrtExecutionProvider", *OnnxRuntimeCudaRunner.providers)


class OnnxRuntimeTensorRTRTXRunner(_GpuRunner):
    """Runs an ONNX file, or a model in memory, on NVIDIA's TensorRT-RTX provider, which is a separate package."""

    name = "onnxruntime-tensorrt-rtx"
    provider = "NvTensorRTRTXExecutionProvider"
    takes_stream = False

    @classmethod
    def missing(cls) -> MissingRequirement | None:
        """Checks for the provider's package and a supported GPU."""
        if importlib.util.find_spec(_RTX) is None:
            return MissingRequirement(
                "ONNX Runtime's provider for TensorRT-RTX is needed",
                seen="not installed",
                fix="Run: pip install onnxruntime-ep-nv-tensorrt-rtx",
            )
        if not _cuda_devices():
            return _no_gpu()
        try:
            devices = _rtx_devices()
        except Exception as error:  # such as a library that does not load, or an incompatible ONNX Runtime
            return MissingRequirement(
                f"the provider for TensorRT-RTX does not load: {_first_line(error)}",
                fix="Run: pip install --force-reinstall onnxruntime onnxruntime-ep-nv-tensorrt-rtx",
            )
        return None if devices else _no_gpu("a GPU that TensorRT-RTX runs on (GeForce or RTX, Ampere or newer)")

    def _open(self, source: str | bytes, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
        options.add_session_config_entry(_RECORD, "1")
        options.add_provider_for_devices(_rtx_devices()[:1], {})
        return onnxruntime.InferenceSession(source, options, enable_fallback=0)

    def _refuse_cpu(self) -> None:
        refuse_cpu(self._session, _register_rtx(), _name(self.artifact))


_RTX = "onnxruntime_ep_nv_tensorrt_rtx"
_RECORD = "session.record_ep_graph_assignment_info"
# Parts of the names of operators that must not run on the CPU; shape computations are expected there.
_HEAVY = ("MatMul", "Gemm", "Conv", "Attention", "Softmax", "Normalization", "Gelu", "TopK")


def refuse_cpu(session: Any, provider: str, where: str) -> None:
    """Checks that a session runs all its work on the given provider.

    Args:
        session: The session, opened with the option that records the assignment of nodes.
        provider: Name of the provider.
        where: Name of the model for the message.

    Raises:
        StageError: The provider was not loaded, or heavy operators were assigned to the CPU.
    """
    found = session.get_providers()
    if found[:1] != [provider]:
        raise StageError(
            f"ONNX Runtime did not load its {provider} and would continue without it",
            where=where,
            seen=", ".join(found),
            fix="Install the CUDA, cuDNN or TensorRT version that this ONNX Runtime was built for.",
        )
    left = {
        node.op_type
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name == "CPUExecutionProvider"
        for node in part.get_nodes()
        if any(name in node.op_type for name in _HEAVY)
    }
    if left:
        what = f"{provider} leaves a part of the model to the CPU"
        raise StageError(what, where=where, seen=", ".join(sorted(left)), fix="Use a newer ONNX Runtime.")


def _no_gpu(wanted: str | None = None) -> MissingRequirement:
    return MissingRequirement("no GPU that it could run on", wanted=wanted, fix="Run it where nvidia-smi lists one.")


def _cuda_devices() -> int:
    """Number of GPUs, from the driver, because a CPU build of PyTorch always reports none."""
    count = ctypes.c_int(0)
    with contextlib.suppress(OSError):  # no driver, no GPU
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
            return 0
    return count.value


@functools.cache
def _register_rtx() -> str:
    """Registers the provider's library with ONNX Runtime, once per process; returns the provider's name."""
    package = importlib.import_module(_RTX)
    onnxruntime.register_execution_provider_library(package.get_ep_name(), package.get_library_path())
    return package.get_ep_name()


def _rtx_devices() -> list[Any]:
    name = _register_rtx()
    return [device for device in onnxruntime.get_ep_devices() if device.ep_name == name]


def _spec(node: Any) -> TensorSpec:
    shape = tuple(size if isinstance(size, int) else None for size in node.shape)
    return TensorSpec(node.name, _NUMPY_NAMES[node.type], shape)


def _name(artifact: Any) -> str:
    if isinstance(artifact, Outline):
        return str(artifact.folder)
    return str(artifact) if isinstance(artifact, str | Path) else "model in memory"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
