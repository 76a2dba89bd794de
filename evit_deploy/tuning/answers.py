"""Compares a schedule's answers with the dense model's: agreement and centered cosine on images, without training.

The blocks before the first location compute the same as in the dense model. Their outputs are cached if they fit into
memory, so that only the remaining blocks are run for each schedule.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from evit_deploy.tokens.backbone import backbone_of, copy_sharing_weights
from evit_deploy.tokens.ending import for_inference
from evit_deploy.tokens.plan import TokenSpec
from evit_deploy.tokens.reduce import reduce_tokens_
from evit_deploy.tokens.state import TokenBlocks
from evit_deploy.verification.answers.retrieval import centered_cosines

_BATCH = 16
_KEPT = 2**29
"""Most bytes of activations to cache."""


class Nearness(msgspec.Struct, frozen=True):
    """Similarity of a model's answers to the dense model's.

    Args:
        cosine: Centered cosine of the answers (logits or embeddings), mean over the images.
        error: Standard error of this mean.
        agreement: Share of images with the same predicted class; ``None`` for a model without classes.
        images: Number of images.
    """

    cosine: float
    error: float
    agreement: float | None
    images: int


class Answers:
    """Computes the answers of a dense model and of its schedules on the same images.

    Args:
        model: The dense model.
        images: float32 ``[n, channels, H, W]``.
        classes: Whether the answers are logits instead of embeddings.
    """

    def __init__(self, model: nn.Module, images: np.ndarray, *, classes: bool) -> None:
        self._model, self._classes = model, classes
        self._device = next(model.parameters()).device
        self._batches = [torch.from_numpy(images[i : i + _BATCH]) for i in range(0, len(images), _BATCH)]
        self._kept: dict[tuple[int, int], Tensor] = {}
        self.dense = self._remembered()

    def of(self, spec: TokenSpec) -> np.ndarray:
        """Answers of the model reduced by a spec, ``[n, classes or width]``."""
        model = for_inference(reduce_tokens_(copy_sharing_weights(self._model), spec))
        first = min(spec.locations or (0,))
        if not all((number, first) in self._kept for number in range(len(self._batches))):
            return self._run(model)
        backbone = backbone_of(self._model)
        blocks = backbone.blocks(model)
        behind = list(blocks)[first:]
        stateful = isinstance(blocks, TokenBlocks)
        rest = TokenBlocks(behind, blocks.replaced[0]) if stateful else nn.Sequential(*behind)
        backbone.set_blocks(model, rest.eval())
        parts = []
        for number, images in enumerate(self._batches):
            with _given(rest, self._kept[number, first]):
                parts.append(self._answer(model, images))
        return np.concatenate(parts)

    def nearness(self, spec: TokenSpec) -> Nearness:
        """Compares the answers of the model reduced by a spec with the dense model's."""
        return nearness(self.of(spec), self.dense, classes=self._classes)

    def _remembered(self) -> np.ndarray:
        """Runs the dense model; also caches the input of every block, unless the inputs exceed the limit."""
        model = for_inference(self._model)
        blocks = list(backbone_of(self._model).blocks(model))
        parts, kept, handles = [], 0, []
        for number, images in enumerate(self._batches):
            seen: dict[tuple[int, int], Tensor] = {}
            handles = [block.register_forward_pre_hook(_note(seen, (number, i))) for i, block in enumerate(blocks)]
            parts.append(self._answer(model, images))
            for handle in handles:
                handle.remove()
            kept += sum(tensor.numel() * tensor.element_size() for tensor in seen.values())
            if kept <= _KEPT:
                self._kept |= seen
        if kept > _KEPT:
            self._kept = {}
        return np.concatenate(parts)

    def _run(self, model: nn.Module) -> np.ndarray:
        return np.concatenate([self._answer(model, images) for images in self._batches])

    def _answer(self, model: nn.Module, images: Tensor) -> np.ndarray:
        with torch.inference_mode():
            return model(images.to(self._device)).float().cpu().numpy()


def _note(seen: dict[tuple[int, int], Tensor], key: tuple[int, int]):
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen[key] = inputs[0]

    return hook


@contextmanager
def _given(blocks: nn.Module, tokens: Tensor) -> Iterator[None]:
    """Replaces the input of the blocks by the given tokens while the context is open."""
    handle = blocks.register_forward_pre_hook(lambda module, inputs: (tokens, *inputs[1:]))
    try:
        yield
    finally:
        handle.remove()


def nearness(answers: np.ndarray, dense: np.ndarray, *, classes: bool) -> Nearness:
    """Compares answers with the dense model's on the same images.

    Args:
        answers: ``[n, width]``.
        dense: Answers of the dense model, ``[n, width]``.
        classes: Whether the answers are logits instead of embeddings.
    """
    cosines = centered_cosines(answers, dense)
    same = float((answers.argmax(1) == dense.argmax(1)).mean()) if classes else None
    return Nearness(float(cosines.mean()), float(cosines.std() / len(cosines) ** 0.5), same, len(cosines))
