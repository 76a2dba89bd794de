"""OpenVINO: runs the portable file, or OpenVINO's own format, on Intel and other CPUs."""

import contextlib
import importlib.util
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
from onnx import ModelProto

from evit_deploy.bundle.manifest import TensorSpec
from evit_deploy.environment.requirements import install_line
from evit_deploy.errors import InputError, MissingRequirement, StageError
from evit_deploy.export.card import ModelCard, load_onnx, read_card
from evit_deploy.export.openvino import (
    import_openvino,
    kept_outputs,
    one_line,
    openvino_card,
    openvino_model,
    read_openvino,
)
from evit_deploy.runtimes.runner import Runner

# Precision of a file -> OpenVINO's inference precision. INT8 files have quantized operators; their other operators are
# FP32.
_COMPUTES = {"fp32": "f32", "bf16": "bf16", "fp16": "f16", "int8": "f32"}


class OpenVINORunner(Runner):
    """Runs ``model.xml``, an ONNX file or an ONNX model in memory, on the CPU, in the file's precision.

    The precision is always set, because by default OpenVINO computes in BF16 on processors that support it. A file that
    evit-deploy did not write runs in FP32.

    Args:
        artifact: The model to run.
        threads: CPU threads; ``None`` for OpenVINO's default.
        with_indices: Whether to also return the kept candidates as ``kept_<block>``.
        mode: ``latency`` for one request at a time on all threads; ``throughput`` for several concurrent requests with
            a few threads each, see :meth:`infer_many`.
    """

    name = "openvino"
    files = ("openvino/model.xml", "model.onnx")

    def __init__(
        self,
        artifact: Any,
        *,
        threads: int | None = None,
        with_indices: bool = False,
        mode: Literal["latency", "throughput"] = "latency",
    ) -> None:
        super().__init__(artifact, threads=threads, with_indices=with_indices)
        self.mode = mode

    @classmethod
    def missing(cls) -> MissingRequirement | None:
        """Checks for the package."""
        if importlib.util.find_spec("openvino") is None:
            return MissingRequirement(
                "openvino is needed", seen="not installed", fix=f"Run: {install_line('openvino')}"
            )
        return None

    @classmethod
    def accepts(cls, artifact: Any) -> list[str]:
        """Accepts OpenVINO models by path, and ONNX models by path or in memory in a supported precision."""
        if not isinstance(artifact, ModelProto | str | Path):
            return [f"it runs OpenVINO and ONNX models, not {type(artifact).__name__}"]
        if not isinstance(artifact, ModelProto) and Path(artifact).suffix != ".onnx":
            return [] if Path(artifact).suffix == ".xml" else [f"it runs .xml and .onnx, not {artifact}"]
        card = read_card(artifact if isinstance(artifact, ModelProto) else load_onnx(Path(artifact)))
        return [f"it has no {card.precision}"] if card is not None and card.precision not in _COMPUTES else []

    def __enter__(self) -> Self:
        missing = self.missing()
        if missing is not None:
            raise missing
        if isinstance(self.artifact, ModelProto):
            model = openvino_model(self.artifact)
        elif Path(self.artifact).suffix == ".xml":
            model = read_openvino(Path(self.artifact))
        else:
            model = openvino_model(load_onnx(Path(self.artifact)), str(self.artifact))
        if self.with_indices:
            present = {name for output in model.outputs for name in output.get_names()}
            model.add_outputs([name for name in kept_outputs(model) if name not in present])
        self._card = openvino_card(model)
        options = {
            "INFERENCE_PRECISION_HINT": self._computes(self._card),
            "PERFORMANCE_HINT": self.mode.upper(),
            # Interleaved measurements run several runtimes in one process. Pinned threads would have to wait for their
            # core: with two threads on two busy cores, calls took half as long again.
            "ENABLE_CPU_PINNING": False,
        }
        if self.threads:
            options["INFERENCE_NUM_THREADS"] = self.threads
        try:
            self._compiled = import_openvino().Core().compile_model(model, "CPU", options)
            self._request = self._compiled.create_infer_request()
        except Exception as error:  # OpenVINO raises RuntimeError for everything
            raise StageError(f"OpenVINO refuses the model: {one_line(error)}", where=self._where()) from error
        self._refuse_other_precision(options["INFERENCE_PRECISION_HINT"])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._request, self._compiled

    @property
    def card(self) -> ModelCard | None:
        """The file's model card; ``None`` if evit-deploy did not write it."""
        return self._card

    @property
    def computes_in(self) -> str:
        """The inference precision that OpenVINO reports: ``f32``, ``bf16`` or ``f16``."""
        return self._compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()

    @property
    def requests(self) -> int:
        """Number of batches that :meth:`infer_many` runs concurrently."""
        return self._compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Inputs declared by the file."""
        return tuple(_spec(port) for port in self._compiled.inputs)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Outputs declared by the file, then with ``with_indices`` the kept candidates."""
        return tuple(_spec(port) for port in self._compiled.outputs)

    def infer(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs one batch."""
        self._check_names(feeds)
        try:
            self._request.infer(dict(feeds), share_inputs=True)
            return self._answers(self._request)
        except Exception as error:
            raise StageError(f"OpenVINO failed: {one_line(error)}", where=self._where()) from error

    def infer_many(self, batches: Sequence[Mapping[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
        """Runs several batches, as many concurrently as the mode allows.

        Args:
            batches: For each batch, one array for each input.

        Returns:
            For each batch, in order, one array for each output.
        """
        for feeds in batches:
            self._check_names(feeds)
        answers: list[dict[str, np.ndarray]] = []
        running: deque[Any] = deque()  # oldest first, which finishes next, since all batches cost the same
        try:
            idle = [self._compiled.create_infer_request() for _ in range(min(self.requests, len(batches)))]
            for feeds in batches:
                if not idle:
                    idle.append(self._finish(running, answers))
                request = idle.pop()
                request.start_async(dict(feeds), share_inputs=True)
                running.append(request)
            while running:
                self._finish(running, answers)
        except Exception as error:
            for request in running:  # they read from the caller's arrays
                request.cancel()
                with contextlib.suppress(Exception):  # wait raises for a canceled request
                    request.wait()
            raise StageError(f"OpenVINO failed: {one_line(error)}", where=self._where()) from error
        return answers

    def _finish(self, running: deque[Any], answers: list[dict[str, np.ndarray]]) -> Any:
        running[0].wait()
        request = running.popleft()
        answers.append(self._answers(request))
        return request

    def _answers(self, request: Any) -> dict[str, np.ndarray]:
        arrays = zip(self._compiled.outputs, request.output_tensors, strict=True)
        return {port.any_name: _narrow(np.array(tensor.data)) for port, tensor in arrays}

    def _check_names(self, feeds: Mapping[str, np.ndarray]) -> None:
        wanted = {port.any_name for port in self._compiled.inputs}
        if feeds.keys() != wanted:  # OpenVINO would run with the old content of a missing input
            what = "OpenVINO failed: these are not the model's inputs"
            raise StageError(what, where=self._where(), seen=sorted(feeds), wanted=sorted(wanted))

    def _computes(self, card: ModelCard | None) -> str:
        precision = card.precision if card else "fp32"
        if precision not in _COMPUTES:
            raise InputError(
                "OpenVINO has no such precision", where=self._where(), seen=precision, wanted=", ".join(_COMPUTES)
            )
        return _COMPUTES[precision]

    def _refuse_other_precision(self, wanted: str) -> None:
        found = self.computes_in
        if found != wanted:
            self.__exit__(None, None, None)
            raise MissingRequirement(
                "this processor cannot compute in the file's precision, and OpenVINO would take another",
                where=self._where(),
                seen=found,
                wanted=wanted,
                fix="Convert with --precision fp32, or run it on another machine.",
            )

    def _where(self) -> str:
        return str(self.artifact) if isinstance(self.artifact, str | Path) else "model in memory"


def _spec(port: Any) -> TensorSpec:
    dtype = port.get_element_type().to_dtype()
    shape = tuple(None if size.is_dynamic else size.get_length() for size in port.get_partial_shape())
    return TensorSpec(port.any_name, "int32" if dtype == np.int64 else np.dtype(dtype).name, shape)


def _narrow(array: np.ndarray) -> np.ndarray:
    """Converts indices, which are int64 in OpenVINO, to int32 as in the other runtimes."""
    return array.astype(np.int32) if array.dtype == np.int64 else array
