"""Tables of the paper with figures from here."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from evit_deploy.errors import InputError
from evit_deploy.paper import published
from evit_deploy.paper.forms import as_markdown, cells, measured_on
from evit_deploy.paper.measured import paper_table
from evit_deploy.recipe.options import PaperOptions

SMALL = {
    "source": "A paper", "conditions": "Published on paper.", "counting": "Counted by hand.",
    "tables": {"1": {"title": "A small ViT", "rows": [
        {"name": "small", "model": "vit_tiny_patch16_224", "image_size": 64, "weights": "mine",
         "published": {"top1": 50.0, "top5": 90.0, "images_per_second": 100.0}},
        {"name": "0.5", "model": "vit_tiny_patch16_224", "image_size": 64, "keep_rate": 0.5, "weights": "mine",
         "published": {"top1": 40.0, "images_per_second": 150.0}},
        {"name": "other", "model": "vit_tiny_patch16_224", "image_size": 64, "keep_rate": [0.5, 0.6, 0.7],
         "locations": [1, 2, 3], "fuse": False, "published": {"gmacs": 0.1}},
    ]}},
}  # fmt: skip


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Another paper's table, of a model that a test can run."""
    file = tmp_path / "published.json"
    file.write_text(json.dumps(SMALL))
    monkeypatch.setattr(published, "FILE", file)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "mine.safetensors"
    save_file(timm.create_model("vit_tiny_patch16_224", num_classes=4).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    draw = np.random.default_rng(0)
    for name in "abcd":
        (folder / name).mkdir()
        for number in range(3):
            Image.fromarray(draw.integers(0, 256, (64, 64, 3), np.uint8)).save(folder / name / f"{number}.png")
    return folder


@pytest.mark.parametrize(
    ("number", "wanted"),
    [("2b", [4.60, 4.02, 3.48, 3.03, 2.64, 2.31]), ("3b", [6.55, 4.71, 3.88])],
)
def test_multiply_adds_are_those_of_the_official_readme(number, wanted):
    table = paper_table(number)
    assert [round(row.gmacs, 2) for row in table.rows] == wanted
    assert table.versions["torch"]


def test_what_is_missing_is_said_and_has_no_column(small):
    table = paper_table("1")
    said = "\n".join(table.notes)
    assert "Throughput here is missing: --throughput" in said
    assert "for want of weights (--weights NAME=FILE) and images (--data): mine; other." in said
    header, rows = cells(table)
    assert "top-1 %\nhere" not in header
    assert "speed-up\nhere" not in header
    assert rows[2][1:3] == ("–", "–")
    assert cells(table, whole=True)[1][0].count("–") >= 4
    assert measured_on(table) == ""


@pytest.mark.parametrize("runtime", ["eager", "onnxruntime"])
def test_throughput_is_measured_in_turn_with_its_interval(small, runtime):
    options = PaperOptions(throughput=True, runtime=runtime, batch=2, threads=1, duration=0.01)
    table = paper_table("1", options=options)
    dense, reduced, other = (row.speed for row in table.rows)
    assert dense.speedup is None
    assert reduced.speedup_low <= reduced.speedup <= reduced.speedup_high
    assert {row.batch for row in (dense, reduced, other)} == {2}
    assert "Throughput here is missing" not in "".join(table.notes)
    header, rows = cells(table)
    assert rows[1][header.index("speed-up\npaper")] == "1.50x"
    assert "[" in rows[1][header.index("speed-up\nhere")]
    assert f"Throughput here: {runtime}, batch 2," in measured_on(table)


def test_accuracy_is_that_of_the_rows_whose_weights_are_given(small, weights, images):
    table = paper_table("1", weights={"mine": weights}, data=images)
    dense, reduced, other = (row.accuracy for row in table.rows)
    assert dense.count == reduced.count == 12
    assert other is None
    assert dense.low <= dense.top1 <= dense.high
    assert "(--data): other." in table.notes[-1]
    text = as_markdown(table)
    assert text.startswith("# Table 1: A small ViT\n")
    assert f"| small | 50.0 | {100 * dense.top1:.1f} [" in text
    assert "| other |" in text


def test_accuracy_is_counted_right(small, weights, images):
    """Against a loop over the images."""
    from evit_deploy.data.preprocess import Preprocess

    model = timm.create_model("vit_tiny_patch16_224", num_classes=4, img_size=64).eval()
    from evit_deploy.models.checkpoint import build_model, preprocess_of, read_checkpoint

    checkpoint = read_checkpoint(weights)
    model = build_model(checkpoint, 64)
    prepare: Preprocess = preprocess_of(checkpoint, model)
    from evit_deploy.data.sources.class_folders import Folder
    from evit_deploy.data.sources.sources import labeled_batches

    right = 0
    for x, labels in labeled_batches(Folder(images), prepare, 1):
        right += int(model(torch.from_numpy(x)).argmax(1).item() == labels[0])
    table = paper_table("1", weights={"mine": weights}, data=images)
    assert table.rows[0].accuracy.top1 == right / 12


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ({"weights": {"absent": "x"}, "data": "x"}, "no row of the table uses these weights"),
        ({"weights": {"mine": "x.pth"}}, "Give --data"),
        ({"data": "x"}, "Give --weights"),
        ({"options": PaperOptions(throughput=True, runtime="tensorrt")}, "need no engine"),
        ({"options": PaperOptions(throughput=True, runtime="triton")}, "not on a server"),
        ({"options": PaperOptions(throughput=True, runtime="egaer")}, "Did you mean 'eager'"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(small, arguments, hint):
    with pytest.raises(InputError, match=hint):
        paper_table("1", **arguments)


def test_weights_of_another_model_and_other_classes_are_refused(small, weights, images, tmp_path):
    path = tmp_path / "base.safetensors"
    save_file(timm.create_model("deit_base_patch16_224", num_classes=4, depth=1).state_dict(), path)
    with pytest.raises(InputError):
        paper_table("1", weights={"mine": path}, data=images)
    few = tmp_path / "few"
    for name in "ab":
        (few / name).mkdir(parents=True)
        Image.new("RGB", (64, 64)).save(few / name / "1.png")
    with pytest.raises(InputError, match="the class folders are not the model's classes"):
        paper_table("1", weights={"mine": weights}, data=few)
