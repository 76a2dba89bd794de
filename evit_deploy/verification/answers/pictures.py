"""Images on which models are compared: class folders that match the model, or images without labels."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np

from evit_deploy.bundle.manifest import Manifest
from evit_deploy.data.images import image_batches, image_files, with_channels
from evit_deploy.data.sources.class_folders import Folder, class_folders, is_labeled
from evit_deploy.data.sources.sources import labeled_batches
from evit_deploy.errors import InputError, first_few
from evit_deploy.export.card import LOGITS


class Pictures(msgspec.Struct, frozen=True):
    """Images to run a model on.

    Args:
        path: Folder of the images.
        folder: The same images as class folders labeled with the model's classes; ``None`` without labels.
        notes: How class folders were matched to the model's classes if their names do not determine it.
    """

    path: Path
    folder: Folder | None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.folder if self.folder is not None else image_files(self.path))

    def batches(self, manifest: Manifest, size: int) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """Yields every image once, in order, preprocessed for a model.

        Args:
            manifest: Manifest of the model.
            size: Images per batch; the last batch may be smaller.

        Yields:
            Images float32 ``[B, channels, H, W]`` and labels int64 ``[B]``, or ``None`` without labels.

        Raises:
            InputError: An image cannot be read.
        """
        channels = int(manifest.inputs[0].shape[1] or 3)
        if self.folder is None:
            yield from image_batches(self.path, manifest.preprocess, channels, size)
        else:
            for images, labels in labeled_batches(self.folder, manifest.preprocess, size):
                yield with_channels(images, channels), labels


def embeds(manifest: Manifest) -> bool:
    """Whether a model returns an embedding instead of logits."""
    return manifest.answer != LOGITS or manifest.model_args.get("num_classes") == 0


def check_images(data: Path) -> None:
    """Checks, before the model is known, that a folder contains usable images.

    Raises:
        InputError: See :func:`pictures_of`.
    """
    if is_labeled(data):
        Folder(data)


def pictures_of(data: Path, manifest: Manifest) -> Pictures:
    """Finds the images of a folder with or without class folders.

    Class folders are matched to the model's classes by name if all names are among its labels, else by order. A model
    without classes accepts any class folders.

    Raises:
        InputError: The folder does not exist, contains no images, contains ``train`` and ``val`` instead of classes, or
            its class folders do not match the model.
    """
    classes = None if embeds(manifest) else int(manifest.outputs[0].shape[-1] or 0)
    return pictures_for(data, manifest.labels, classes)


def pictures_for(data: Path, labels: Sequence[str] | None, classes: int | None) -> Pictures:
    """Like :func:`pictures_of`, without a manifest.

    Args:
        data: The folder.
        labels: Names of the model's classes, if known.
        classes: Number of classes; 0 if unknown, ``None`` for a model without classes.

    Raises:
        InputError: See :func:`pictures_of`.
    """
    if not is_labeled(data):
        return Pictures(data, None)
    if classes is None:
        return Pictures(data, Folder(data))
    names = class_folders(data) if data.is_dir() else []
    if labels is not None and names and not _unlike(names, labels):
        return Pictures(data, Folder(data, labels))
    folder = Folder(data)
    return Pictures(data, folder, _in_order(data, folder.classes, labels, classes or len(folder.classes)))


def _in_order(data: Path, names: tuple[str, ...], labels: Sequence[str] | None, classes: int) -> tuple[str, ...]:
    """Notes for class folders that are matched to the model's classes by order.

    Raises:
        InputError: There are more folders than classes, or fewer with names that are not among the model's labels.
    """
    if len(names) > classes:
        raise InputError(
            "more class folders than the model has classes", where=data, seen=len(names), wanted=f"at most {classes}"
        )
    if len(names) == classes:
        first = next(
            (i for i, pair in enumerate(zip(names, labels or names, strict=False)) if pair[0] != pair[1]), None
        )
        if labels is None or first is None:
            return ()
        return (
            f"The {classes} class folders of {data.name} are not called as the model's labels, and were taken for its "
            f"classes in order: {names[first]!r} for {labels[first]!r}.",
        )
    if labels is not None:
        strange = first_few(_unlike(names, labels), 5)
        raise InputError(
            "these class folders are not among the model's labels", where=data, seen=strange,
            wanted=f"some of its {classes} labels, such as {first_few(labels, 5)}, or a folder for each",
            fix="Call the folders as the labels, or give the images without class folders for agreement alone.",
        )  # fmt: skip
    return (
        f"The model has {classes} classes without names, and {data.name} has {len(names)} class folders: they were "
        f"taken for its first {len(names)}.",
    )


def _unlike(names: Sequence[str], labels: Sequence[str]) -> list[str]:
    """Names that are not a label, or that several classes share (ImageNet has two classes named crane)."""
    counts = Counter(labels)
    return [name for name in names if counts[name] != 1]
