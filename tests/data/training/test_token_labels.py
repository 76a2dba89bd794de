"""Token labeling: labels follow their patches through crop, mirror, mixing and reduction, and the loss by hand."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from evit_deploy.data.training.augmentation import CropAndFlip
from evit_deploy.data.training.token_labels import crop_token_labels, read_token_labels, token_label_file
from evit_deploy.errors import InputError, UnsupportedModelError
from evit_deploy.tokens.choices import original_patches
from evit_deploy.tokens.plan import FUSED, TokenSpec
from evit_deploy.tokens.reduce import capture, reduce_tokens_, token_plan
from evit_deploy.training.token_labels import MixToken, TokenLogits, WithTokenLogits, token_label_loss, token_logits
from tests.support.models import TINY, images, of_kind, seeded


def reduced(fuse: bool = True, rate: float = 0.6) -> nn.Module:
    return reduce_tokens_(seeded("lvvit_s", **TINY), TokenSpec(keep_rate=rate, fuse=fuse))


def soft_labels(batch: int, patches: int, classes: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, patches, classes, generator=torch.Generator().manual_seed(seed)).softmax(-1)


# ---- what the model gives


@pytest.mark.parametrize("fuse", [True, False])
def test_kept_are_the_original_patches(fuse):
    model = reduced(fuse)
    x = torch.from_numpy(images(model, 3))
    with capture(model) as seen:
        logits = model(x)
    wanted = original_patches([kept.numpy() for kept in seen.kept], token_plan(model))[-1]
    with torch.no_grad():
        found = token_logits(model, x)
    np.testing.assert_array_equal(found.kept.numpy(), wanted)
    assert found.token_logits.shape == (3, token_plan(model).blocks[-1].tokens_out - 1, 10)
    assert bool((found.kept == FUSED).any()) == fuse
    both = found.class_logits + 0.5 * found.token_logits.max(dim=1).values
    torch.testing.assert_close(both, logits)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_dense_model_keeps_every_patch():
    model = seeded("lvvit_s", **TINY)
    found = token_logits(model, torch.from_numpy(images(model, 2)))
    assert found.kept.tolist() == [list(range(36))] * 2


def test_hooks_are_gone_when_the_model_fails():
    model = reduced()
    with pytest.raises(AssertionError):
        token_logits(model, torch.zeros(1, 3, 32, 32), MixToken((6, 6), (0, 0, 1, 1)))
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("kind", ["plain", "registers, no classes"])
def test_a_model_without_token_classifier_is_refused(kind):
    model = of_kind(kind)
    with pytest.raises(UnsupportedModelError, match="no classifier on every token"):
        token_logits(model, torch.from_numpy(images(model, 1)))


# ---- the loss


def loss_by_hand(found: TokenLogits, labels: Tensor, token_labels: Tensor, weight: float) -> float:
    logits, tokens = found.class_logits.double(), found.token_logits.double()
    total = 0.0
    for i in range(len(labels)):
        each = [
            -float((token_labels[i, patch].double() * tokens[i, t].log_softmax(-1)).sum())
            for t, patch in enumerate(found.kept[i].tolist())
            if patch != FUSED
        ]
        total += -float(logits[i].log_softmax(-1)[labels[i]]) + weight * sum(each) / len(each)
    return total / len(labels)


@pytest.mark.parametrize("weight", [0.0, 1.0, 0.3])
@pytest.mark.parametrize("fuse", [True, False])
def test_the_loss_is_the_one_written_out(fuse, weight):
    model = reduced(fuse)
    labels, wanted = torch.tensor([3, 0, 9]), soft_labels(3, 36, 10)
    with torch.no_grad():
        found = token_logits(model, torch.from_numpy(images(model, 3)))
    loss = token_label_loss(*found, labels, wanted, weight)
    assert loss.item() == pytest.approx(loss_by_hand(found, labels, wanted, weight), rel=1e-5)
    soft = token_label_loss(*found, F.one_hot(labels, 10).float(), wanted, weight)
    assert soft.item() == pytest.approx(loss.item(), rel=1e-6)


def test_labels_of_removed_patches_and_the_fused_token_have_no_part():
    model = reduced(rate=0.4)
    with torch.no_grad():
        found = token_logits(model, torch.from_numpy(images(model, 2)))
    labels, wanted = torch.tensor([1, 2]), soft_labels(2, 36, 10)
    loss = token_label_loss(*found, labels, wanted)
    changed, gone = wanted.clone(), torch.ones(2, 36, dtype=torch.bool)
    for image in range(2):
        gone[image, found.kept[image][found.kept[image] >= 0]] = False
    changed[gone] = 1.0
    assert gone.any()
    assert torch.equal(token_label_loss(*found, labels, changed), loss)
    fused = found.token_logits.clone()
    fused[found.kept == FUSED] += torch.arange(10.0)
    assert torch.equal(token_label_loss(found.class_logits, fused, found.kept, labels, wanted), loss)


def test_it_trains_and_every_parameter_has_a_gradient():
    model = WithTokenLogits(reduced().train())
    x, labels, wanted = torch.from_numpy(images(model.model, 8)), torch.arange(8), soft_labels(8, 36, 10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(5):
        loss = token_label_loss(*model(x), labels, wanted)
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_labels_of_another_shape_are_refused():
    model = reduced()
    found = token_logits(model, torch.from_numpy(images(model, 2)))
    for shape in ((2, 36), (1, 36, 10), (2, 36, 7)):
        with pytest.raises(InputError, match="token labels that do not match the tokens"):
            token_label_loss(*found, torch.tensor([0, 1]), torch.zeros(shape))


# ---- maps


def write_map(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def peaked(rows: int, columns: int, classes: int, k: int = 5) -> Tensor:
    """A map as released: in each cell one class with a high logit, its own number modulo the classes, and others."""
    cells = torch.arange(rows * columns).view(rows, columns)
    indices = torch.stack([(cells + i) % classes for i in range(k)])
    scores = torch.full((k, rows, columns), 1.0)
    scores[0] = 12.0
    return torch.stack([scores, indices.float()])


def test_a_map_is_read_as_it_is_released(tmp_path):
    image = Path("train/n01440764/n01440764_10026.JPEG")
    path = token_label_file(tmp_path, image)
    assert path == tmp_path / "n01440764" / "n01440764_10026.pt"
    content = peaked(18, 18, 1000).half()
    found = read_token_labels(write_map(path, content), 1000)
    assert found.dtype == torch.float32
    assert torch.equal(found, content.float())


def test_files_that_are_no_maps(tmp_path):
    with pytest.raises(InputError, match="no token labels of this image"):
        read_token_labels(tmp_path / "none.pt", 10)
    repeated, sparse = torch.zeros(2, 1, 1, 1).expand(2, 5, 30_000, 30_000), torch.zeros(2, 5, 2, 2).to_sparse()
    for content in (
        repeated,
        sparse,
        {"a": 1},
        torch.zeros(3, 5, 2, 2),
        torch.zeros(2, 5, 2),
        torch.zeros(2, 5, 0, 0),
        torch.zeros(2, 5, 2, 2, dtype=torch.complex64),
        Path("x"),
    ):
        with pytest.raises(InputError, match="not a token label map"):
            read_token_labels(write_map(tmp_path / "map.pt", content), 10)
    (tmp_path / "map.pt").write_bytes(b"PK\x03\x04 not a file")
    with pytest.raises(InputError, match="not a token label map"):
        read_token_labels(tmp_path / "map.pt", 10)
    with pytest.raises(InputError, match="of unknown classes"):
        read_token_labels(write_map(tmp_path / "map.pt", peaked(3, 3, 10)), 5)
    for place in ((0, 0, 0, 0), (1, 0, 0, 0)):
        damaged = peaked(3, 3, 10)
        damaged[place] = math.nan
        with pytest.raises(InputError, match="not finite"):
            read_token_labels(write_map(tmp_path / "map.pt", damaged), 10)


WHOLE = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
STRAIGHT = torch.tensor([False])


def test_the_whole_image_is_the_softmax_of_its_map():
    soft = crop_token_labels(peaked(6, 4, 30)[None], WHOLE, STRAIGHT, (6, 4), 30)
    assert soft.shape == (1, 24, 30)
    logits = torch.zeros(30)
    logits[:5] = torch.tensor([12.0, 1, 1, 1, 1])  # a class outside the five has logit 0
    torch.testing.assert_close(soft[0, 0], logits.softmax(0))
    assert soft[0].argmax(-1).tolist() == list(range(24))
    torch.testing.assert_close(soft.sum(-1), torch.ones(1, 24))


def test_a_crop_takes_its_own_cells_and_a_mirror_turns_them():
    maps = peaked(6, 8, 50)[None]
    box = torch.tensor([[2 / 8, 3 / 6, 6 / 8, 5 / 6]])  # columns 2 to 5, rows 3 and 4
    soft = crop_token_labels(maps, box, STRAIGHT, (2, 4), 50)
    assert soft[0].argmax(-1).tolist() == [26, 27, 28, 29, 34, 35, 36, 37]
    mirrored = crop_token_labels(maps, box, ~STRAIGHT, (2, 4), 50)
    assert mirrored[0].argmax(-1).tolist() == [29, 28, 27, 26, 37, 36, 35, 34]
    both = crop_token_labels(maps.expand(2, -1, -1, -1, -1), box.expand(2, -1), torch.tensor([False, True]), (2, 4), 50)
    assert torch.equal(both, torch.cat([soft, mirrored]))


def test_smoothing_gives_every_class_its_share():
    plain = crop_token_labels(peaked(3, 3, 20)[None], WHOLE, STRAIGHT, (3, 3), 20)
    smooth = crop_token_labels(peaked(3, 3, 20)[None], WHOLE, STRAIGHT, (3, 3), 20, label_smoothing=0.1)
    torch.testing.assert_close(smooth, 0.9 * plain + 0.005)


def test_the_recorded_crop_is_the_crop_that_was_made():
    torch.manual_seed(0)
    rows = torch.arange(60).view(60, 1).expand(60, 80)
    columns = torch.arange(80).view(1, 80).expand(60, 80)
    picture = Image.fromarray(torch.stack([rows, columns, rows * 0], dim=-1).to(torch.uint8).numpy())
    transform, mirrored = CropAndFlip((32, 32), interpolation="bilinear"), set()
    for _ in range(20):
        crop, (left, top, right, bottom), flipped = transform(picture)
        pixels = np.asarray(crop).astype(float)
        mirrored.add(flipped)
        assert crop.size == (32, 32)
        # A pixel says where it comes from: those of the result's middle lie in the middle of the box.
        middle = pixels[15:17, 15:17].mean((0, 1))
        assert middle[0] == pytest.approx(60 * (top + bottom).item() / 2 - 0.5, abs=1)
        assert middle[1] == pytest.approx(80 * (left + right).item() / 2 - 0.5, abs=1)
        assert (pixels[0, 0, 1] > pixels[0, -1, 1]) == flipped
    assert mirrored == {True, False}


# ---- MixToken


def test_a_box_is_drawn_as_large_as_lambda_says():
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(300):
        mix = MixToken.draw((14, 14), rng)
        top, left, bottom, right = mix.box
        assert 0 <= top <= bottom <= 14
        assert 0 <= left <= right <= 14
        assert mix.share == pytest.approx(1 - (bottom - top) * (right - left) / 196)
        shares.append(mix.share)
    assert 0.5 < np.mean(shares) < 0.8  # boxes are cut off at the borders, so that more than half is the image's own
    assert max(shares) > 0.95
    assert min(shares) < 0.3


def test_tokens_and_labels_are_mixed_alike():
    mix = MixToken((2, 3), (0, 1, 2, 2))
    x = torch.arange(6.0).view(1, 6, 1) + torch.tensor([0.0, 100.0]).view(2, 1, 1)
    assert mix.tokens(x).squeeze(-1).tolist() == [[0, 101, 2, 3, 104, 5], [100, 1, 102, 103, 4, 105]]
    assert mix.share == pytest.approx(4 / 6)
    hard = mix.labels(torch.tensor([0, 2]), 3)
    torch.testing.assert_close(hard, torch.tensor([[4 / 6, 0, 2 / 6], [2 / 6, 0, 4 / 6]]))
    assert torch.equal(mix.labels(F.one_hot(torch.tensor([0, 2]), 3).float(), 3), hard)


def test_moving_labels_is_moving_logits_back():
    # The released code puts the logits of the box back before the loss; of a dense model both are the same.
    model = seeded("lvvit_s", **TINY)
    x, labels, wanted = torch.from_numpy(images(model, 4)), torch.arange(4), soft_labels(4, 36, 10)
    mix = MixToken((6, 6), (1, 2, 4, 6))
    with torch.no_grad():
        found, plain = token_logits(model, x, mix), token_logits(model, x)
    assert (found.class_logits - plain.class_logits).abs().max() > 0.01
    loss = token_label_loss(*found, mix.labels(labels, 10), mix.tokens(wanted))
    back = token_label_loss(
        found.class_logits, mix.tokens(found.token_logits), found.kept, mix.labels(labels, 10), wanted
    )
    assert loss.item() == pytest.approx(back.item(), rel=1e-6)


def test_mixing_goes_with_reduction():
    model = reduced(rate=0.4)
    x, mix = torch.from_numpy(images(model, 4)), MixToken((6, 6), (0, 0, 6, 6))
    with torch.no_grad():
        mixed, turned = token_logits(model, x, mix), token_logits(model, x.flip(0))
    torch.testing.assert_close(mixed.token_logits, turned.token_logits)  # the box is everything
    assert torch.equal(mixed.kept, turned.kept)
    assert math.isfinite(token_label_loss(*mixed, mix.labels(torch.arange(4), 10), soft_labels(4, 36, 10)).item())
