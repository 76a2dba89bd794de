"""What every source of labeled images has: a length, images by number, class names."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec
from PIL import Image

from evit_deploy.errors import InputError, first_few


class Source(Protocol):
    """Labeled images by number."""

    classes: tuple[str, ...]
    """Class names; a label is an index into them."""

    def __len__(self) -> int: ...

    def load(self, index: int) -> tuple[Image.Image, int]:
        """An image as RGB, read to its end, and its label. Raises an :class:`InputError` if it cannot be read."""
        ...

    def name(self, index: int) -> str:
        """What an image is called in messages."""
        ...

    def present(self) -> set[int]:
        """Labels that occur, as far as the source tells without reading every image."""
        ...

    def stamp(self) -> list[Any]:
        """What changes when an image does: names, sizes and times of files."""
        ...


class Place(msgspec.Struct, frozen=True):
    """Where labeled images lie.

    Args:
        path: A folder, a ``.tar``, ``wds/<folder>`` or ``hfds/<name or folder>``.
        split: ``hfds``: timm's split; ``wds``: shards in brace notation or a split of ``_info.json``.
        input_key: ``hfds``: the column of images.
        target_key: ``hfds``: the column of labels; ``wds``: a field of the JSON beside an image instead of ``.cls``.
        num_classes: ``wds``: how many classes there are.
    """

    path: str
    split: str | None = None
    input_key: str | None = None
    target_key: str | None = None
    num_classes: int | None = None


def check_classes(own: Sequence[str], classes: Sequence[str], where: str) -> None:
    """Refuses a source with a class that is not among the training images'.

    Raises:
        InputError: It has one; the message names a few.
    """
    unknown = [name for name in own if name not in classes]
    if unknown:
        raise InputError(
            "classes that are not among the training images'", where=where, seen=first_few(unknown, 5),
            wanted=f"some of the {len(classes)}: {first_few(classes, 5)}",
        )  # fmt: skip


def bad_label(label: int, classes: int, where: str) -> InputError:
    """The error for a label that is no index into the classes."""
    return InputError("a label is not among the classes", where=where, seen=label, wanted=f"0 to {classes - 1}",
                      fix="Set data.num_classes to the number of classes.")  # fmt: skip


def file_stamp(path: Path) -> list[Any]:
    """Name, size and time of a file: what changes when its content does."""
    found = path.stat()
    return [str(path.resolve()), found.st_size, found.st_mtime_ns]
