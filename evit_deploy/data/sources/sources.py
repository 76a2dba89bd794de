"""Opens labeled images: class folders, tar files, WebDataset shards, Hugging Face datasets.

The names are the same as for timm's ``--dataset`` and ``--data-dir``.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from evit_deploy.data.images import COPY_AGAIN, preprocess_image
from evit_deploy.data.preprocess import Preprocess
from evit_deploy.data.sources.class_folders import Folder
from evit_deploy.data.sources.shards import Shards
from evit_deploy.data.sources.source import Place, Source
from evit_deploy.data.sources.timm_readers import HuggingFace, Tar
from evit_deploy.errors import InputError


def open_source(place: Place, classes: Sequence[str] | None = None) -> Source:
    """Opens labeled images.

    Args:
        place: Location of the images.
        classes: For validation images, the classes of the training images: labels index into these, and a source with
            other classes is an error.

    Raises:
        InputError: There are no images, or their classes do not match.
        MissingRequirement: The package that reads them is not installed.
    """
    kind, _, rest = place.path.partition("/")
    if kind == "hfds":
        return HuggingFace(place, rest, classes)
    if kind == "wds":
        return Shards(place, rest, classes)
    if kind in ("hfids", "tfds", "torch"):
        raise InputError(f"images cannot be read by timm's {kind!r} here", where=place.path,
                         wanted="a folder, FILE.tar, wds/FOLDER or hfds/NAME")  # fmt: skip
    if place.path.endswith(".tar") or _holds_tars(Path(place.path)):
        return Tar(place, classes)
    return Folder(place.path, classes)


def labeled_batches(source: Source, preprocess: Preprocess, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Loads every image of a source once, in order, with the deployment preprocessing.

    Args:
        source: The images.
        preprocess: The preprocessing.
        batch_size: Images per batch; the last batch may be smaller.

    Yields:
        Images float32 ``[B, 3, H, W]`` and labels int64 ``[B]``.

    Raises:
        InputError: An image cannot be read.
    """
    for start in range(0, len(source), batch_size):
        images, labels = [], []
        for index in range(start, min(start + batch_size, len(source))):
            try:
                image, label = source.load(index)
            except InputError as error:
                raise InputError(
                    error.what, where=error.where, seen=error.seen, wanted=error.wanted, fix=error.fix or COPY_AGAIN
                ) from None
            images.append(preprocess_image(image, preprocess))
            labels.append(label)
        yield np.stack(images), np.array(labels, np.int64)


def _holds_tars(path: Path) -> bool:
    return path.is_dir() and any(path.glob("*.tar")) and not any(entry.is_dir() for entry in path.iterdir())
