"""Pytest fixtures: bundles to compare, and noise images for them."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evit_deploy.bundle.bundle import Bundle, read_bundle
from evit_deploy.models.checkpoint import read_checkpoint
from evit_deploy.pipeline.convert import Job, convert_checkpoint
from evit_deploy.pipeline.lowering import lowering
from evit_deploy.recipe.options import ConvertOptions, Precision, ProfileOptions
from evit_deploy.tokens.plan import TokenSpec
from tests.support.models import write_checkpoint
from tests.support.shared import made_once

GLANCE = ProfileOptions(batch_sizes=(1,), duration=0.01, threads=1)


def bundle_of(checkpoint: Path, name: str, spec: TokenSpec, precision: Precision = "fp32") -> Bundle:
    """A bundle made once in a test run. Read only.

    It is not next to its checkpoint, because other tests copy that folder while this one is being written.
    """

    def make(path: Path) -> None:
        made = lowering(ConvertOptions(targets=("onnx",), precision=precision))
        convert_checkpoint(read_checkpoint(checkpoint), spec, Job(made, measure=GLANCE, out=path))

    return read_bundle(made_once(f"compared/{name}", make))


@pytest.fixture(scope="session")
def fewer(checkpoint_file: Path) -> Bundle:
    """The weights of ``converted`` with fewer tokens, without fusion. Read only."""
    return bundle_of(checkpoint_file, "fewer", TokenSpec(keep_rate=0.4, fuse=False))


def _registers() -> Path:
    """A model with registers and without classes. Read only."""
    return made_once("registers.safetensors", lambda path: write_checkpoint(path, "registers, no classes"))


@pytest.fixture(scope="session")
def embedding() -> Bundle:
    """A model with registers and without classes. Read only."""
    return bundle_of(_registers(), "embedding", TokenSpec(keep_rate=0.6))


@pytest.fixture(scope="session")
def embedding_fewer() -> Bundle:
    """The weights of ``embedding`` with fewer tokens. Read only."""
    return bundle_of(_registers(), "embedding-fewer", TokenSpec(keep_rate=0.4))


@pytest.fixture(scope="session")
def half(checkpoint_file: Path) -> Bundle:
    """Like ``converted``, in FP16. Read only."""
    return bundle_of(checkpoint_file, "half", TokenSpec(keep_rate=0.6), "fp16")


@pytest.fixture(scope="session")
def other_weights() -> Bundle:
    """Like ``converted``, from a checkpoint with other weights. Read only."""
    checkpoint = made_once("other/other.safetensors", lambda path: write_checkpoint(path, seed=1))
    return bundle_of(checkpoint, "other-weights", TokenSpec(keep_rate=0.6))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty colored noise images in folders for ten classes. Read only."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for number in range(40):
        path = root / f"class {number % 10}" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        noise = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((110, 100), Image.Resampling.BICUBIC).save(path)
    return root
