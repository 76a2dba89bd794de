"""The interface of a source of labeled images: length, images by index, class names."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec
from PIL import Image

from evit_deploy.errors import InputError, first_few


class Source(Protocol):
    """Labeled images by index."""

    classes: tuple[str, ...]
    """Class names; a label is an index into them."""

    def __len__(self) -> int: ...

    def load(self, index: int) -> tuple[Image.Image, int]:
        """Returns a completely decoded RGB image and its label.

        Raises:
            InputError: The image cannot be read.
        """
        ...

    def name(self, index: int) -> str:
        """Name of an image in messages."""
        ...

    def present(self) -> set[int]:
        """Labels that occur, as far as the source knows without reading every image."""
        ...

    def stamp(self) -> list[Any]:
        """A value that changes when an image changes: names, sizes and modification times of files."""
        ...


class Place(msgspec.Struct, frozen=True):
    """Location of labeled images.

    Args:
        path: A folder, a ``.tar``, ``wds/<folder>`` or ``hfds/<name or folder>``.
        split: ``hfds``: timm's split; ``wds``: shards in brace notation or a split of ``_info.json``.
        input_key: ``hfds``: the image column.
        target_key: ``hfds``: the label column; ``wds``: a field in the image's JSON member, used instead of ``.cls``.
        num_classes: ``wds``: number of classes.
    """

    path: str
    split: str | None = None
    input_key: str | None = None
    target_key: str | None = None
    num_classes: int | None = None


def check_classes(own: Sequence[str], classes: Sequence[str], where: str) -> None:
    """Checks that a source has no classes other than the training images'.

    Raises:
        InputError: It has other classes; the message names a few.
    """
    unknown = [name for name in own if name not in classes]
    if unknown:
        raise InputError(
            "classes that are not among the training images'", where=where, seen=first_few(unknown, 5),
            wanted=f"some of the {len(classes)}: {first_few(classes, 5)}",
        )  # fmt: skip


def bad_label(label: int, classes: int, where: str) -> InputError:
    """Returns the error for a label that is not an index into the classes."""
    return InputError("a label is not among the classes", where=where, seen=label, wanted=f"0 to {classes - 1}",
                      fix="Set data.num_classes to the number of classes.")  # fmt: skip


def file_stamp(path: Path) -> list[Any]:
    """Path, size and modification time of a file, which change with its content."""
    found = path.stat()
    return [str(path.resolve()), found.st_size, found.st_mtime_ns]
