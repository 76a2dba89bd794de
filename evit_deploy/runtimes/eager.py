"""PyTorch as it is: the runtime every other one is compared with."""

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

from evit_deploy.bundle.manifest import TensorSpec
from evit_deploy.errors import UnsupportedModelError
from evit_deploy.export.card import INPUT, LOGITS, kept_name
from evit_deploy.runtimes.runner import Runner
from evit_deploy.tokens.backbone import backbone_of
from evit_deploy.tokens.reduce import capture, token_plan


class EagerRunner(Runner):
    """Runs an ``nn.Module`` in the dtype of its parameters, on the device they are on."""

    name = "eager"

    @classmethod
    def accepts(cls, artifact: Any) -> list[str]:
        """Models of a registered backbone."""
        if not isinstance(artifact, torch.nn.Module):
            return [f"it runs PyTorch models, not {type(artifact).__name__}"]
        try:
            backbone_of(artifact)
        except UnsupportedModelError as error:
            return error.reasons
        return []

    def __enter__(self) -> Self:
        self._threads_before = torch.get_num_threads()
        if self.threads:
            torch.set_num_threads(self.threads)
        self._training_before = self.artifact.training
        self.artifact.eval()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        torch.set_num_threads(self._threads_before)
        self.artifact.train(self._training_before)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The images."""
        backbone = backbone_of(self.artifact)
        shape = (None, backbone.channels(self.artifact), *backbone.image_size(self.artifact))
        return (TensorSpec(INPUT, "float32", shape),)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The logits, then the kept candidates if they were asked for."""
        classes = self.artifact.num_classes or self.artifact.num_features
        specs = [TensorSpec(LOGITS, "float32", (None, classes))]
        if self.with_indices:
            plan = token_plan(self.artifact)
            specs += [TensorSpec(kept_name(row.block), "int32", (None, row.keep)) for row in plan.locations]
        return tuple(specs)

    def infer(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs one batch; logits come back in float32 (float64 from a float64 model)."""
        parameter = next(self.artifact.parameters())
        images = torch.from_numpy(np.ascontiguousarray(feeds[INPUT])).to(parameter.device, parameter.dtype)
        if not self.with_indices:
            with torch.inference_mode():
                return {LOGITS: to_numpy(self.artifact(images))}
        with capture(self.artifact) as seen:
            result = {LOGITS: to_numpy(self.artifact(images))}
        for row, kept in zip(token_plan(self.artifact).locations, seen.kept, strict=True):
            result[kept_name(row.block)] = kept.cpu().numpy()
        return result

    def synchronize(self) -> None:
        """Waits for a GPU, if that is where the model is."""
        if next(self.artifact.parameters()).is_cuda:
            torch.cuda.synchronize()


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """In float32, whatever half precision it was computed in; float64 stays what it is."""
    return tensor.cpu().numpy() if tensor.dtype == torch.float64 else tensor.float().cpu().numpy()
