"""Deployment preprocessing is the owner's: Hugging Face, OpenCLIP and torchvision make the same inputs."""

from collections.abc import Callable, Sequence

import numpy as np
import open_clip
import pytest
import torch
import torchvision
from PIL import Image
from transformers import BitImageProcessor, CLIPImageProcessor, ViTImageProcessor
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from evit_deploy.data.images import preprocess_image, sample_photographs
from evit_deploy.data.preprocess import Preprocess

HALF, CLIP_MEAN, CLIP_STD = (0.5,) * 3, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def hugging_face(kind: type, **settings) -> Callable[[Sequence[Image.Image]], np.ndarray]:
    processor = kind(**settings)
    return lambda images: np.concatenate([processor(images=one, return_tensors="np")["pixel_values"] for one in images])


def each(transform: Callable[[Image.Image], torch.Tensor]) -> Callable[[Sequence[Image.Image]], np.ndarray]:
    return lambda images: np.stack([transform(image).numpy() for image in images])


VIT = {"size": {"height": 224, "width": 224}, "resample": 2, "image_mean": list(HALF), "image_std": list(HALF)}
DINOV2 = {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}, "resample": 3, **IMAGENET}
CLIP_224 = Preprocess((224, 224), 1.0, "center-floor", "bicubic", tuple(CLIP_MEAN), tuple(CLIP_STD))
VIT_224 = Preprocess((224, 224), 1.0, "squash", "bilinear", HALF, HALF)
DINOV2_224 = Preprocess((224, 224), 0.875, "center-floor", "bicubic")
OWNERS = {
    "ViT of Hugging Face": (lambda: hugging_face(ViTImageProcessorPil, **VIT), VIT_224, 0),
    "the same by torchvision": (lambda: hugging_face(ViTImageProcessor, **VIT), VIT_224, 1),
    "CLIP of Hugging Face": (lambda: hugging_face(CLIPImageProcessorPil), CLIP_224, 0),
    "CLIP by torchvision": (lambda: hugging_face(CLIPImageProcessor), CLIP_224, 1),
    "DINOv2 of Hugging Face": (lambda: hugging_face(BitImageProcessorPil, **DINOV2), DINOV2_224, 0),
    "DINOv2 by torchvision": (lambda: hugging_face(BitImageProcessor, **DINOV2), DINOV2_224, 2),
    "OpenCLIP": (
        lambda: each(open_clip.image_transform(224, is_train=False)),
        Preprocess((224, 224), 1.0, "center", "bicubic", tuple(CLIP_MEAN), tuple(CLIP_STD)),
        0,
    ),
    "torchvision": (
        lambda: each(torchvision.models.ViT_B_16_Weights.IMAGENET1K_V1.transforms()),
        Preprocess((224, 224), 0.875, "center", "bilinear"),
        0,
    ),
}


def shapes() -> list[Image.Image]:
    """The sample photographs, and crops of them whose margins are of every remainder by four, upright and lying."""
    china, flower = sample_photographs()
    crops = [china.crop((0, 0, 300 + extra, 240)) for extra in range(4)]
    return [china, flower, *crops, *(crop.transpose(Image.Transpose.ROTATE_90) for crop in crops)]


@pytest.mark.parametrize("owner", OWNERS)
def test_inputs_are_the_owners_own(owner):
    """Pillow's arithmetic gives the same bits; torchvision's on tensors is off by a level or two of 255."""
    make, preprocess, levels = OWNERS[owner]
    images = shapes()
    own = np.stack([preprocess_image(image, preprocess) for image in images])
    off = 255 * np.abs(make()(images) - own) * np.array(preprocess.std, np.float32)[:, None, None]
    assert off.max() < levels + 0.01


def test_rounding_margins_the_other_way_moves_a_picture_by_a_pixel():
    """That is why there are two modes: the photographs are among the images whose crop is not the same."""
    image = sample_photographs()[0]
    modes = [preprocess_image(image, Preprocess((224, 224), 1.0, mode)) for mode in ("center", "center-floor")]
    np.testing.assert_array_equal(modes[0][..., :-1], modes[1][..., 1:])
    assert np.abs(modes[0] - modes[1]).max() > 1


def test_where_margins_are_even_or_missing_the_two_modes_are_one():
    for size in ((224, 336), (300, 224), (100, 90)):
        image = sample_photographs()[0].resize(size)
        for crop_pct in (1.0, 1.4):
            first, second = (Preprocess((224, 224), crop_pct, mode) for mode in ("center", "center-floor"))
            np.testing.assert_array_equal(preprocess_image(image, first), preprocess_image(image, second))
