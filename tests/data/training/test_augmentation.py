"""What is added to timm's augmentation: erasing in two halves, where an image is read and where it is normalized."""

import itertools

import pytest
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing

from evit_deploy.data.preprocess import Preprocess
from evit_deploy.data.training.augmentation import ErasedTransform, erase_
from evit_deploy.data.training.sampling import own_randomness
from evit_deploy.data.training.training_data import open_data
from tests.support.labeled_images import data_section
from tests.support.training_devices import DEVICES, available

SIDE = 24


def rectangles(probability: float, count: int) -> torch.Tensor:
    transform, found = ErasedTransform(lambda image: image, probability), []
    for number in range(count):
        with own_randomness(7, number):
            found.append(transform(torch.zeros(3, SIDE, SIDE))[1])
    return torch.stack(found)


def test_rectangles_are_those_that_timm_erases():
    erasing, found = RandomErasing(0.5, mode="pixel", device="cpu"), rectangles(0.5, 40)
    for number, (_, top, left, height, width) in enumerate(found.tolist()):
        with own_randomness(7, number):
            wanted = erasing(torch.zeros(3, SIDE, SIDE)).abs().amax(0) > 0
        erased = torch.zeros(SIDE, SIDE, dtype=torch.bool)
        erased[top : top + height, left : left + width] = True
        assert torch.equal(erased, wanted)
    assert 8 < int((found[:, 3] > 0).sum()) < 32  # some are left whole
    assert len(set(found[found[:, 3] > 0, 0].tolist())) == int((found[:, 3] > 0).sum())  # each with its own seed


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_erased_is_noise_from_the_image_s_own_seed(device):
    asked = torch.tensor([[5, 2, 3, 10, 12], [0, 0, 0, 0, 0], [5, 0, 0, 10, 12], [6, 2, 3, 10, 12]])
    images = erase_(torch.full((4, 3, SIDE, SIDE), 9.0, device=available(device)), asked).cpu()
    noise = images[0, :, 2:12, 3:15]
    assert abs(float(noise.mean())) < 0.2
    assert 0.85 < float(noise.std()) < 1.15
    assert int((images[0] == 9).sum()) == 3 * (SIDE * SIDE - 120)
    assert bool((images[1] == 9).all())
    assert torch.equal(images[2, :, :10, :12], noise)  # wherever the image stands in a batch, and the rectangle in it
    assert not torch.equal(images[3, :, 2:12, 3:15], noise)


@pytest.mark.parametrize("policy", [None, "rand-m9-mstd0.5-inc1"])
def test_training_images_are_timm_s_to_the_bit(policy, labeled):
    """Cropped and varied as bytes, normalized later: the same as timm's transform, which does it at once."""
    section = data_section(labeled, token_labels=None, auto_augment=policy, color_jitter=0.4)
    how = Preprocess(size=(SIDE, SIDE))
    reference = create_transform((3, SIDE, SIDE), is_training=True, scale=section.crop, color_jitter=0.4,
                                 auto_augment=policy, interpolation="bicubic")  # fmt: skip
    files = sorted((labeled / "train").glob("*/*.JPEG"))
    for step, (images, labels) in enumerate(itertools.islice(open_data(section, how).training(6, 0), 3)):
        for row, (image, label) in enumerate(zip(images, labels, strict=True)):
            found = []
            for file in files[8 * int(label) : 8 * int(label) + 8]:
                with own_randomness(0, step, row), Image.open(file) as read:
                    found.append(torch.equal(reference(read.convert("RGB")), image))
            assert sum(found) == 1
