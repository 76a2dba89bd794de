"""Colors of groups, chosen so that neighbors differ, and of scores."""

import numpy as np

PAPER = (255, 255, 255)
INK = (26, 26, 26)
FAINT = (90, 90, 90)
GROUPS = np.array(
    [(0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (213, 94, 0), (240, 228, 66)],
    np.uint8,
)
"""Okabe and Ito's colors, which are distinguishable with color vision deficiencies."""
_SCALE = np.array(
    [(68, 1, 84), (71, 44, 122), (59, 81, 139), (44, 113, 142), (33, 144, 141), (39, 173, 129), (92, 200, 99),
     (170, 220, 50), (253, 231, 37)],
    np.float64,
)  # fmt: skip
"""Nine colors of viridis, whose brightness increases steadily, so that it also works in gray."""


def scale_colors(shares: np.ndarray) -> np.ndarray:
    """Maps numbers from 0 (dark) to 1 (bright) to colors; NaN is the darkest.

    Args:
        shares: float of any shape.

    Returns:
        uint8 of shape ``[..., 3]``.
    """
    place = np.clip(np.nan_to_num(shares), 0, 1) * (len(_SCALE) - 1)
    channels = [np.interp(place, np.arange(len(_SCALE)), _SCALE[:, channel]) for channel in range(3)]
    return np.rint(np.stack(channels, axis=-1)).astype(np.uint8)


def group_colors(groups: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Index into :data:`GROUPS` for each patch.

    A group uses the first color that no neighbor has, searching from its own number on, so that it has the same color
    at most locations.

    Args:
        groups: int ``[patches]``, see :class:`~evit_deploy.drawing.seen.Stage`.
        grid: Rows and columns.

    Returns:
        int ``[patches]``; −1 for a patch that is alone in its token or was dropped.
    """
    numbers, sizes = np.unique(groups, return_counts=True)
    several = {int(number) for number, size in zip(numbers, sizes, strict=True) if number >= 0 and size > 1}
    beside: dict[int, set[int]] = {number: set() for number in several}
    square = groups.reshape(grid)
    for one, other in ((square[:, :-1], square[:, 1:]), (square[:-1], square[1:])):
        for left, right in zip(one.flat, other.flat, strict=True):
            if left != right and int(left) in several and int(right) in several:
                beside[int(left)].add(int(right))
                beside[int(right)].add(int(left))
    chosen: dict[int, int] = {}
    for number in sorted(several):
        taken = {chosen[other] for other in beside[number] if other in chosen}
        order = [(number + step) % len(GROUPS) for step in range(len(GROUPS))]
        chosen[number] = next((color for color in order if color not in taken), order[0])
    return np.array([chosen.get(int(number), -1) for number in groups])
