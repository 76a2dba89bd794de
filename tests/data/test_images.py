"""Images: preprocessing, samples, folders, digits, and what training draws from."""

import itertools

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

from evit_deploy.data.images import preprocess_image, sample_inputs, sample_photographs
from evit_deploy.data.preprocess import Preprocess
from evit_deploy.data.sources.class_folders import Folder
from evit_deploy.data.sources.sources import labeled_batches
from evit_deploy.data.training.digits.digits import DigitsData, augment, load_digits_data
from evit_deploy.data.training.training_data import open_data
from evit_deploy.errors import InputError, RecipeError
from evit_deploy.recipe.sections import DataSection

SMALL = Preprocess(size=(16, 16), crop_pct=1.0)


@pytest.fixture
def folder(tmp_path):
    """Three images in each of three classes, every image of one color: 20 · class + 5 · number."""
    for label, name in enumerate(("class 2", "class 9", "class 10")):
        (tmp_path / name).mkdir()
        for number in range(3):
            shade = 20 * label + 5 * number
            Image.new("RGB", (20, 24), (shade, shade, shade)).save(tmp_path / name / f"{number}.png")
    return tmp_path


def shades(images):
    return [round(float(value)) for value in (images[:, 0, 8, 8] * 0.229 + 0.485) * 255]


@pytest.mark.parametrize("name", ["deit_small_patch16_224", "vit_small_patch16_224", "deit3_small_patch16_384"])
def test_preprocess_is_what_timm_says(name):
    model = timm.create_model(name, embed_dim=12, num_heads=1, depth=1)
    config = resolve_data_config({}, model=model)
    reference = create_transform(**config, is_training=False)
    photograph = sample_photographs()[0]
    found = preprocess_image(photograph, Preprocess.from_model(model))
    np.testing.assert_array_equal(found, reference(photograph).numpy())
    assert found.dtype == np.float32


def test_preprocess_follows_the_size_a_model_was_built_for():
    model = timm.create_model("deit_small_patch16_224", img_size=(64, 32), embed_dim=12, num_heads=1, depth=1)
    assert Preprocess.from_model(model).size == (64, 32)
    assert Preprocess.from_model(model, 48).size == (48, 48)
    assert Preprocess.from_model(model.pretrained_cfg, (48, 80)).size == (48, 80)
    assert Preprocess.from_model({}).mean == (0.485, 0.456, 0.406)


def test_image_files_in_other_modes_become_rgb(tmp_path):
    for mode in ("L", "RGBA", "P", "1", "CMYK", "LA"):
        file = tmp_path / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}"
        Image.new(mode, (20, 20)).save(file)
        assert preprocess_image(file, SMALL).shape == (3, 16, 16)


def test_sample_inputs_are_distinct_steady_and_in_range():
    inputs = sample_inputs(SMALL, 12)
    assert inputs.shape == (12, 3, 16, 16)
    assert inputs.dtype == np.float32
    np.testing.assert_array_equal(inputs[:5], sample_inputs(SMALL, 5))
    for a, b in itertools.combinations(inputs, 2):
        assert np.abs(a - b).max() > 0.1
    assert 0.3 < inputs.std() < 3


def test_sample_inputs_for_other_channels():
    colors = sample_inputs(SMALL, 2)
    np.testing.assert_allclose(sample_inputs(SMALL, 2, channels=1)[:, 0], colors.mean(1), rtol=1e-6)
    np.testing.assert_array_equal(sample_inputs(SMALL, 2, channels=5)[:, 3:], colors[:, :2])


@pytest.mark.parametrize(("count", "channels"), [(0, 3), (-1, 3), (2, 0)])
def test_nothing_to_sample_is_refused(count, channels):
    with pytest.raises(InputError, match="at least 1"):
        sample_inputs(SMALL, count, channels)


def test_folder_keeps_numbers_in_order_and_every_image_once(folder):
    (folder / "class 2" / ".hidden.png").write_text("no image")
    (folder / "class 2" / "notes.txt").write_text("no image")
    found = Folder(folder)
    assert found.classes == ("class 2", "class 9", "class 10")
    batches = list(labeled_batches(found, SMALL, 4))
    assert [len(labels) for _, labels in batches] == [4, 4, 1]
    images, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert shades(images) == [0, 5, 10, 20, 25, 30, 40, 45, 50]
    assert images.dtype == np.float32


def test_folder_finds_nested_images_and_takes_given_classes(folder):
    (folder / "class 9" / "deep").mkdir()
    (folder / "class 9" / "1.png").rename(folder / "class 9" / "deep" / "1.PNG")
    found = Folder(folder, classes=["other", "class 10", "class 9", "class 2"])
    assert len(found) == 9
    assert [found.load(i)[1] for i in range(9)] == [3, 3, 3, 2, 2, 2, 1, 1, 1]


