"""A few hundred images on a CPU, as recipes/small.yaml has it: digits that the model never saw, under other names."""

import csv
from pathlib import Path

import pytest

from evit_deploy import load_recipe, run
from evit_deploy.data.training.digits.digits import digits_images, digits_split
from evit_deploy.pipeline.run import train_stage
from evit_deploy.training.setup import setup
from tests.support.logs import notices
from tests.support.paths import RECIPES

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SHORT = ("model.args.depth=4", "tokens.locations=[1,2,3]", "expect={}", "compare.untrained=false",
         "compare.baselines=[]", "compare.keep_rates=[]", "finetune.steps=1")  # fmt: skip


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A dense model that learned the 1,437 training digits."""
    out = tmp_path_factory.mktemp("start")
    train_stage(load_recipe(RECIPES / "digits.yaml", (*SHORT, "dense.steps=200")), out)
    return out / "dense.safetensors"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """The 360 test digits as pictures in class folders whose names no checkpoint knows."""
    root = tmp_path_factory.mktemp("digits")
    images, labels = digits_images()
    for number in digits_split(labels)[1]:
        path = root / NAMES[labels[number]] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        images[number].save(path)
    return root


def small(start: Path, folders: Path, *more: str):
    return load_recipe(
        RECIPES / "small.yaml",
        (f"model.checkpoint={start}", f"data.train={folders}", "data.flip=0", "data.workers=0", "dense.threads=1",
         "finetune.threads=1", "profile.duration=0.1", "profile.batch_sizes=[1]", *more),
    )  # fmt: skip


@pytest.mark.slow
def test_a_few_hundred_images_are_learned_on_a_cpu(start, folders, tmp_path):
    told = notices()
    bundle, report = run(small(start, folders), tmp_path)
    assert report.passed
    assert any("a new classifier is trained: the data has 10 classes" in text for text in told)
    assert told.count("data.validation_share: 70 of 360 images are validated on and not trained on") == 2
    assert bundle.manifest.labels == sorted(NAMES)
    top1 = {row.name: row.top1 for row in report.accuracy}
    assert all(row.count == 70 for row in report.accuracy)
    with (tmp_path / "dense.csv").open() as file:
        way = [float(row["validation_top1"]) for row in csv.DictReader(file) if row["validation_top1"]]
    assert len(way) == 10
    assert way[0] < 0.3 < 0.5 < way[-1] == pytest.approx(top1["dense"], abs=1e-6)  # chance is 0.1
    assert top1["evit 0.7, fine-tuned"] > 0.5
    assert top1["evit 0.7, fine-tuned"] > top1["evit 0.7, not fine-tuned"] - 0.05
    assert any(text.startswith("finetune: validation top-1 ") and "epochs 1 to 10" in text for text in told)


def test_the_recipe_takes_small_batches_and_a_folder_to_validate_on(start, folders):
    recipe = small(start, folders, "dense.batch_size=2", "finetune.batch_size=2", f"data.validation={folders}")
    _, _, data = setup(recipe)
    assert sum(len(labels) for _, labels in data.validation(64)) == 360
    assert recipe.finetune.effective_learning_rate() == pytest.approx(5e-5 * 2 / 16)
    assert recipe.finetune.lowest_learning_rate() == 1e-6
