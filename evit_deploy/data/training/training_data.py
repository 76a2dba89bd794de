"""What ``fit`` and ``evaluate`` draw their batches from: digits in memory, digits in the wild, or images on disk.

Every kind guarantees two things (:mod:`evit_deploy.data.training.sampling`): step k draws the same images, varied
in the same way, for one process or several, and for a run that begins at step k.
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
    """Labeled images to train and to evaluate on."""

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
        device: torch.device | str = "cpu",
    ) -> Iterator[tuple[Tensor, ...]]:
        """Endless: images float32 ``[B, 3, H, W]`` and targets, int64 ``[B]`` or probabilities ``[B, classes]``.

        Where there are token labels, four more: maps, boxes, flipped and warps of
        :func:`evit_deploy.data.training.token_labels.crop_token_labels`.

        Args:
            batch_size: Images a step, over all processes; ``B`` is this by ``world``.
            seed: Where order and variation start.
            rank: Which process this is: it draws rows ``rank``, ``rank + world``, ... of every step.
            world: How many processes train.
            start_step: Step to begin at: exactly the batches come that would have followed in an unbroken run.
            curriculum: What :func:`curriculum_of` gave; without one, images are at full difficulty.
            device: Where the batches are to be; see :class:`evit_deploy.data.training.transfer.Transfer`.
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


def open_data(section: DataSection, preprocess: Preprocess) -> TrainingData:
    """Opens what a recipe's ``data`` section names.

    Args:
        section: The section.
        preprocess: The model's preprocessing; the digits use its size only.

    Raises:
        RecipeError: A folder is not given.
        InputError: A folder holds no labeled images; the message has the reason.
        MissingRequirement: A package that reads the images is not installed.
    """
    if section.name == "digits":
        return DigitsData(section, preprocess)
    if section.name == "digits-in-the-wild":
        return WildDigitsData(section, preprocess)
    return FolderData(section, preprocess)


def curriculum_of(data: TrainingData) -> Curriculum | None:
    """A fresh curriculum for a model that begins from nothing, where the data has one."""
    make: Callable[[], Curriculum] | None = getattr(data, "curriculum", None)
    return None if make is None else make()
