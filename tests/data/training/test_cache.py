"""Decoded images on disk: the same images, made once, anew when a file changes, and never half."""

import errno
import os
import pickle

import numpy as np
import pytest
from PIL import Image

from evit_deploy.data.preprocess import Preprocess
from evit_deploy.data.sources.source import Place
from evit_deploy.data.sources.sources import open_source
from evit_deploy.data.training import cache as image_cache
from evit_deploy.data.training.cache import INDEX, PIXELS, cached
from evit_deploy.data.training.training_data import open_data
from evit_deploy.errors import InputError, StageError
from evit_deploy.recipe.sections import DataSection


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    for label, name in enumerate("ab"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(3):
            size = (40 + 10 * number, 30 + 30 * label, 3)
            Image.fromarray(rng.integers(0, 255, size, dtype=np.uint8)).save(
                tmp_path / "images" / name / f"{number}.png"
            )
    return tmp_path / "images"


def source(images):
    return open_source(Place(str(images)))


@pytest.mark.parametrize("workers", [0, 2])
def test_small_images_are_kept_as_they_are_and_large_ones_made_smaller(images, tmp_path, workers):
    plain = source(images)
    whole, small = (cached(plain, tmp_path / "cache", side, workers) for side in (64, 20))
    assert len(whole) == len(plain) == 6
    assert whole.classes == ("a", "b")
    for i in range(6):
        image, label = plain.load(i)
        kept, same = whole.load(i)
        assert label == same == small.load(i)[1]
        np.testing.assert_array_equal(np.asarray(kept), np.asarray(image))
        assert min(small.load(i)[0].size) == 20
        ratio = image.width / image.height
        assert small.load(i)[0].width / small.load(i)[0].height == pytest.approx(ratio, rel=0.03)
        assert whole.name(i) == plain.name(i)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_cache_is_made_once_and_anew_when_a_file_changes(images, tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    cached(source(images), folder, 32, 0)
    written = []
    original = image_cache._write
    monkeypatch.setattr(image_cache, "_write", lambda *a: written.append(1) or original(*a))
    cached(source(images), folder, 32, 0)
    assert not written
    os.utime(images / "a" / "1.png", ns=(1, 1))
    cached(source(images), folder, 32, 0)
    (images / "a" / "2.png").unlink()
    assert len(cached(source(images), folder, 32, 0)) == 5
    assert len(written) == 2


def test_another_process_maps_the_file_itself(images, tmp_path):
    kept = cached(source(images), tmp_path / "cache", 32, 0)
    kept.load(0)
    assert len(pickle.dumps(kept)) < 8000 < (next((tmp_path / "cache").iterdir()) / PIXELS).stat().st_size
    again = pickle.loads(pickle.dumps(kept))
    np.testing.assert_array_equal(np.asarray(again.load(5)[0]), np.asarray(kept.load(5)[0]))


def test_unreadable_images_stay_unreadable_and_are_named(images, tmp_path):
    (images / "b" / "0.png").write_bytes(b"no image")
    kept = cached(source(images), tmp_path / "cache", 32, 0)
    with pytest.raises(InputError, match=r"b/0\.png"):
        kept.load(3)
    assert kept.load(4)[1] == 1


def test_a_cache_that_cannot_be_written_leaves_nothing(images, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(image_cache.np, "save", full)
    with pytest.raises(StageError, match=r"No space left.*data\.cache"):
        cached(source(images), tmp_path / "cache", 32, 0)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_damaged_cache_is_refused(images, tmp_path):
    cached(source(images), tmp_path / "cache", 32, 0)
    (path,) = (tmp_path / "cache").iterdir()
    (path / PIXELS).write_bytes((path / PIXELS).read_bytes()[:-1])
    with pytest.raises(InputError, match=r"damaged.*Delete it"):
        cached(source(images), tmp_path / "cache", 32, 0)
    assert (path / INDEX).is_file()


def test_training_reads_from_the_cache_and_validation_from_the_files(images, tmp_path):
    section = DataSection(
        name="folder", train=str(images), validation=str(images), cache=str(tmp_path / "cache"), cache_size=32,
        workers=0, mixup=0, cutmix=0,
    )  # fmt: skip
    data = open_data(section, Preprocess(size=(16, 16)))
    for file in (images / "a").iterdir():
        file.write_bytes(b"gone")
    batch, labels = next(data.training(6, 0))
    assert batch.shape == (6, 3, 16, 16)
    assert labels.tolist().count(0) == 3
    with pytest.raises(InputError, match="3 images cannot be read"):
        list(data.validation(6))
