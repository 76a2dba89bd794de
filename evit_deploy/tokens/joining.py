"""Choices that keep the highest-scored tokens and merge each other token into the most similar kept one.

They are of kind ``merge`` (:mod:`evit_deploy.tokens.choices`). Choices are made in PyTorch; their margins are computed
in NumPy.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evit_deploy.tokens.choices import rounding_of, swap_last
from evit_deploy.tokens.operators.token_reorg import precise, rows_of, select

_TINY = float(np.finfo(np.float32).tiny)


def nearest_kept(x: Tensor, scores: Tensor, keep: int, prefix: int) -> Tensor:
    """Makes a choice of kind ``merge``: the highest scores are kept, and each other token joins the most similar one.

    Similarity is the cosine; on ties, the kept token with the higher score is used.

    Args:
        x: ``[B, prefix + N, C]``.
        scores: ``[B, N]``.
        keep: K.
        prefix: Tokens in front of the candidates.

    Returns:
        int32 ``[B, 2N - K]``.
    """
    order = select(scores, scores.shape[1])
    tokens = precise(rows_of(x.detach(), order, prefix))
    stay, move = tokens[:, :keep], tokens[:, keep:]
    # Only the kept tokens are normalized: the length of the moving token does not change which is most similar.
    directions = stay / stay.norm(dim=-1, keepdim=True).clamp_min(_TINY)
    with in_full(x):
        joined = (move @ directions.transpose(1, 2)).argmax(dim=-1)
    return torch.cat([order, joined], dim=1).to(torch.int32)


def in_full(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Disables autocast, which would compare in half precision; a null context if it is off, as exports require.

    Args:
        x: A tensor on the device.
    """
    autocast = torch.is_autocast_enabled(x.device.type)
    return torch.autocast(x.device.type, enabled=False) if autocast else contextlib.nullcontext()


def cosines(x: np.ndarray, candidates: int) -> np.ndarray:
    """Cosines between all candidates, float64 ``[n, N, N]``.

    Args:
        x: ``[n, prefix + N, C]``.
        candidates: N.
    """
    tokens = x[:, -candidates:].astype(np.float64)
    unit = tokens / np.maximum(np.linalg.norm(tokens, axis=-1, keepdims=True), _TINY)
    return unit @ unit.transpose(0, 2, 1)


def join_margin(clear: np.ndarray, low: np.ndarray, exact: np.ndarray, choice: np.ndarray, keep: int) -> np.ndarray:
    """Margin of the decision on each candidate, relative to the rounding error.

    The kept token that a candidate joins also changes if that token may be dropped, or if a more similar one may be
    kept.

    Args:
        clear: ``[n, N]``: margin of keeping or dropping each candidate.
        low: Cosines between all candidates in the precision under test, ``[n, N, N]``.
        exact: The same in FP64.
        choice: ``[n, 2N - K]``.
        keep: K.

    Returns:
        ``[n, N]``.
    """
    candidates = clear.shape[1]
    rounding = rounding_of(low, exact)
    result = clear.copy()
    for image, (stay, move, joined) in enumerate(_lists(choice, keep, candidates)):
        kept = np.isin(np.arange(candidates), stay)
        for dropped, target in zip(move, joined, strict=True):
            gap = (exact[image, dropped, target] - exact[image, dropped]) / rounding
            others = np.where(kept, gap, np.maximum(gap, clear[image]))  # a dropped one would have to be kept first
            others[[dropped, target]] = np.inf
            result[image, dropped] = min(clear[image, dropped], clear[image, target], others.min())
    return result


def nearest_join(choice: np.ndarray, scores: np.ndarray, similarity: np.ndarray, keep: int) -> np.ndarray:
    """The next best choice: swaps the last kept token for the next, and moves the least clear join to its second best.

    Args:
        choice: ``[n, 2N - K]``.
        scores: ``[n, N]``; the highest are kept.
        similarity: Similarities between all candidates, ``[n, N, N]``.
        keep: K.
    """
    candidates = scores.shape[1]
    swapped = choice.copy()
    swapped[:, :candidates] = swap_last(choice[:, :candidates], scores, keep)
    for image, (stay, move, _) in enumerate(_lists(swapped, keep, candidates)):
        found = similarity[image][np.ix_(move, stay)]
        best = np.argsort(-found, axis=1, kind="stable")
        joined = best[:, 0].copy()
        if keep > 1:
            ranked = np.take_along_axis(found, best[:, :2], axis=1)
            closest = int(np.argmin(ranked[:, 0] - ranked[:, 1]))
            joined[closest] = best[closest, 1]
        swapped[image, candidates:] = joined
    return swapped


def _lists(choice: np.ndarray, keep: int, candidates: int) -> Iterator[tuple[np.ndarray, ...]]:
    """For each image: kept candidates, moving candidates, and the candidate that each moving one joins."""
    for numbers in choice.astype(np.int64):
        stay = numbers[:keep]
        yield stay, numbers[keep:candidates], stay[numbers[candidates:]]
