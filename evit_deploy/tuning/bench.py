"""Builds models in the same way as ``convert`` and times them interleaved on one runtime."""

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
    """Builds models for one runtime and times them on it.

    Args:
        runtime: Name in the registry of runtimes.
        made: Targets, precision and options of the models.
        about: timm name and preprocessing.
        batch: Images per call.
        threads: CPU threads; ``None`` for the runtime's default.
        images: Calibration images for ``int8`` and ``fp8``, float32 ``[n, C, H, W]``.
    """

    runtime: str
    made: Lowering
    about: tuple[str, Preprocess]
    batch: int
    threads: int | None = None
    images: np.ndarray | None = None

    @property
    def on_files(self) -> bool:
        """Whether the runtime runs files instead of PyTorch models."""
        return bool(RUNTIMES.get(self.runtime).files)

    def artifact(self, model: torch.nn.Module, folder: Path, exports: Exports) -> Any:
        """Returns the form of a model that the runtime runs: a file built in an empty folder, or a PyTorch model.

        Args:
            model: A PyTorch model, reduced or dense, FP32.
            folder: Empty folder for the files.
            exports: Earlier exports of the same dense model.

        Raises:
            InputError: The runtime cannot run any of the files that are built.
            StageError: A file could not be built.
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
            if path == folder / DENSE:  # moved out of the folder, because later exports copy it
                exports.dense[twin] = folder.with_name(f"{folder.name}-dense.onnx")
                shutil.move(path, exports.dense[twin])
        shutil.rmtree(folder / TWIN)
        return found

    def times(self, artifacts: Sequence[Any], duration: float) -> list[Times]:
        """Times models, interleaved.

        Args:
            artifacts: Results of :meth:`artifact`.
            duration: Total time in seconds.

        Raises:
            InputError: The runtime cannot run one of them.
            MissingRequirement: The runtime is not available.
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
