"""Sheets: tiles in their places, words that stay words in an SVG, and the same bytes each time."""

import base64
import io
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from evit_deploy.drawing.seen import Seen, Stage, grid_of
from evit_deploy.drawing.sheet import Sheet
from evit_deploy.drawing.tiles import kept_tile, score_tile, tile_of
from evit_deploy.errors import InputError

SVG = "{http://www.w3.org/2000/svg}"


def seen(name: str = "cat.jpg", seed: int = 0, grid=(3, 4), scores: bool = True) -> Seen:
    generator = np.random.default_rng(seed)
    patches = grid[0] * grid[1]
    image = generator.integers(0, 256, (grid[0] * 16, grid[1] * 16, 3), np.uint8)
    stages, alive = [], np.ones(patches, bool)
    for block, count in ((1, 8), (3, 5)):
        values = np.where(alive, generator.random(patches), np.nan).astype(np.float32)
        alive = np.isin(np.arange(patches), np.argsort(-np.nan_to_num(values, nan=-1))[:count])
        groups = np.where(alive, np.arange(patches), np.flatnonzero(~alive)[0]).astype(np.int32)
        stages.append(Stage(block, alive, groups, count, patches, scores=values if scores else None))
    return Seen(image, grid, tuple(stages), name, "tabby 98 %")


def places(sheet: Sheet) -> list[tuple[int, int, np.ndarray]]:
    """Every picture of the SVG: where it is, and its pixels."""
    found = []
    for image in ElementTree.fromstring(sheet.svg()).iter(f"{SVG}image"):
        content = base64.b64decode(image.attrib["href"].removeprefix("data:image/png;base64,"))
        pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
        assert pixels.shape[:2] == (int(image.attrib["height"]), int(image.attrib["width"]))
        found.append((int(image.attrib["x"]), int(image.attrib["y"]), pixels))
    return found


def test_every_tile_is_in_the_png_where_the_svg_has_it():
    images = [seen(), seen("dog.jpg", 1)]
    sheet = Sheet(images, "A heading", "class attention", side=64)
    canvas = np.asarray(sheet.image())
    found = places(sheet)
    for left, top, pixels in found:
        np.testing.assert_array_equal(canvas[top : top + pixels.shape[0], left : left + pixels.shape[1]], pixels)
    wanted = [
        tile
        for one in images
        for tile in (
            tile_of(one, 64),
            *(kept_tile(one, stage, 64) for stage in one.stages),
            *(score_tile(one, stage, 64) for stage in one.stages),
        )
    ]
    tiles = [pixels for _, _, pixels in found if pixels.shape[0] > 20]  # without the legend's bar
    assert len(tiles) == len(wanted) == 10
    for tile, one in zip(tiles, wanted, strict=True):
        np.testing.assert_array_equal(tile, one)


def test_no_tile_or_word_covers_another():
    sheet = Sheet([seen("a name that is far too long for its column " * 20), seen()], "Heading " * 60, "attention")
    boxes = [(x, y, x + p.shape[1], y + p.shape[0]) for x, y, p in places(sheet)]
    texts = ElementTree.fromstring(sheet.svg()).iter(f"{SVG}text")
    for text in texts:
        size = int(text.attrib["font-size"])
        left, bottom = int(text.attrib["x"]), int(text.attrib["y"])
        boxes.append((left, bottom - size, left + 1, bottom))
    for number, one in enumerate(boxes):
        assert 0 <= one[0] < one[2] <= sheet.width
        assert 0 <= one[1] < one[3] <= sheet.height
        for other in boxes[:number]:
            assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]


def test_a_png_has_the_same_bytes_each_time():
    assert Sheet([seen()]).png() == Sheet([seen()]).png()
    assert Sheet([seen()]).png() != Sheet([seen(seed=1)]).png()


def test_titles_say_how_much_is_kept():
    text = " ".join(one.text or "" for one in ElementTree.fromstring(Sheet([seen()]).svg()).iter(f"{SVG}text"))
    assert "input: 48 x 64, 12 patches" in text
    assert "block 1: 8 of 12 patches kept" in text
    assert "cat.jpg - tabby 98 %" in text
    merged = Stage(2, np.ones(12, bool), np.zeros(12, np.int32), 7, 12, "merged")
    assert merged.title == "block 2: 12 patches in 7 tokens"


def test_without_scores_there_is_no_heat_map_and_no_legend():
    sheet = Sheet([seen(scores=False)], scores="class attention")
    assert len(places(sheet)) == 3
    assert "class attention" not in sheet.svg()


@pytest.mark.parametrize(
    "name",
    ['<script>alert("1")</script>&.png', "a\nb\x1b[31m\x00.png", "‮gnp.exe", "写真.jpg", "]]>", "\ud800"],
)
def test_names_with_markup_control_characters_and_other_letters_are_text(name):
    sheet = Sheet([seen(name)], heading=name)
    document = sheet.svg()
    root = ElementTree.fromstring(document.encode("utf-8", "strict"))
    assert {element.tag for element in root.iter()} == {
        f"{SVG}{tag}" for tag in ("svg", "rect", "text", "image", "title")
    }
    said = " ".join(text.text or "" for text in root.iter(f"{SVG}text"))
    assert not re.search(r"[\x00-\x08\x0b-\x1f‮]", document)
    if name.isprintable():
        assert name in said
    assert sheet.png().startswith(b"\x89PNG")


def test_images_that_do_not_belong_together_are_refused():
    with pytest.raises(InputError, match="no image"):
        Sheet([])
    with pytest.raises(InputError, match="same size"):
        Sheet([seen(), seen(grid=(4, 3))])
    with pytest.raises(InputError, match="divide"):
        Seen(np.zeros((30, 32, 3), np.uint8), (4, 4), ())
    with pytest.raises(InputError, match="picture"):
        Seen(np.zeros((32, 32), np.uint8), (4, 4), ())
    stage = Stage(0, np.ones(15, bool), np.zeros(15, np.int32), 15, 15)
    with pytest.raises(InputError, match="do not fit"):
        Seen(np.zeros((32, 32, 3), np.uint8), (4, 4), (stage,))


def test_the_grid_is_the_one_with_the_most_square_patches():
    assert grid_of(224, 224, 196) == (14, 14)
    assert grid_of(518, 518, 1369) == (37, 37)
    assert grid_of(96, 192, 72) == (6, 12)
    with pytest.raises(InputError, match="positions of the patches"):
        grid_of(224, 224, 197)
