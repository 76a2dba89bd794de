"""What a model did with one image, location by location, as arrays: everything that a picture of it needs."""

import math
from collections.abc import Sequence

import msgspec
import numpy as np

from evit_deploy.errors import InputError


class Stage(msgspec.Struct, frozen=True, eq=False):
    """What became of the patches of one image at one location.

    Arrays are by patch, row by row from the top left.

    Args:
        block: 0-based block of the location.
        kept: bool ``[patches]``: whether the model continues with the patch, by itself or merged; others are dimmed.
        groups: int32 ``[patches]``: the lowest patch number in the token that the patch is in; −1 where it was dropped.
        count: Patches that were kept, where a fused token may take the place of one; tokens where they merge.
        patches: Of so many.
        does: What happened to those that are counted: ``kept``, ``merged`` or, where the others wait, ``updated``.
        scores: float32 ``[patches]``: what was chosen by, NaN where the patch was no candidate; ``None`` if not known.
    """

    block: int
    kept: np.ndarray
    groups: np.ndarray
    count: int
    patches: int
    does: str = "kept"
    scores: np.ndarray | None = None

    @property
    def title(self) -> str:
        """``block 3: 138 of 196 patches kept``."""
        return title_of([self])

    def tokens(self) -> list[list[int]]:
        """The patches of each token that holds several, in the order of their lowest numbers."""
        found: dict[int, list[int]] = {}
        for patch, group in enumerate(self.groups.tolist()):
            found.setdefault(group, []).append(patch)
        return [members for group, members in sorted(found.items()) if group >= 0 and len(members) > 1]

    def equals(self, other: "Stage") -> bool:
        """Whether the same patches were kept, and the same ones fused or merged, whatever the scores."""
        return bool((self.kept == other.kept).all() and (self.groups == other.groups).all())


def title_of(stages: Sequence[Stage]) -> str:
    """The title of one location of several images: ``block 6: 96 to 97 of 196 patches kept``."""
    first, counts = stages[0], [stage.count for stage in stages]
    count = str(min(counts)) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    if first.does == "merged":
        return f"block {first.block}: {first.patches} patches in {count} tokens"
    return f"block {first.block}: {count} of {first.patches} patches {first.does}"


class Seen(msgspec.Struct, frozen=True, eq=False):
    """One image and what a model did with it.

    Args:
        image: uint8 ``[H, W, 3]``: what the model saw.
        grid: Rows and columns of patches.
        stages: The locations, in order.
        name: What the image is called.
        answer: What the model said, in a few words.

    Raises:
        InputError: The grid does not divide the image, or a stage has another number of patches.
    """

    image: np.ndarray
    grid: tuple[int, int]
    stages: tuple[Stage, ...]
    name: str = ""
    answer: str = ""

    def __post_init__(self) -> None:
        (rows, columns), (height, width) = self.grid, self.image.shape[:2]
        if self.image.dtype != np.uint8 or self.image.ndim != 3 or self.image.shape[2] != 3:
            shape = f"{self.image.dtype} {list(self.image.shape)}"
            raise InputError("not a picture", where="image", seen=shape, wanted="uint8 [H, W, 3]")
        if rows < 1 or columns < 1 or height % rows or width % columns:
            raise InputError("the grid does not divide the image", where="grid", seen=f"{rows} x {columns}")
        for stage in self.stages:
            arrays = [stage.kept, stage.groups, *([] if stage.scores is None else [stage.scores])]
            if any(array.shape != (rows * columns,) for array in arrays):
                shapes = ", ".join(str(list(array.shape)) for array in arrays)
                where = f"block {stage.block}"
                raise InputError("arrays do not fit the grid", where=where, seen=shapes, wanted=[rows * columns])


def grid_of(height: int, width: int, patches: int) -> tuple[int, int]:
    """Rows and columns of so many patches in an image, as square as patches can be.

    >>> grid_of(224, 448, 392)
    (14, 28)

    Raises:
        InputError: No such grid divides the image.
    """
    found = [
        (rows, patches // rows)
        for rows in range(1, patches + 1)
        if patches % rows == 0 and height % rows == 0 and width % (patches // rows) == 0
    ]
    if not found:
        raise InputError(
            "the positions of the patches are unknown", seen=f"{patches} patches of {height} by {width} pixels",
            wanted="a grid that divides the image",
        )  # fmt: skip
    return min(found, key=lambda grid: abs(math.log(height * grid[1] / (width * grid[0]))))
