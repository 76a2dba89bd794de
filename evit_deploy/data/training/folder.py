"""Training and validation images on disk: augmentation, mixup, and counting of unreadable images."""

import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import Mixup, create_transform
from torch import Tensor

from evit_deploy.data.preprocess import Preprocess
from evit_deploy.data.sources.class_folders import Folder
from evit_deploy.data.sources.source import Place, Source
from evit_deploy.data.sources.sources import open_source
from evit_deploy.data.training.augmentation import (
    CropAndFlip,
    ErasedTransform,
    FollowedTransform,
    erase_,
    operations_of,
)
from evit_deploy.data.training.cache import cached
from evit_deploy.data.training.curriculum import Curriculum
from evit_deploy.data.training.sampling import (
    AHEAD,
    Batch,
    Batches,
    Draw,
    loader,
    own_randomness,
    spaced,
    stacked,
    validation_rows,
    whole_batches,
)
from evit_deploy.data.training.token_labels import TokenLabelMaps
from evit_deploy.data.training.transfer import Transfer
from evit_deploy.errors import InputError, RecipeError, first_few
from evit_deploy.recipe.sections import DataSection

_LOG = logging.getLogger(__name__)


class FolderData:
    """Images on disk, with the augmentation of the official DeiT and EViT training.

    Augmentation consists of RandAugment, color jitter, flips, random erasing, mixup, CutMix and repeated augmentation.
    See :mod:`evit_deploy.data.sources.sources` for supported storage formats.
    """

    def __init__(self, section: DataSection, preprocess: Preprocess) -> None:
        self._section, self.preprocess = section, preprocess
        self._train = open_source(self._place("train"))
        self.classes = self._train.classes
        self._validation = self._held_out() if section.validation_share else self._opened_validation()
        present = self._validation.present()
        missing = [name for i, name in enumerate(self.classes) if i not in present]
        if missing:
            named, key = first_few(missing, 5), "validation_share" if section.validation_share else "validation"
            _LOG.warning(f"data.{key} has no images of {len(missing)} of the {len(self.classes)} classes: {named}")
        self._maps = self._token_labels()
        if section.cache is not None:
            self._train = cached(self._train, Path(section.cache), section.cache_size, section.workers)
        self._unreadable = {
            "train": Unreadable("data.train", len(self._train), section.max_corrupt),
            "validation": Unreadable("data.validation", len(self._validation), section.max_corrupt),
        }
        transform: Any = create_transform(
            (3, *preprocess.size),
            is_training=True,
            scale=section.crop,
            hflip=section.flip,
            color_jitter=section.color_jitter,
            auto_augment=section.auto_augment,
            interpolation=preprocess.interpolation,
            mean=preprocess.mean,  # geometric augmentations fill with it
            normalize=False,
            separate=self._maps is not None,
        )
        keep_a_bit(transform if self._maps is None else transform[1])
        if self._maps is not None:
            _, varied, final = transform
            crop = CropAndFlip(preprocess.size, section.crop, flip=section.flip, interpolation=preprocess.interpolation)
            transform = FollowedTransform(crop, varied, final)
        self._transform = ErasedTransform(transform, section.random_erasing)

    def _opened_validation(self) -> Source:
        return open_source(self._place("validation"), self.classes)

    def _held_out(self) -> Source:
        """Holds out ``validation_share`` of the training images."""
        share = self._section.validation_share
        assert share is not None
        if not isinstance(self._train, Folder):
            raise RecipeError(
                "a share can only be held out of class folders", where="data.validation_share",
                seen=f"data.train={self._section.train}", wanted="one folder of images a class",
                fix="Set data.validation to separate images.",
            )  # fmt: skip
        images = len(self._train)
        self._train, held = self._train.split(share)
        if not len(held):
            raise RecipeError(
                "no class has a second image to hold out", where="data.validation_share",
                seen=f"{images} images, one per class",
                fix="Add images, or set data.validation to separate images.",
            )  # fmt: skip
        _LOG.info(f"data.validation_share: {len(held)} of {images} images are validated on and not trained on")
        return held

    def _token_labels(self) -> TokenLabelMaps | None:
        root = self._section.token_labels
        if root is None:
            return None
        if not isinstance(self._train, Folder):
            raise RecipeError(
                "token label maps only work with class folders", where="data.train",
                seen=self._section.train, wanted="one folder of images a class",
            )  # fmt: skip
        return TokenLabelMaps(Path(root), self._train.files, len(self.classes))

    def _place(self, key: str) -> Place:
        section = self._section
        path = getattr(section, key)
        if path is None:
            fix = f"Set it in the recipe, or give --set data.{key}=FOLDER."
            if key == "validation":
                fix += (
                    " Where there is no second folder, --set data.validation_share=0.2 holds a fifth of data.train out."
                )
            raise RecipeError("no folder of images given", where=f"data.{key}", fix=fix)
        split = getattr(section, f"{key}_split") or (key if path.startswith("hfds/") else None)
        return Place(path, split, section.input_key, section.target_key, section.num_classes)

    def steps_per_epoch(self, batch_size: int) -> int:
        """See :class:`evit_deploy.data.training.training_data.TrainingData`."""
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
        device: torch.device | str = "cpu",
    ) -> Iterator[tuple[Tensor, ...]]:
        """See :class:`evit_deploy.data.training.training_data.TrainingData`.

        Workers read, crop, flip and augment images; the device normalizes, erases and mixes them. Mixup and CutMix only
        mix images of the same process.
        """
        section = self._section
        batches = Batches(
            len(self._train), batch_size, seed, rank=rank, world=world, start_step=start_step,
            repeats=section.repeated_augmentation,
        )  # fmt: skip
        mix = self._mixup()
        if mix is not None and batch_size // world % 2:
            raise InputError("mixup and CutMix need an even number of images in every process",
                             seen=f"{batch_size} images, {world} processes")  # fmt: skip
        items, transfer = _Readable(self._train, self._transform, maps=self._maps), Transfer(device, self.preprocess)
        loaded = loader(items, batches, section.workers, _with_unreadable, AHEAD, pin=transfer.pins)
        for step, (batch, unreadable) in enumerate(loaded, start_step):
            self._unreadable["train"].add(unreadable)
            # Too many unreadable images in a row to find a replacement.
            if batch is None or len(batch[0]) < batch_size // world:
                raise self._unreadable["train"].error()
            images, labels, erased, *rest = batch
            place = seed, step, batch_size, rank  # batch_size is never a row, so no image has this place
            yield transfer((images, labels, *rest), partial(_finished, erased, mix, place))

    def _mixup(self) -> Mixup | None:
        section = self._section
        if not (section.mixup or section.cutmix):
            return None
        return Mixup(
            mixup_alpha=section.mixup,
            cutmix_alpha=section.cutmix,
            switch_prob=section.mix_switch,
            label_smoothing=0.0,  # applied in the loss
            num_classes=len(self.classes),
        )

    def validation(self, batch_size: int, *, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """See :class:`evit_deploy.data.training.training_data.TrainingData`; skips images that cannot be read."""
        rows = validation_rows(len(self._validation), batch_size, rank, world)
        yield from self._plain(self._validation, rows, "validation")

    def calibration(self, count: int) -> np.ndarray:
        """See :class:`evit_deploy.data.training.training_data.TrainingData`."""
        chosen = spaced(len(self._train), count).tolist()
        rows = [chosen[start : start + 64] for start in range(0, len(chosen), 64)]
        return np.concatenate([images.numpy() for images, *_ in self._plain(self._train, rows, "train")])

    def _plain(self, source: Source, rows: list[list[int]], key: str) -> Iterator[Batch]:
        items = _Readable(source, self.preprocess.transform(), tries=1)
        for batch, unreadable in loader(items, rows, self._section.workers, _with_unreadable, AHEAD):
            self._unreadable[key].add(unreadable)
            if batch is not None:
                images, labels = batch
                yield images, labels


class Unreadable:
    """Counts unreadable images, each once, and raises an error above a limit.

    Args:
        where: The recipe key of the images, for messages.
        images: Number of images.
        limit: Maximum number of unreadable images; below 1, a fraction of all images.
    """

    def __init__(self, where: str, images: int, limit: float) -> None:
        self.found: dict[int, str] = {}
        self._where, self._images = where, images
        self._allowed = int(limit * images) if limit < 1 else int(limit)

    def add(self, unreadable: dict[int, str]) -> None:
        """Adds unreadable images.

        Args:
            unreadable: Image index to reason.

        Raises:
            InputError: There are now too many; the message names the first few.
        """
        new = unreadable.keys() - self.found.keys()
        self.found |= unreadable
        if len(self.found) > self._allowed:
            raise self.error()
        if new and len(new) == len(self.found):
            _LOG.warning(f"{self._where}: left out, and so are others up to {self._allowed}: {unreadable[min(new)]}")

    def error(self) -> InputError:
        """Returns the error for too many unreadable images."""
        count = len(self.found)
        return InputError(
            "an image cannot be read" if count == 1 else f"{count} images cannot be read", where=self._where,
            seen=first_few(self.found.values(), separator="; "), wanted=f"at most {self._allowed} of {self._images}",
            fix="Copy them here again or delete them; data.max_corrupt allows more.",
        )  # fmt: skip


Item = tuple[Any, ...]
"""An image and its label; in training also the rectangle to erase and, with token labels, the image's map and other
arguments of ``crop_token_labels``."""


class _Readable:
    """Transformed items of a source; an unreadable image is replaced by the next readable one.

    Args:
        source: Source of the images.
        transform: Transforms an RGB image to a tensor, or an :class:`ErasedTransform`; with maps, an
            :class:`ErasedTransform` of a :class:`FollowedTransform`.
        tries: Number of images to try; with 1, images are not replaced.
        maps: Token labels; an image without a readable map counts as unreadable.
    """

    def __init__(
        self,
        source: Source,
        transform: Callable[[Any], Any],
        tries: int = 16,
        maps: TokenLabelMaps | None = None,
    ) -> None:
        self._source, self._transform, self._tries, self._maps = source, transform, min(tries, len(source)), maps

    def __getitem__(self, draw: Draw | int) -> tuple[Item | None, dict[int, str]]:
        index, place = (draw, (0,)) if isinstance(draw, int) else (draw.number, draw.place)
        unreadable = {}
        for number in ((index + i) % len(self._source) for i in range(self._tries)):
            try:
                image, label = self._source.load(number)
                patches = None if self._maps is None else self._maps.load(number)
            except InputError as error:
                unreadable[number] = str(error).rstrip(".")
                continue
            with own_randomness(*place):
                made = self._transform(image)
            shown, *rest = made if isinstance(made, tuple) else (made,)
            if patches is not None:
                rest.insert(1, patches)
            return (shown, label, *rest), unreadable
        return None, unreadable


def _with_unreadable(
    items: list[tuple[Item | None, dict[int, str]]],
) -> tuple[tuple[Tensor, ...] | None, dict[int, str]]:
    unreadable: dict[int, str] = {}
    for _, found in items:
        unreadable |= found
    good = [item for item, _ in items if item is not None]
    if not good:
        return None, unreadable
    rest = zip(*(item[2:] for item in good), strict=True)
    return (*stacked([item[:2] for item in good]), *map(torch.stack, rest)), unreadable


def _finished(
    erased: Tensor, mix: Mixup | None, place: tuple[int, ...], images: Tensor, labels: Tensor, *rest: Tensor
) -> tuple[Tensor, ...]:
    """Erases and mixes normalized images on their device; random numbers are drawn on the CPU."""
    erase_(images, erased)
    if mix is not None:
        with own_randomness(*place):
            mixed: Any = mix(images, labels)  # Any, because its annotation also allows arrays
        images, labels = mixed
    return images, labels, *rest


def keep_a_bit(transform: Any) -> None:
    """Limits posterization to at least 1 bit: 0 bits produce a black image in older Pillow, an error since Pillow 13.

    Args:
        transform: timm's transform with AutoAugment or RandAugment among its stages; modified in place.
    """
    for operation in operations_of(transform):
        if operation.name.startswith("Posterize"):
            operation.level_fn = partial(_at_least_one_bit, operation.level_fn)


def _at_least_one_bit(level_fn: Callable[..., tuple[int]], *level: Any) -> tuple[int]:
    return (max(1, level_fn(*level)[0]),)
