"""What may be given as an image: each kind becomes the same input, and what is ambiguous is refused in words."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from evit_deploy.data.images import preprocess_image
from evit_deploy.errors import InputError
from evit_deploy.inference.inputs import Given, image_paths


@pytest.fixture
def picture() -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (70, 120, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def given_of(images, manifest) -> Given:
    return Given(images, manifest.preprocess, manifest.inputs[0].shape[1:])


def prepared(images, manifest) -> np.ndarray:
    given = given_of(images, manifest)
    arrays, unusable = given.prepared(0, len(given))
    assert unusable == {}
    return arrays


def refusal(images, manifest) -> str:
    try:
        given = given_of(images, manifest)
    except InputError as error:
        return str(error)
    return str(given.prepared(0, len(given))[1][0])


def test_every_kind_of_one_picture_is_the_same_input(picture, converted, tmp_path):
    manifest = converted.manifest
    expected = preprocess_image(picture, manifest.preprocess)
    path, content = tmp_path / "a.png", io.BytesIO()
    picture.save(path)
    picture.save(content, "PNG")
    array, read = np.asarray(picture), content.getvalue()
    kinds = [path, str(path), read, bytearray(read), picture, Image.open(path), array]
    kinds += [torch.from_numpy(array.copy()), expected, torch.from_numpy(expected)]
    for kind in kinds:
        assert given_of(kind, manifest).single
        np.testing.assert_array_equal(prepared(kind, manifest), expected[None])
    np.testing.assert_array_equal(prepared(kinds, manifest), np.stack([expected] * len(kinds)))  # mixed
    np.testing.assert_array_equal(prepared((kind for kind in kinds[:3]), manifest), np.stack([expected] * 3))
    several = np.stack([np.asarray(picture)] * 2)
    np.testing.assert_array_equal(prepared(several, manifest), np.stack([expected] * 2))
    assert not given_of(several, manifest).single


def test_a_prepared_batch_is_not_copied(converted):
    batch = np.zeros((5, 3, 96, 96), np.float32)
    assert np.shares_memory(prepared(batch, converted.manifest), batch)


def test_gray_and_transparent_pictures_become_color(converted):
    for mode in ("L", "P", "LA", "RGBA", "1", "CMYK"):
        image = Image.new(mode, (50, 40))
        np.testing.assert_array_equal(
            prepared(image, converted.manifest)[0],
            preprocess_image(image.convert("RGB"), converted.manifest.preprocess),
        )


FLOAT = np.float32


@pytest.mark.parametrize(
    ("image", "hints"),
    [
        (np.zeros((96, 96, 3), FLOAT), ["counts as prepared", "got [96, 96, 3]", "expected [3, 96, 96]", "uint8"]),
        (np.zeros((3, 224, 224), FLOAT), ["got [3, 224, 224]", "expected [3, 96, 96]"]),
        (np.zeros((2, 96, 96, 3), FLOAT), ["got [96, 96, 3]", "expected [3, 96, 96]"]),
        (np.full((3, 96, 96), 128, FLOAT), ["this model's preprocessing cannot produce", "got 128", "about -1 to 1"]),
        (np.full((3, 96, 96), np.nan, FLOAT), ["this model's preprocessing cannot produce", "got nan"]),
        (np.full((3, 96, 96), -np.inf, FLOAT), ["got inf"]),
        (np.zeros((3, 96, 96)), ["of this type is ambiguous", "got float64", "float32 for prepared"]),
        (np.zeros((96, 96, 3), np.int64), ["of this type is ambiguous", "got int64"]),
        (np.zeros((96, 96), np.uint8), ["RGB pictures", "got [96, 96]", "[H, W, 3]", "Image.fromarray"]),
        (np.zeros((96, 96, 4), np.uint8), ["got [96, 96, 4]", "Image.fromarray"]),
        (np.zeros((3, 96, 96), np.uint8), ["got [3, 96, 96]", "colors last"]),
        ([np.zeros((2, 96, 96, 3), np.uint8)], ["images[0]", "one image is wanted", "got [2, 96, 96, 3]"]),
        (np.zeros((0, 96, 3), np.uint8), ["one image is wanted", "got [0, 96, 3]"]),
        (torch.zeros(3, 96, 96, requires_grad=True), ["cannot be read as an array", "requires grad"]),
        (7, ["not an image", "got int", "a path"]),
        (None, ["not an image", "got NoneType"]),
        ([7], ["images[0]", "not an image", "got int"]),
        (b"no image", ["images[0]", "cannot be read", "a whole image"]),
        ("gone.png", ["gone.png: no such image"]),
        ("x" * 5000, ["cannot be read"]),
        ("a\0b", ["a\0b"]),
    ],
    ids=lambda value: None if isinstance(value, list) else "image",
)  # fmt: skip
def test_what_is_ambiguous_or_no_image_is_refused(image, hints, converted):
    said = refusal(image, converted.manifest)
    for hint in hints:
        assert hint in said


def test_a_picture_that_was_opened_and_is_cut_off_is_named(picture, converted, tmp_path):
    path = tmp_path / "cut.png"
    picture.save(path)
    path.write_bytes(path.read_bytes()[:2000])
    for given in (path, path.read_bytes(), Image.open(path)):
        assert "the image cannot be read" in refusal(given, converted.manifest)


def test_those_that_can_be_read_come_in_order(picture, converted):
    given = given_of([picture, b"no", np.asarray(picture), "gone.png", picture], converted.manifest)
    arrays, unusable = given.prepared(1, 5)
    assert arrays.shape == (2, 3, 96, 96)
    assert list(unusable) == [1, 3]
    arrays, unusable = given.prepared(3, 4)
    assert (arrays.shape, list(unusable)) == ((0, 3, 96, 96), [3])


def test_a_folder_stands_for_its_images(picture, tmp_path):
    for name in ("b/10.png", "b/9.png", "a.jpg", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture.save(tmp_path / name, "PNG")
    names = [path.name for path in image_paths([tmp_path / "b", tmp_path / "notes.txt", str(tmp_path)])]
    assert names == ["9.png", "10.png", "notes.txt", "a.jpg", "9.png", "10.png"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no images here"):
        image_paths([tmp_path / "empty"])
