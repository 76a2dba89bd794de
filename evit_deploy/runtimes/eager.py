"""PyTorch eager, the runtime that all others are compared with."""

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from evit_deploy.bundle.manifest import TensorSpec
from evit_deploy.errors import UnsupportedModelError
from evit_deploy.export.answer import answer_name, answer_size
from evit_deploy.export.card import INPUT, kept_name
from evit_deploy.runtimes.fp32 import fp32_products, missing_tf32
from evit_deploy.runtimes.resident import TensorResident, as_told
from evit_deploy.runtimes.runner import Resident, Runner
from evit_deploy.tokens.backbone import backbone_of
from evit_deploy.tokens.ending import for_inference
from evit_deploy.tokens.reduce import capture, token_plan


class EagerRunner(Runner):
    """Runs an ``nn.Module`` in the dtype and on the device of its parameters.

    FP32 models never use TF32, including in convolutions, unless ``tf32`` is set, whatever PyTorch's global settings.

    Args:
        artifact: The model.
        threads: CPU threads; ``None`` for PyTorch's default.
        with_indices: Whether to also return the kept candidates as ``kept_<block>``.
        tf32: Whether to multiply FP32 tensors in TF32, on a GPU that supports it.
    """

    name = "eager"
    has_tf32 = True

    def __init__(
        self, artifact: Any, *, threads: int | None = None, with_indices: bool = False, tf32: bool = False
    ) -> None:
        super().__init__(artifact, threads=threads, with_indices=with_indices)
        self.tf32 = tf32

    @classmethod
    def accepts(cls, artifact: Any) -> list[str]:
        """Accepts models of a registered backbone."""
        if not isinstance(artifact, torch.nn.Module):
            return [f"it runs PyTorch models, not {type(artifact).__name__}"]
        try:
            backbone_of(artifact)
        except UnsupportedModelError as error:
            return error.reasons
        return []

    def __enter__(self) -> Self:
        lacking = missing_tf32(self._parameter.device) if self.tf32 else None
        if lacking is not None:
            raise lacking
        self._threads_before = torch.get_num_threads()
        if self.threads:
            torch.set_num_threads(self.threads)
        # Batch sizes rarely change, so autotuning pays. Without it cuDNN runs a patch embedding in FP16 without tensor
        # cores, which took a sixth of DeiT-S's time on an H100.
        self._benchmark_before = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = True
        self._model = for_inference(self.artifact)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        torch.set_num_threads(self._threads_before)
        torch.backends.cudnn.benchmark = self._benchmark_before

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The input images."""
        backbone = backbone_of(self.artifact)
        shape = (None, backbone.channels(self.artifact), *backbone.image_size(self.artifact))
        return (TensorSpec(INPUT, "float32", shape),)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The answer, then with ``with_indices`` the kept candidates."""
        specs = [TensorSpec(answer_name(self.artifact), "float32", (None, answer_size(self.artifact)))]
        if self.with_indices:
            plan = token_plan(self.artifact)
            specs += [TensorSpec(kept_name(row.block), "int32", (None, row.choice_length)) for row in plan.locations]
        return tuple(specs)

    def infer(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs one batch; answers come back in float32 (float64 from a float64 model)."""
        parameter, images = self._parameter, torch.from_numpy(np.ascontiguousarray(feeds[INPUT]))
        if parameter.is_cuda:
            images = images.pin_memory()
        # Two steps, because a single to(device, dtype) would convert on the host.
        images = images.to(parameter.device, non_blocking=True).to(parameter.dtype)
        answers = self._call({INPUT: images})
        return {name: as_told(tensor).cpu().numpy() for name, tensor in answers.items()}

    def synchronize(self) -> None:
        """Waits for the GPU if the model is on one."""
        if self._parameter.is_cuda:
            torch.cuda.synchronize()

    def resident(self, feeds: Mapping[str, np.ndarray]) -> Resident:
        """Places the images on the model's device in its dtype, on PyTorch's current stream."""
        return TensorResident(self._call, feeds, self._parameter.device, self._parameter.dtype)

    def _call(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Runs the model on images on the device; the answers stay there."""
        with fp32_products(tf32=self.tf32), torch.inference_mode():
            answer, kept = self._forward(inputs[INPUT])
        blocks = [row.block for row in token_plan(self.artifact).locations] if self.with_indices else []
        named = {kept_name(block): row for block, row in zip(blocks, kept, strict=True)}
        return {answer_name(self.artifact): answer} | named

    def _forward(self, images: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """Returns the answer, and with ``with_indices`` what each location keeps."""
        if not self.with_indices:
            return self._model(images), ()
        with capture(self._model) as seen:
            logits = self._model(images)
        return logits, seen.kept

    @property
    def _parameter(self) -> torch.nn.Parameter:
        return next(self.artifact.parameters())
