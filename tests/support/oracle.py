"""EViT's op and class scores in NumPy float64, written from the paper's equations 2 and 3 and its algorithm 1.

The reference for all implementations of the op: plain loops, without imports from the package under test.
"""

import math

import numpy as np


def class_scores(q: np.ndarray, k: np.ndarray, scale: float, prefix: int) -> np.ndarray:
    """Equation 2, averaged over heads: how much the class token (token 0) attends to each candidate.

    The softmax runs over all tokens including the prefix, whose share is dropped afterwards and not redistributed.

    Args:
        q: Queries ``[B, N, H, d]``.
        k: Keys ``[B, N, H, d]``.
        scale: Factor on the logits.
        prefix: Number of prefix tokens, which are not candidates.

    Returns:
        float64 ``[B, N - prefix]``.
    """
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    batch, tokens, heads, _ = k.shape
    scores = np.zeros((batch, tokens - prefix))
    for b in range(batch):
        for h in range(heads):
            logits = np.array([np.dot(q[b, 0, h], k[b, n, h]) * scale for n in range(tokens)])
            exponentials = np.exp(logits - logits.max())
            attention = exponentials / exponentials.sum()
            scores[b] += attention[prefix:] / heads
    return scores


def select(scores: np.ndarray, keep: int) -> np.ndarray:
    """The ``keep`` candidates with the highest scores, descending, the lowest index first on ties.

    Found by repeatedly selecting the largest, so that it does not depend on a sort's treatment of ties. Undefined for
    NaN: see :func:`is_valid_choice`.

    Args:
        scores: ``[B, N]``, without NaN.
        keep: K.

    Returns:
        int64 ``[B, K]``.
    """
    chosen = np.zeros((len(scores), keep), np.int64)
    for b, row in enumerate(np.asarray(scores, np.float64)):
        left = list(range(len(row)))
        for place in range(keep):
            best = left[0]
            # in ascending order, replaced only by a strictly higher score: the lowest index wins ties
            for candidate in left:
                if row[candidate] > row[best]:
                    best = candidate
            chosen[b, place] = best
            left.remove(best)
    return chosen


def is_valid_choice(kept: np.ndarray, candidates: int) -> bool:
    """Required for all scores, including NaN: every index is valid and occurs once."""
    return all(len(set(row)) == len(row) and all(0 <= i < candidates for i in row) for row in np.asarray(kept).tolist())


def fused_row(patches: np.ndarray, scores: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Equation 3: Σ score · row over the candidates that are not kept; not normalized, zero when all are kept.

    Args:
        patches: The candidates ``[B, N, C]``.
        scores: ``[B, N]``.
        kept: Indices ``[B, K]``.

    Returns:
        float64 ``[B, 1, C]``.
    """
    patches, scores = np.asarray(patches, np.float64), np.asarray(scores, np.float64)
    row = np.zeros((len(patches), 1, patches.shape[2]))
    for b in range(len(patches)):
        for i in sorted(set(range(patches.shape[1])) - set(kept[b].tolist())):
            row[b, 0] += scores[b, i] * patches[b, i]
    return row


def reorganize(x: np.ndarray, scores: np.ndarray, kept: np.ndarray, fuse: bool, prefix: int) -> np.ndarray:
    """Algorithm 1 after the choice: ``[prefix, kept rows in the order of kept, fused row]``, float64."""
    x = np.asarray(x, np.float64)
    front, patches = x[:, :prefix], x[:, prefix:]
    rows = np.stack([patches[b][kept[b]] for b in range(len(x))])
    return np.concatenate([front, rows, *([fused_row(patches, scores, kept)] if fuse else [])], axis=1)


def token_reorg(x: np.ndarray, scores: np.ndarray, keep: int, fuse: bool, prefix: int) -> tuple[np.ndarray, np.ndarray]:
    """The whole op: y float64 ``[B, prefix + K + fuse, C]`` and idx int64 ``[B, K]``."""
    kept = select(scores, keep)
    return reorganize(x, scores, kept, fuse, prefix), kept


def fused_row_error(x: np.ndarray, scores: np.ndarray, kept: np.ndarray, prefix: int) -> float:
    """Error bound of an FP32 sum of n = N − K products, in any order: γ_n · Σ |score · row|.

    γ_n = n·u / (1 − n·u) with u = 2⁻²⁴, the unit roundoff (Higham, "Accuracy and Stability of Numerical Algorithms",
    section 3.1). It excludes the subsequent rounding to x's dtype.
    """
    terms = x.shape[1] - prefix - kept.shape[1]
    magnitude = fused_row(np.abs(np.asarray(x[:, prefix:], np.float64)), np.abs(scores), kept)
    return gamma(terms) * float(magnitude.max(initial=0.0))


def gamma(terms: int) -> float:
    """γ_n of FP32 arithmetic, see :func:`fused_row_error`."""
    roundoff = 2.0**-24
    return terms * roundoff / (1 - terms * roundoff)


def class_scores_error(q: np.ndarray, k: np.ndarray, scale: float) -> float:
    """Relative error bound of FP32 class scores.

    A logit is a dot product (γ_{d+1} · Σ |q·k| · scale) from which the row's largest is subtracted (one rounding of
    something at most twice the largest logit); ``exp`` turns that absolute error into a relative one, of numerator and
    denominator both, and adds its own (4 roundings are more than libm and vector libraries take); the sums over tokens
    and heads add γ of their lengths.
    """
    q, k = np.abs(np.asarray(q, np.float64)), np.abs(np.asarray(k, np.float64))
    _, tokens, heads, width = k.shape
    largest = float((q[:, :1] * k).sum(-1).max()) * abs(scale)
    logit_error = gamma(width + 1) * largest + gamma(1) * 2 * largest
    return math.expm1(2 * logit_error) + gamma(tokens + heads + 8)
