"""Tiles, pixel by pixel: what has to be there is computed here patch by patch, from the rules and not from the code."""

import numpy as np
import pytest
from PIL import Image

from evit_deploy.drawing.colors import GROUPS, group_colors, scale_colors
from evit_deploy.drawing.seen import Seen, Stage
from evit_deploy.drawing.tiles import kept_tile, ranks, score_tile, tile_of

DARK, LIGHT = (26, 26, 26), (255, 255, 255)


def photograph(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def gray_of(pixel) -> int:
    return (299 * int(pixel[0]) + 587 * int(pixel[1]) + 114 * int(pixel[2]) + 500) // 1000


def drawn(image: np.ndarray, grid, paint, apart, patch: tuple[int, int]) -> np.ndarray:
    """Pixels by rule: ``paint`` says what becomes of one, ``apart`` whether a line separates two patches."""
    high, wide = patch
    rows, columns = grid
    found = np.array(
        [
            [paint(image[y, x], y // high * columns + x // wide) for x in range(columns * wide)]
            for y in range(rows * high)
        ],
        np.uint8,
    )
    dark, light = max(1, min(patch) // 12), 1 if min(patch) >= 6 else 0
    for color, before, after in ((LIGHT, 0, light), (DARK, dark, 0)):
        for row in range(rows):
            for column in range(columns):
                own, y, x = row * columns + column, row * high, column * wide
                if column + 1 < columns and apart(own, own + 1):
                    found[y : y + high, x + wide - before : x + wide + after] = color
                if row + 1 < rows and apart(own, own + columns):
                    found[y + high - before : y + high + after, x : x + wide] = color
    return found


SHAPES = [
    pytest.param((2, 3), (16, 16), id="patches of 16, wide"),
    pytest.param((4, 2), (14, 14), id="patches of 14, high"),
    pytest.param((3, 3), (4, 4), id="patches of 4"),
    pytest.param((2, 2), (24, 12), id="patches that are not square"),
]


@pytest.mark.parametrize(("grid", "patch"), SHAPES)
def test_patches_that_are_dropped_are_pale_and_the_others_as_they_were(grid, patch):
    image, patches = photograph(grid[0] * patch[0], grid[1] * patch[1]), grid[0] * grid[1]
    kept = np.arange(patches) % 3 != 1
    stage = Stage(0, kept, np.where(kept, np.arange(patches), -1).astype(np.int32), int(kept.sum()), patches)

    def paint(pixel, number):
        return pixel if kept[number] else [(gray_of(pixel) + 3 * 255 + 2) // 4] * 3

    found = kept_tile(Seen(image, grid, (stage,)), stage, side=max(image.shape))
    wanted = drawn(image, grid, paint, lambda one, other: kept[one] != kept[other], patch)
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(("grid", "patch"), SHAPES)
def test_a_fused_token_is_pale_in_its_color_with_a_line_around_it(grid, patch):
    image, patches = photograph(grid[0] * patch[0], grid[1] * patch[1]), grid[0] * grid[1]
    kept = np.arange(patches) % 2 == 0
    groups = np.where(kept, np.arange(patches), 1).astype(np.int32)  # the lowest of those that are fused
    stage = Stage(0, kept, groups, int(kept.sum()), patches)
    tint = GROUPS[1]

    def paint(pixel, number):
        if kept[number]:
            return pixel
        return [(gray_of(pixel) + 3 * ((2 * 255 + int(channel)) // 3) + 2) // 4 for channel in tint]

    found = kept_tile(Seen(image, grid, (stage,)), stage, side=max(image.shape))
    wanted = drawn(image, grid, paint, lambda one, other: (groups[one] == 1) != (groups[other] == 1), patch)
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(("grid", "patch"), SHAPES)
def test_merged_tokens_are_tinted_and_patches_alone_are_not(grid, patch):
    image, patches = photograph(grid[0] * patch[0], grid[1] * patch[1]), grid[0] * grid[1]
    groups = np.arange(patches, dtype=np.int32)
    groups[patches - 1] = 0  # not beside one another
    stage = Stage(0, np.ones(patches, bool), groups, patches - 1, patches, "merged")

    def paint(pixel, number):
        if groups[number] != 0:
            return pixel
        return [(int(value) + int(tint) + 1) // 2 for value, tint in zip(pixel, GROUPS[0], strict=True)]

    def apart(one, other):
        return groups[one] != groups[other] and 0 in (groups[one], groups[other])

    found = kept_tile(Seen(image, grid, (stage,)), stage, side=max(image.shape))
    np.testing.assert_array_equal(found, drawn(image, grid, paint, apart, patch))
    assert stage.tokens() == [[0, patches - 1]]


@pytest.mark.parametrize(("grid", "patch"), SHAPES)
def test_scores_are_colors_by_rank_with_a_line_around_what_was_kept(grid, patch):
    image, patches = photograph(grid[0] * patch[0], grid[1] * patch[1]), grid[0] * grid[1]
    scores = np.random.default_rng(1).permutation(patches).astype(np.float32) ** 9  # ranks, not values, count
    order = np.argsort(scores)
    scores[order[0]] = np.nan
    kept = np.zeros(patches, bool)
    kept[order[-2:]] = True
    stage = Stage(0, kept, np.where(kept, np.arange(patches), -1).astype(np.int32), 2, patches, scores=scores)
    colors = {int(patch): scale_colors(np.array(i / (patches - 2))) for i, patch in enumerate(order[1:])}

    def paint(pixel, number):
        over = colors.get(number, (255, 255, 255))
        return [(gray_of(pixel) + 3 * int(channel) + 2) // 4 for channel in over]

    found = score_tile(Seen(image, grid, (stage,)), stage, side=max(image.shape))
    wanted = drawn(image, grid, paint, lambda one, other: kept[one] != kept[other], patch)
    np.testing.assert_array_equal(found, wanted)


def test_a_small_image_is_enlarged_whole_times_and_a_large_one_reduced_to_whole_patches():
    small, large = photograph(32, 16), photograph(14 * 37, 14 * 37)
    enlarged = tile_of(Seen(small, (2, 1), ()), side=224)
    np.testing.assert_array_equal(enlarged, np.kron(small, np.ones((7, 7, 1), np.uint8)))
    reduced = tile_of(Seen(large, (37, 37), ()), side=224)
    assert reduced.shape == (37 * 6, 37 * 6, 3)
    np.testing.assert_array_equal(
        reduced, np.asarray(Image.fromarray(large).resize((222, 222), Image.Resampling.LANCZOS))
    )


def test_neighboring_groups_differ_in_color():
    generator = np.random.default_rng(0)
    compared = 0
    for _ in range(20):
        tokens = generator.integers(0, 60, 144)
        groups = np.array([int(np.flatnonzero(tokens == token)[0]) for token in tokens], np.int32)
        colors = group_colors(groups, (12, 12))
        alone = {group for group in groups.tolist() if (groups == group).sum() == 1}
        beside: dict[int, set[int]] = {group: set() for group in groups.tolist()}
        for patch, group in enumerate(groups.tolist()):
            assert (colors[patch] == -1) == (group in alone)
            assert colors[patch] == colors[group]  # all patches of a group have one color
            row, column = divmod(patch, 12)
            for other in ([patch + 1] if column < 11 else []) + ([patch + 12] if row < 11 else []):
                if groups[other] != group and not {int(groups[other]), group} & alone:
                    beside[group].add(int(groups[other]))
                    beside[int(groups[other])].add(group)
        for group, others in beside.items():
            for other in others:  # where both have more neighbors there may not be colors enough
                if len(others) < len(GROUPS) and len(beside[other]) < len(GROUPS):
                    assert colors[group] != colors[other]
                    compared += 1
    assert compared > 100


def test_equal_scores_have_equal_ranks():
    found = ranks(np.array([3.0, np.nan, 1.0, 3.0, 7.0]))
    np.testing.assert_array_equal(found, [0.5, np.nan, 0.0, 0.5, 1.0])
    np.testing.assert_array_equal(ranks(np.array([2.0, 2.0])), [0.0, 0.0])
