"""`predict` on the sample photographs is what the owner's own model says to the owner's own inputs."""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import open_clip
import pytest
import torch
import torchvision
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from evit_deploy.data.images import sample_photographs
from evit_deploy.data.preprocess import Preprocess
from evit_deploy.inference.model import load
from evit_deploy.models.checkpoint import build_model, read_checkpoint
from evit_deploy.pipeline.convert import Job, convert_checkpoint
from evit_deploy.pipeline.lowering import lowering
from evit_deploy.recipe.options import ConvertOptions, ProfileOptions
from evit_deploy.tokens.plan import TokenSpec

SIZE, HALF, CLIP_MEAN, CLIP_STD = 96, (0.5,) * 3, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
IMAGENET = torchvision.transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def vit(image: Any) -> Tensor:
    settings = {"size": {"height": SIZE, "width": SIZE}, "resample": 2, "image_mean": HALF, "image_std": HALF}
    return ViTImageProcessorPil(**settings)(images=image, return_tensors="pt")["pixel_values"][0]


def clip(image: Any) -> Tensor:
    sizes = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
    return CLIPImageProcessorPil(**sizes)(images=image, return_tensors="pt")["pixel_values"][0]


def of_torchvision(image: Any) -> Tensor:
    steps = torchvision.transforms
    interpolation = steps.InterpolationMode.BILINEAR
    return steps.Compose([steps.Resize(112, interpolation), steps.CenterCrop(SIZE), steps.ToTensor(), IMAGENET])(image)


OWNERS = {
    "ViT of Hugging Face": (vit, Preprocess((SIZE, SIZE), 1.0, "squash", "bilinear", HALF, HALF)),
    "CLIP of Hugging Face": (
        clip, Preprocess((SIZE, SIZE), 1.0, "center-floor", "bicubic", tuple(CLIP_MEAN), tuple(CLIP_STD))
    ),
    "OpenCLIP": (
        open_clip.image_transform(SIZE, is_train=False),
        Preprocess((SIZE, SIZE), 1.0, "center", "bicubic", tuple(CLIP_MEAN), tuple(CLIP_STD)),
    ),
    "torchvision": (of_torchvision, Preprocess((SIZE, SIZE), SIZE / 112, "center", "bilinear")),
}  # fmt: skip


def answers_as(owner: str, source: Path, model: nn.Module, spec: TokenSpec, out: Path) -> None:
    """Converts with the owner's preprocessing, and holds ``predict`` against the owner's inputs in PyTorch."""
    prepare, preprocess = OWNERS[owner]
    labels = [f"kind {number}" for number in range(10)]
    checkpoint = msgspec.structs.replace(read_checkpoint(source), preprocess=preprocess, labels=labels)
    job = Job(lowering(ConvertOptions()), measure=ProfileOptions(batch_sizes=(1,), duration=0.01, threads=1), out=out)
    bundle, _ = convert_checkpoint(checkpoint, spec, job)
    images = sample_photographs()
    with torch.inference_mode():
        found: Any = model(torch.stack([prepare(image) for image in images]))
    shares = getattr(found, "logits", found).softmax(1)
    with load(bundle.path, threads=1) as opened:
        predictions = opened.predict(images, top=5)
    for prediction, row in zip(predictions, shares, strict=True):
        best = row.topk(5)
        assert prediction.classes == tuple(best.indices.tolist())
        assert prediction.labels == tuple(labels[index] for index in prediction.classes)
        np.testing.assert_allclose(prediction.probabilities, best.values, atol=1e-5)


@pytest.mark.parametrize("owner", OWNERS)
def test_the_owners_inputs_give_the_same_answers(owner, checkpoint_file, tmp_path):
    model = build_model(read_checkpoint(checkpoint_file))
    answers_as(owner, checkpoint_file, model, TokenSpec(keep_rate=1.0), tmp_path / "bundle")


def test_hugging_faces_model_and_processor_give_the_same_answers(tmp_path):
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=128, num_hidden_layers=4, num_attention_heads=2, intermediate_size=256,
                       image_size=SIZE, num_labels=10)  # fmt: skip
    model = ViTForImageClassification(config).eval()
    with torch.no_grad():  # its first weights are so small that all images look alike
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape)
            parameter.copy_(noise / parameter[0].numel() ** 0.5 if parameter.dim() > 1 else parameter + 0.2 * noise)
    model.save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "model.safetensors"
    answers_as("ViT of Hugging Face", file, model, TokenSpec(keep_rate=1.0), tmp_path / "bundle")
