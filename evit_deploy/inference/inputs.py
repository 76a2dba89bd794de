"""Conversion of images in various forms to a model's input."""

import itertools
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from evit_deploy.data.images import COPY_AGAIN, decode_image, image_files, preprocess_image, with_channels
from evit_deploy.data.preprocess import Preprocess
from evit_deploy.errors import InputError

ImageLike: TypeAlias = str | Path | bytes | Image.Image | np.ndarray
"""One image: a path, the bytes of a file, a PIL image, or an array."""
_KINDS = "a path, the bytes of a file, a PIL image, uint8 [H, W, 3] or prepared float32"
_FAR_OFF = 10
"""Prepared values this many times larger than preprocessing can produce are taken as not normalized."""


class Given:
    """One or several images from the user, prepared on demand.

    Args:
        images: One image or several, see :class:`~evit_deploy.inference.model.Model`.
        preprocess: Preprocessing of images.
        shape: Shape of the model's input for one image, ``(C, H, W)``.
        threads: CPU threads to decode and preprocess images. Default: one for each core.

    Raises:
        InputError: The value is not an image, or an array of an ambiguous type or shape.
    """

    def __init__(self, images: Any, preprocess: Preprocess, shape: tuple[int, ...], threads: int | None = None) -> None:
        self._workers = threads or _cores()
        self._preprocess, self._shape = preprocess, shape
        self.single = isinstance(images, str | Path | bytes | bytearray | Image.Image)
        if not self.single and hasattr(images, "__array__"):
            images = _array(images, "the array")
            self.single = images.ndim <= 3
        if self.single:
            images = [images]
        elif not isinstance(images, np.ndarray):
            if not isinstance(images, Iterable):
                raise InputError("not an image", seen=type(images).__name__, wanted=_KINDS)
            images = list(images)
        elif images.dtype == np.float32:
            self._check_prepared(images, images.shape[1:], "the array")
        self._images: Sequence[Any] | np.ndarray = images

    def __len__(self) -> int:
        return len(self._images)

    def name(self, number: int) -> str | None:
        """Returns the file of an image, or ``None`` for an image in memory."""
        image = self._images[number]
        return str(image) if isinstance(image, str | Path) else None

    def prepared(self, start: int, stop: int) -> tuple[np.ndarray, dict[int, InputError]]:
        """Prepares a range of the images in parallel.

        Args:
            start: Number of the first image.
            stop: Number after the last.

        Returns:
            Float32 ``[n, C, H, W]``, and the errors of unusable images by number; these are not in the array.
        """
        part = self._images[start:stop]
        if isinstance(part, np.ndarray) and part.dtype == np.float32:
            return part, {}
        numbers = range(start, stop)
        workers = min(len(part), self._workers)
        if workers > 1 and any(not isinstance(image, np.ndarray) or image.dtype == np.uint8 for image in part):
            with ThreadPoolExecutor(workers) as pool:  # Pillow releases the GIL while it decodes and resizes
                found = list(pool.map(self._one, part, numbers))
        else:
            found = [self._one(image, number) for image, number in zip(part, numbers, strict=True)]
        unusable = {number: one for number, one in zip(numbers, found, strict=True) if isinstance(one, InputError)}
        arrays = [one for one in found if not isinstance(one, InputError)]
        return np.stack(arrays) if arrays else np.empty((0, *self._shape), np.float32), unusable

    def _one(self, image: Any, number: int) -> np.ndarray | InputError:
        """Prepares one image as float32 ``[C, H, W]``, or returns its error."""
        where = f"images[{number}]"
        try:
            if isinstance(image, bytes | bytearray):
                image = decode_image(bytes(image), where, COPY_AGAIN)
            elif isinstance(image, Image.Image):
                image = image.convert("RGB")  # may read the file, since PIL opens lazily
            elif not isinstance(image, str | Path):
                if not hasattr(image, "__array__"):
                    raise InputError("not an image", where=where, seen=type(image).__name__, wanted=_KINDS)
                array = _array(image, where)
                if array.dtype == np.float32:
                    self._check_prepared(array, array.shape, where)
                    return array
                image = _picture(array, where)
            channels = self._shape[0]
            return with_channels(preprocess_image(image, self._preprocess)[None], channels)[0]
        except InputError as error:
            return error
        except (OSError, SyntaxError, ValueError) as error:  # from an image that PIL opened lazily, or an invalid path
            return InputError(f"the image cannot be read: {error}", where=self.name(number) or where, fix=COPY_AGAIN)

    def _check_prepared(self, array: np.ndarray, shape: tuple[int, ...], where: str) -> None:
        if shape != self._shape:
            raise InputError(
                "an array of floats counts as prepared, but this one does not have the shape of the model's input",
                where=where, seen=list(shape), wanted=list(self._shape),
                fix="Give pictures as uint8 [H, W, 3]; the bundle's own preprocessing makes the rest.",
            )  # fmt: skip
        if not array.size:
            return
        settings = self._preprocess
        ends = [abs(end - mean) / std for mean, std in zip(settings.mean, settings.std, strict=True) for end in (0, 1)]
        furthest = float(max(array.max(), -array.min()))
        if not furthest <= _FAR_OFF * max(ends):  # also true for NaN
            raise InputError(
                "an array of floats counts as prepared, but this model's preprocessing cannot produce such values",
                where=where, seen=f"{furthest:.4g}", wanted=f"about -{max(ends):.2g} to {max(ends):.2g}",
                fix="Give pictures as uint8 [H, W, 3], or subtract the mean and divide by the deviation first.",
            )  # fmt: skip


def _cores() -> int:
    """Number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _array(image: Any, where: str) -> np.ndarray:
    try:
        array = np.asarray(image)
    except Exception as error:  # such as for tensors on a GPU or with gradients; depends on the library
        raise InputError(f"this cannot be read as an array: {error}", where=where, wanted=_KINDS) from None
    if array.dtype not in (np.uint8, np.float32):
        raise InputError(
            "an array of this type is ambiguous", where=where, seen=array.dtype.name,
            wanted="uint8 for pictures, float32 for prepared inputs",
        )  # fmt: skip
    if array.dtype == np.uint8 and (array.ndim not in (3, 4) or array.shape[-1] != 3):
        raise InputError(
            "an array of bytes counts as RGB pictures, but this one does not have their shape", where=where,
            seen=list(array.shape), wanted="[H, W, 3] or [n, H, W, 3]",
            fix="Move the colors last, or give Image.fromarray(array), which knows gray and transparent pictures.",
        )  # fmt: skip
    return array


def _picture(array: np.ndarray, where: str) -> Image.Image:
    if array.ndim != 3 or not array.size:
        raise InputError("one image is wanted here", where=where, seen=list(array.shape), wanted="[H, W, 3]")
    return Image.fromarray(array)


def image_paths(paths: Iterable[str | Path]) -> list[Path]:
    """Replaces folders with all images below them, recursively.

    Raises:
        InputError: A folder has no images.
    """
    return list(itertools.chain.from_iterable(image_files(p) if os.path.isdir(p) else [p] for p in map(Path, paths)))
