"""Predictions of a classifier: the most probable classes of an image, with their labels."""

from collections.abc import Sequence

import msgspec
import numpy as np

from evit_deploy.errors import InputError
from evit_deploy.report.html import html_table


class Prediction(msgspec.Struct, frozen=True):
    """The most probable classes of one image, best first; printed as a line, or as a table in a notebook.

    Args:
        labels: Class names; class numbers as text if the bundle has no labels.
        probabilities: Softmax over all classes, in FP32.
        classes: Class numbers, 0-based.
        image: File of the image; ``None`` for an image in memory.
    """

    labels: tuple[str, ...]
    probabilities: tuple[float, ...]
    classes: tuple[int, ...]
    image: str | None = None

    @property
    def label(self) -> str:
        """Label of the most probable class."""
        return self.labels[0]

    @property
    def probability(self) -> float:
        """Probability of the most probable class."""
        return self.probabilities[0]

    @property
    def index(self) -> int:
        """Number of the most probable class."""
        return self.classes[0]

    @property
    def top(self) -> tuple[tuple[str, float], ...]:
        """(label, probability) pairs."""
        return tuple(zip(self.labels, self.probabilities, strict=True))

    def rows(self) -> list[tuple[str, str, str]]:
        """Returns label, probability in percent and class number of each class, as text."""
        return [
            (label, f"{100 * probability:.2f}", str(index))
            for label, probability, index in zip(self.labels, self.probabilities, self.classes, strict=True)
        ]

    def __repr__(self) -> str:
        said = ", ".join(f"{label} {percent} %" for label, percent, _ in self.rows())
        return f"Prediction({said})"

    def _repr_html_(self) -> str:
        return html_table(("label", "probability %", "class"), self.rows(), self.image)


def predictions_of(
    logits: np.ndarray, labels: list[str] | None, top: int, images: Sequence[str | None]
) -> list[Prediction]:
    """Converts logits to predictions.

    Args:
        logits: Float32 ``[n, classes]``.
        labels: One label per class, or ``None`` if unknown.
        top: Number of classes to list for each image, if there are as many.
        images: File of each image; ``None`` for an image in memory.

    Raises:
        InputError: ``top`` is below 1.
    """
    if top < 1:
        raise InputError("no classes to name", where="top", seen=top, wanted="a whole number from 1 up")
    shares = softmax(logits)
    # Stable, so that ties are in the same order on every machine.
    best = np.argsort(-shares, axis=1, kind="stable")[:, :top]
    chosen = np.take_along_axis(shares, best, axis=1)
    return [
        Prediction(
            labels=tuple(str(index) if labels is None else labels[index] for index in row),
            probabilities=tuple(values),
            classes=tuple(row),
            image=image,
        )
        for row, values, image in zip(best.tolist(), chosen.tolist(), images, strict=True)
    ]


def softmax(logits: np.ndarray) -> np.ndarray:
    """Softmax over the last axis, always computed in FP32.

    Args:
        logits: ``[n, classes]``.

    Returns:
        Float32 ``[n, classes]``.
    """
    logits = logits.astype(np.float32, copy=False)
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)
