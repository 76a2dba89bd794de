"""digits-in-the-wild: scikit-learn's handwritten digits on crops of photographs that are included in Python packages.

It is a real-image task that needs no download: most patches show background, so a method that keeps the wrong patches
loses the digit. Training never uses the glyphs *or* the photographs of the test images. Every image depends only on the
seed, the split, its index and the curriculum's level, not on the number of images or the process.

The photographs are read as files, without importing scikit-learn or scikit-image. Pictures with numerals or print
(``clock_motion``, ``page``, ``text``), drawings, and the second image of a stereo pair are not used.
"""

import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec
import numpy as np
from PIL import Image

from evit_deploy.data.images import read_image
from evit_deploy.data.preprocess import Preprocess
from evit_deploy.data.training.curriculum import Curriculum
from evit_deploy.data.training.digits.digits import digits_images, digits_preprocess
from evit_deploy.data.training.sampling import (
    AHEAD,
    Batch,
    Batches,
    Draw,
    loader,
    spaced,
    stacked,
    validation_rows,
    whole_batches,
)
from evit_deploy.data.training.transfer import Transfer
from evit_deploy.environment.requirements import install_line
from evit_deploy.errors import InputError, MissingRequirement
from evit_deploy.recipe.sections import DataSection

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Split = Literal["train", "test"]

TRAIN_PHOTOGRAPHS = (
    "sklearn/china.jpg",
    "skimage/astronaut.png",
    "skimage/coffee.png",
    "skimage/motorcycle_left.png",
    "skimage/hubble_deep_field.jpg",
    "skimage/ihc.png",
    "skimage/retina.jpg",
    "skimage/camera.png",
    "skimage/brick.png",
    "skimage/gravel.png",
    "skimage/coins.png",
)
"""Backgrounds of training images: seven color photographs and four gray ones."""
TEST_PHOTOGRAPHS = (
    "sklearn/flower.jpg",
    "skimage/chelsea.png",
    "skimage/rocket.jpg",
    "skimage/grass.png",
    "skimage/moon.png",
)
"""Backgrounds of test images: three color photographs and two gray ones, none of them used in training."""

_FOLDERS = {"sklearn": Path("datasets", "images"), "skimage": Path("data")}
_LUMA = np.array([0.299, 0.587, 0.114])


class Difficulty(msgspec.Struct, frozen=True):
    """Parameters of the images at full difficulty. Lengths are fractions of the image's side.

    Args:
        scale: Minimum and maximum side of the digit's square.
        grid: Grid spacing of the digit's top left corner; 0 allows any position, 1/8 is the grid of eight patches.
        contrast: Minimum difference between the digit's luma (0..1) and the mean luma behind it.
        opacity: Minimum opacity; the maximum is 1.
        rotation: Maximum rotation in degrees, in either direction.
    """

    scale: tuple[float, float] = (3 / 8, 3 / 8)
    grid: float = 0.0
    contrast: float = 0.25
    opacity: float = 0.75
    rotation: float = 10.0


DIFFICULTIES = {
    "easy": Difficulty(grid=1 / 8),
    "medium": Difficulty(),
    "hard": Difficulty(scale=(3 / 16, 3 / 8), contrast=0.15, opacity=0.6, rotation=15.0),
}
"""``easy``: one size, on a grid. ``medium``: any position. ``hard``: down to half the size, and fainter."""


