"""The data of ``fit`` and ``evaluate``: digits in memory, digits in the wild, or images on disk.

For every kind of data, step k draws the same images with the same augmentation, for any number of processes and for a
run that starts at step k (:mod:`evit_deploy.data.training.sampling`).
"""

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from evit_deploy.data.preprocess import Preprocess
from evit_deploy.data.training.curriculum import Curriculum
from evit_deploy.data.training.digits.digits import DigitsData
from evit_deploy.data.training.digits.wild_digits import WildDigitsData
from evit_deploy.data.training.folder import FolderData
from evit_deploy.data.training.sampling import Batch
from evit_deploy.recipe.sections import DataSection


class TrainingData(Protocol):
    """Labeled images for training and evaluation."""

    classes: tuple[str, ...]
    """Class names; a label is an index into them."""
    preprocess: Preprocess
    """Preprocessing of an image for the model, here and in deployment."""

    def steps_per_epoch(self, batch_size: int) -> int:
        """Number of full batches in one pass."""
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
        device: torch.device | str = "cpu",
    ) -> Iterator[tuple[Tensor, ...]]:
        """Draws an endless sequence of batches.

        Each has images float32 ``[B, 3, H, W]`` and targets, int64 ``[B]`` or probabilities ``[B, classes]``. With
        token labels, it also has the maps, boxes, flipped and warps for
        :func:`evit_deploy.data.training.token_labels.crop_token_labels`.

        Args:
            batch_size: Images per step over all processes; ``B`` is ``batch_size / world``.
            seed: Seed of order and augmentation.
            rank: Index of this process, which draws rows ``rank``, ``rank + world``, ... of every step.
            world: Number of processes.
            start_step: First step; the batches are the same as in an uninterrupted run from this step on.
            curriculum: Result of :func:`curriculum_of`; without one, images have full difficulty.
            device: Device of the batches; see :class:`evit_deploy.data.training.transfer.Transfer`.
        """
        ...

    def validation(self, batch_size: int, *, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """Loads every validation image once: images float32 ``[B, 3, H, W]`` and labels int64 ``[B]``.

        The images are divided among the processes without repetition, and some processes may get fewer than others.
        Sum the counts of correct predictions and of images over the processes; do not average their accuracies.
        """
        ...

    def calibration(self, count: int) -> np.ndarray:
        """Loads at most ``count`` evenly spaced training images without augmentation, float32 ``[n, 3, H, W]``."""
        ...


def open_data(section: DataSection, preprocess: Preprocess) -> TrainingData:
    """Opens the data of a recipe's ``data`` section.

    Args:
        section: The section.
        preprocess: The model's preprocessing; the digits only use its size.

    Raises:
        RecipeError: A folder is missing in the section.
        InputError: A folder contains no labeled images; the message has the reason.
        MissingRequirement: A package that reads the images is not installed.
    """
    if section.name == "digits":
        return DigitsData(section, preprocess)
    if section.name == "digits-in-the-wild":
        return WildDigitsData(section, preprocess)
    return FolderData(section, preprocess)


def curriculum_of(data: TrainingData) -> Curriculum | None:
    """Returns a new curriculum for a model that is trained from scratch, or ``None`` if the data has none."""
    make: Callable[[], Curriculum] | None = getattr(data, "curriculum", None)
    return None if make is None else make()
