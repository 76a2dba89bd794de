"""Analysis of a model's choices in NumPy: where each patch went, how clear each choice was, and the next best choice.

A choice is int32 ``[B, length]``. A choice of kind ``kept`` lists the candidates in their order after the location; a
fused token or the waiting tokens follow them. A choice of kind ``merge`` consists of three lists: the candidates that
stay, in order; the candidates that move; and for each of these, the position in the first list of the one it joins.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from evit_deploy.tokens.plan import FUSED, BlockPlan, TokenPlan

FLOOR = 4
"""Smallest tolerance, in multiples of FP32's machine epsilon."""


def patch_rows(choices: Sequence[Any], plan: TokenPlan) -> list[np.ndarray]:
    """Follows every patch of the image through all locations.

    Args:
        choices: One integer array for each of the plan's locations.
        plan: The plan they come from.

    Returns:
        For each location int32 ``[B, patches]``: the token that contains the patch afterwards, counted without the
        prefix; −1 for dropped patches. Patches in the same token were fused or merged.
    """
    rows: np.ndarray | None = None
    found = []
    for choice, row in zip(choices, plan.locations, strict=True):
        choice = np.asarray(choice).astype(np.int64)
        if row.places:  # the candidates are in order again, on a smaller grid
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
    """Labels every patch with the token that contains it.

    Args:
        choices: One integer array for each of the plan's locations.
        plan: The plan they come from.

    Returns:
        For each location int32 ``[B, patches]``: the lowest patch number in the token that contains the patch
        afterwards; −1 for dropped patches. Patches with the same number were fused or merged.
    """
    return [_lowest(rows) for rows in patch_rows(choices, plan)]


def _lowest(rows: np.ndarray) -> np.ndarray:
    """Replaces each patch's token by the lowest patch number in that token; −1 is kept."""
    images, patches = rows.shape
    lowest = np.full((images, int(rows.max(initial=0)) + 1), patches, np.int32)
    inside = np.where(rows < 0, 0, rows)
    numbers = np.broadcast_to(np.arange(patches, dtype=np.int32), rows.shape)
    np.minimum.at(lowest, (np.arange(images)[:, None], inside), np.where(rows < 0, patches, numbers))
    return np.where(rows < 0, -1, np.take_along_axis(lowest, inside, axis=1)).astype(np.int32)


def _tokens_after(plan: TokenPlan, location: int) -> int:
    """Number of tokens after a location, without the prefix but including waiting tokens."""
    row = plan.locations[location]
    assert row.keep is not None
    return row.keep + row.aside if row.aside else row.keep + row.fused


def _places(choice: np.ndarray, row: BlockPlan, candidates: int) -> np.ndarray:
    """The new position of each candidate, ``[B, candidates]``; −1 for dropped candidates."""
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

    Raw indices count the candidates of their location, so after the first location they cannot be compared between
    models.

    Args:
        choices: One integer array for each of the plan's locations.
        plan: The plan they come from.

    Returns:
        One int32 array for each location. For kind ``kept``: the kept patches ``[B, K]``, where −1 is a fused token;
        with fusion ``[B, K + 1]``, with −1 in the last column. For kind ``merge``: ``[B, patches]``, for every patch
        the lowest patch number, before the merge, in the token that its token joined, or in its own token if that
        stayed. Two models with equal tokens before a location therefore differ only in the patches about which they
        decide differently.
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
    """For every patch, the lowest patch number before the merge in the token that it joins."""
    images, patches = before.shape
    candidates = int(before.max()) + 1
    lowest = np.full((images, candidates), patches, np.int32)
    numbers = np.broadcast_to(np.arange(patches, dtype=np.int32), before.shape)
    np.minimum.at(lowest, (np.arange(images)[:, None], before), numbers)
    choice = choice.astype(np.int64)
    joined = np.take_along_axis(choice, _places(choice, row, candidates), axis=1)  # positions are among the first K
    return np.take_along_axis(np.take_along_axis(lowest, joined, axis=1), before.astype(np.int64), axis=1)


def patch_margins(margins: Sequence[np.ndarray], choices: Sequence[Any], plan: TokenPlan) -> list[np.ndarray]:
    """Translates the margins of candidates into margins of patches.

    Args:
        margins: ``[B, candidates]`` for each location.
        choices: The model's choice at each location.
        plan: The model's plan.

    Returns:
        For each location ``[B, patches + 1]``, by patch number, fused tokens last; infinite for patches that are not
        candidates.
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
            np.minimum.at(result, place, margin)  # fused tokens share one column
            order = np.take_along_axis(numbers, np.asarray(choices[index]).astype(np.int64), axis=1)
            order = order if row.aside else kept[index]
        found.append(result)
    return found


def share_margin(scores: np.ndarray, exact: np.ndarray, keep: int) -> np.ndarray:
    """Distance of scores from the boundary between kept and dropped, relative to the rounding error.

    The scores are probabilities of a softmax. Their logarithms are compared, because their rounding error is relative.

    Args:
        scores: ``[n, N]`` in the precision under test.
        exact: The same in FP64.
        keep: Number of kept candidates.

    Returns:
        ``[n, N]``; below 1, rounding can decide whether the candidate is kept.
    """
    return linear_margin(_logarithm(scores), _logarithm(exact), keep)


def linear_margin(scores: np.ndarray, exact: np.ndarray, keep: int) -> np.ndarray:
    """Like :func:`share_margin`, for scores with an absolute rounding error, such as logits.

    Args:
        scores: See :func:`share_margin`.
        exact: See :func:`share_margin`.
        keep: See :func:`share_margin`.
    """
    ranked = -np.sort(-exact, axis=1)
    boundary = ranked[:, keep - 1 : keep + 1].mean(axis=1, keepdims=True)
    return np.abs(exact - boundary) / rounding_of(scores, exact)


def rounding_of(scores: np.ndarray, exact: np.ndarray) -> float:
    """Largest distance at which rounding can still swap the order of two scores."""
    return 2 * float(np.abs(scores - exact).max()) + FLOOR * float(np.finfo(np.float32).eps)


def _logarithm(scores: np.ndarray) -> np.ndarray:
    """The logarithm, with scores clamped to the smallest normal FP32 number."""
    return np.log(np.maximum(scores.astype(np.float64), np.finfo(np.float32).tiny))


def swap_last(choice: np.ndarray, scores: np.ndarray, keep: int) -> np.ndarray:
    """Swaps the last kept candidate of a choice of kind ``kept`` with the highest-scored candidate that is not kept.

    Args:
        choice: ``[n, length]``.
        scores: ``[n, N]``.
        keep: Number of kept candidates.
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
