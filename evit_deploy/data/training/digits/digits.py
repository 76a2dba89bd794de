"""scikit-learn's digits: training data in memory, and the original images for other data sets."""

from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from evit_deploy.data.images import preprocess_image
from evit_deploy.data.preprocess import Preprocess
from evit_deploy.data.training.curriculum import Curriculum
from evit_deploy.data.training.sampling import Batch, share, spaced, validation_rows, whole_batches
from evit_deploy.data.training.transfer import Transfer
from evit_deploy.environment.requirements import require_extra
from evit_deploy.recipe.sections import DataSection


class DigitsData:
    """scikit-learn's digits in memory, augmented by rotation, scale and shift."""

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
        device: torch.device | str = "cpu",
    ) -> Iterator[tuple[Tensor, ...]]:
        """See :class:`TrainingData`."""
        images, labels = self._train
        transfer = Transfer(device, self.preprocess)
        mine, steps = share(batch_size, rank, world), self.steps_per_epoch(batch_size)
        # One generator for order and augmentation: the set is small enough to draw all earlier steps again.
        generator, step = torch.Generator().manual_seed(seed), 0
        while True:
            order = torch.randperm(len(images), generator=generator)[: steps * batch_size]
            for chosen in order.split(batch_size):
                varied = augment(images[chosen], self._section, generator, self._background)
                if step >= start_step:
                    yield transfer((varied[mine], labels[chosen][mine]))
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


def digits_preprocess(image_size: int) -> Preprocess:
    """Preprocessing of the digits: resizes the complete image, with black as -1 and white as 1."""
    half = (0.5, 0.5, 0.5)
    return Preprocess(size=(image_size, image_size), crop_pct=1.0, mean=half, std=half)


def digits_images() -> tuple[list[Image.Image], np.ndarray]:
    """scikit-learn's 1,797 handwritten digits: 8 × 8 images and their labels, int64.

    Raises:
        MissingRequirement: scikit-learn is not installed.
    """
    require_extra("digits")
    from sklearn.datasets import load_digits

    pixels, labels = (np.asarray(part) for part in load_digits(return_X_y=True))
    shades = np.round(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)  # scikit-learn's values are 0 to 16
    return [Image.fromarray(shade) for shade in shades], np.asarray(labels, np.int64)


def digits_split(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the 1,437 training and 360 test digits; the split is stratified and deterministic."""
    from sklearn.model_selection import train_test_split

    train, test = train_test_split(np.arange(len(labels)), test_size=360, stratify=labels, random_state=0)
    return np.asarray(train), np.asarray(test)


def load_digits_data(
    image_size: int,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Loads the digits as tensors, with a stratified split of 1,437 for training and 360 for testing.

    The preprocessing is the same as for digits that are read from files later.

    Args:
        image_size: Side of the model's input in pixels.

    Returns:
        Training and test set, each with images float32 ``[N, 3, image_size, image_size]`` and labels int64 ``[N]``.
    """
    images, labels = digits_images()
    preprocess = digits_preprocess(image_size)
    tensors = torch.from_numpy(np.stack([preprocess_image(image, preprocess) for image in images]))
    train, test = digits_split(labels)
    targets = torch.from_numpy(labels)
    return (tensors[train], targets[train]), (tensors[test], targets[test])


def augment(images: Tensor, section: DataSection, generator: torch.Generator, background: float) -> Tensor:
    """Rotates, scales and shifts each image by random amounts.

    Args:
        images: ``[B, C, H, W]``.
        section: Section with the maximum ``rotation`` (degrees), ``scale`` and ``shift`` (fractions) in either
            direction.
        generator: Generator of the random numbers.
        background: Value for areas outside the original image.

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
