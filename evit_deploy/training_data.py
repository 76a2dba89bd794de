"""What ``fit`` and ``evaluate`` draw their batches from: the digits in memory, or folders of images."""

import itertools
import random
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from timm.data import Mixup, create_transform
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from evit_deploy.data import ImageFolder, Preprocess, digits_preprocess, image_folder, load_digits_data
from evit_deploy.errors import InputError, RecipeError
from evit_deploy.recipe import DataSection


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
        self, batch_size: int, seed: int, *, rank: int = 0, world: int = 1, start: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless: images float32 ``[B, 3, H, W]`` and targets, int64 ``[B]`` or probabilities ``[B, classes]``."""
        ...

    def validation(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Every validation image once: images float32 ``[B, 3, H, W]`` and labels int64 ``[B]``."""
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
        InputError: A folder holds no labelled images; the message has the reason.
    """
    return DigitsData(section, preprocess) if section.name == "digits" else FolderData(section, preprocess)


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
        return _whole_batches(len(self._train[0]), batch_size)

    def training(
        self, batch_size: int, seed: int, *, rank: int = 0, world: int = 1, start: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """See :class:`TrainingData`."""
        images, labels = self._train
        whole = batch_size * world
        steps = self.steps_per_epoch(whole)
        for batch in itertools.count(start):
            epoch, place = divmod(batch, steps)
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed + 7919 * epoch))
            chosen = order[place * whole : (place + 1) * whole]
            generator = torch.Generator().manual_seed(seed + 104729 * batch)
            varied = augment(images[chosen], self._section, generator, self._background)
            own = slice(rank * batch_size, (rank + 1) * batch_size)
            yield varied[own], labels[chosen][own]

    def validation(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """See :class:`TrainingData`."""
        images, labels = self._test
        yield from zip(images.split(batch_size), labels.split(batch_size), strict=True)

    def calibration(self, count: int) -> np.ndarray:
        """See :class:`TrainingData`."""
        images = self._train[0]
        return images[np.unique(np.linspace(0, len(images) - 1, min(count, len(images))).astype(int))].numpy()


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


class FolderData:
    """Two folders of images, varied as in the official DeiT and EViT training.

    RandAugment, colour jitter, flips, random erasing, mixup and CutMix. The official training also shows every image
    three times an epoch (repeated augmentation), which needs several processes and is left out.
    """

    def __init__(self, section: DataSection, preprocess: Preprocess) -> None:
        for key in ("train", "validation"):
            if getattr(section, key) is None:
                fix = f"Set it in the recipe, or give --set data.{key}=FOLDER."
                raise RecipeError("no folder of images given", where=f"data.{key}", fix=fix)
        assert section.train is not None
        assert section.validation is not None
        transform: Any = create_transform(
            (3, *preprocess.size),
            is_training=True,
            scale=section.crop,
            color_jitter=section.color_jitter,
            auto_augment=section.auto_augment,
            interpolation=preprocess.interpolation,
            mean=preprocess.mean,
            std=preprocess.std,
            re_prob=section.random_erasing,
            re_mode="pixel",
        )
        self._section, self.preprocess = section, preprocess
        self._train: ImageFolder = image_folder(section.train, preprocess, transform=transform)
        self.classes = self._train.classes
        self._validation = image_folder(section.validation, preprocess, classes=self.classes)

    def steps_per_epoch(self, batch_size: int) -> int:
        """See :class:`TrainingData`."""
        return _whole_batches(len(self._train), batch_size)

    def training(
        self, batch_size: int, seed: int, *, rank: int = 0, world: int = 1, start: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """See :class:`TrainingData`."""
        section = self._section
        self.steps_per_epoch(batch_size)
        mix = None
        if section.mixup > 0 or section.cutmix > 0:
            mix = Mixup(
                mixup_alpha=section.mixup,
                cutmix_alpha=section.cutmix,
                switch_prob=section.mix_switch,
                label_smoothing=0.0,  # the loss smooths
                num_classes=len(self.classes),
            )
        loader = DataLoader(
            self._train,  # type: ignore[arg-type]  # a map-style data set without the base class
            batch_size=batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=section.workers,
            worker_init_fn=_seed_worker,
            persistent_workers=section.workers > 0,
            generator=torch.Generator().manual_seed(seed),
        )
        while True:
            for images, labels in loader:
                yield (images, labels) if mix is None else _mixed(mix, images, labels)

    def validation(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """See :class:`TrainingData`."""
        for images, labels in self._validation.batches(batch_size, workers=self._section.workers):
            yield torch.from_numpy(images), torch.from_numpy(labels)

    def calibration(self, count: int) -> np.ndarray:
        """See :class:`TrainingData`."""
        assert self._section.train is not None
        folder = image_folder(self._section.train, self.preprocess)
        return np.concatenate([images for images, _ in folder.batches(64, limit=count, workers=self._section.workers)])


def _mixed(mix: Mixup, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    mixed: Any = mix(images, labels)  # typed for arrays as well
    return mixed


def _seed_worker(_: int) -> None:
    seed = torch.initial_seed() % 2**32  # PyTorch has given every worker its own
    random.seed(seed)
    np.random.seed(seed)


def _whole_batches(images: int, batch_size: int) -> int:
    if images < batch_size:
        raise InputError("a batch is larger than the training set", seen=batch_size, wanted=f"at most {images}")
    return images // batch_size
