"""Confidence intervals of proportions, medians and paired differences."""

from collections.abc import Iterable

import numpy as np

from evit_deploy.report.report import AccuracyRow, Difference

_Z = 1.959963984540054
"""Number of standard deviations around the mean that contain 95 % of a normal distribution."""


def wilson(right: int, count: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927), which is accurate near 0 and 1 too.

    >>> tuple(round(x, 3) for x in wilson(354, 360))
    (0.964, 0.992)
    """
    if count == 0:
        return 0.0, 1.0
    z = _Z
    share = right / count
    middle = share + z * z / (2 * count)
    half = z * (share * (1 - share) / count + z * z / (4 * count * count)) ** 0.5
    scale = 1 + z * z / count
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def difference(other: str, right: np.ndarray, others: np.ndarray) -> Difference:
    """Compares two models image by image.

    Args:
        other: Name of the other model's row.
        right: Whether this model was right, for every image.
        others: Whether the other was, for the same images in the same order.
    """
    each = right.astype(np.float64) - others
    low, high = paired_interval(right, others)
    return Difference(other, float(each.mean()), float(each.std() / len(each) ** 0.5), low, high)


def paired_interval(right: np.ndarray, others: np.ndarray) -> tuple[float, float]:
    """95 % interval of the difference of two paired proportions (Bonett and Price 2012).

    It is accurate even if the two rarely or never differ; its width then depends on the number of images.

    >>> tuple(round(x, 3) for x in paired_interval(np.ones(100, bool), np.arange(100) >= 10))
    (0.034, 0.162)

    Args:
        right: Whether the first model was right, bool ``[n]``.
        others: Whether the other was right, bool ``[n]``.
    """
    count, only_one = len(right) + 2, (right & ~others).sum() + 1
    only_other = (others & ~right).sum() + 1
    middle = (only_one - only_other) / count
    half = _Z * (((only_one + only_other) / count - middle**2) / count) ** 0.5
    return float(max(-1.0, middle - half)), float(min(1.0, middle + half))


def accuracy_row(
    name: str, answers: Iterable[tuple[np.ndarray, np.ndarray]], gmacs: float | None = None
) -> AccuracyRow:
    """Computes the accuracy of a model.

    Args:
        name: Name of the model.
        answers: Logits ``[B, classes]`` and labels ``[B]`` of each batch.
        gmacs: Multiply-adds per image, in 10⁹.
    """
    return row_of_hits(name, np.concatenate([hits_of(logits, labels) for logits, labels in answers]), gmacs)


def hits_of(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Whether the label ranked first, and whether it ranked among the first five.

    Args:
        logits: ``[B, classes]``.
        labels: int64 ``[B]``.

    Returns:
        bool ``[B, 2]``; ``[B, 1]`` with five or fewer classes, where top-5 is meaningless.
    """
    hits = np.argsort(-logits, axis=1, kind="stable")[:, :5] == labels[:, None]
    if logits.shape[1] <= 5:
        return hits[:, :1]
    return np.stack([hits[:, 0], hits.any(axis=1)], axis=1)


def row_of_hits(name: str, hits: np.ndarray, gmacs: float | None = None) -> AccuracyRow:
    """Accuracy row of a model from the results of :func:`hits_of` for all images."""
    right1, *right5 = (int(count) for count in hits.sum(axis=0))
    low, high = wilson(right1, len(hits))
    top5 = right5[0] / len(hits) if right5 else None
    return AccuracyRow(name, right1 / len(hits), top5, len(hits), low, high, gmacs)


def median_interval(values: np.ndarray) -> tuple[float, float]:
    """Distribution-free 95 % interval of the median (order statistics, binomial).

    With five values or fewer it is their range, which covers less: 94 % for five, 75 % for three.

    >>> median_interval(np.arange(1.0, 12.0))
    (2.0, 10.0)
    """
    ordered = np.sort(values)
    n = len(ordered)
    rank = max(int(np.floor((n - 1.96 * np.sqrt(n)) / 2)), 1)
    return float(ordered[rank - 1]), float(ordered[n - rank])
