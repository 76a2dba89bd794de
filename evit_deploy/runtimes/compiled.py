"""PyTorch with ``torch.compile``."""

import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from evit_deploy.errors import MissingRequirement, StageError
from evit_deploy.runtimes.eager import EagerRunner
from evit_deploy.tokens.reducer import TokenReducer

# Each model is compiled for each batch size, and PyTorch counts all of them together: its default limit of eight would
# be reached by a model and its dense twin at four batch sizes.
_PROGRAMS = 256


class CompiledRunner(EagerRunner):
    """Runs a compiled ``nn.Module`` in the dtype and on the device of its parameters.

    The first call at each batch size compiles for seconds to minutes; profiling warms up first and never times it.
    Shapes are static, as for an engine's kernels. The model must be one graph (``fullgraph``): a graph break is an
    error, because it would make the model slow without an explanation. On a GPU the mode is ``reduce-overhead``, which
    replays CUDA graphs, because launching a ViT's kernels one by one takes longer than running them at small batches;
    after compilation, the next calls warm up, then record, then replay. ``max-autotune`` is not used, because
    autotuning takes minutes for each batch size.

    With ``with_indices``, the kept candidates are outputs of the same compiled graph.
    """

    name = "torch.compile"
    default: ClassVar[bool] = False
    """Not used by default, because compiling takes longer than all other measurements."""

    @classmethod
    def missing(cls) -> MissingRequirement | None:
        """Checks for a C++ compiler and Python's headers, which launchers of GPU kernels need too."""
        compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
        if shutil.which(compiler) is None:
            fix = f"Install {compiler} (apt install g++), or set CXX to a C++ compiler."
            return MissingRequirement("torch.compile needs a C++ compiler", seen=f"no {compiler}", fix=fix)
        headers = Path(sysconfig.get_path("include"), "Python.h")
        if not headers.is_file():
            fix = "Install them: apt install python3-dev"
            return MissingRequirement("torch.compile needs Python's headers", seen=f"no {headers}", fix=fix)
        return None

    def __enter__(self) -> Self:
        super().__enter__()
        self._stack = ExitStack()
        self._stack.enter_context(_limit(_PROGRAMS))  # not around each call, where it would cost half a second
        # dynamic=False, because otherwise PyTorch would use one slower program for all batch sizes from the second on.
        mode = "reduce-overhead" if self._on_gpu else None
        forward = self._with_kept() if self.with_indices else _plain(self._model)
        self._compiled = torch.compile(forward, fullgraph=True, dynamic=False, mode=mode)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        del self._compiled
        super().__exit__(kind, error, trace)

    def _forward(self, images: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """See :class:`EagerRunner`; compiles first if the batch size is new.

        Raises:
            StageError: The model cannot be compiled.
        """
        try:
            if self._on_gpu:
                torch.compiler.cudagraph_mark_step_begin()  # the answers of the last call may be overwritten
            return self._compiled(images)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # PyTorch's compiler raises many kinds of exceptions
            raise StageError(f"torch.compile fails: {_line(error)}", where=f"batch {len(images)}") from error

    @property
    def _on_gpu(self) -> bool:
        return self._parameter.is_cuda

    def _with_kept(self) -> Callable[[Tensor], tuple[Tensor, tuple[Tensor, ...]]]:
        """Returns a function for the model and what its reducers keep; the hooks are compiled with the model."""
        model, kept = self._model, []

        def remember(reducer: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
            kept.append(output[1])

        for module in model.modules():
            if isinstance(module, TokenReducer):
                self._stack.callback(module.register_forward_hook(remember).remove)

        def forward(images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
            kept.clear()
            return model(images), tuple(kept)

        return forward


def _plain(model: Any) -> Callable[[Tensor], tuple[Tensor, tuple[Tensor, ...]]]:
    def forward(images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return model(images), ()

    return forward


def _limit(programs: int) -> Any:
    import torch._dynamo.config as config

    return config.patch(recompile_limit=programs, accumulated_recompile_limit=programs)


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # "backend='inductor' raised:" is followed by what it raised.
    reason = next((line for line in lines if not line.endswith("raised:")), type(error).__name__)
    return reason.rstrip(".")
