"""Class folders: images on disk as ``<class>/**/<image>``.

The files are listed here because timm's reader names classes after the innermost folder and silently drops unknown
classes.
"""

import copy
import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from evit_deploy.data.images import EXTENSIONS, decode_image, natural
from evit_deploy.data.sources.source import file_stamp
from evit_deploy.errors import InputError, first_few

SPLITS = ("val", "valid", "validation", "eval", "test", "testing", "train", "training")
"""Names of data set splits, in lower case: such folders contain classes and are not classes themselves."""


def class_folders(root: Path) -> list[str]:
    """Names of a folder's subfolders in natural order, without hidden ones."""
    return sorted((e.name for e in root.iterdir() if e.is_dir() and not e.name.startswith(".")), key=natural)


def is_labeled(root: Path) -> bool:
    """Whether to read a folder as class folders: false if it contains images and none of its subfolders does."""
    if not root.is_dir():
        return True  # Folder raises the error
    inside = any(_is_image(file) for name in class_folders(root) for file in (root / name).rglob("*"))
    return inside or not any(_is_image(file) for file in root.iterdir())


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in EXTENSIONS and not file.name.startswith(".")


def _refuse_splits(root: Path, names: Sequence[str]) -> None:
    """Rejects the parent folder of ``train/`` and ``val/``, which would be read as two classes."""
    splits = sorted((n for n in names if n.lower() in SPLITS), key=lambda name: SPLITS.index(name.lower()))
    holding = [name for name in splits if any(entry.is_dir() for entry in (root / name).iterdir())]
    alone = len(splits) == len(names) and (len(splits) > 1 or bool(holding))
    if len(holding) < 2 and not (splits and alone):
        return
    raise InputError(
        "this folder holds the parts of a data set, not its classes", where=root, seen=", ".join(splits),
        wanted="one folder of images a class",
        fix="Give one of them: " + " or ".join(str(root / name) for name in splits) + ".",
    )  # fmt: skip


class Folder:
    """Images on disk, ``<class>/**/<image>``.

    Args:
        path: A folder with one subfolder per class.
        classes: Class names; by default, the names of the subfolders in natural order.

    Raises:
        InputError: The path does not exist, is a file, contains no images in class folders, contains ``train`` and
            ``val`` instead of classes, or has a class that is not in ``classes``.
    """

    def __init__(self, path: str | Path, classes: Sequence[str] | None = None) -> None:
        root = Path(path)
        if not root.exists():
            raise InputError("no such folder", where=root)
        if not root.is_dir():
            raise InputError("this is a file", where=root, wanted="a folder with one folder of images a class")
        found = class_folders(root)
        _refuse_splits(root, found)
        self.classes = tuple(found if classes is None else classes)
        numbers = {name: i for i, name in enumerate(self.classes)}
        unknown = next((name for name in found if name not in numbers), None)
        if unknown is not None:
            raise InputError(
                "this class is not among the model's",
                where=root / unknown,
                wanted=f"one of {first_few(self.classes, 8)}",
            )
        self._root = root
        self._files = tuple(
            (file, numbers[name])
            for name in found
            for file in sorted((root / name).rglob("*"), key=lambda file: natural(str(file)))
            if _is_image(file)
        )
        if not self._files:
            loose = any(map(_is_image, root.iterdir()))
            seen = "images outside class folders" if loose else f"{len(found)} class folders, no images"
            raise InputError("no labeled images here", where=root, seen=seen, wanted="<class>/<image> files")
        filled = self.present()
        empty = next((name for name in found if numbers[name] not in filled), None)
        if empty is not None:
            fix = "Put images into it or delete it."
            raise InputError("this class folder holds no images", where=root / empty, fix=fix)

    @property
    def files(self) -> tuple[Path, ...]:
        """The file of every image, by index."""
        return tuple(path for path, _ in self._files)

    @property
    def labels(self) -> tuple[int, ...]:
        """The label of every image, by index."""
        return tuple(label for _, label in self._files)

    def __len__(self) -> int:
        return len(self._files)

    def split(self, share: float) -> "tuple[Folder, Folder]":
        """Splits off a fraction of each class; each part gets at least one image of a class with two or more.

        The images are selected by the hash of their class and name, so that the same images are held out every time and
        on every machine, and adding or deleting an image moves few others.

        Args:
            share: Fraction of each class, above 0 and below 1; rounded to a number of images.

        Returns:
            The remaining images, and those split off.
        """
        held: set[int] = set()
        for _, group in itertools.groupby(range(len(self)), lambda index: self._files[index][1]):
            numbers = sorted(group, key=self._place)
            held.update(numbers[: min(max(round(share * len(numbers)), 1), len(numbers) - 1)])
        return self._only(set(range(len(self))) - held), self._only(held)

    def _place(self, index: int) -> bytes:
        return hashlib.sha256(self._files[index][0].relative_to(self._root).as_posix().encode()).digest()

    def _only(self, numbers: set[int]) -> "Folder":
        part = copy.copy(self)
        part._files = tuple(file for index, file in enumerate(self._files) if index in numbers)
        return part

    def load(self, index: int) -> tuple[Image.Image, int]:
        """See :class:`Source`."""
        path, label = self._files[index]
        try:
            return decode_image(path.read_bytes(), path), label
        except OSError as error:
            raise InputError(f"the image cannot be read: {error.strerror or error}", where=path) from None

    def name(self, index: int) -> str:
        """See :class:`Source`."""
        return str(self._files[index][0])

    def present(self) -> set[int]:
        """See :class:`Source`."""
        return {label for _, label in self._files}

    def stamp(self) -> list[Any]:
        """See :class:`Source`."""
        return [file_stamp(path) for path, _ in self._files]
