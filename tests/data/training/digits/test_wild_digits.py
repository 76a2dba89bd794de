"""Digits on photographs: what an image follows from, and what it looks like at each level and difficulty."""

import itertools
import re

import numpy as np
import pytest
import torch
from PIL import Image

from evit_deploy.data.images import preprocess_image
from evit_deploy.data.preprocess import Preprocess
from evit_deploy.data.training.digits import wild_digits
from evit_deploy.data.training.digits.wild_digits import (
    TEST_PHOTOGRAPHS,
    TRAIN_PHOTOGRAPHS,
    Difficulty,
    WildDigits,
    photographs,
)
from evit_deploy.data.training.training_data import curriculum_of, open_data
from evit_deploy.environment.requirements import install_line
from evit_deploy.errors import InputError, MissingRequirement
from evit_deploy.recipe.sections import DataSection

LUMA = np.array([0.299, 0.587, 0.114])


def opened(**changes):
    section = {"name": "digits-in-the-wild", "images": 40, "test_images": 10, "workers": 0} | changes
    return open_data(DataSection(**section), Preprocess(size=(32, 32)))


def test_an_image_follows_from_seed_split_and_number_alone():
    few, many = WildDigits("train", 3, 32), WildDigits("train", 10**9, 32)
    backwards = [many.render(i) for i in (2, 1, 0)][::-1]
    for i, (image, label) in enumerate(backwards):
        np.testing.assert_array_equal(image, few[i][0])
        assert label == few[i][1]
    assert image.shape == (3, 32, 32)
    assert image.dtype == np.uint8
    for other in (WildDigits("train", 3, 32, seed=1), WildDigits("test", 3, 32)):
        assert not np.array_equal(other[0][0], few[0][0])
    assert not np.array_equal(few[0][0], few[1][0])
    assert many.render(10**9 - 1)[0].any()


def test_photographs_and_glyphs_of_the_test_images_are_held_out():
    assert not set(TRAIN_PHOTOGRAPHS) & set(TEST_PHOTOGRAPHS)
    assert len(photographs("train")) == 11
    assert len(photographs("test")) == 5
    train, test = (wild_digits._glyphs(split) for split in ("train", "test"))
    assert (len(train[0]), len(test[0])) == (1437, 360)
    shown = {glyph.tobytes() for glyph in train[0]}
    assert sum(glyph.tobytes() in shown for glyph in test[0]) == 0


def test_every_digit_has_its_share():
    data = WildDigits("test", 400, 16)
    counts = np.bincount([data.render(i, 0.0)[1] for i in range(400)], minlength=10)
    assert counts.min() > 20
    assert counts.max() < 65


@pytest.mark.parametrize("size", [64, 224, 33])
def test_level_zero_is_a_centered_white_digit_on_black(size):
    data = WildDigits("train", 8, size, "hard")
    for i in range(8):
        image = data.render(i, 0.0)[0]
        np.testing.assert_array_equal(image[0], image[1])
        rows, columns = np.nonzero(image[0])
        side, edge = 3 / 8 * size, (size - 3 / 8 * size) / 2  # "hard" has no grid
        for places in (rows, columns):
            assert edge - 1 <= places.min()
            assert places.max() <= edge + side + 1
        assert image.max() > 230


def test_levels_lead_from_black_to_the_photograph():
    data = WildDigits("train", 30, 32)
    corner = [np.mean([data.render(i, level)[0][:, :4, :4].mean() for i in range(30)]) for level in (0, 0.3, 0.6, 1)]
    assert corner[0] == 0
    assert corner == sorted(corner)
    assert corner[3] > 50


def changed(data, index, level=1.0):
    """Where an image differs from one with another digit's mask of nothing: the digit's own place."""
    shown = data.render(index, level)[0].astype(int)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wild_digits, "_mask", lambda glyph, side, angle: np.zeros((side, side), np.float32))
        bare = data.render(index, level)[0].astype(int)
    return shown, bare, np.nonzero(np.abs(shown - bare).max(0) > 2)


def noted(name, level=1.0):
    """Places and sides of 80 digits."""
    data, places, sides = WildDigits("train", 80, 64, name), [], []
    with pytest.MonkeyPatch.context() as patch:
        place, mask = data._place, wild_digits._mask
        patch.setattr(data, "_place", lambda *a: places.append(place(*a)) or places[-1])
        patch.setattr(wild_digits, "_mask", lambda glyph, side, angle: sides.append(side) or mask(glyph, side, angle))
        for i in range(80):
            data.render(i, level)
    return set(places), (min(sides), max(sides))


