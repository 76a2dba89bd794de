"""Intervals and counts: of a share, of a median, of a difference on the same images."""

from collections.abc import Iterable

import numpy as np

from evit_deploy.report.report import AccuracyRow, Difference

_Z = 1.959963984540054
"""Standard deviations on either side of the middle that hold 95 % of a normal distribution."""


def wilson(right: int, count: int) -> tuple[float, float]:
    """Ends of the 95 % interval of a share (Wilson 1927), which stays sound near 0 and 1.

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
    """Ends of the 95 % interval of the difference of two shares on the same images (Bonett and Price 2012).

    It stays sound where the two never or hardly ever differ: there it is as wide as the number of images asks for.

    >>> tuple(round(x, 3) for x in paired_interval(np.ones(100, bool), np.arange(100) >= 10))
    (0.034, 0.162)

    Args:
        right: Whether the one was right, for every image, bool ``[n]``.
        others: Whether the other was, bool ``[n]``.
    """
    count, only_one = len(right) + 2, (right & ~others).sum() + 1
    only_other = (others & ~right).sum() + 1
    middle = (only_one - only_other) / count
    half = _Z * (((only_one + only_other) / count - middle**2) / count) ** 0.5
    return float(max(-1.0, middle - half)), float(min(1.0, middle + half))


def accuracy_row(
    name: str, answers: Iterable[tuple[np.ndarray, np.ndarray]], gmacs: float | None = None
) -> AccuracyRow:
    """Counts how often answers were right.

    Args:
        name: Which model.
        answers: Logits ``[B, classes]`` and labels ``[B]`` of each batch.
        gmacs: Multiply-adds for one image, in 10⁹.
    """
    return row_of_hits(name, np.concatenate([hits_of(logits, labels) for logits, labels in answers]), gmacs)


def hits_of(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Whether the label came first, and whether it was among the first five.

    Args:
        logits: ``[B, classes]``.
        labels: int64 ``[B]``.

    Returns:
        bool ``[B, 2]``; ``[B, 1]`` where there are no more than five classes, among which every label would be.
    """
    hits = np.argsort(-logits, axis=1, kind="stable")[:, :5] == labels[:, None]
    if logits.shape[1] <= 5:
        return hits[:, :1]
    return np.stack([hits[:, 0], hits.any(axis=1)], axis=1)


def row_of_hits(name: str, hits: np.ndarray, gmacs: float | None = None) -> AccuracyRow:
    """The row of a model from what :func:`hits_of` said of all images."""
    right1, *right5 = (int(count) for count in hits.sum(axis=0))
    low, high = wilson(right1, len(hits))
    top5 = right5[0] / len(hits) if right5 else None
    return AccuracyRow(name, right1 / len(hits), top5, len(hits), low, high, gmacs)


def median_interval(values: np.ndarray) -> tuple[float, float]:
    """A 95 % interval of the median that assumes nothing of the distribution (order statistics, binomial).

    Of five values or fewer it is all of them, which covers less: 94 % of five, 75 % of three.

    >>> median_interval(np.arange(1.0, 12.0))
    (2.0, 10.0)
    """
    ordered = np.sort(values)
    n = len(ordered)
    rank = max(int(np.floor((n - 1.96 * np.sqrt(n)) / 2)), 1)
    return float(ordered[rank - 1]), float(ordered[n - rank])
