"""Images on their way into a model: decoding, inputs, sample photographs, unlabeled folders."""

import io
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from evit_deploy.data.preprocess import Preprocess
from evit_deploy.errors import InputError

EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""Endings of the files that count as images in a folder, in lower case."""
COPY_AGAIN = "Copy it here again, or leave it out."
"""What to do about an image that cannot be read."""


def decode_image(content: bytes, where: object, fix: str | None = None) -> Image.Image:
    """Decodes the content of an image file as RGB, to its end.

    Args:
        content: The file's.
        where: What the image is called in messages.
        fix: What to do where it cannot be read.

    Raises:
        InputError: It is no image, or not a whole one.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        text = str(error).split(" <_io")[0]  # not the address of a buffer
        raise InputError(f"the image cannot be read: {text}", where=where, wanted="a whole image", fix=fix) from None


def read_image(path: str | Path) -> Image.Image:
    """Reads an image file as RGB.

    Raises:
        InputError: There is no such file, or it is no image that can be read to its end.
    """
    path = Path(path)
    if not path.exists():
        raise InputError("no such image", where=path)
    if path.is_dir():
        raise InputError("this is a folder", where=path, wanted="an image file")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"the image cannot be read: {error.strerror or error}", where=path, fix=COPY_AGAIN) from None
    return decode_image(content, path, COPY_AGAIN)


def preprocess_image(image: str | Path | Image.Image, preprocess: Preprocess) -> np.ndarray:
    """Puts one image through the deployment preprocessing.

    Args:
        image: A file or an open image; converted to RGB.
        preprocess: What to do with it.

    Returns:
        float32 ``[3, H, W]``.

    Raises:
        InputError: The file cannot be read.
    """
    rgb = image.convert("RGB") if isinstance(image, Image.Image) else read_image(image)
    return preprocess.transform()(rgb).numpy()


def sample_photographs() -> list[Image.Image]:
    """The two photographs that ship with the package, 640 × 427 each: a temple and a flower.

    They are those of scikit-learn; ``photographs/LICENSE`` names who took them.
    """
    folder = Path(__file__).with_name("photographs")
    return [read_image(folder / name) for name in ("china.jpg", "flower.jpg")]


def sample_inputs(preprocess: Preprocess, count: int, channels: int = 3) -> np.ndarray:
    """Inputs that look like photographs: distinct crops and flips of the two sample photographs.

    Always the same for the same arguments, and the first inputs do not depend on how many are asked for.

    Args:
        preprocess: The model's preprocessing.
        count: How many.
        channels: Channels of the model's input; other than 3 are made from the three colors.

    Returns:
        float32 ``[count, channels, H, W]``.

    Raises:
        InputError: ``count`` or ``channels`` is below 1.
    """
    if count < 1 or channels < 1:
        raise InputError("nothing to sample", seen=f"count {count}, channels {channels}", wanted="at least 1 of each")
    photographs = sample_photographs()
    inputs = [preprocess_image(_crop(photographs[i % 2], seed=i), preprocess) for i in range(count)]
    return with_channels(np.stack(inputs), channels)


def with_channels(images: np.ndarray, channels: int) -> np.ndarray:
    """Color images for a model that takes another number of channels: one is their mean, more repeat them."""
    if channels == 1:
        images = images.mean(axis=1, keepdims=True)
    elif channels != 3:
        images = images[:, np.arange(channels) % 3]
    return np.ascontiguousarray(images, dtype=np.float32)


def _crop(photograph: Image.Image, seed: int) -> Image.Image:
    share, left, top, flip = np.random.default_rng(seed).random(4)
    width, height = (round(side * (0.4 + 0.5 * share)) for side in photograph.size)
    left, top = round(left * (photograph.width - width)), round(top * (photograph.height - height))
    crop = photograph.crop((left, top, left + width, top + height))
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip < 0.5 else crop


def image_files(path: Path) -> list[Path]:
    """Image files anywhere below a folder, labeled or not, always in the same order.

    Raises:
        InputError: No such folder, or no images in it.
    """
    if not path.is_dir():
        raise InputError(
            "this is a file" if path.exists() else "no such folder", where=path, wanted="a folder of images"
        )
    files = [file for file in path.rglob("*") if file.suffix.lower() in EXTENSIONS and not file.name.startswith(".")]
    if not files:
        raise InputError("no images here", where=path, wanted=", ".join(EXTENSIONS))
    return sorted(files, key=lambda file: natural(str(file)))


def calibration_images(path: Path, preprocess: Preprocess, channels: int, limit: int) -> np.ndarray:
    """Real images to learn ranges from, in the deployment's preprocessing.

    Args:
        path: Folder with images anywhere below it.
        preprocess: What is done with each.
        channels: Channels of the model's input.
        limit: At most this many, evenly spaced.

    Returns:
        float32 ``[n, channels, H, W]``.

    Raises:
        InputError: See :func:`image_files` and :func:`read_image`.
    """
    files = image_files(path)
    chosen = [files[i] for i in np.unique(np.linspace(0, len(files) - 1, min(limit, len(files))).astype(int))]
    return with_channels(np.stack([preprocess_image(file, preprocess) for file in chosen]), channels)


def image_batches(
    path: Path, preprocess: Preprocess, channels: int, batch_size: int
) -> Iterator[tuple[np.ndarray, None]]:
    """Every image below a folder once, in the deployment's preprocessing; of labels nothing is known.

    Args:
        path: Folder with images anywhere below it.
        preprocess: What is done with each.
        channels: Channels of the model's input.
        batch_size: Images a batch; the last batch may be smaller.

    Yields:
        Images float32 ``[B, channels, H, W]``, and ``None`` in place of their labels.

    Raises:
        InputError: See :func:`image_files` and :func:`read_image`.
    """
    files = image_files(path)
    for start in range(0, len(files), batch_size):
        part = [preprocess_image(file, preprocess) for file in files[start : start + batch_size]]
        yield with_channels(np.stack(part), channels), None


def natural(text: str) -> list[tuple[int, int, str]]:
    """A key to sort names by: "class 10" after "class 9"; pairs that always compare, whatever stands where."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", text) if part]
