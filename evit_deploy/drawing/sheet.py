"""Sheets: images in rows, each with the remaining patches after each location; as PNG or SVG."""

import base64
import io
from collections.abc import Sequence
from typing import TypeAlias
from xml.sax.saxutils import escape, quoteattr

import msgspec
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from evit_deploy.drawing.colors import FAINT, INK, PAPER, scale_colors
from evit_deploy.drawing.seen import Seen, title_of
from evit_deploy.drawing.tiles import SIDE, kept_tile, score_tile, tile_of
from evit_deploy.errors import InputError

_GAP = 8
_LINE = 5 / 4
"""Line height, relative to the font size."""


class _Text(msgspec.Struct, frozen=True):
    """A line of text; ``top`` is the upper edge of its font."""

    left: int
    top: int
    text: str
    size: int
    color: tuple[int, int, int] = INK


class _Picture(msgspec.Struct, frozen=True, eq=False):
    """Pixels with a text alternative."""

    left: int
    top: int
    pixels: np.ndarray
    said: str


_Part: TypeAlias = _Text | _Picture


class Sheet:
    """Lays out images and their stages.

    Titles are above the columns. The scores of a stage are below its tile, if any image has scores.

    Args:
        images: Images with the same grid and stages.
        heading: A sentence at the top.
        scores: Name of the scores, for the legend; empty to leave them out.
        side: See :func:`~evit_deploy.drawing.tiles.tile_of`.

    Raises:
        InputError: There are no images, or they differ in their grid or stages.
    """

    def __init__(self, images: Sequence[Seen], heading: str = "", scores: str = "score", side: int = SIDE) -> None:
        if not images:
            raise InputError("there is no image to draw")
        kinds = {
            (one.grid, one.image.shape, tuple((stage.block, stage.patches, stage.does) for stage in one.stages))
            for one in images
        }
        if len(kinds) > 1:
            raise InputError("images of one sheet have the same size and stages")
        self._images, self._side = images, side
        self._high, self._wide = tile_of(images[0], side).shape[:2]
        self._small = max(12, min(self._high, self._wide) // 13)
        self._large = max(14, min(self._high, self._wide) // 11)
        self._step = max(self._wide, 12 * self._small) + _GAP
        self._scores = scores if any(s.scores is not None for one in images for s in one.stages) else ""
        self.width = _GAP + self._step * (1 + len(images[0].stages))
        self.height = 0
        self._parts: list[_Part] = []
        self._lay_out(heading)

    def image(self) -> Image.Image:
        """The sheet as pixels."""
        canvas = Image.new("RGB", (self.width, self.height), PAPER)
        draw = ImageDraw.Draw(canvas)
        for part in self._parts:
            if isinstance(part, _Text):
                draw.text((part.left, part.top), _drawable(part.text), part.color, _font(part.size))
            else:
                canvas.paste(Image.fromarray(part.pixels), (part.left, part.top))
        return canvas

    def png(self) -> bytes:
        """The sheet as the content of a PNG file; deterministic."""
        return _png(self.image())

    def svg(self) -> str:
        """The sheet as an SVG document, with embedded images and text elements."""
        size = f'width="{self.width}" height="{self.height}" viewBox="0 0 {self.width} {self.height}"'
        lines = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" role="img">']
        lines += [f'<rect width="{self.width}" height="{self.height}" fill="{_hex(PAPER)}"/>']
        lines += [_svg_text(part) if isinstance(part, _Text) else _svg_picture(part) for part in self._parts]
        return "\n".join([*lines, "</svg>"]) + "\n"

    # ---- where everything goes

    def _lay_out(self, heading: str) -> None:
        self.height = _GAP
        if heading:
            self._write(_GAP, heading, self._small, self.width - 2 * _GAP)
            self.height += _GAP
        self._titles()
        for number, seen in enumerate(self._images):
            self._row(seen, legend=number == 0)

    def _titles(self) -> None:
        first = self._images[0]
        high, wide = first.image.shape[:2]
        texts = [f"input: {high} x {wide}, {first.grid[0] * first.grid[1]} patches"]
        texts += [title_of(stages) for stages in zip(*(one.stages for one in self._images), strict=True)]
        top = bottom = self.height
        for column, text in enumerate(texts):
            self.height = top
            self._write(_GAP + column * self._step, text, self._large, self._step - _GAP)
            bottom = max(bottom, self.height)
        self.height = bottom + _GAP // 2

    def _row(self, seen: Seen, *, legend: bool) -> None:
        said = " - ".join(text for text in (seen.name, seen.answer) if text)
        if said:
            self._write(_GAP, said, self._small, self.width - 2 * _GAP, FAINT, most=2)
        self._place(0, tile_of(seen, self._side), seen.name or "input")
        for column, stage in enumerate(seen.stages, 1):
            self._place(column, kept_tile(seen, stage, self._side), stage.title)
        self.height += self._high + _GAP
        if self._scores:
            if legend:
                self._legend()
            for column, stage in enumerate(seen.stages, 1):
                if stage.scores is not None:
                    said = f"{self._scores} at block {stage.block}"
                    self._place(column, score_tile(seen, stage, self._side), said)
            self.height += self._high + _GAP
        self.height += _GAP

    def _legend(self) -> None:
        """A color bar next to the first heat map."""
        top = self.height
        size, long = self._small, self._wide // 2
        left = _GAP + self._wide - long
        bar = scale_colors(np.linspace(0, 1, long))[None].repeat(size, axis=0)
        texts = [*_wrapped(self._scores, size, self._wide), "low to high"]
        for text in texts:
            self._parts.append(_Text(left + long - _width(text, size), self.height, text, size, FAINT))
            self.height += round(size * _LINE)
        self._parts.append(_Picture(left, self.height + 2, bar, "colors of the scores, dark for low"))
        self.height = top

    def _place(self, column: int, pixels: np.ndarray, said: str) -> None:
        self._parts.append(_Picture(_GAP + column * self._step, self.height, pixels, said))

    def _write(
        self, left: int, text: str, size: int, width: int, color: tuple[int, int, int] = INK, most: int = 6
    ) -> None:
        """Writes text in at most ``most`` lines of at most ``width`` pixels."""
        lines = _wrapped(_visible(text), size, width)
        if len(lines) > most:
            lines = [*lines[: most - 1], _cut(" ".join(lines[most - 1 :]), size, width)]
        for line in lines:
            self._parts.append(_Text(left, self.height, line, size, color))
            self.height += round(size * _LINE)


def _wrapped(text: str, size: int, width: int) -> list[str]:
    """Wraps text between words; words wider than a line are shortened."""
    lines: list[str] = []
    for word in text.split():
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and _width(joined, size) <= width:
            lines[-1] = joined
        else:
            lines.append(_cut(word, size, width))
    return lines


def _cut(text: str, size: int, width: int) -> str:
    """Shortens a wide text by removing its middle."""
    text = text if len(text) <= 500 else f"{text[:250]}...{text[-250:]}"
    if _width(text, size) <= width:
        return text
    rest = len(text) - 1
    while rest > 2 and _width(f"{text[: rest // 2]}...{text[-(rest - rest // 2) :]}", size) > width:
        rest -= 1
    return f"{text[: rest // 2]}...{text[-(rest - rest // 2) :]}"


_FONTS: dict[int, ImageFont.FreeTypeFont | ImageFont.ImageFont] = {}


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's built-in font, so that a sheet looks the same everywhere."""
    if size not in _FONTS:
        _FONTS[size] = ImageFont.load_default(size)
    return _FONTS[size]


def _width(text: str, size: int) -> int:
    return int(_font(size).getlength(_drawable(text)) + 0.999)


def _drawable(text: str) -> str:
    """Replaces characters that Pillow's font lacks; SVG needs no replacement."""
    return text.encode("latin-1", "replace").decode("latin-1")


def _visible(text: str) -> str:
    """The text on one line with invisible characters replaced, because SVG does not allow control characters."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text)


def _png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG", optimize=True)
    return content.getvalue()


def _hex(color: tuple[int, int, int]) -> str:
    return "#" + "".join(f"{channel:02x}" for channel in color)


def _svg_text(part: _Text) -> str:
    place = f'x="{part.left}" y="{part.top + part.size}" font-size="{part.size}" fill="{_hex(part.color)}"'
    return f"<text {place}>{escape(part.text)}</text>"


def _svg_picture(part: _Picture) -> str:
    content = base64.b64encode(_png(Image.fromarray(part.pixels))).decode()
    place = f'x="{part.left}" y="{part.top}" width="{part.pixels.shape[1]}" height="{part.pixels.shape[0]}"'
    said = quoteattr(_visible(part.said))
    title = escape(_visible(part.said))
    return f'<image {place} aria-label={said} href="data:image/png;base64,{content}"><title>{title}</title></image>'
