"""Image files, as commands read them and as the preprocessing inside Triton does."""

import functools
import io
import struct
import zlib
from pathlib import Path

import msgspec
import numpy as np
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from PIL import Image

from evit_deploy.data.images import preprocess_image
from evit_deploy.data.preprocess import Preprocess
from evit_deploy.errors import InputError
from evit_deploy.serving.server_files.preprocess import ImageError, ImagePreprocess
from tests.fuzz.harness import Format
from tests.fuzz.mutations import NUMBERS, damaged, either

SIZE = 32
TO = Preprocess(size=(SIZE, SIZE), crop_pct=0.9)


def picture() -> Image.Image:
    """Colors with something in them."""
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8)).resize((40, 50))


def written(form: str, mode: str = "RGB", **options: object) -> bytes:
    """A picture in a format."""
    file = io.BytesIO()
    picture().convert(mode).save(file, form, **options)
    return file.getvalue()


@functools.cache
def seeds() -> tuple[bytes, ...]:
    """Valid files in all formats that count as images, and some that do not."""
    return (
        written("JPEG"), written("JPEG", progressive=True), written("JPEG", "L"), written("JPEG", "CMYK"),
        written("PNG"), written("PNG", "RGBA"), written("PNG", "P"), written("PNG", "1"), written("PNG", "I;16"),
        written("BMP"), written("WEBP"), written("WEBP", lossless=True), written("PPM"), written("GIF"), written("ICO"),
        written("TIFF"), written("TIFF", compression="tiff_lzw"), written("TIFF", compression="tiff_deflate"),
        written("TGA"), written("JPEG2000"),
    )  # fmt: skip


@st.composite
def pngs(draw: DrawFn) -> bytes:
    """PNG files of changed chunks with right check sums: sizes, text, profiles and data that unpack to too much."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 40, 50, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(50 * 121))),
        (b"IEND", b""),
    ]
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(("size", "head", "text", "bomb", "order", "chunk")))
        if kind == "size":
            width, height = (draw(st.sampled_from(NUMBERS[:-1])) % 2**32 for _ in range(2))
            chunks[0] = (b"IHDR", struct.pack(">II", width, height) + chunks[0][1][8:])
        elif kind == "head":
            chunks[0] = (b"IHDR", draw(damaged([chunks[0][1]])))
        elif kind == "text":
            name = draw(st.sampled_from((b"zTXt", b"iTXt", b"iCCP", b"tEXt", b"eXIf")))
            packed = zlib.compress(bytes(draw(st.sampled_from((10, 10**6, 5 * 10**7)))))
            chunks.insert(1, (name, b"k\0\0" + packed))
        elif kind == "bomb":
            chunks[-2] = (b"IDAT", zlib.compress(bytes(10**7)))
        elif kind == "order":
            chunks = draw(st.permutations(chunks))
        else:
            chunks.insert(
                1,
                (
                    draw(st.sampled_from((b"PLTE", b"tRNS", b"acTL", b"fcTL", b"fdAT", b"gAMA"))),
                    draw(st.binary(max_size=30)),
                ),
            )
    content = b"\x89PNG\r\n\x1a\n"
    for name, data in chunks:
        content += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return content


@functools.cache
def _served() -> ImagePreprocess:
    return ImagePreprocess(msgspec.to_builtins(TO))


def read_served(path: Path) -> None:
    """The server's own; its error is answered to the client, as an input error is."""
    try:
        made = _served()(path.read_bytes())
    except ImageError as error:
        raise InputError(str(error)) from None
    assert made.shape == (3, SIZE, SIZE)


def read_here(path: Path) -> None:
    """As ``predict`` does."""
    assert preprocess_image(path, TO).shape == (3, SIZE, SIZE)


def _inputs() -> SearchStrategy[bytes]:
    return either(damaged(seeds()), pngs())


FORMATS = (
    Format("image", "image.png", _inputs, read_here),
    Format("image-served", "image.png", _inputs, read_served),
)
