"""ONNX Runtime: the portable file on any CPU."""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import onnx
import onnxruntime

from evit_deploy.errors import StageError
from evit_deploy.export import load_onnx, read_card
from evit_deploy.runtimes import Runner, TensorSpec
from evit_deploy.variants import with_indices

_NUMPY_NAMES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int32)": "int32"}


class OnnxRuntimeRunner(Runner):
    """Runs an ONNX file, or a model in memory, on the CPU provider."""

    name = "onnxruntime"
    files = ("model.onnx",)

    @classmethod
    def accepts(cls, artifact: Any) -> list[str]:
        """ONNX models, by path or in memory, but for bf16: the CPU provider has no kernels for it."""
        model = artifact
        if isinstance(artifact, str | Path) and Path(artifact).suffix == ".onnx":
            model = load_onnx(Path(artifact))
        if isinstance(model, onnx.ModelProto):
            card = read_card(model)
            return ["its CPU provider has no bf16"] if card is not None and card.precision == "bf16" else []
        return [f"it runs ONNX models, not {artifact if isinstance(artifact, str | Path) else type(artifact).__name__}"]

    def __enter__(self) -> Self:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # Sessions take turns in one process here, and a pool that spins while it waits takes a core from whoever's turn
        # it is: interleaved on two cores, everything takes twice as long with ONNX Runtime's default.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if self.threads:
            options.intra_op_num_threads = self.threads
        model = self.artifact
        if self.with_indices:
            model = with_indices(model if isinstance(model, onnx.ModelProto) else load_onnx(Path(model)))
        source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else str(model)
        try:
            self._session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime raises its own undocumented classes
            raise StageError(
                f"ONNX Runtime refuses the model: {_first_line(error)}", where=_name(self.artifact)
            ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._session

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """As the file declares them."""
        return tuple(_spec(node) for node in self._session.get_inputs())

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """As the file declares them, then the kept candidates if they were asked for."""
        return tuple(_spec(node) for node in self._session.get_outputs())

    def infer(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs one batch."""
        names = [node.name for node in self._session.get_outputs()]
        try:
            answers: Any = self._session.run(names, dict(feeds))
            return dict(zip(names, answers, strict=True))
        except Exception as error:
            raise StageError(f"ONNX Runtime failed: {_first_line(error)}", where=_name(self.artifact)) from error


def _spec(node: Any) -> TensorSpec:
    shape = tuple(size if isinstance(size, int) else None for size in node.shape)
    return TensorSpec(node.name, _NUMPY_NAMES[node.type], shape)


def _name(artifact: Any) -> str:
    return str(artifact) if isinstance(artifact, str | Path) else "model in memory"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
