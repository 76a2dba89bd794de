"""What the locations of a model chose, in NumPy: where each patch went, how clear a choice was, which is the next best.

A choice is int32 ``[B, length]``. Of kind ``kept`` it is the candidates in the order in which they stand afterwards; a
fused token, or those that wait, come behind. Of kind ``merge`` it is three lists: candidates that stay, in order, those
that move, and for each of these the place among the first that it joins.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from evit_deploy.tokens.plan import FUSED, BlockPlan, TokenPlan

FLOOR = 4
"""Roundings that no tolerance is tighter than."""


def patch_rows(choices: Sequence[Any], plan: TokenPlan) -> list[np.ndarray]:
    """Follows every patch of the image through all locations.

    Args:
        choices: One integer array for each of the plan's locations.
        plan: The plan they come from.

    Returns:
        For each location int32 ``[B, patches]``: the token behind the prefix that the patch is in afterwards; −1 where
        it was dropped. Patches in the same token were fused or merged.
    """
    rows: np.ndarray | None = None
    found = []
    for choice, row in zip(choices, plan.locations, strict=True):
        choice = np.asarray(choice).astype(np.int64)
        if row.places:  # in order again, on a smaller grid
            candidates, rows = len(row.places), np.full((len(choice), plan.patches), -1)
            rows[:, row.places] = np.arange(candidates)
        else:
            candidates = plan.patches if rows is None else _tokens_after(plan, len(found) - 1)
        places = _places(choice, row, candidates)
        if rows is None:
            rows = np.broadcast_to(np.arange(plan.patches), (len(choice), plan.patches))
        moved = np.take_along_axis(places, np.maximum(rows, 0), axis=1)
        rows = np.where(rows < 0, -1, moved)
        found.append(rows.astype(np.int32))
    return found


def patch_groups(choices: Sequence[Any], plan: TokenPlan) -> list[np.ndarray]:
    """Names for every patch the token that it is in.

    Args:
        choices: One integer array for each of the plan's locations.
        plan: The plan they come from.

    Returns:
        For each location int32 ``[B, patches]``: the lowest patch number in the token that the patch is in afterwards;
        −1 where it was dropped. Patches with the same number were fused or merged.
    """
    return [_lowest(rows) for rows in patch_rows(choices, plan)]


def _lowest(rows: np.ndarray) -> np.ndarray:
    """The lowest patch number of each token, at every patch in it; −1 stays."""
    images, patches = rows.shape
    lowest = np.full((images, int(rows.max(initial=0)) + 1), patches, np.int32)
    inside = np.where(rows < 0, 0, rows)
    numbers = np.broadcast_to(np.arange(patches, dtype=np.int32), rows.shape)
    np.minimum.at(lowest, (np.arange(images)[:, None], inside), np.where(rows < 0, patches, numbers))
    return np.where(rows < 0, -1, np.take_along_axis(lowest, inside, axis=1)).astype(np.int32)


def _tokens_after(plan: TokenPlan, location: int) -> int:
    """Tokens behind the prefix, those that wait included."""
    row = plan.locations[location]
    assert row.keep is not None
    return row.keep + row.aside if row.aside else row.keep + row.fused


def _places(choice: np.ndarray, row: BlockPlan, candidates: int) -> np.ndarray:
    """Where each candidate goes, ``[B, candidates]``; −1 for nowhere."""
    assert row.keep is not None
    gone = row.keep if row.fused and not row.aside and row.choice == "kept" else -1
    places = np.full((len(choice), candidates), gone, np.int64)
    staying = choice[:, : row.keep] if row.choice == "merge" else choice
    numbers = np.broadcast_to(np.arange(staying.shape[1]), staying.shape)
    np.put_along_axis(places, staying, numbers, axis=1)
    if row.choice == "merge":
        moving = candidates - row.keep
        targets = choice[:, row.keep + moving :]
        np.put_along_axis(places, choice[:, row.keep : row.keep + moving], targets, axis=1)
    return places


def original_patches(choices: Sequence[Any], plan: TokenPlan) -> list[np.ndarray]:
    """Translates each location's choice into patch numbers of the image.

    Raw indices count the candidates of their own location, so they cannot be compared after the first one.

    Args:
        choices: One integer array for each of the plan's locations.
        plan: The plan they come from.

    Returns:
        One int32 array for each location. Of kind ``kept``: the kept patches ``[B, K]``, a fused token is −1; with
        fusion ``[B, K + 1]``, its last column −1. Of kind ``merge``: for every patch the lowest patch number in the
        token that it joined, or in its own where that stayed, as they were before, ``[B, patches]``. So two models with
        equal tokens before a location differ in the patches about which they decide differently, and in no others.
    """
    result: list[np.ndarray] = []
    numbers: np.ndarray | None = None
    rows = patch_rows(choices, plan) if any(row.choice == "merge" for row in plan.locations) else []
    for index, (choice, row) in enumerate(zip(choices, plan.locations, strict=True)):
        choice = np.asarray(choice)
        if row.choice == "merge":
            before = np.arange(plan.patches)[None].repeat(len(choice), axis=0) if index == 0 else rows[index - 1]
            result.append(_joined(choice, row, before))
            continue
        if numbers is None or row.places:
            first = np.array(row.places or range(plan.patches), np.int32)
            numbers = np.broadcast_to(first, (len(choice), len(first)))
        numbers = np.take_along_axis(numbers, choice.astype(np.int64), axis=1)
        if row.aside:
            result.append(numbers[:, : row.keep])
            continue
        if row.fused:
            numbers = np.concatenate([numbers, np.full((len(numbers), 1), FUSED, np.int32)], axis=1)
        result.append(numbers)
    return result


def _joined(choice: np.ndarray, row: BlockPlan, before: np.ndarray) -> np.ndarray:
    """For every patch the lowest patch number in the token that it joins, as that was before."""
    images, patches = before.shape
    candidates = int(before.max()) + 1
    lowest = np.full((images, candidates), patches, np.int32)
    numbers = np.broadcast_to(np.arange(patches, dtype=np.int32), before.shape)
    np.minimum.at(lowest, (np.arange(images)[:, None], before), numbers)
    choice = choice.astype(np.int64)
    joined = np.take_along_axis(choice, _places(choice, row, candidates), axis=1)  # places are among the first K
    return np.take_along_axis(np.take_along_axis(lowest, joined, axis=1), before.astype(np.int64), axis=1)


def patch_margins(margins: Sequence[np.ndarray], choices: Sequence[Any], plan: TokenPlan) -> list[np.ndarray]:
    """Translates the margins of candidates into those of patches.

    Args:
        margins: Of each location ``[B, candidates]``.
        choices: What the model chose there.
        plan: The model's plan.

    Returns:
        For each location ``[B, patches + 1]``, by patch number, fused tokens last; infinite where it is no candidate.
    """
    found = []
    rows, kept = patch_rows(choices, plan), original_patches(choices, plan)
    order: np.ndarray | None = None
    for index, (margin, row) in enumerate(zip(margins, plan.locations, strict=True)):
        images = len(margin)
        result = np.full((images, plan.patches + 1), np.inf)
        if row.choice == "merge":
            before = rows[index - 1] if index else np.broadcast_to(np.arange(plan.patches), (images, plan.patches))
            result[:, :-1] = np.take_along_axis(margin, before.astype(np.int64), axis=1)
        else:
            first = np.array(row.places or range(plan.patches))
            numbers = np.broadcast_to(first, (images, len(first))) if order is None or row.places else order
            place = np.arange(images)[:, None], numbers.astype(np.int64) % (plan.patches + 1)
            np.minimum.at(result, place, margin)  # fused tokens share one place
            order = np.take_along_axis(numbers, np.asarray(choices[index]).astype(np.int64), axis=1)
            order = order if row.aside else kept[index]
        found.append(result)
    return found


def share_margin(scores: np.ndarray, exact: np.ndarray, keep: int) -> np.ndarray:
    """How far scores lie from the boundary between kept and dropped, over what rounding moves them by.

    Scores are shares of a softmax: compared in logarithms, because rounding moves each by a share of itself.

    Args:
        scores: ``[n, N]`` in the precision that is examined.
        exact: The same in FP64.
        keep: How many candidates are kept.

    Returns:
        ``[n, N]``; below 1 the candidate may be kept or not.
    """
    return linear_margin(_logarithm(scores), _logarithm(exact), keep)


def linear_margin(scores: np.ndarray, exact: np.ndarray, keep: int) -> np.ndarray:
    """The same for scores that rounding moves by an absolute amount, such as logits.

    Args:
        scores: See :func:`share_margin`.
        exact: See :func:`share_margin`.
        keep: See :func:`share_margin`.
    """
    ranked = -np.sort(-exact, axis=1)
    boundary = ranked[:, keep - 1 : keep + 1].mean(axis=1, keepdims=True)
    return np.abs(exact - boundary) / rounding_of(scores, exact)


def rounding_of(scores: np.ndarray, exact: np.ndarray) -> float:
    """How far apart two scores can be and still change places for rounding."""
    return 2 * float(np.abs(scores - exact).max()) + FLOOR * float(np.finfo(np.float32).eps)


def _logarithm(scores: np.ndarray) -> np.ndarray:
    """What FP32 cannot hold counts as its smallest number."""
    return np.log(np.maximum(scores.astype(np.float64), np.finfo(np.float32).tiny))


def swap_last(choice: np.ndarray, scores: np.ndarray, keep: int) -> np.ndarray:
    """A choice of kind ``kept`` with its last kept candidate and the first that is not in each other's place.

    Args:
        choice: ``[n, length]``.
        scores: ``[n, N]``; they say which is the first that is not kept.
        keep: How many are kept.
    """
    order = np.argsort(-scores, axis=1, kind="stable")
    chosen = np.zeros(scores.shape, bool)
    np.put_along_axis(chosen, choice[:, :keep].astype(np.int64), True, axis=1)
    swapped = choice.copy()
    for image, row in enumerate(order):
        dropped = row[~chosen[image, row]]
        if len(dropped):
            waiting = np.flatnonzero(swapped[image] == dropped[0])
            swapped[image, waiting] = swapped[image, keep - 1]
            swapped[image, keep - 1] = dropped[0]
    return swapped
