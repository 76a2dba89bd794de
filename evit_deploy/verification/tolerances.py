"""How far two right answers may lie apart: what the precision itself costs decides, no number is picked by hand.

The reference is the model in FP64. How far PyTorch lies from it, computing in the bundle's precision, sets the limit
for every other runtime: twice that, and never less than :data:`FLOOR` roundings of the largest sum of terms of a logit.

Where scores lie closer together than rounding, either choice of patches is right: such an image counts as a tie. Its
logits answer another question, and have more room: as much as it moves the FP64 answer when the last kept and the first
dropped patch change places at every location.
"""

from collections.abc import Iterable

import numpy as np

FLOOR = 4  # times eps · the largest Σ|terms| of a logit: no tolerance is tighter than this
NOISE_LIMIT = 0.5
"""A precision whose error is half of what tells one class from another has broken the model."""


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
    limit: float, free: np.ndarray, swapped: np.ndarray, reference: np.ndarray, margins: Iterable[np.ndarray]
) -> np.ndarray:
    """The same for each image ``[n]``, more where another choice within rounding may have been made.

    Args:
        limit: Of answers that keep the golden patches, see :func:`error_limit`.
        free: ``[n, classes]`` in the bundle's precision, with a choice of its own.
        swapped: FP64, with the last kept and the first dropped token exchanged at every location.
        reference: FP64 ``[n, classes]``.
        margins: Of every location, see :func:`margin`.
    """
    room = max(limit, 2 * distance(free, reference))
    room = room + np.abs(swapped - reference).max(axis=1)
    # It takes two patches within rounding to change places; elsewhere there is no other choice.
    possible = [(~(margin >= 1)).sum(axis=1) > 1 for margin in margins]
    return np.where(np.any([np.zeros(len(room), bool), *possible], axis=0), room, limit)


def margin(scores: np.ndarray, exact: np.ndarray, keep: int) -> np.ndarray:
    """How far each score lies from the boundary between kept and dropped, over what rounding moves scores by.

    Below 1 the candidate may be kept or not.

    Args:
        scores: ``[n, N]`` in the bundle's precision.
        exact: The same in FP64.
        keep: How many candidates are kept.
    """
    # In logarithms: scores are exponentials, so that rounding moves each by a share of itself.
    ranked, exact, scores = -np.sort(-_logarithm(exact), axis=1), _logarithm(exact), _logarithm(scores)
    boundary = ranked[:, keep - 1 : keep + 1].mean(axis=1, keepdims=True)
    rounding = 2 * np.abs(scores - exact).max() + FLOOR * np.finfo(np.float32).eps
    return np.abs(exact - boundary) / rounding


def _logarithm(scores: np.ndarray) -> np.ndarray:
    """What FP32 cannot hold counts as its smallest number."""
    return np.log(np.maximum(scores.astype(np.float64), np.finfo(np.float32).tiny))


def noise(expected: np.ndarray, reference: np.ndarray) -> float:
    """What a precision costs: its error over the spread of the logits, both as root mean squares.

    Args:
        expected: ``[n, classes]`` in that precision.
        reference: The same in FP64.
    """
    axis = 0 if reference.shape[1] == 1 else 1  # a single logit has no others to stand out from
    spread = reference - reference.mean(axis=axis, keepdims=True)
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.linalg.norm(expected - reference)
    return float(error / max(float(np.linalg.norm(spread)), np.finfo(np.float64).tiny))
