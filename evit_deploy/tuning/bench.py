"""What is timed on which runtime: models, made as ``convert`` makes them, that take turns."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from evit_deploy.bundle.manifest import DENSE, TWIN
from evit_deploy.data.preprocess import Preprocess
from evit_deploy.errors import InputError
from evit_deploy.pipeline.lowering import Exports, Lowering, export, write_targets
from evit_deploy.profiling.batch_sizes import sizes_for
from evit_deploy.profiling.candidates import Candidate, torch_candidates
from evit_deploy.profiling.clocks.gpu_times import measure_on_gpu
from evit_deploy.profiling.clocks.turns import Times, random_feeds
from evit_deploy.profiling.timing import measure_on_cpu
from evit_deploy.registry import RUNTIMES
from evit_deploy.runtimes.runner import Runner
from evit_deploy.runtimes.select import opened
from evit_deploy.targets.target import Exported
from evit_deploy.tokens.reduce import dense_twin, token_plan

MINIMUM_ROUNDS = 9


class Bench(msgspec.Struct, frozen=True):
    """Makes models for one runtime and times them there.

    Args:
        runtime: Name in the registry of runtimes.
        made: Targets, precision and options of what is made.
        about: timm name, and how an image file becomes an input tensor.
        batch: Images per call.
        threads: CPU threads, ``None`` for the runtime's own choice.
        images: For ``int8`` and ``fp8``: images to learn ranges from, float32 ``[n, C, H, W]``.
    """

    runtime: str
    made: Lowering
    about: tuple[str, Preprocess]
    batch: int
    threads: int | None = None
    images: np.ndarray | None = None

    @property
    def on_files(self) -> bool:
        """Whether the runtime runs files, and not PyTorch's model."""
        return bool(RUNTIMES.get(self.runtime).files)

    def artifact(self, model: torch.nn.Module, folder: Path, exports: Exports) -> Any:
        """What the runtime runs of a model: a file that is made in an empty folder, or the model itself.

        Args:
            model: A PyTorch model, reduced or not, FP32.
            folder: Where to write.
            exports: What was exported before of the same dense model.

        Raises:
            InputError: The runtime runs no file that is made.
            StageError: It could not be made.
        """
        if not self.on_files:
            return torch_candidates(model, self.runtime, self.made.precision)[0].artifact
        dense = dense_twin(model)
        export((model, dense), self.made, self.about, self.images, folder, exports)
        if set(self.made.targets) != {"onnx"}:
            write_targets(Exported(model, dense, token_plan(model), self.made.precision, folder), self.made)
        kind: type[Runner] = RUNTIMES.get(self.runtime)
        found = next((folder / name for name in kind.files if (folder / name).is_file()), None)
        if found is None:
            raise InputError(
                f"{self.runtime} runs none of the files that are made", where="--runtime",
                seen=", ".join(self.made.targets), wanted=" or ".join(kind.files), fix="Give a --target that it runs.",
            )  # fmt: skip
        for twin, path in exports.dense.items():
            if path == folder / DENSE:  # it outlives its folder, because further exports copy it
                exports.dense[twin] = folder.with_name(f"{folder.name}-dense.onnx")
                shutil.move(path, exports.dense[twin])
        shutil.rmtree(folder / TWIN)
        return found

    def times(self, artifacts: Sequence[Any], duration: float) -> list[Times]:
        """Times models in turn.

        Args:
            artifacts: What :meth:`artifact` gave.
            duration: Seconds.

        Raises:
            InputError: The runtime cannot run one of them.
            MissingRequirement: The runtime is not here.
        """
        with self._opened(artifacts) as runners:
            on_gpu = Candidate(self.runtime, "model", artifacts[0]).on_gpu
            sizes_for([runner.profiles for runner in runners], (self.batch,), on_gpu=on_gpu)
            if on_gpu:
                return measure_on_gpu(runners, random_feeds(runners, self.batch), duration, MINIMUM_ROUNDS)
            return measure_on_cpu(runners, self.batch, duration, MINIMUM_ROUNDS, self.threads)

    @contextmanager
    def _opened(self, artifacts: Sequence[Any]) -> Iterator[list[Runner]]:
        with ExitStack() as stack:
            yield [stack.enter_context(opened(self.runtime, artifact, self.threads)) for artifact in artifacts]
