"""Draws one image at one location: removed patches dimmed, groups tinted and outlined, scores as colors.

All arithmetic uses integers, so that a picture has the same bytes on every machine.
"""

import msgspec
import numpy as np
from PIL import Image

from evit_deploy.drawing.colors import GROUPS, INK, PAPER, group_colors, scale_colors
from evit_deploy.drawing.seen import Seen, Stage

SIDE = 224
"""Longer side of a tile in pixels; rounded down to whole patches."""


def tile_of(seen: Seen, side: int = SIDE) -> np.ndarray:
    """Resizes the image so that every patch has a whole number of pixels.

    A small image is enlarged by an integer factor; one larger than ``side`` is reduced.

    Returns:
        uint8 ``[h, w, 3]``.
    """
    (rows, columns), (height, width) = seen.grid, seen.image.shape[:2]
    longer = max(height, width)
    if longer <= side:
        times = side // longer
        return seen.image.repeat(times, axis=0).repeat(times, axis=1)
    high, wide = (max(1, round(pixels * side / longer)) for pixels in (height // rows, width // columns))
    small = Image.fromarray(seen.image).resize((columns * wide, rows * high), Image.Resampling.LANCZOS)
    return np.asarray(small)


def kept_tile(seen: Seen, stage: Stage, side: int = SIDE) -> np.ndarray:
    """Draws the remaining patches: removed ones pale, tokens of several patches tinted, both outlined.

    Args:
        seen: The image.
        stage: One of its stages.
        side: See :func:`tile_of`.

    Returns:
        uint8 ``[h, w, 3]``.
    """
    photo = tile_of(seen, side)
    place = _patch_at(photo, seen.grid)
    colors = group_colors(stage.groups, seen.grid)
    tints = np.where(colors[:, None] < 0, np.array(PAPER), GROUPS[colors].astype(int))
    kept, grouped = stage.kept[place][..., None], (colors >= 0)[place][..., None]
    pixels, tint = photo.astype(np.int64), tints[place]
    pale = np.where(grouped, (2 * PAPER[0] + tint) // 3, PAPER[0])  # the paper color is gray, so one channel is enough
    pixels = np.where(kept, np.where(grouped, (pixels + tint + 1) // 2, pixels), (_gray(pixels) + 3 * pale + 2) // 4)
    # Outline the kept patches too: pale patches would be invisible on white images.
    apart = np.where(colors >= 0, stage.groups, np.where(stage.kept, -1, -2))
    return _outlined(pixels.astype(np.uint8), apart, seen.grid)


def score_tile(seen: Seen, stage: Stage, side: int = SIDE) -> np.ndarray:
    """Draws scores as colors over the gray image, from dark for the lowest to bright for the highest.

    Colors are by rank, because class attention spans orders of magnitude and the choice is by rank too. Patches that
    were not candidates are pale; the kept ones are outlined.

    Args:
        seen: The image.
        stage: One of its stages, with scores.
        side: See :func:`tile_of`.

    Returns:
        uint8 ``[h, w, 3]``.
    """
    photo = tile_of(seen, side).astype(np.int64)
    place = _patch_at(photo, seen.grid)
    assert stage.scores is not None
    known = ~np.isnan(stage.scores)
    colors = scale_colors(ranks(stage.scores)).astype(np.int64)[place]
    gray = _gray(photo)
    pixels = np.where(known[place][..., None], (gray + 3 * colors + 2) // 4, (gray + 3 * PAPER[0] + 2) // 4)
    return _outlined(pixels.astype(np.uint8), stage.kept, seen.grid)


def ranks(scores: np.ndarray) -> np.ndarray:
    """Rank of each score, scaled to 0 to 1; equal scores have equal ranks, NaN stays NaN.

    Args:
        scores: ``[patches]``.
    """
    known = ~np.isnan(scores)
    values, number = np.unique(scores[known], return_inverse=True)
    found = np.full(scores.shape, np.nan)
    found[known] = number / max(len(values) - 1, 1)
    return found


class Outline(msgspec.Struct, frozen=True):
    """Width of the lines between patches.

    Args:
        dark: Width of the dark line in pixels.
        light: Width of the light line in pixels.
    """

    dark: int
    light: int


def outline_for(patch: int) -> Outline:
    """Line widths for a patch size in pixels."""
    return Outline(max(1, patch // 12), 1 if patch >= 6 else 0)


def _patch_at(photo: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Patch index of each pixel, ``[h, w]``."""
    numbers = np.arange(grid[0] * grid[1]).reshape(grid)
    return numbers.repeat(photo.shape[0] // grid[0], axis=0).repeat(photo.shape[1] // grid[1], axis=1)


def _gray(pixels: np.ndarray) -> np.ndarray:
    """Brightness, ``[h, w, 1]``: ITU-R 601 in thousandths."""
    return ((pixels @ np.array([299, 587, 114]) + 500) // 1000)[..., None]


def _outlined(pixels: np.ndarray, groups: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Draws a line between neighboring patches of different groups.

    It is dark in the patch above or to the left and light in the other, so that it is visible on any image.
    """
    square = groups.reshape(grid)
    high, wide = pixels.shape[0] // grid[0], pixels.shape[1] // grid[1]
    line = outline_for(min(high, wide))
    for light in (True, False):  # dark lines are drawn last, so that corners are closed
        width, color = (line.light, PAPER) if light else (line.dark, INK)
        for row, column in np.argwhere(square[:, :-1] != square[:, 1:]):
            edge = (column + 1) * wide
            across = slice(edge, edge + width) if light else slice(edge - width, edge)
            pixels[row * high : (row + 1) * high, across] = color
        for row, column in np.argwhere(square[:-1] != square[1:]):
            edge = (row + 1) * high
            down = slice(edge, edge + width) if light else slice(edge - width, edge)
            pixels[down, column * wide : (column + 1) * wide] = color
    return pixels
