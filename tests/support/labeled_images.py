"""Noise images with token labels, and an LV-ViT small enough to train on them; also their fixture."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from evit_deploy.data.preprocess import Preprocess
from evit_deploy.data.training.training_data import open_data
from evit_deploy.recipe.sections import DataSection, TokenLabelSection, TrainSection
from evit_deploy.tokens.plan import TokenSpec

CLASSES, SIZE = ("ant", "bee", "cat"), 64
ARGS = {"embed_dim": 24, "depth": 4, "num_heads": 2, "stem_width": 8}
SPEC = TokenSpec(keep_rate=0.6, locations=(1, 2, 3))
PLAIN = TokenLabelSection(weight=0.7, mix_token=0)


def write_map(path: Path, classes: int, generator: torch.Generator, size: int = 6) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    order = torch.rand(classes, size, size, generator=generator).argsort(0)[:2]
    scores = 4 * torch.randn(2, size, size, generator=generator)
    torch.save(torch.stack([scores, order.float()]).half(), path)


@pytest.fixture(scope="session")
def labeled(tmp_path_factory) -> Path:
    """Noise images in three classes, with noise as label maps. Read only."""
    root, generator = tmp_path_factory.mktemp("images"), torch.Generator().manual_seed(0)
    rng = np.random.default_rng(0)
    for split, name, number in itertools.product(("train", "val"), CLASSES, range(8)):
        path = root / split / name / f"{number}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (72, 80, 3), dtype=np.uint8)).save(path)
        if split == "train":
            write_map(root / "labels" / name / f"{number}.pt", len(CLASSES), generator)
    return root


def data_section(root: Path, **changes) -> DataSection:
    plain = {"auto_augment": None, "color_jitter": 0, "random_erasing": 0, "mixup": 0, "cutmix": 0, "workers": 0}
    folders = {"train": str(root / "train"), "validation": str(root / "val"), "token_labels": str(root / "labels")}
    return DataSection(**({"name": "folder"} | plain | folders | changes))


def tiny(**changes):
    torch.manual_seed(0)
    return timm.create_model("lvvit_s", num_classes=3, img_size=SIZE, **(ARGS | changes))


def section(**changes) -> TrainSection:
    return TrainSection(**({"steps": 4, "batch_size": 6, "learning_rate": 1e-3, "token_labels": PLAIN} | changes))


def opened(root: Path, **changes):
    return open_data(data_section(root, **changes), Preprocess(size=(SIZE, SIZE)))
