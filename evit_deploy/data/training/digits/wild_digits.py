"""digits-in-the-wild: scikit-learn's handwritten digits on crops of photographs that ship inside Python packages.

A real-image task without a download: most patches show background, so a method that keeps the wrong ones loses the
digit. Glyphs *and* photographs of the test images are never seen in training. Every image follows from the seed, the
split, its number and the curriculum's level alone, however many are made, in whichever process.

The photographs are read as files: neither scikit-learn's nor scikit-image's code is imported for them. Pictures with
numerals or print (``clock_motion``, ``page``, ``text``), drawings, and the second half of a stereo pair are left out.
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
"""What training images show behind their digits: seven color photographs and four gray ones."""
TEST_PHOTOGRAPHS = (
    "sklearn/flower.jpg",
    "skimage/chelsea.png",
    "skimage/rocket.jpg",
    "skimage/grass.png",
    "skimage/moon.png",
)
"""What test images show: three color photographs and two gray ones, none of them seen in training."""

_FOLDERS = {"sklearn": Path("datasets", "images"), "skimage": Path("data")}
_LUMA = np.array([0.299, 0.587, 0.114])


class Difficulty(msgspec.Struct, frozen=True):
    """What an image may look like at full difficulty. Lengths are shares of the image's side.

    Args:
        scale: Smallest and largest side of the digit's square.
        grid: Distance of the places that a digit may begin at; 0 is anywhere. 1/8 is the patch grid of eight patches.
        contrast: Least difference of the digit's luma (0..1) to the mean luma behind it.
        opacity: Least opacity; drawn from here to 1.
        rotation: Largest rotation in degrees, either way.
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
"""``easy``: one size, on a grid. ``medium``: anywhere. ``hard``: from half that size on, and fainter."""


class WildDigits:
    """A map-style data set of uint8 images ``[3, size, size]`` and labels; see the module.

    Args:
        split: ``train`` or ``test``: other glyphs and other photographs.
        count: How many images; the first ones do not depend on it.
        size: Side of an image in pixels.
        difficulty: A name from :data:`DIFFICULTIES`, or parameters of one's own.
        seed: Another seed gives other images.

    Raises:
        InputError: No such difficulty, or nothing to generate.
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
        """One image.

        Args:
            index: Which, from 0.
            level: The curriculum's: 0 is a centered white digit on black, 1 is full difficulty.

        Returns:
            uint8 ``[3, size, size]`` and the digit it shows.
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
        last = int(room / grid + 1e-6)  # a step off the grid on the way there would have to be unlearned
        return round(grid * round(last / 2 + (int(draw * (last + 1)) - last / 2) * level))


def photographs(split: Split) -> list[Image.Image]:
    """The photographs of a split, RGB; read once.

    Raises:
        MissingRequirement: scikit-learn or scikit-image is not installed, or without them.
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
    """A color whose luma is at least ``contrast`` away from the luma behind it; the furthest one if none is."""
    darker, brighter = max(0.0, behind - contrast), max(0.0, 1 - behind - contrast)  # lengths of what may be chosen
    if darker + brighter == 0:
        luma = 1.0 if behind < 0.5 else 0.0
    else:
        at = draw * (darker + brighter)
        luma = at if at < darker else behind + contrast + (at - darker)
    tint = tint - tint @ _LUMA  # no luma of its own
    room = np.where(tint > 0, 1 - luma, luma) / np.maximum(np.abs(tint), 1e-6)
    return (luma + tint * min(1.0, float(room.min())) * level).astype(np.float32)


class WildDigitsData:
    """Digits on photographs, see :mod:`evit_deploy.data.training.digits.wild_digits`; made as they are drawn."""

    def __init__(self, section: DataSection, preprocess: Preprocess) -> None:
        size = preprocess.size[0]
        self.classes = tuple("0123456789")
        self.preprocess = digits_preprocess(size)
        self._section = section
        self._train = WildDigits("train", section.images, size, section.difficulty)
        self._test = WildDigits("test", section.test_images, size, section.difficulty)

    def curriculum(self) -> Curriculum:
        """From a centered white digit on black to the section's difficulty, as the model learns."""
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
    """Wild digits by :class:`Draw`."""

    def __init__(self, images: WildDigits) -> None:
        self._images = images

    def __getitem__(self, draw: Draw) -> tuple[np.ndarray, int]:
        return self._images.render(draw.number, draw.level)
