"""Small seeded models, checkpoints and one bundle that several test files share; also pytest's fixtures for them.

``seeded`` redraws every parameter with enough spread that each one matters. timm's initialization leaves biases at 0,
layer scales at 1e-5 and attention nearly uniform, so that a test would miss a lost parameter.
"""

import functools
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from evit_deploy.bundle.bundle import Bundle, read_bundle
from evit_deploy.data.preprocess import Preprocess
from evit_deploy.models.checkpoint import Checkpoint, read_checkpoint, save_checkpoint
from evit_deploy.pipeline.convert import Job, convert, convert_checkpoint
from evit_deploy.pipeline.lowering import lowering
from evit_deploy.recipe.options import ConvertOptions, ProfileOptions
from evit_deploy.tokens.backbone import backbone_of, load_backbones
from evit_deploy.tokens.plan import TokenSpec
from tests.support.shared import made_once

load_backbones()  # registers our models with timm

# 36 patches, 4 blocks: the smallest model with meaningful kept sets.
TINY: dict[str, Any] = {"img_size": 96, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 10}
KEEP = TokenSpec(keep_rate=0.6)

# For tests of the command line, where the model does not matter.
SMALLEST = ("vit_tiny_patch16_224", TINY | {"img_size": 64, "depth": 2})

# timm name and arguments of one model for each kind that the export treats differently.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("vit_tiny_patch16_224", TINY),
    "distilled": ("deit_tiny_distilled_patch16_224", TINY),
    "layer scale": ("deit3_small_patch16_224", TINY),
    "registers, no classes": ("vit_small_patch14_reg4_dinov2", TINY | {"img_size": 84, "num_classes": 0}),
    "qk-norm, one channel": ("vit_tiny_patch16_224", TINY | {"qk_norm": True, "in_chans": 1}),
    "LV-ViT": ("lvvit_s", TINY),
}


def seeded(name: str = "vit_tiny_patch16_224", seed: int = 0, **model_args: Any) -> Any:
    """A timm model in evaluation mode whose parameters come from a seed."""
    model = timm.create_model(name, pretrained=False, **(model_args or TINY))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "gamma" in name or (parameter.dim() == 1 and name.endswith("weight")):  # norms and layer scales
                parameter.copy_(1 + 0.2 * noise)
            elif parameter.dim() > 1 and not name.endswith(("token", "pos_embed")):
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.3 * noise)
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):  # batch norms
                noise = torch.randn(buffer.shape, generator=generator)
                buffer.copy_(0.3 * noise if name.endswith("mean") else (0.3 * noise).exp())
    return model.eval()


def of_kind(kind: str, seed: int = 0) -> Any:
    """The seeded model of one of ``KINDS``, or the ``smallest``."""
    name, model_args = KINDS.get(kind, SMALLEST)
    return seeded(name, seed, **model_args)


def preprocess_for(model: Any) -> Preprocess:
    """timm's preprocessing for a model at its image size."""
    return Preprocess.from_model(model)


def images(model: Any, count: int, seed: int = 0) -> np.ndarray:
    """Inputs of a model, normally distributed."""
    backbone = backbone_of(model)
    shape = (count, backbone.channels(model), *backbone.image_size(model))
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def write_checkpoint(path: Path, kind: str = "plain", tokens: TokenSpec | None = None, seed: int = 0) -> Path:
    """Saves a small model with its metadata."""
    name, model_args = KINDS.get(kind, SMALLEST)
    model = of_kind(kind, seed)
    about = Checkpoint(
        str(path), None, {}, name, model_args, tokens=tokens, preprocess=preprocess_for(model), labels=None
    )
    save_checkpoint(path, model, about)
    return path


@functools.cache
def _shapes(name: str, model_args: tuple[tuple[str, Any], ...]) -> dict[str, torch.Size]:
    with torch.device("meta"):
        model: nn.Module = timm.create_model(name, pretrained=False, **dict(model_args))
    return {key: value.shape for key, value in model.state_dict().items()}


def hollow(name: str, **model_args: Any) -> dict[str, Tensor]:
    """The tensors of a real architecture, all zero."""
    shapes = _shapes(name, tuple(sorted(model_args.items())))
    return {key: torch.zeros(shape) for key, shape in shapes.items()}


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, hidden files included: relative name -> content, ``None`` for folders."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture(scope="session")
def checkpoint_file() -> Path:
    """The tiny plain model on disk. Read only."""
    return made_once("tiny/tiny.safetensors", write_checkpoint)


@pytest.fixture(scope="session")
def converted(checkpoint_file: Path) -> Bundle:
    """The tiny plain model as a bundle, next to its checkpoint. Read only; copy it to modify it."""

    def make(path: Path) -> None:
        measure = ProfileOptions(batch_sizes=(1,), duration=0.01, threads=1)
        convert(checkpoint_file, out=path, keep_rate=0.6, measure=measure)

    return read_bundle(made_once(f"tiny/{checkpoint_file.stem}-evit-k0.6", make))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of half a megabyte; skips if mounting is not permitted."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def quantized_bundle(checkpoint: Path, images: np.ndarray, out: Path | None = None, **options: Any) -> Bundle:
    """A bundle in INT8 or FP8, calibrated from an array instead of a folder, as in ``run``."""
    made = lowering(ConvertOptions(**options), calibrated=True)
    measure = ProfileOptions(batch_sizes=(1,), duration=0.01, threads=1)
    job = Job(made, images=images, measure=measure, out=out)
    return convert_checkpoint(read_checkpoint(checkpoint), KEEP, job)[0]
