"""Sources of choices: a PyTorch model, a bundle's ONNX file including its scores, or any runtime of a bundle."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import torch

from evit_deploy.bundle.bundle import Bundle
from evit_deploy.bundle.manifest import MODEL
from evit_deploy.errors import UnsupportedModelError
from evit_deploy.export.card import feeds, kept_name
from evit_deploy.export.outline import Outline, read_outline
from evit_deploy.export.variants import scores_in, with_scores
from evit_deploy.inference.model import Model
from evit_deploy.runtimes.fp32 import fp32_products
from evit_deploy.runtimes.onnxruntime import OnnxRuntimeRunner
from evit_deploy.tokens.reduce import capture, token_plan, token_spec

BATCH = 8
"""Images per call."""


class Told(msgspec.Struct, frozen=True):
    """Answers, choices and scores for a batch of images.

    Args:
        answers: Logits or embeddings, float32 ``[n, width]``.
        choices: The choice of each location, see :mod:`evit_deploy.tokens.choices`.
        scores: The scores of each location; empty if not available.
    """

    answers: np.ndarray
    choices: list[np.ndarray]
    scores: list[Any] = []


class Teller(ABC):
    """Runs a model on images and returns the choices of its locations; call :meth:`close` at the end.

    Args:
        runtime: Name of the runtime.
    """

    def __init__(self, runtime: str) -> None:
        self.runtime = runtime

    @abstractmethod
    def tell(self, images: np.ndarray) -> Told:
        """Runs prepared images.

        Args:
            images: float32 ``[n, C, H, W]``.
        """

    def close(self) -> None:
        """Releases its resources."""
        return


class PyTorch(Teller):
    """A model in PyTorch.

    Args:
        model: A reduced model; not changed.

    Raises:
        UnsupportedModelError: Its method does not expose its choices.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__("eager")
        self._model = model

    def tell(self, images: np.ndarray) -> Told:
        """See :meth:`Teller.tell`."""
        parts = [self._call(images[start : start + BATCH]) for start in range(0, len(images), BATCH)]
        return _joined(parts)

    def _call(self, images: np.ndarray) -> Told:
        parameter, training = next(self._model.parameters()), self._model.training
        self._model.eval()
        try:
            with capture(self._model) as seen, fp32_products(tf32=False):
                answers = self._model(torch.from_numpy(images).to(parameter.device, parameter.dtype))
        finally:
            self._model.train(training)
        if len(seen.kept) != len(token_plan(self._model).locations):
            method = token_spec(self._model).method
            raise UnsupportedModelError(f"the method {method!r}", ["it does not say what its locations choose"])
        scores = [_numbers(scores) for scores in seen.scores] if len(seen.scores) == len(seen.kept) else []
        return Told(answers.float().cpu().numpy(), [choice.cpu().numpy() for choice in seen.kept], scores)


class File(Teller):
    """A bundle's ONNX file on ONNX Runtime's CPU provider, scores included.

    Args:
        bundle: The bundle.
        threads: CPU threads, ``None`` for the runtime's own choice.

    Raises:
        InputError: The file was not exported by evit-deploy.
        StageError: ONNX Runtime refuses it.
    """

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        super().__init__(OnnxRuntimeRunner.name)
        self._plan, self._answer = bundle.manifest.plan, bundle.manifest.answer
        outline = read_outline(bundle.file(MODEL))
        self._runner = OnnxRuntimeRunner(Outline(with_scores(outline.proto), outline.folder), threads=threads)
        self._runner.__enter__()

    @staticmethod
    def unusable(bundle: Bundle) -> list[str]:
        """Reasons why ONNX Runtime cannot run a bundle's file here; empty if it can."""
        if MODEL not in bundle.manifest.files:
            return ["the bundle has no ONNX file"]
        return OnnxRuntimeRunner.accepts(bundle.file(MODEL))

    def tell(self, images: np.ndarray) -> Told:
        """See :meth:`Teller.tell`."""
        return _joined([self._call(images[start : start + BATCH]) for start in range(0, len(images), BATCH)])

    def _call(self, images: np.ndarray) -> Told:
        outputs = self._runner.infer(feeds(images))
        blocks = [row.block for row in self._plan.locations]
        return Told(
            outputs[self._answer].astype(np.float32, copy=False),
            [outputs[kept_name(block)] for block in blocks],
            [scores_in(outputs, block) for block in blocks],
        )

    def close(self) -> None:
        """Closes the session."""
        self._runner.__exit__(None, None, None)


class Opened(Teller):
    """A bundle on any runtime, without scores.

    Args:
        model: The opened bundle; closed together with this object.
    """

    def __init__(self, model: Model) -> None:
        super().__init__(model.runtime)
        self._model = model

    def tell(self, images: np.ndarray) -> Told:
        """See :meth:`Teller.tell`.

        Raises:
            InputError: The runtime's file does not return its choices.
        """
        return Told(*self._model.choices(images))

    def close(self) -> None:
        """Closes the model."""
        self._model.close()


def _numbers(scores: Any) -> Any:
    return tuple(map(_numbers, scores)) if isinstance(scores, tuple) else scores.float().cpu().numpy()


def _joined(parts: Sequence[Told]) -> Told:
    if len(parts) == 1:
        return parts[0]
    choices = [np.concatenate(one) for one in zip(*(part.choices for part in parts), strict=True)]
    scores = [_concatenated(one) for one in zip(*(part.scores for part in parts), strict=True)]
    return Told(np.concatenate([part.answers for part in parts]), choices, scores)


def _concatenated(parts: Sequence[Any]) -> Any:
    if isinstance(parts[0], tuple):
        return tuple(map(np.concatenate, zip(*parts, strict=True)))
    return np.concatenate(parts)