class WildDigits:
    """A map-style data set of uint8 images ``[3, size, size]`` and labels; see the module.

    Args:
        split: ``train`` or ``test``, which use different glyphs and photographs.
        count: Number of images; the first images do not depend on it.
        size: Side of an image in pixels.
        difficulty: A name in :data:`DIFFICULTIES`, or custom parameters.
        seed: Seed of the images.

    Raises:
        InputError: The difficulty does not exist, or there is nothing to generate.
        MissingRequirement: The photographs are not installed.
    """

    def __init__(
        self, split: Split, count: int, size: int, difficulty: str | Difficulty = "easy", seed: int = 0
    ) -> None:
        if isinstance(difficulty, str) and difficulty not in DIFFICULTIES:
            raise InputError("no such difficulty", seen=difficulty, wanted=", ".join(DIFFICULTIES))
        if count < 1 or size < 16:
            raise InputError("nothing to generate", seen=f"{count} images of {size} pixels", wanted="1 of 16 or more")
        self.split, self.size, self.seed, self._count = split, size, seed, count
        self.difficulty = DIFFICULTIES[difficulty] if isinstance(difficulty, str) else difficulty
        self._photographs = photographs(split)
        self._glyphs, self._labels = _glyphs(split)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.render(index)

    def render(self, index: int, level: float = 1.0) -> tuple[np.ndarray, int]:
        """Renders one image.

        Args:
            index: 0-based index.
            level: Level of the curriculum: 0 is a centered white digit on black, 1 is full difficulty.

        Returns:
            uint8 ``[3, size, size]`` and the digit in it.
        """
        rng = np.random.default_rng((self.seed, self.split == "test", index))
        asked, size = self.difficulty, self.size
        draws = rng.random(12)
        number = int(draws[0] * len(self._glyphs))
        scale = asked.scale[0] + (asked.scale[1] - asked.scale[0]) * draws[1]
        scale = asked.scale[1] + (scale - asked.scale[1]) * level
        side = max(8, round(scale * size))
        mask = _mask(self._glyphs[number], side, (2 * draws[2] - 1) * asked.rotation * level)
        mask *= 1 - (1 - asked.opacity) * draws[3] * level
        top, left = (self._place(draw, side, level) for draw in draws[4:6])
        photograph = self._photographs[int(draws[6] * len(self._photographs))]
        image = np.asarray(_crop(photograph, size, draws[7:11]), dtype=np.float32) * (level / 255)
        behind = image[top : top + side, left : left + side]
        luma = float(behind.mean(axis=(0, 1)) @ _LUMA)
        color = _color(luma, 1 - (1 - asked.contrast) * level, level, draws[11], rng.random(3))
        behind += mask[:, :, None] * (color - behind)
        return np.ascontiguousarray((image * 255 + 0.5).astype(np.uint8).transpose(2, 0, 1)), int(self._labels[number])

    def _place(self, draw: float, side: int, level: float) -> int:
        room, grid = self.size - side, self.difficulty.grid * self.size
        if not grid:
            return round(room * (0.5 + (draw - 0.5) * level))
        # Positions are on the grid at every level: the model would have to unlearn others.
        last = int(room / grid + 1e-6)
        return round(grid * round(last / 2 + (int(draw * (last + 1)) - last / 2) * level))


def photographs(split: Split) -> list[Image.Image]:
    """Returns the photographs of a split as RGB; they are read once.

    Raises:
        MissingRequirement: scikit-learn or scikit-image is not installed, or does not include them.
    """
    return _photographs(TRAIN_PHOTOGRAPHS if split == "train" else TEST_PHOTOGRAPHS)


@functools.lru_cache(maxsize=2)
def _photographs(names: tuple[str, ...]) -> list[Image.Image]:
    files = []
    for name in names:
        package, file = name.split("/")
        found = importlib.util.find_spec(package)
        path = Path(found.origin).parent / _FOLDERS[package] / file if found and found.origin else None
        if path is None or not path.is_file():
            raise MissingRequirement(
                f"the photograph {file} of {package} is missing: digits-in-the-wild needs it",
                fix=f"Run: {install_line('wild')}",
            )
        files.append(path)
    return [read_image(path) for path in files]


@functools.lru_cache(maxsize=2)
def _glyphs(split: Split) -> tuple[list[Image.Image], np.ndarray]:
    from evit_deploy.data.training.digits.digits import digits_split

    images, labels = digits_images()
    chosen = digits_split(labels)[split == "test"]
    return [images[i] for i in chosen], labels[chosen]


def _mask(glyph: Image.Image, side: int, angle: float) -> np.ndarray:
    enlarged = glyph.resize((side, side), Image.Resampling.BICUBIC).rotate(angle, Image.Resampling.BILINEAR)
    return np.asarray(enlarged, dtype=np.float32) / 255


