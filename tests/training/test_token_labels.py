"""Training with token labels: the loss by hand, and labels that follow their images."""

import itertools
import math
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import Compose, ToTensor

from evit_deploy.data.training.augmentation import GEOMETRIC, CropAndFlip, FollowedTransform, Warp
from evit_deploy.data.training.sampling import own_randomness
from evit_deploy.data.training.token_labels import crop_token_labels
from evit_deploy.recipe.sections import TokenLabelSection
from evit_deploy.tokens.plan import FUSED, TokenSpec
from evit_deploy.tokens.reduce import reduce_tokens_, set_keep_rate_
from evit_deploy.training.loop import fit
from evit_deploy.training.step import TrainingRun
from evit_deploy.training.tasks import make_task
from evit_deploy.training.token_labels import MixToken, token_logits
from tests.support.labeled_images import CLASSES, SIZE, SPEC, opened, section, tiny

# ---- the loss, in float64 and without PyTorch


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def bilinear(plane: np.ndarray, y: float, x: float) -> np.ndarray:
    y, x = (min(max(value, 0.0), size - 1.0) for value, size in zip((y, x), plane.shape[:2], strict=True))
    top, left = (min(int(value), size - 2) for value, size in zip((y, x), plane.shape[:2], strict=True))
    v, u = y - top, x - left
    rows = [(1 - u) * plane[row, left] + u * plane[row, left + 1] for row in (top, top + 1)]
    return (1 - v) * rows[0] + v * rows[1]


