"""A cache of decoded images on disk, so that a JPEG is decoded once and not in every pass.

All images are stored as uint8 RGB in one memory-mapped file, with their shorter side limited to a bound. The key of a
cache depends on the images' files and the bound, so that a changed file leads to a new cache.
"""

import hashlib
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from PIL import Image

from evit_deploy.data.sources.source import Source
from evit_deploy.data.training.sampling import loader
from evit_deploy.errors import InputError, StageError
from evit_deploy.files.drafts import draft

PIXELS, INDEX = "pixels.bin", "index.npy"
_FORMAT = 1


class CachedSource:
    """A :class:`evit_deploy.data.sources.source.Source` that reads from a cache; created by :func:`cached`."""

    def __init__(self, source: Source, path: Path) -> None:
        self.classes, self._source, self._path = source.classes, source, path
        self._index = np.load(path / INDEX)  # start, height, width, label; a height of 0 is an unreadable image
        self._pixels: np.ndarray | None = None
        if len(self._index) != len(source) or (path / PIXELS).stat().st_size != _length(self._index):
            raise InputError("the cache of decoded images is damaged", where=path, fix="Delete it.")

    def __len__(self) -> int:
        return len(self._source)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_pixels": None}  # another process maps the file again

    def load(self, index: int) -> tuple[Image.Image, int]:
        """See :class:`evit_deploy.data.sources.source.Source`."""
        start, height, width, label = map(int, self._index[index])
        if not height:
            return self._source.load(index)  # raises the reason, unless it has become readable
        if self._pixels is None:
            self._pixels = np.memmap(self._path / PIXELS, dtype=np.uint8, mode="r")
        pixels = self._pixels[start : start + height * width * 3].reshape(height, width, 3)
        return Image.fromarray(np.ascontiguousarray(pixels)), label

    def name(self, index: int) -> str:
        """See :class:`evit_deploy.data.sources.source.Source`."""
        return self._source.name(index)

    def present(self) -> set[int]:
        """See :class:`evit_deploy.data.sources.source.Source`."""
        return self._source.present()

    def stamp(self) -> list[Any]:
        """See :class:`evit_deploy.data.sources.source.Source`."""
        return self._source.stamp()


def cached(source: Source, folder: Path, side: int, workers: int) -> CachedSource:
    """Opens the cache of a source; creates it if it does not exist.

    Args:
        source: Source of the images.
        folder: Folder of caches, each in its own subfolder; created if it does not exist.
        side: Maximum shorter side of a stored image in pixels; smaller images are not resized.
        workers: Number of decoding processes.

    Raises:
        StageError: It cannot be written; no partial cache is left.
        InputError: The existing cache is damaged.
    """
    stamp = msgspec.json.encode([_FORMAT, side, source.classes, len(source), source.stamp()])
    path = folder / hashlib.sha256(stamp).hexdigest()[:24]
    if not (path / INDEX).is_file():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with draft(folder) as making:
                _write(source, making.folder, side, workers)
                making.publish(making.folder, path, replace=False)
        except OSError as error:
            if not (path / INDEX).is_file():  # otherwise another process has created it
                fix = "Free some space, set data.cache to another folder, or to null."
                raise StageError(f"decoded images cannot be cached: {error}", where=folder, fix=fix) from error
    return CachedSource(source, path)


class _Small:
    """Items of a source as downscaled arrays; ``None`` for unreadable images."""

    def __init__(self, source: Source, side: int) -> None:
        self._source, self._side = source, side

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> tuple[np.ndarray | None, int]:
        try:
            image, label = self._source.load(index)
        except InputError:
            return None, -1
        factor = self._side / min(image.size)
        if factor < 1:
            size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
            image = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
        return np.asarray(image), label


def _write(source: Source, part: Path, side: int, workers: int) -> None:
    rows, start = [], 0
    asked = [list(range(i, min(i + 16, len(source)))) for i in range(0, len(source), 16)]
    with (part / PIXELS).open("wb") as file:
        for items in loader(_Small(source, side), asked, workers, list, 2 * max(1, workers)):
            for pixels, label in items:
                height, width = (0, 0) if pixels is None else pixels.shape[:2]
                rows.append((start, height, width, label))
                if pixels is not None:
                    file.write(pixels.tobytes())
                    start += pixels.nbytes
    np.save(part / INDEX, np.array(rows, dtype=np.int64))


def _length(index: np.ndarray) -> int:
    return int((index[:, 1] * index[:, 2]).sum()) * 3
