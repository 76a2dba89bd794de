"""Batches on their way to a device: what arrives is what the transform would have given."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from evit_deploy.data.preprocess import Preprocess
from evit_deploy.data.training.digits.digits import DigitsData
from evit_deploy.data.training.sampling import loader, stacked
from evit_deploy.data.training.training_data import open_data
from evit_deploy.data.training.transfer import Transfer
from evit_deploy.recipe.sections import DataSection
from tests.support.labeled_images import SIZE, data_section
from tests.support.training_devices import DEVICES, available

HOW = Preprocess(size=(8, 8), crop_pct=1.0)
MIXED = {"auto_augment": "rand-m9-mstd0.5-inc1", "random_erasing": 0.0, "mixup": 0.8, "cutmix": 1.0}


def pixels(count: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, 3, 8, 8), dtype=np.uint8))


@pytest.mark.parametrize("device", DEVICES)
def test_bytes_become_what_the_transform_of_deployment_gives(device):
    images, labels = pixels(4), torch.arange(4)
    wanted = torch.stack([HOW.transform()(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in images])
    found, same = Transfer(available(device), HOW)((images, labels))
    assert (found.device.type, found.dtype, same.device.type) == (device, torch.float32, device)
    assert torch.equal(found.cpu(), wanted)  # to the bit: the same operations, none of them by a reciprocal
    assert torch.equal(same.cpu(), labels)
    assert images.dtype == torch.uint8


@pytest.mark.parametrize("device", DEVICES)
def test_numbers_stay_as_they_are_and_a_batch_is_finished_where_it_arrives(device):
    numbers, seen = torch.rand(2, 3, 8, 8), []

    def finish(images, labels):
        seen.append((images.device.type, labels.device.type))
        return images + 1, labels, labels * 2

    images, labels, twice = Transfer(available(device), HOW)((numbers, torch.arange(2)), finish)
    assert torch.equal(images.cpu(), numbers + 1)
    assert (labels.tolist(), twice.tolist()) == ([0, 1], [0, 2])
    assert seen == [(device, device)]


@pytest.mark.gpu
def test_batches_are_whole_however_far_ahead_of_the_gpu_they_are_asked_for():
    transfer, sums, wanted = Transfer(available("cuda"), HOW), [], []
    busy = torch.rand(4096, 4096, device="cuda")
    for number in range(20):  # the memory of one batch becomes that of another while the GPU is still busy
        images = torch.full((64, 3, 64, 64), number, dtype=torch.uint8)
        wanted.append(((number / 255 - 0.485) / 0.229, (number / 255 - 0.406) / 0.225))
        (found,) = transfer((images,))
        busy = busy @ busy / 4096
        sums.append(torch.stack([found[:, 0].mean(), found[:, 2].mean()]))
        del found, images
    np.testing.assert_allclose(torch.stack(sums).cpu().numpy(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_a_batch_arrives_while_the_gpu_is_busy():
    transfer = Transfer(available("cuda"), HOW)
    images = [torch.full((64, 3, 64, 64), number, dtype=torch.uint8) for number in range(4)]
    kept = [transfer((one,)) for one in images]  # memory for as many
    matrix = torch.rand(8192, 8192, device="cuda") / 8192
    matrix @ matrix
    del kept
    torch.cuda.synchronize()
    for _ in range(20):  # about half a second
        matrix = matrix @ matrix
    ended = torch.cuda.current_stream().record_event()
    arrived = [transfer((one,)) for one in images]
    transfer._stream.synchronize()
    assert not ended.query()  # what was sent off before is still being computed
    torch.cuda.synchronize()
    assert len({float(found.sum()) for (found,) in arrived}) == 4


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_pins_what_it_is_asked_to(workers):
    available("cuda")
    items = [(torch.full((3, 4, 4), number, dtype=torch.uint8), number) for number in range(4)]
    for images, labels in loader(items, [[0, 1], [2, 3]], workers, stacked, 2, pin=True):
        assert images.is_pinned()
        assert labels.is_pinned()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["digits", "digits-in-the-wild", "folder"])
def test_a_gpu_gets_the_images_that_a_cpu_gets(name, labeled):
    available("cuda")
    if name == "folder":
        section = data_section(labeled, token_labels=None, **MIXED)
    else:
        section = DataSection(name=name, workers=0, images=100, test_images=10)
    data = open_data(section, Preprocess(size=(SIZE, SIZE)))
    batches = zip(data.training(6, 3), data.training(6, 3, device="cuda"), strict=True)
    for (images, targets), (sent, theirs) in itertools.islice(batches, 4):
        assert sent.is_cuda
        torch.testing.assert_close(sent.cpu(), images, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(theirs.cpu(), targets)


def test_what_a_loop_of_one_s_own_draws_is_ready_for_a_model(labeled):
    folder = open_data(data_section(labeled, token_labels=None, **MIXED), Preprocess(size=(SIZE, SIZE)))
    for data in (folder, DigitsData(DataSection(name="digits"), Preprocess(size=(16, 16)))):
        images, _ = next(data.training(6, 0))
        assert images.dtype == torch.float32
        assert images.device.type == "cpu"
        assert -3 < float(images.min()) < 0 < float(images.max()) < 3
