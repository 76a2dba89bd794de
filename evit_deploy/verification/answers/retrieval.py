"""Embeddings as answers: how near two models' lie to each other, and which other image each finds nearest."""

import numpy as np

_BLOCK = 2**23
"""Cosines that are held at a time: 32 MiB."""


def cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Cosine of each row with the row of the same number.

    Args:
        one: Embeddings, ``[n, width]``.
        other: Embeddings of the same images, ``[n, width]``.

    Returns:
        float64 ``[n]``; 0 where one of the two has no length.
    """
    return (_unit(one).astype(np.float64) * _unit(other)).sum(axis=1)


def centered_cosines(one: np.ndarray, dense: np.ndarray) -> np.ndarray:
    """Cosines after the mean of the dense model's embeddings is taken from both.

    Embeddings of any images have a large part in common, which makes plain cosines high whatever is damaged.

    Args:
        one: Embeddings, ``[n, width]``.
        dense: The dense model's, of the same images.

    Returns:
        float64 ``[n]``.
    """
    middle = dense.mean(axis=0, dtype=np.float64)
    return cosines(one - middle, dense - middle)


def nearest(embeddings: np.ndarray) -> np.ndarray:
    """For each image the number of the other image whose embedding has the highest cosine with its own.

    Of several with the very same cosine it is the first. Cosines are computed in blocks: memory grows with the number
    of images, not with its square.

    >>> nearest(np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])).tolist()
    [1, 0, 1]

    Args:
        embeddings: ``[n, width]``, two or more.

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
    """Whether the nearest other image is of an image's own class.

    Args:
        neighbors: What :func:`nearest` gives.
        labels: Classes, int64 ``[n]``.

    Returns:
        bool ``[m]``: of the images whose class has another image, in their order. The rest could not be right.
    """
    possible = np.bincount(labels)[labels] > 1
    return (labels[neighbors] == labels)[possible]


def _unit(embeddings: np.ndarray) -> np.ndarray:
    """Rows of length 1, float32."""
    exact = embeddings.astype(np.float64)
    lengths = np.linalg.norm(exact, axis=1, keepdims=True)
    return (exact / np.where(lengths == 0, 1, lengths)).astype(np.float32)