def _crop(photograph: Image.Image, size: int, draws: np.ndarray) -> Image.Image:
    share, left, top, flip = draws
    side = (0.25 + 0.75 * share) * min(photograph.size)
    left, top = left * (photograph.width - side), top * (photograph.height - side)
    box = (left, top, left + side, top + side)
    crop = photograph.resize((size, size), Image.Resampling.BILINEAR, box=box, reducing_gap=2.0)
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip < 0.5 else crop


def _color(behind: float, contrast: float, level: float, draw: float, tint: np.ndarray) -> np.ndarray:
    """A color with luma at least ``contrast`` away from the luma behind it; the most distant luma if there is none."""
    darker, brighter = max(0.0, behind - contrast), max(0.0, 1 - behind - contrast)  # lengths of the allowed ranges
    if darker + brighter == 0:
        luma = 1.0 if behind < 0.5 else 0.0
    else:
        at = draw * (darker + brighter)
        luma = at if at < darker else behind + contrast + (at - darker)
    tint = tint - tint @ _LUMA  # leaves the luma unchanged
    room = np.where(tint > 0, 1 - luma, luma) / np.maximum(np.abs(tint), 1e-6)
    return (luma + tint * min(1.0, float(room.min())) * level).astype(np.float32)


class WildDigitsData:
    """Digits on photographs, generated on demand; see :mod:`evit_deploy.data.training.digits.wild_digits`."""

    def __init__(self, section: DataSection, preprocess: Preprocess) -> None:
        size = preprocess.size[0]
        self.classes = tuple("0123456789")
        self.preprocess = digits_preprocess(size)
        self._section = section
        self._train = WildDigits("train", section.images, size, section.difficulty)
        self._test = WildDigits("test", section.test_images, size, section.difficulty)

    def curriculum(self) -> Curriculum:
        """A curriculum from a centered white digit on black to the section's difficulty, as the model learns."""
        section = self._section
        return Curriculum(section.curriculum_threshold, section.curriculum_rate, delay=AHEAD)

    def steps_per_epoch(self, batch_size: int) -> int:
        """See :class:`TrainingData`."""
        return whole_batches(len(self._train), batch_size)

    def training(
        self,
        batch_size: int,
        seed: int,
        *,
        rank: int = 0,
        world: int = 1,
        start_step: int = 0,
        curriculum: Curriculum | None = None,
        device: "torch.device | str" = "cpu",
    ) -> "Iterator[tuple[Tensor, ...]]":
        """See :class:`TrainingData`."""
        if curriculum is not None and curriculum.delay < AHEAD and self._section.workers:
            raise InputError("the curriculum's delay is too short for worker processes", seen=curriculum.delay,
                             wanted=f"at least {AHEAD}")  # fmt: skip
        batches = Batches(
            len(self._train), batch_size, seed, rank=rank, world=world, start_step=start_step,
            level_at=None if curriculum is None else curriculum.at,
        )  # fmt: skip
        transfer = Transfer(device, self.preprocess)
        drawn = _Drawn(self._train)
        for batch in loader(drawn, batches, self._section.workers, stacked, AHEAD, pin=transfer.pins):
            yield transfer(batch)

    def validation(self, batch_size: int, *, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """See :class:`TrainingData`."""
        rows = validation_rows(len(self._test), batch_size, rank, world)
        transfer = Transfer("cpu", self.preprocess)
        for batch in loader(self._test, rows, self._section.workers, stacked, AHEAD):
            images, labels = transfer(batch)
            yield images, labels

    def calibration(self, count: int) -> np.ndarray:
        """See :class:`TrainingData`."""
        chosen = stacked([self._train[int(i)] for i in spaced(len(self._train), count)])
        return Transfer("cpu", self.preprocess)(chosen)[0].numpy()


class _Drawn:
    """Wild digits, indexed by :class:`Draw`."""

    def __init__(self, images: WildDigits) -> None:
        self._images = images

    def __getitem__(self, draw: Draw) -> tuple[np.ndarray, int]:
        return self._images.render(draw.number, draw.level)
