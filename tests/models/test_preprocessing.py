"""What files beside weights say of preprocessing and labels, held against the code that writes those files."""

import argparse
import json
from typing import Any

import numpy as np
import open_clip
import pytest
import transformers
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from evit_deploy.data.images import preprocess_image, sample_photographs
from evit_deploy.data.preprocess import Preprocess
from evit_deploy.errors import CheckpointError, InputError
from evit_deploy.models.preprocessing import Said, described, labels_in, preprocess_in, resolve_inputs
from evit_deploy.recipe.options import PreprocessOptions

HALF, IMAGENET = (0.5, 0.5, 0.5), (0.485, 0.456, 0.406)
PROCESSORS = {
    "ViT": ViTImageProcessorPil(),
    "ViT, ImageNet's": ViTImageProcessorPil(size={"height": 96, "width": 128}, image_mean=list(IMAGENET), resample=3),
    "DeiT": DeiTImageProcessorPil(),
    "DeiT, odd": DeiTImageProcessorPil(size={"height": 113, "width": 113}, crop_size={"height": 99, "width": 99}),
    "CLIP": CLIPImageProcessorPil(),
    "DINOv2": BitImageProcessorPil(
        size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}, image_mean=list(IMAGENET),
    ),
    "not normalized": ViTImageProcessorPil(do_normalize=False),
    "another scale": ViTImageProcessorPil(rescale_factor=1 / 127.5, image_mean=[1.0] * 3, image_std=[1.0] * 3),
}  # fmt: skip


@pytest.mark.parametrize("name", PROCESSORS)
def test_an_image_is_prepared_as_its_processor_prepares_it(name):
    processor = PROCESSORS[name]
    said = preprocess_in({"preprocessor_config.json": json.loads(processor.to_json_string())}, None, "folder")
    assert said is not None
    assert said.origin == "preprocessor_config.json"
    for photograph in sample_photographs():
        wanted = processor(images=photograph, return_tensors="np")["pixel_values"][0]
        given = preprocess_image(photograph, said.value)
        assert given.shape == wanted.shape
        deviation = np.array(said.value.std)[:, None, None]
        assert np.abs((given - wanted) * deviation).max() * 255 <= 1.01  # one step of 255


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"feature_extractor_type": "ViTFeatureExtractor", "size": 224, "resample": 2, "image_mean": [0.5] * 3,
          "image_std": [0.5] * 3}, Preprocess((224, 224), 1.0, "squash", "bilinear", HALF, HALF)),
        ({"feature_extractor_type": "DeiTFeatureExtractor", "size": 256, "crop_size": 224, "do_center_crop": True,
          "resample": 3}, Preprocess((224, 224), 0.875, "squash", "bicubic", HALF, HALF)),
        ({"feature_extractor_type": "CLIPFeatureExtractor", "size": 224, "crop_size": 224},
         Preprocess((224, 224), 1.0, "center-floor", "bicubic", (0.48145466, 0.4578275, 0.40821073),
                    (0.26862954, 0.26130258, 0.27577711))),
        ({}, Preprocess((224, 224), 1.0, "squash", "bilinear", HALF, HALF)),
    ],
)  # fmt: skip
def test_old_files_say_it_in_their_own_way(config, wanted):
    said = preprocess_in({"preprocessor_config.json": config}, None, "folder")
    assert said is not None
    assert said.value == wanted


def test_every_crop_is_of_the_size_that_the_file_says():
    for crop in range(90, 260, 7):
        for size in range(crop, 300, 11):
            config = {"size": {"shortest_edge": size}, "do_center_crop": True, "crop_size": crop}
            said = preprocess_in({"preprocessor_config.json": config}, None, "folder")
            assert said is not None
            assert int(crop / said.value.crop_pct) == size


def test_open_clips_file_says_what_its_transform_does():
    settings = {"mean": list(HALF), "std": [0.2] * 3, "interpolation": "bilinear", "resize_mode": "squash"}
    config = {"model_cfg": {"vision_cfg": {"image_size": 96}}, "preprocess_cfg": settings}
    said = preprocess_in({"open_clip_config.json": config}, None, "folder")
    assert said is not None
    transform: Any = open_clip.image_transform(
        96, is_train=False, mean=HALF, std=(0.2, 0.2, 0.2), interpolation="bilinear", resize_mode="squash"
    )
    for photograph in sample_photographs():
        wanted = transform(photograph).numpy()
        assert np.abs(preprocess_image(photograph, said.value) - wanted).max() * 0.2 * 255 <= 1.01


