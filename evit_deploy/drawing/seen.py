"""What a model did with one image at each location, as arrays: the data of a picture."""

import math
from collections.abc import Sequence

import msgspec
import numpy as np

from evit_deploy.errors import InputError


class Stage(msgspec.Struct, frozen=True, eq=False):
    """The patches of one image after one location.

    Arrays are indexed by patch, row by row from the top left.

    Args:
        block: 0-based block of the location.
        kept: bool ``[patches]``: whether the patch is still in use, alone or merged; others are dimmed.
        groups: int32 ``[patches]``: lowest patch index in the token that contains the patch; −1 if it was dropped.
        count: Number of kept patches, including a fused token in place of one; number of tokens for merging methods.
        patches: Total number of patches.
        does: What happened to the counted ones: ``kept``, ``merged``, or ``updated`` if the others wait.
        scores: float32 ``[patches]``: scores of the choice, NaN for patches that were not candidates; ``None`` if
            unknown.
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
        """The patches of each token that contains several, ordered by lowest index."""
        found: dict[int, list[int]] = {}
        for patch, group in enumerate(self.groups.tolist()):
            found.setdefault(group, []).append(patch)
        return [members for group, members in sorted(found.items()) if group >= 0 and len(members) > 1]

    def equals(self, other: "Stage") -> bool:
        """Whether the same patches were kept, fused and merged; scores are ignored."""
        return bool((self.kept == other.kept).all() and (self.groups == other.groups).all())


def title_of(stages: Sequence[Stage]) -> str:
    """Title of one location for several images: ``block 6: 96 to 97 of 196 patches kept``."""
    first, counts = stages[0], [stage.count for stage in stages]
    count = str(min(counts)) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    if first.does == "merged":
        return f"block {first.block}: {first.patches} patches in {count} tokens"
    return f"block {first.block}: {count} of {first.patches} patches {first.does}"


class Seen(msgspec.Struct, frozen=True, eq=False):
    """One image and what a model did with it.

    Args:
        image: uint8 ``[H, W, 3]``: the model's input as an image.
        grid: Rows and columns of patches.
        stages: The locations, in order.
        name: Name of the image.
        answer: The model's answer as a short text.

    Raises:
        InputError: The grid does not divide the image, or a stage has the wrong number of patches.
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
    """Rows and columns of the patches in an image, with patches as square as possible.

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
