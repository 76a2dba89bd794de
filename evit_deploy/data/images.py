"""Images as model inputs: decoding, preprocessing, sample photographs, unlabeled folders."""

import io
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from evit_deploy.data.preprocess import Preprocess
from evit_deploy.errors import InputError

EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""File name extensions of images in folders, in lower case."""
COPY_AGAIN = "Copy it here again, or leave it out."
"""The fix for an image that cannot be read."""


def decode_image(content: bytes, where: object, fix: str | None = None) -> Image.Image:
    """Decodes a complete image file as RGB.

    Args:
        content: Content of the file.
        where: Name of the image in error messages.
        fix: The fix to show if it cannot be read.

    Raises:
        InputError: It is not an image, or it is truncated.
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
        InputError: There is no such file, or it is not a complete, readable image.
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
    """Applies the deployment preprocessing to one image.

    Args:
        image: A file or an open image; converted to RGB.
        preprocess: The preprocessing.

    Returns:
        float32 ``[3, H, W]``.

    Raises:
        InputError: The file cannot be read.
    """
    rgb = image.convert("RGB") if isinstance(image, Image.Image) else read_image(image)
    return preprocess.transform()(rgb).numpy()


def sample_photographs() -> list[Image.Image]:
    """The two photographs included in the package, 640 × 427 each: a temple and a flower.

    They are scikit-learn's sample images; ``photographs/LICENSE`` names the photographers.
    """
    folder = Path(__file__).with_name("photographs")
    return [read_image(folder / name) for name in ("china.jpg", "flower.jpg")]


def sample_inputs(preprocess: Preprocess, count: int, channels: int = 3) -> np.ndarray:
    """Creates realistic inputs: distinct crops and flips of the two sample photographs.

    The result is deterministic, and the first inputs do not depend on ``count``.

    Args:
        preprocess: The model's preprocessing.
        count: Number of inputs.
        channels: Channels of the model's input; numbers other than 3 are derived from the three colors.

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
    """Converts color images to another number of channels: 1 is the mean of the colors, more repeat them."""
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
    """Finds all image files below a folder, labeled or not, in a deterministic order.

    Raises:
        InputError: The folder does not exist or contains no images.
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
    """Loads real images for calibration, with the deployment preprocessing.

    Args:
        path: Folder with images at any depth.
        preprocess: The preprocessing.
        channels: Channels of the model's input.
        limit: Maximum number of images; they are evenly spaced.

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
    """Loads every image below a folder once, without labels and with the deployment preprocessing.

    Args:
        path: Folder with images at any depth.
        preprocess: The preprocessing.
        channels: Channels of the model's input.
        batch_size: Images per batch; the last batch may be smaller.

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
    """Sort key for names with numbers, so that "class 10" follows "class 9"; any two keys can be compared."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", text) if part]
