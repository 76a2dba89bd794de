"""What ``fit`` and ``evaluate`` draw their batches from: digits in memory, digits in the wild, or images on disk.

Every kind keeps the same two promises (:mod:`evit_deploy.sampling`): step k draws the same images, varied in the same
way, for one process or several, and for a run that begins at step k.
"""

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from evit_deploy.curriculum import Curriculum
from evit_deploy.data import Preprocess, digits_preprocess, load_digits_data
from evit_deploy.errors import InputError
from evit_deploy.folder_data import FolderData
from evit_deploy.recipe import DataSection
from evit_deploy.sampling import (
    AHEAD,
    Batch,
    Batches,
    Draw,
    loader,
    share,
    spaced,
    stacked,
    validation_rows,
    whole_batches,
)
from evit_deploy.wild_digits import WildDigits

Tell = Callable[[str], None]


class TrainingData(Protocol):
    """Labelled images to train and to evaluate on."""

    classes: tuple[str, ...]
    """Class names; a label is an index into them."""
    preprocess: Preprocess
    """How an image is put into the model, here and in deployment."""

    def steps_per_epoch(self, batch_size: int) -> int:
        """Whole batches in one pass."""
        ...

    def training(
        self,
        batch_size: int,
        seed: int,
        *,
        rank: int = 0,
        world: int = 1,
        start_step: int = 0,
        curriculum: Curriculum | None = None,
    ) -> Iterator[tuple[Tensor, ...]]:
        """Endless: images float32 ``[B, 3, H, W]`` and targets, int64 ``[B]`` or probabilities ``[B, classes]``.

        Where there are token labels, four more: maps, boxes, flipped and warps of
        :func:`evit_deploy.token_labels.crop_token_labels`.

        Args:
            batch_size: Images a step, over all processes; ``B`` is this by ``world``.
            seed: Where order and variation start.
            rank: Which process this is: it draws rows ``rank``, ``rank + world``, ... of every step.
            world: How many processes train.
            start_step: Step to begin at: exactly the batches come that would have followed in an unbroken run.
            curriculum: What :func:`curriculum_of` gave; without one, images are at full difficulty.
        """
        ...

    def validation(self, batch_size: int, *, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """Every validation image once: images float32 ``[B, 3, H, W]`` and labels int64 ``[B]``.

        Of several processes each gets its own images, none comes twice, and one may get fewer than another: add up the
        counts of right answers and of images, not the shares.
        """
        ...

    def calibration(self, count: int) -> np.ndarray:
        """Training images as in deployment, not varied: at most ``count``, evenly spaced, float32 ``[n, 3, H, W]``."""
        ...


def open_data(section: DataSection, preprocess: Preprocess, notice: Tell | None = None) -> TrainingData:
    """Opens what a recipe's ``data`` section names.

    Args:
        section: The section.
        preprocess: The model's preprocessing; the digits use its size only.
        notice: Told what the user should know, such as images that cannot be read.

    Raises:
        RecipeError: A folder is not given.
        InputError: A folder holds no labelled images; the message has the reason.
        MissingRequirement: A package that reads the images is not installed.
    """
    if section.name == "digits":
        return DigitsData(section, preprocess)
    if section.name == "digits-in-the-wild":
        return WildDigitsData(section, preprocess)
    return FolderData(section, preprocess, notice)


def curriculum_of(data: TrainingData) -> Curriculum | None:
    """A fresh curriculum for a model that begins from nothing, where the data has one."""
    make: Callable[[], Curriculum] | None = getattr(data, "curriculum", None)
    return None if make is None else make()


class DigitsData:
    """The digits inside scikit-learn, varied by rotation, size and place; all in memory."""

    def __init__(self, section: DataSection, preprocess: Preprocess) -> None:
        self.classes = tuple("0123456789")
        self.preprocess = digits_preprocess(preprocess.size[0])
        self._section = section
        self._train, self._test = load_digits_data(preprocess.size[0])
        self._background = float(self._train[0].min())

    def steps_per_epoch(self, batch_size: int) -> int:
        """See :class:`TrainingData`."""
        return whole_batches(len(self._train[0]), batch_size)

    def training(
        self,
        batch_size: int,
        seed: int,
        *,
        rank: int = 0,
        world: int = 1,
        start_step: int = 0,
        curriculum: Curriculum | None = None,
    ) -> Iterator[Batch]:
        """See :class:`TrainingData`."""
        images, labels = self._train
        mine, steps = share(batch_size, rank, world), self.steps_per_epoch(batch_size)
        # One generator for order and variation, as long as the set is small enough to draw everything again.
        generator, step = torch.Generator().manual_seed(seed), 0
        while True:
            order = torch.randperm(len(images), generator=generator)[: steps * batch_size]
            for chosen in order.split(batch_size):
                varied = augment(images[chosen], self._section, generator, self._background)
                if step >= start_step:
                    yield varied[mine], labels[chosen][mine]
                step += 1

    def validation(self, batch_size: int, *, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """See :class:`TrainingData`."""
        images, labels = self._test
        for rows in validation_rows(len(images), batch_size, rank, world):
            yield images[rows], labels[rows]

    def calibration(self, count: int) -> np.ndarray:
        """See :class:`TrainingData`."""
        images = self._train[0]
        return images[spaced(len(images), count)].numpy()


def augment(images: Tensor, section: DataSection, generator: torch.Generator, background: float) -> Tensor:
    """Rotates, resizes and shifts every image by its own random amount.

    Args:
        images: ``[B, C, H, W]``.
        section: Its ``rotation`` (degrees), ``scale`` and ``shift`` (shares) are the largest amounts, either way.
        generator: Where the random numbers come from.
        background: Value that moves in from outside.

    Returns:
        ``[B, C, H, W]``.
    """
    amounts = 2 * torch.rand(4, len(images), generator=generator) - 1
    angle = amounts[0] * torch.pi * section.rotation / 180
    size = 1 + amounts[1] * section.scale
    shift = amounts[2:] * section.shift * 2  # affine_grid's coordinates run from -1 to 1
    cosine, sine = angle.cos() / size, angle.sin() / size
    matrix = torch.stack([cosine, -sine, shift[0], sine, cosine, shift[1]], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images - background, grid, align_corners=False) + background


class WildDigitsData:
    """Digits on photographs, see :mod:`evit_deploy.wild_digits`; made as they are drawn."""

    def __init__(self, section: DataSection, preprocess: Preprocess) -> None:
        size = preprocess.size[0]
        self.classes = tuple("0123456789")
        self.preprocess = digits_preprocess(size)
        self._section = section
        self._train = WildDigits("train", section.images, size, section.difficulty)
        self._test = WildDigits("test", section.test_images, size, section.difficulty)

    def curriculum(self) -> Curriculum:
        """From a centred white digit on black to the section's difficulty, as the model learns."""
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
    ) -> Iterator[Batch]:
        """See :class:`TrainingData`."""
        if curriculum is not None and curriculum.delay < AHEAD and self._section.workers:
            raise InputError("the curriculum's delay is too short for worker processes", seen=curriculum.delay,
                             wanted=f"at least {AHEAD}")  # fmt: skip
        batches = Batches(
            len(self._train), batch_size, seed, rank=rank, world=world, start_step=start_step, curriculum=curriculum
        )
        yield from loader(_Drawn(self._train), batches, self._section.workers, _normalised, AHEAD)

    def validation(self, batch_size: int, *, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """See :class:`TrainingData`."""
        rows = validation_rows(len(self._test), batch_size, rank, world)
        yield from loader(self._test, rows, self._section.workers, _normalised, AHEAD)

    def calibration(self, count: int) -> np.ndarray:
        """See :class:`TrainingData`."""
        images, _ = _normalised([self._train[int(i)] for i in spaced(len(self._train), count)])
        return images.numpy()


class _Drawn:
    """Wild digits by :class:`Draw`."""

    def __init__(self, images: WildDigits) -> None:
        self._images = images

    def __getitem__(self, draw: Draw) -> tuple[np.ndarray, int]:
        return self._images.render(draw.number, draw.level)


def _normalised(items: list[tuple[np.ndarray, int]]) -> Batch:
    images, labels = stacked(items)
    return images.float().div_(255).sub_(0.5).div_(0.5), labels