def test_bad_folders_are_refused_with_reason(folder):
    (folder / "file").write_text("")
    (folder / "empty" / "a").mkdir(parents=True)
    for path, word in [("none", "no such folder"), ("file", "this is a file"), ("empty", "1 class folders, no images")]:
        with pytest.raises(InputError, match=word):
            Folder(folder / path)
    with pytest.raises(InputError, match="outside class folders"):
        Folder(folder / "class 9")
    with pytest.raises(InputError, match=r"class 10.*not among the model's"):
        Folder(folder, classes=["class 2", "class 9", "empty"])


def test_unreadable_images_are_named(folder):
    whole = (folder / "class 9" / "1.png").read_bytes()
    for content in (b"", b"no image", whole[: len(whole) // 2]):
        (folder / "class 9" / "1.png").write_bytes(content)
        with pytest.raises(InputError, match=r"1\.png"):
            list(labeled_batches(Folder(folder), SMALL, 4))
    for path, word in [(folder / "none.png", "no such image"), (folder, "this is a folder")]:
        with pytest.raises(InputError, match=word):
            preprocess_image(path, SMALL)


def test_digits_are_split_and_scaled():
    (images, labels), (test_images, test_labels) = load_digits_data(32)
    assert (images.shape, labels.shape) == ((1437, 3, 32, 32), (1437,))
    assert (test_images.shape, test_labels.shape) == ((360, 3, 32, 32), (360,))
    assert (float(images.min()), float(images.max())) == (-1.0, 1.0)
    assert torch.equal(images[:, 0], images[:, 2])
    share = labels.bincount() / len(labels) - test_labels.bincount() / len(test_labels)
    assert share.abs().max() < 0.01
    assert not any(torch.equal(test_images[0], image) for image in images)


def test_digits_training_is_seeded_endless_and_whole():
    data = DigitsData(DataSection(name="digits"), Preprocess(size=(16, 16)))
    assert data.steps_per_epoch(500) == 2
    first, again, other = (list(itertools.islice(data.training(500, seed), 3)) for seed in (1, 1, 2))
    assert all(len(images) == len(labels) == 500 for images, labels in first)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0][0], other[0][0])
    assert sum(len(labels) for _, labels in data.validation(100)) == 360
    with pytest.raises(InputError, match="larger than the training set"):
        next(data.training(1438, 0))


def test_augmentation_without_amounts_changes_nothing_and_shift_moves_background_in():
    images = torch.rand(2, 3, 8, 8) + 1
    still = DataSection(name="digits", rotation=0, scale=0, shift=0)
    generator = torch.Generator().manual_seed(0)
    torch.testing.assert_close(augment(images, still, generator, -1.0), images)
    away = augment(images, DataSection(name="digits", rotation=0, scale=0, shift=1), generator, -1.0)
    assert float(away.min()) == -1.0
    turned = augment(images, DataSection(name="digits", rotation=180, scale=0.5, shift=0), generator, 0.0)
    assert turned.shape == images.shape
    assert not torch.allclose(turned, images, atol=0.05)


@pytest.mark.parametrize("workers", [0, 1])
def test_folder_training_mixes_and_validates(folder, workers):
    section = DataSection(name="folder", train=str(folder), validation=str(folder), workers=workers)
    data = open_data(section, SMALL)
    assert data.classes == ("class 2", "class 9", "class 10")
    assert data.steps_per_epoch(4) == 2
    for images, targets in itertools.islice(data.training(4, seed=0), 3):
        assert (images.shape, images.dtype) == ((4, 3, 16, 16), torch.float32)
        torch.testing.assert_close(targets.sum(1), torch.ones(4))
    images, labels = next(iter(data.validation(16)))
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert shades(images) == [0, 5, 10, 20, 25, 30, 40, 45, 50]  # validation is not varied


def test_folder_training_without_mixing_gives_labels(folder):
    section = DataSection(
        name="folder", train=str(folder), validation=str(folder), workers=0, mixup=0, cutmix=0, auto_augment=None
    )
    _, targets = next(open_data(section, SMALL).training(9, seed=0))
    assert sorted(targets.tolist()) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("policy", ["rand-m10-n4-inc1", "rand-m0-n4", "v0"])
def test_the_strongest_augmentation_leaves_an_image(folder, policy):
    section = DataSection(name="folder", train=str(folder), validation=str(folder), workers=0, mixup=0, cutmix=0,
                          color_jitter=0, random_erasing=0, auto_augment=policy)  # fmt: skip
    data = open_data(section, SMALL)
    for images, _ in itertools.islice(data.training(9, seed=0), 60):  # every operation comes up
        assert images.isfinite().all()


def test_folders_that_are_not_given_are_asked_for(folder):
    for key, section in [
        ("train", DataSection(name="folder")),
        ("validation", DataSection(name="folder", train=str(folder))),
    ]:
        with pytest.raises(RecipeError, match=rf"--set data\.{key}="):
            open_data(section, SMALL)
