"""Tiny training runs: a model and data with steps of milliseconds, and a recipe of a dozen steps."""

import csv
import itertools
import math
from pathlib import Path

import timm
import torch

from evit_deploy.data.preprocess import Preprocess
from evit_deploy.recipe.recipe import CompareSection, Recipe
from evit_deploy.recipe.sections import DataSection, ModelSection, TrainSection
from evit_deploy.tokens.plan import TokenSpec

SPEC = TokenSpec(keep_rate=0.5, locations=(1, 2))
TINY = {"patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 2, "mlp_ratio": 2}


def tiny(**changes):
    torch.manual_seed(0)
    return timm.create_model("deit_tiny_patch16_224", **({"num_classes": 4, "img_size": 16} | TINY | changes))


class FixedBatch:
    """The same eight images in every step; replaced with NaN from step ``poison`` on."""

    classes = tuple("abcd")
    preprocess = Preprocess(size=(16, 16))

    def __init__(self, poison=None):
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(8, 3, 16, 16, generator=generator)
        self.labels = torch.arange(8) % 4
        self.poison = poison

    def steps_per_epoch(self, batch_size):
        return 3

    def training(self, batch_size, seed, *, rank=0, world=1, start_step=0, curriculum=None, device="cpu"):
        for step in itertools.count(start_step):
            bad = self.poison is not None and step >= self.poison
            yield (self.images * (math.nan if bad else 1.0)).to(device), self.labels.to(device)

    def validation(self, batch_size, *, rank=0, world=1):
        yield from zip(self.images.split(batch_size), self.labels.split(batch_size), strict=True)


def section(**changes):
    return TrainSection(**({"steps": 8, "batch_size": 8, "learning_rate": 3e-3} | changes))


RUN = TrainSection(
    steps=12, batch_size=16, learning_rate=1e-3, keep_rate_epochs=0.1, save_every=3, ema=0.9, warmup=0.2, threads=1
)
QUIET = {"compare": CompareSection(untrained=False, baselines=())}


def recipe(**changes) -> Recipe:
    # Stochastic depth uses PyTorch's generator, the digits a separate one.
    model = ModelSection(
        name="deit_tiny_patch16_224", image_size=16, args=TINY | {"drop_path_rate": 0.3}, init="scaled"
    )
    base = {"name": "tiny", "model": model, "data": DataSection(name="digits"), "dense": RUN, "tokens": SPEC}
    return Recipe(**(base | {"finetune": RUN} | QUIET | changes))


class Killed(BaseException):
    """Ends a run with an exception that no handler catches."""


def losses_of(folder: Path) -> list[float]:
    with (folder / "finetune.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]
