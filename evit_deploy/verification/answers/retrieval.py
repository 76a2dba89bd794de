"""Metrics for embeddings: cosine between two models, and nearest neighbors among images."""

import numpy as np

_BLOCK = 2**23
"""Number of cosines in memory at a time: 32 MiB."""


def cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Cosine of each row with the row at the same index.

    Args:
        one: Embeddings, ``[n, width]``.
        other: Embeddings of the same images, ``[n, width]``.

    Returns:
        float64 ``[n]``; 0 where one of the two has length zero.
    """
    return (_unit(one).astype(np.float64) * _unit(other)).sum(axis=1)


def centered_cosines(one: np.ndarray, dense: np.ndarray) -> np.ndarray:
    """Cosines after subtracting the mean of the dense model's embeddings from both.

    Embeddings share a large common component, which keeps plain cosines high even for a damaged model.

    Args:
        one: Embeddings, ``[n, width]``.
        dense: Embeddings of the same images by the dense model, ``[n, width]``.

    Returns:
        float64 ``[n]``.
    """
    middle = dense.mean(axis=0, dtype=np.float64)
    return cosines(one - middle, dense - middle)


def nearest(embeddings: np.ndarray) -> np.ndarray:
    """Index of each image's nearest neighbor: the other image with the highest cosine.

    If several have the same cosine, the first is returned. Cosines are computed in blocks, so that memory grows
    linearly with the number of images.

    >>> nearest(np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])).tolist()
    [1, 0, 1]

    Args:
        embeddings: ``[n, width]``, at least two rows.

    Returns:
        int64 ``[n]``.
    """
    unit, count = _unit(embeddings), len(embeddings)
    found = np.empty(count, np.int64)
    rows = max(1, _BLOCK // count)
    for start in range(0, count, rows):
        block = unit[start : start + rows] @ unit.T
        own = np.arange(len(block))
        block[own, start + own] = -np.inf
        found[start : start + rows] = block.argmax(axis=1)
    return found


def recalled(neighbors: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Whether the nearest neighbor of each image has the same class.

    Args:
        neighbors: Result of :func:`nearest`, int64 ``[n]``.
        labels: Classes, int64 ``[n]``.

    Returns:
        bool ``[m]`` for the images that share their class with another image, in order. The others cannot have a
        neighbor of their class.
    """
    possible = np.bincount(labels)[labels] > 1
    return (labels[neighbors] == labels)[possible]


def _unit(embeddings: np.ndarray) -> np.ndarray:
    """Rows normalized to length 1, float32."""
    exact = embeddings.astype(np.float64)
    lengths = np.linalg.norm(exact, axis=1, keepdims=True)
    return (exact / np.where(lengths == 0, 1, lengths)).astype(np.float32)