def labels_by_hand(label_map: np.ndarray, box: np.ndarray, mirrored: bool, side: int, smoothing: float) -> np.ndarray:
    """RoI-align as its paper has it: each cell is the mean of bilinear samples, at most a map's cell apart."""
    scores, indices = label_map
    size = scores.shape[1]
    logits = np.zeros((size, size, len(CLASSES)))
    for k, row, column in np.ndindex(scores.shape):
        logits[row, column, int(indices[k, row, column])] = scores[k, row, column]
    left, top, right, bottom = box * size
    height, width = (bottom - top) / side, (right - left) / side
    cells = np.zeros((side, side, len(CLASSES)))
    for row, column in np.ndindex(side, side):
        ys = [top + height * (row + (i + 0.5) / math.ceil(height)) - 0.5 for i in range(math.ceil(height))]
        xs = [left + width * (column + (i + 0.5) / math.ceil(width)) - 0.5 for i in range(math.ceil(width))]
        cells[row, column] = np.mean([bilinear(logits, y, x) for y in ys for x in xs], axis=0)
    cells = cells[:, ::-1] if mirrored else cells
    return softmax(cells.reshape(side * side, -1)) * (1 - smoothing) + smoothing / len(CLASSES)


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0])
def test_loss_and_gradient_are_those_written_out(labeled, fuse, progress):
    model = reduce_tokens_(tiny(), TokenSpec(keep_rate=0.6, locations=(1, 2, 3), fuse=fuse)).eval()
    set_keep_rate_(model, progress)
    run = section(steps=1, label_smoothing=0.1, model_mode="eval")
    images, targets, *labels = (part.numpy() for part in next(opened(labeled).training(6, 3)))
    maps, boxes, mirrored, warps = labels
    np.testing.assert_allclose(warps, np.broadcast_to(np.eye(3)[:2], (6, 2, 3)))
    with torch.no_grad():
        found = token_logits(model, torch.from_numpy(images))
    classes, tokens, kept = (part.numpy() for part in found)
    side, total, head, aux = SIZE // 16, 0.0, np.zeros(3), np.zeros(3)
    for i in range(6):
        wanted = labels_by_hand(maps[i].astype(float), boxes[i].astype(float), bool(mirrored[i]), side, 0.1)
        own = np.eye(3)[targets[i]] * 0.9 + 0.1 / 3
        patches = kept[i][kept[i] != FUSED]
        said = softmax(tokens[i].astype(float))[kept[i] != FUSED]
        shown = softmax(classes[i].astype(float))
        total -= (own * np.log(shown)).sum() + 0.7 * (wanted[patches] * np.log(said)).sum(-1).mean()
        head += shown - own
        aux += 0.7 * (said - wanted[patches]).mean(0)
    assert (len(kept[0]) < side**2) == (progress > 0)
    done = TrainingRun(model, run).advance(opened(labeled).training(6, 3), 1e-3, moving=False)
    assert done.loss == pytest.approx(total / 6, rel=2e-6)
    np.testing.assert_allclose(model.head.bias.grad.numpy(), head / 6, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(model.aux_head.bias.grad.numpy(), aux / 6, rtol=1e-4, atol=1e-6)


def test_mixed_tokens_learn_mixed_labels(labeled):
    model = reduce_tokens_(tiny(), SPEC).eval()
    task = make_task(model, section(token_labels=TokenLabelSection(weight=0.7)), None)
    images, targets, *labels = next(opened(labeled).training(6, 3))
    torch.manual_seed(4)
    drawn = MixToken.draw((4, 4), np.random.default_rng(int(torch.randint(2**62, ()))))
    assert 0 < drawn.share < 1
    torch.manual_seed(4)
    done = task(images, targets, *labels)
    wanted = crop_token_labels(labels[0], labels[1], labels[2], (4, 4), 3)
    wanted = torch.where(drawn.mask()[:, None], wanted.flip(0), wanted)
    own = torch.nn.functional.one_hot(targets, 3).float()
    own = drawn.share * own + (1 - drawn.share) * own.flip(0)
    found, total = token_logits(model, images, drawn), torch.zeros(())
    for i in range(6):
        known = found.kept[i] >= 0
        each = -(wanted[i, found.kept[i, known]] * found.token_logits[i, known].log_softmax(-1)).sum(-1)
        total += 0.7 * each.mean() - (own[i] * found.class_logits[i].log_softmax(-1)).sum()
    torch.testing.assert_close(done["loss"], total / 6)
    torch.testing.assert_close(done["target"], own)


def test_a_run_learns_and_saving_memory_changes_nothing(labeled):
    mixed = TokenLabelSection()
    models, losses = [], []
    for changes in ({}, {"checkpoint_activations": True}, {"channels_last": True}):
        model = reduce_tokens_(tiny(), SPEC)
        torch.manual_seed(1)
        run = section(steps=12, keep_rate_epochs=1, token_labels=mixed, learning_rate=3e-3, **changes)
        losses.append(fit(model, opened(labeled), run))
        models.append(model)
    assert sum(losses[0][-3:]) < sum(losses[0][:3])
    for other in losses[1:]:
        np.testing.assert_allclose(other, losses[0], rtol=1e-3)
    assert not hasattr(models[0], "model")  # its own keys, not the wrapper's
    assert list(models[0].state_dict()) == list(tiny().state_dict())


def test_accumulated_batches_give_the_step_of_one_large_batch(labeled):
    found = []
    for size, accumulate in ((6, 1), (3, 2)):
        model = reduce_tokens_(tiny(), SPEC).eval()
        batch = next(opened(labeled).training(6, 3))
        parts = zip(*(part.split(size) for part in batch), strict=True)
        run = TrainingRun(model, section(batch_size=size, accumulate=accumulate))
        loss = run.advance(iter(list(parts)), 1e-3, moving=False).loss
        found.append((loss, [parameter.grad for parameter in model.parameters()]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_a_whole_run_compiles_once_whatever_is_mixed(labeled, monkeypatch):
    torch._dynamo.reset()
    graphs: list[int] = []

    def backend(graph, inputs):
        graphs.append(len(inputs))
        return graph

    compiling = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, **how: compiling(module, **how, backend=backend))
    run = section(steps=12, keep_rate_start=1, keep_rate_epochs=1, token_labels=TokenLabelSection())
    losses = []
    for compiled in (False, True):
        torch.manual_seed(2)
        model = reduce_tokens_(tiny(), SPEC)
        losses.append(fit(model, opened(labeled), msgspec.structs.replace(run, compile=compiled)))
    torch._dynamo.reset()
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    assert len(graphs) == 2  # before the keep rate moves and after it


# ---- labels follow their images


def test_labels_follow_crop_mirror_and_warp():
    # A picture of four colors, and a map that says which: where a patch of the result shows one color, its label says
    # it too.
    from timm.data.auto_augment import RandAugment, rand_augment_ops

    colors = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]])
    rows, columns = torch.meshgrid(torch.arange(192) // 96, torch.arange(256) // 128, indexing="ij")
    picture = Image.fromarray((colors[2 * rows + columns] * 255).byte().numpy())
    cells = 2 * (torch.arange(24) // 12).view(24, 1) + (torch.arange(24) // 12).view(1, 24)
    label_map = torch.stack([torch.full((1, 24, 24), 20.0), cells[None].float()])
    options = {"img_mean": (128, 128, 128), "interpolation": Image.Resampling.BILINEAR, "translate_const": 40}
    ops = rand_augment_ops(6, hparams=options, transforms=list(GEOMETRIC))
    crop = CropAndFlip((128, 128), scale=(0.3, 1.0), interpolation="bilinear")
    transform = FollowedTransform(crop, Compose([RandAugment(ops, 2)]), ToTensor())
    seen, moved = 0, 0
    for number in range(60):
        with own_randomness(number):
            shown, box, mirrored, warp = transform(picture)
        soft = crop_token_labels(label_map[None], box[None], mirrored[None], (8, 8), 4, warps=warp[None])[0]
        straight = crop_token_labels(label_map[None], box[None], mirrored[None], (8, 8), 4)[0]
        patches = shown.unfold(1, 16, 16).unfold(2, 16, 16).permute(1, 2, 3, 4, 0).reshape(64, 256, 3)
        pure = [(patches - color).abs().amax((1, 2)) < 0.02 for color in colors]
        for label, mask in enumerate(pure):
            assert (soft[mask].argmax(-1) == label).all()
            seen += int(mask.sum())
            moved += int((straight[mask].argmax(-1) != label).sum())
    assert seen > 1000
    assert moved > 100  # without the warp many labels would be wrong


def test_a_warp_is_what_the_image_library_does():
    from timm.data.auto_augment import rotate, shear_x, shear_y, translate_x_rel, translate_y_abs

    size, steps = (
        (96, 64),
        ((rotate, 25), (shear_x, 0.3), (translate_x_rel, 0.1), (shear_y, -0.2), (translate_y_abs, -7)),
    )
    ys, xs = np.mgrid[:64, :96].astype(np.float32) + 0.5
    pictures, warp = [Image.fromarray(part) for part in (xs, ys, np.ones_like(xs))], Warp(size)
    for function, amount in steps:
        pictures = [function(picture, amount, resample=Image.Resampling.BILINEAR) for picture in pictures]
        function(warp, amount, resample=Image.Resampling.BILINEAR)
    x, y, shown = (np.asarray(picture) for picture in pictures)  # where each pixel comes from, if from anywhere
    matrix = warp.places().double().numpy()
    across, down = (matrix @ np.stack([2 * xs / 96 - 1, 2 * ys / 64 - 1, np.ones_like(xs)]).reshape(3, -1)).reshape(
        2, 64, 96
    )
    wanted = (across + 1) * 48, (down + 1) * 32
    inside = shown > 0.999
    assert inside.mean() > 0.2
    np.testing.assert_allclose(x[inside], wanted[0][inside], atol=0.6)
    np.testing.assert_allclose(y[inside], wanted[1][inside], atol=0.6)


def drawn(labeled: Path, steps: int, *, section: dict | None = None, **place) -> list[tuple[Tensor, ...]]:
    data = opened(labeled, auto_augment="rand-m9-mstd0.5-inc1", random_erasing=0.25, **(section or {}))
    return list(itertools.islice(data.training(6, 5, **place), steps))


def assert_same(one, other) -> None:
    assert len(one) == len(other) == 6
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_processes_share_what_one_draws_and_a_later_start_changes_nothing(labeled, tmp_path):
    whole = drawn(labeled, 5)
    shares = [drawn(labeled, 5, rank=rank, world=2) for rank in range(2)]
    for step in range(5):
        for rank in range(2):
            assert_same(shares[rank][step], [part[rank::2] for part in whole[step]])
    for one, other in zip(drawn(labeled, 2, start_step=3), whole[3:], strict=True):
        assert_same(one, other)
    for one, other in zip(drawn(labeled, 5, section={"workers": 2}), whole, strict=True):
        assert_same(one, other)
    cached = drawn(labeled, 5, section={"cache": str(tmp_path)})  # the pictures are small enough to be kept as they are
    for one, other in zip(cached, whole, strict=True):
        assert_same(one, other)