def test_a_training_scripts_arguments():
    args = argparse.Namespace(mean=[0.1, 0.2, 0.3], std=[0.4] * 3, img_size=96, crop_pct=None, interpolation="bilinear")
    said = preprocess_in({}, args, "x.pth")
    assert said == Said(
        Preprocess((96, 96), 0.875, "center", "bilinear", (0.1, 0.2, 0.3), (0.4, 0.4, 0.4)),
        "the checkpoint's own arguments",
    )
    assert preprocess_in({}, argparse.Namespace(mean=None, std=None, crop_pct=0.9), "x.pth") is None
    assert preprocess_in({}, None, "x.pth") is None
    with pytest.raises(CheckpointError, match=r"x\.pth: .*std"):
        preprocess_in({}, {"mean": [0.0] * 3, "std": [0.0] * 3}, "x.pth")
    with pytest.raises(CheckpointError, match="no preprocessing that can be used"):
        preprocess_in({}, {"mean": "red", "std": [1.0] * 3}, "x.pth")


def test_names_of_transformers_own_are_none():
    assert labels_in({"config.json": json.loads(transformers.ViTConfig(num_labels=3).to_json_string())}, "x") is None
    names = {"0": "cat", "1": "LABEL_1"}
    assert labels_in({"config.json": {"id2label": names}}, "x") == Said(["cat", "LABEL_1"], "config.json, id2label")
    with pytest.raises(CheckpointError, match="none for 1"):
        labels_in({"config.json": {"id2label": {"0": "cat", "2": "dog"}}}, "x")
    nested = {"pretrained_cfg": {"label_names": ["cat", "dog"]}}
    assert labels_in({"config.json": nested}, "x") == Said(["cat", "dog"], "config.json, label_names")


SAID = Said(Preprocess((96, 96), 1.0, "squash", "bilinear", HALF, HALF), "preprocessor_config.json")


def test_what_is_asked_for_goes_before_what_the_checkpoint_says(tmp_path):
    (tmp_path / "names.txt").write_text("a\nb\n")
    asked = PreprocessOptions(mean=IMAGENET, crop_pct=0.5, labels=str(tmp_path / "names.txt"))
    found = resolve_inputs("deit_tiny_patch16_224", 2, SAID, Said(["x", "y"], "config.json"), asked)
    assert found.preprocess == Preprocess((96, 96), 0.5, "squash", "bilinear", IMAGENET, HALF)
    assert found.labels == ["a", "b"]
    assert found.origins["preprocess"] == "--mean, --crop-pct; the rest from preprocessor_config.json"
    assert found.origins["labels"] == f"--labels {tmp_path / 'names.txt'}"
    assert found.notes == ()


def test_a_guess_stands_out_and_ends_with_what_was_asked_for():
    guessed = resolve_inputs("vit_tiny_patch16_224", 2, None, None, PreprocessOptions())
    (warning,) = guessed.notes
    assert warning.startswith("Warning: nothing in the checkpoint says how its images were normalized. mean 0.5")
    assert guessed.origins == {"preprocess": "timm's vit_tiny_patch16_224, assumed"}
    assert resolve_inputs("vit_tiny_patch16_224", 2, None, None, PreprocessOptions(), chosen=True).notes == ()
    given = PreprocessOptions(mean=IMAGENET, std=HALF)
    assert resolve_inputs("vit_tiny_patch16_224", 2, None, None, given).notes == ()
    half_given = PreprocessOptions(mean=IMAGENET)
    assert len(resolve_inputs("vit_tiny_patch16_224", 2, None, None, half_given).notes) == 1


def test_labels_have_to_be_of_the_classes(tmp_path):
    names = Said(["x", "y"], "config.json, id2label")
    with pytest.raises(
        InputError,
        match=r"config\.json, id2label: the number of labels is not the number of classes .got 2 labels, expected 3",
    ):
        resolve_inputs("vit_tiny_patch16_224", 3, SAID, names, PreprocessOptions())
    assert resolve_inputs("vit_tiny_patch16_224", 0, SAID, names, PreprocessOptions()).labels is None
    (tmp_path / "names.txt").write_text("a\nb\n")
    with pytest.raises(InputError, match="the model has no classes"):
        resolve_inputs("vit_tiny_patch16_224", 0, SAID, None, PreprocessOptions(labels=str(tmp_path / "names.txt")))
    with pytest.raises(InputError, match=r"--mean and --std: .*1 and 3"):
        resolve_inputs("vit_tiny_patch16_224", 0, SAID, None, PreprocessOptions(mean=(0.5,)))


def test_one_line_says_what_is_done_to_images():
    line = described(SAID.value, ["x", "y"], {"preprocess": SAID.origin, "labels": "config.json"})
    assert line == (
        "Preprocessing: resize to 96×96, bilinear, mean 0.5 0.5 0.5, std 0.5 0.5 0.5 (preprocessor_config.json). "
        "Labels: 2 (config.json)."
    )
    assert "resize the shorter side to 256, center crop 224×224, bicubic" in described(Preprocess((224, 224)), None, {})
