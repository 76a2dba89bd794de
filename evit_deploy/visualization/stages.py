"""Converts the choices of a model's locations to the state of each patch of each image."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from evit_deploy.drawing.seen import Stage
from evit_deploy.tokens.choices import original_patches, patch_groups, patch_rows
from evit_deploy.tokens.plan import BlockPlan, TokenPlan
from evit_deploy.tokens.reducer import TokenReducer


def stages_of(
    choices: Sequence[np.ndarray],
    plan: TokenPlan,
    grid: tuple[int, int],
    method: type[TokenReducer],
    scores: Sequence[Any] = (),
) -> list[tuple[Stage, ...]]:
    """Follows every patch of every image through the locations.

    Args:
        choices: One integer array for each of the plan's locations, see :mod:`evit_deploy.tokens.choices`.
        plan: The model's plan.
        grid: Rows and columns of patches.
        method: The model's method.
        scores: Scores of each location, as returned by the method's ``scores``; empty if unknown.

    Returns:
        For each image its stages, one per location.
    """
    kept, groups, rows = original_patches(choices, plan), patch_groups(choices, plan), patch_rows(choices, plan)
    places: tuple[int, ...] = ()
    found: list[list[Stage]] = [[] for _ in range(len(choices[0]) if choices else 0)]
    for number, row in enumerate(plan.locations):
        places = row.places or places
        spread = _spread(places, grid)
        own = _own_patches(kept[number], row, plan.patches)
        shown = _of_patches(number, plan, rows, method.shown_scores(scores[number], plan.prefix)) if scores else None
        for image, stages in enumerate(found):
            stages.append(
                Stage(
                    block=row.block,
                    kept=own[image, spread],
                    groups=_groups(groups[number][image], spread),
                    count=int(row.keep or 0) if row.choice == "merge" else int(own[image].sum()),
                    patches=len(places) or plan.patches,
                    does="merged" if row.choice == "merge" else "updated" if row.aside else "kept",
                    scores=None if shown is None else shown[image, spread].astype(np.float32),
                )
            )
    return [tuple(stages) for stages in found]


def _own_patches(kept: np.ndarray, row: BlockPlan, patches: int) -> np.ndarray:
    """Which patches are kept, bool ``[B, patches]``; all for merging methods."""
    if row.choice == "merge":
        return kept >= 0
    own = np.zeros((len(kept), patches + 1), bool)
    np.put_along_axis(own, kept.astype(np.int64) % (patches + 1), True, axis=1)
    return own[:, :patches]  # drops the last column, for the fused token (−1)


def _of_patches(number: int, plan: TokenPlan, rows: list[np.ndarray], shown: np.ndarray) -> np.ndarray:
    """Maps the scores of a location's candidates to their patches, float ``[B, patches]``.

    For methods that keep patches, those inside a fused token get no score, because it belongs to the token.
    """
    row = plan.locations[number]
    found = np.full((len(shown), plan.patches), np.nan)
    if row.places:
        found[:, row.places] = shown
        return found
    if number == 0:
        return np.asarray(shown, np.float64)
    before = rows[number - 1]
    at = np.take_along_axis(np.asarray(shown, np.float64), np.maximum(before, 0).astype(np.int64), axis=1)
    gone = before < 0
    if row.choice == "kept":
        counts = np.zeros((len(before), int(before.max()) + 2), int)
        np.add.at(counts, (np.arange(len(before))[:, None], before), 1)  # removed ones are counted in the last column
        gone |= np.take_along_axis(counts, before.astype(np.int64), axis=1) > 1
    return np.where(gone, np.nan, at)


def _spread(places: tuple[int, ...], grid: tuple[int, int]) -> np.ndarray:
    """For each patch the one whose candidate covers it; after a downsampling a candidate covers several."""
    rows, columns = grid
    if not places:
        return np.arange(rows * columns)
    row_steps, column_steps = (np.unique(numbers) for numbers in np.divmod(np.array(places), columns))
    down = int(row_steps[1]) if len(row_steps) > 1 else rows
    across = int(column_steps[1]) if len(column_steps) > 1 else columns
    row, column = np.divmod(np.arange(rows * columns), columns)
    return row // down * down * columns + column // across * across


def _groups(groups: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """Groups of one image by patch; covering several patches does not make a candidate a group."""
    alone = np.bincount(groups[groups >= 0], minlength=len(groups)) <= 1
    found = groups[spread]
    return np.where((found >= 0) & alone[found], np.arange(len(groups)), found).astype(np.int32)