@pytest.mark.parametrize(("name", "smallest"), [("easy", 24), ("medium", 24), ("hard", 12)])
def test_easy_digits_begin_on_the_grid_and_only_hard_ones_vary_in_size(name, smallest):
    places, sides = noted(name)
    assert (places <= {0, 8, 16, 24, 32, 40}) == (name == "easy")
    assert min(places) < 8
    assert max(places) > 36
    assert sides == (smallest, 24)


def test_easy_digits_stay_on_the_grid_at_every_level_and_spread_out():
    assert [sorted(noted("easy", level)[0]) for level in (0.0, 0.5, 1.0)] == [
        [16],
        [8, 16, 24, 32],
        [0, 8, 16, 24, 32, 40],
    ]


def test_contrast_to_what_lies_behind_is_kept():
    rng = np.random.default_rng(0)
    for behind, contrast, draw in itertools.product((0.0, 0.2, 0.5, 0.9, 1.0), (0.25, 0.5, 1.0), (0.0, 0.4, 0.99)):
        color = wild_digits._color(behind, contrast, 1.0, draw, rng.random(3))
        luma = float(color @ LUMA)
        possible = max(behind, 1 - behind)
        assert abs(luma - behind) >= min(contrast, possible) - 1e-5
        assert color.min() >= -1e-6
        assert color.max() <= 1 + 1e-6
    data = WildDigits("test", 20, 64, Difficulty(opacity=1.0, contrast=0.4))
    for i in range(20):
        shown, bare, (rows, columns) = changed(data, i)
        difference = np.abs(shown - bare)[:, rows, columns].max()
        assert difference > 0.3 * 255


def test_most_of_an_image_is_background():
    data = WildDigits("test", 30, 64)
    covered = []
    for i in range(30):
        _, _, (rows, columns) = changed(data, i)
        covered.append(len(set(zip(rows // 8, columns // 8, strict=True))))
    assert max(covered) <= 9  # of 64 patches
    assert np.mean(covered) > 3


@pytest.mark.parametrize("bad", [("train", 1, 64, "harder"), ("train", 0, 64), ("train", 1, 8)])
def test_what_cannot_be_made_is_refused(bad):
    with pytest.raises(InputError):
        WildDigits(*bad)


def test_missing_photographs_name_the_extra(monkeypatch):
    monkeypatch.setattr(wild_digits.importlib.util, "find_spec", lambda name: None)
    wild_digits._photographs.cache_clear()
    with pytest.raises(MissingRequirement, match=re.escape(install_line("wild"))):
        photographs("test")


def test_a_photograph_from_a_file_goes_the_same_way_into_the_model():
    data = opened()
    (images, labels), *_ = data.validation(10)
    pixels, label = WildDigits("test", 10, 32)[3]
    again = preprocess_image(Image.fromarray(pixels.transpose(1, 2, 0)), data.preprocess)
    torch.testing.assert_close(images[3], torch.from_numpy(again))
    assert labels[3] == label


@pytest.mark.parametrize("workers", [0, 2])
def test_training_is_the_same_for_any_number_of_workers_and_follows_the_curriculum(workers):
    data, found = opened(workers=workers, curriculum_threshold=0.0, curriculum_rate=0.1), []
    curriculum = curriculum_of(data)
    assert curriculum is not None
    batches = data.training(8, 3, curriculum=curriculum)
    for _ in range(13):
        images, _ = next(batches)
        found.append(images)
        curriculum.update(0.5)
    expected, again = opened(workers=0, curriculum_threshold=0.0, curriculum_rate=0.1), []
    plain = curriculum_of(expected)
    batches = expected.training(8, 3, curriculum=plain)
    for _ in range(13):
        again.append(next(batches)[0])
        plain.update(0.5)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    black = [float((images == -1).float().mean()) for images in found]
    assert min(black[:9]) > 0.85  # the first updates take effect after the delay
    assert black[12] < 0.6


def test_a_resumed_run_sees_what_would_have_followed():
    data = opened(curriculum_threshold=0.0, curriculum_rate=0.05)
    whole, state = curriculum_of(data), None
    batches, seen = data.training(8, 0, curriculum=whole), []
    for step in range(14):
        if step == 10:
            state = whole.state_dict()
        seen.append(next(batches)[0])
        whole.update(1.0)
    second = curriculum_of(data)
    second.load_state_dict(state)
    batches = data.training(8, 0, start_step=10, curriculum=second)
    for step in range(10, 14):
        assert torch.equal(next(batches)[0], seen[step])
        second.update(1.0)


def test_without_a_curriculum_images_are_at_full_difficulty():
    data = opened()
    images, labels = next(data.training(8, 0))
    assert images.shape == (8, 3, 32, 32)
    assert labels.dtype == torch.int64
    assert float((images == -1).float().mean()) < 0.3
    assert data.calibration(7).shape == (7, 3, 32, 32)
    assert curriculum_of(open_data(DataSection(name="digits"), Preprocess(size=(16, 16)))) is None
