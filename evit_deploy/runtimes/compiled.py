"""PyTorch through ``torch.compile``: what is to be gained without leaving Python."""

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

# Every pair of a model and a batch size is compiled on its own, and PyTorch counts them all together: at its own limit
# of eight, a model and its dense twin could be run at four batch sizes and not at a fifth.
_PROGRAMS = 256


class CompiledRunner(EagerRunner):
    """Runs an ``nn.Module`` compiled, in the dtype of its parameters, on the device they are on.

    The first call at each batch size compiles, for seconds to minutes; profiling warms up and never times it. Shapes
    are static, as they are for an engine's kernels. The model is one graph (``fullgraph``): a part that fell back to
    Python would be a slow number that nobody can explain, and is an error instead. On a GPU the mode is
    ``reduce-overhead``, which replays CUDA graphs: launching a ViT's kernels one by one takes longer than small batches
    run: the calls after the one that compiles warm up, then record, then replay. Autotuned matrix multiplications
    (``max-autotune``) are left out: they take minutes a batch size.

    With indices, the kept candidates are outputs of the same compiled graph.
    """

    name = "torch.compile"
    default: ClassVar[bool] = False
    """Whoever wants it asks for it: compiling takes longer than everything else that is measured."""

    @classmethod
    def missing(cls) -> MissingRequirement | None:
        """What compiling takes: a C++ compiler and Python's headers, for the launchers of GPU kernels too."""
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
        self._stack.enter_context(_limit(_PROGRAMS))  # not around each call: that alone takes half a second
        # dynamic=False: at the second batch size PyTorch would make one program for all, slower than each one's own.
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
        """See :class:`EagerRunner`; compiles first when the batch size is new.

        Raises:
            StageError: It cannot be compiled.
        """
        try:
            if self._on_gpu:
                torch.compiler.cudagraph_mark_step_begin()  # the answers of the last call may be overwritten
            return self._compiled(images)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # PyTorch's compiler raises whatever its many parts raise
            raise StageError(f"torch.compile fails: {_line(error)}", where=f"batch {len(images)}") from error

    @property
    def _on_gpu(self) -> bool:
        return self._parameter.is_cuda

    def _with_kept(self) -> Callable[[Tensor], tuple[Tensor, tuple[Tensor, ...]]]:
        """The model and what its reducers keep; their hooks are compiled along with them."""
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
    told = next((line for line in lines if not line.endswith("raised:")), type(error).__name__)
    return told.rstrip(".")
