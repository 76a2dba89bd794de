"""Tolerances between correct answers, derived from the error of the precision instead of chosen by hand.

The reference is the model in FP64. The limit for every runtime is twice the error of PyTorch in the bundle's precision
against this reference, and at least :data:`~evit_deploy.tokens.choices.FLOOR` roundings of the largest sum of absolute
terms in an output value.

Where scores differ by less than rounding, either choice of patches is correct, and the image counts as a tie. Another
choice changes the answer, so the limit of a tie is larger: it also includes the change of the FP64 answer when the next
best choice is made at every location, such as keeping the first dropped patch instead of the last kept one.
"""

from collections.abc import Iterable

import numpy as np

from evit_deploy.tokens.choices import FLOOR

NOISE_LIMIT = 0.5
"""Largest acceptable :func:`noise` of a precision. Above it, the error is more than half of the spread among classes
(or, for embeddings, among images)."""


def distance(answers: np.ndarray, reference: np.ndarray) -> float:
    """Largest absolute difference; NaN if any difference is NaN."""
    with np.errstate(invalid="ignore"):
        return float(np.abs(answers - reference).max(initial=0.0))


def error_limit(expected: np.ndarray, reference: np.ndarray, terms: np.ndarray) -> float:
    """Largest error against FP64 allowed for logits.

    Args:
        expected: ``[n, classes]`` computed by PyTorch in the bundle's precision.
        reference: ``[n, classes]`` in FP64.
        terms: ``[n]``: per image, the largest sum of absolute terms over the logits.
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
    """Limit for each image ``[n]``, larger where rounding may change the choice of tokens.

    Args:
        limit: Limit of answers with the golden choice of patches; see :func:`error_limit`.
        free: ``[n, classes]`` in the bundle's precision, with the model's own choice of tokens.
        swapped: FP64 ``[n, classes]``, with the next best choice at every location.
        reference: FP64 ``[n, classes]``.
        margins: Margins of the locations that keep a subset of the tokens; see
            :meth:`evit_deploy.tokens.reducer.TokenReducer.margin`.
        merges: Margins of the locations that merge tokens.
    """
    room = max(limit, 2 * distance(free, reference))
    room = room + np.abs(swapped - reference).max(axis=1)
    # Keeping another patch means dropping one, so two patches must be within rounding.
    possible = [(~(margin >= 1)).sum(axis=1) > 1 for margin in margins]
    possible += [(~(margin >= 1)).any(axis=1) for margin in merges]  # a single patch may join another token
    return np.where(np.any([np.zeros(len(room), bool), *possible], axis=0), room, limit)


def noise(expected: np.ndarray, reference: np.ndarray, *, embedding: bool = False) -> float:
    """Relative error of a precision: RMS error over RMS spread of the answers.

    Logits are spread over the classes of an image. Embeddings are spread over images, so that the component common to
    all images does not count.

    Args:
        expected: ``[n, classes]`` in that precision, or embeddings ``[n, width]``.
        reference: The same in FP64.
        embedding: Whether the arrays contain embeddings.
    """
    axis = 0 if embedding or reference.shape[1] == 1 else 1  # a single logit has no spread over classes
    spread = reference - reference.mean(axis=axis, keepdims=True)
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.linalg.norm(expected - reference)
    return float(error / max(float(np.linalg.norm(spread)), np.finfo(np.float64).tiny))
