"""How far two right answers may lie apart: what the precision itself costs decides; no limit is chosen by hand.

The reference is the model in FP64. How far PyTorch lies from it, computing in the bundle's precision, sets the limit
for every other runtime: twice that, and never less than :data:`~evit_deploy.tokens.choices.FLOOR` roundings of the
largest sum of terms of a number of the answer.

Where scores lie closer together than rounding, either choice of patches is right: such an image counts as a tie. Its
numbers answer another question, and have more room: as much as it moves the FP64 answer to make the next best choice at
every location, such as to keep the first dropped patch in place of the last kept one.
"""

from collections.abc import Iterable

import numpy as np

from evit_deploy.tokens.choices import FLOOR

NOISE_LIMIT = 0.5
"""A precision whose error is half of what tells one class, or image, from another has broken the model."""


def distance(answers: np.ndarray, reference: np.ndarray) -> float:
    """Largest difference of any number; NaN if one is."""
    with np.errstate(invalid="ignore"):
        return float(np.abs(answers - reference).max(initial=0.0))


def error_limit(expected: np.ndarray, reference: np.ndarray, terms: np.ndarray) -> float:
    """Largest error against FP64 that logits may have.

    Args:
        expected: ``[n, classes]`` in the bundle's precision, as PyTorch computes it.
        reference: The same in FP64.
        terms: ``[n]``: the largest sum of absolute terms that a logit of the image is added up from.
    """
    floor = FLOOR * float(np.finfo(np.float32).eps) * float(terms.max(initial=0.0))
    return max(2 * distance(expected, reference), floor)


def tie_limits(
    limit: float,
    free: np.ndarray,
    swapped: np.ndarray,
    reference: np.ndarray,
    margins: Iterable[np.ndarray],
    merges: Iterable[np.ndarray] = (),
) -> np.ndarray:
    """The same for each image ``[n]``, more where another choice within rounding may have been made.

    Args:
        limit: Of answers that keep the golden patches, see :func:`error_limit`.
        free: ``[n, classes]`` in the bundle's precision, with the tokens that it chooses itself.
        swapped: FP64, with the next best choice at every location.
        reference: FP64 ``[n, classes]``.
        margins: Of every location that keeps some, see :meth:`evit_deploy.tokens.reducer.TokenReducer.margin`.
        merges: Of every location that merges.
    """
    room = max(limit, 2 * distance(free, reference))
    room = room + np.abs(swapped - reference).max(axis=1)
    # It takes two patches within rounding to change places; elsewhere there is no other choice.
    possible = [(~(margin >= 1)).sum(axis=1) > 1 for margin in margins]
    possible += [(~(margin >= 1)).any(axis=1) for margin in merges]  # one alone may join another token
    return np.where(np.any([np.zeros(len(room), bool), *possible], axis=0), room, limit)


def noise(expected: np.ndarray, reference: np.ndarray, *, embedding: bool = False) -> float:
    """What a precision costs: its error over the spread of the answers, both as root mean squares.

    The spread of logits is that among the classes of an image; the spread of embeddings is that among images, so what
    all images have in common does not count.

    Args:
        expected: ``[n, classes]`` in that precision, or embeddings ``[n, width]``.
        reference: The same in FP64.
        embedding: Which of the two they are.
    """
    axis = 0 if embedding or reference.shape[1] == 1 else 1  # a single logit has no others to stand out from
    spread = reference - reference.mean(axis=axis, keepdims=True)
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.linalg.norm(expected - reference)
    return float(error / max(float(np.linalg.norm(spread)), np.finfo(np.float64).tiny))
