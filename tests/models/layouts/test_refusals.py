"""Families that cannot be reduced exactly: the reason, whether it is their config that tells them or their tensors."""

import pytest
import timm
import torch
import transformers

from evit_deploy.errors import CheckpointError
from tests.support.layouts import identified, written

SMALL = {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 100, "image_size": 64,
    "patch_size": 16,
}  # fmt: skip
# How it is made, what its config says of it, and what is to be said.
FAMILIES = {
    "SigLIP": (lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SMALL)), "no class token"),
    "BEiT": (
        lambda: transformers.BeitForImageClassification(
            transformers.BeitConfig(**SMALL, use_relative_position_bias=True)
        ),
        "relative position bias",
    ),
    "data2vec": (
        lambda: transformers.Data2VecVisionModel(
            transformers.Data2VecVisionConfig(**SMALL, use_relative_position_bias=True)
        ),
        "relative position bias",
    ),
    "Swin": (
        lambda: transformers.SwinModel(
            transformers.SwinConfig(image_size=64, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4)
        ),
        "windows",
    ),
    "DINOv3": (lambda: transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**SMALL)), "rotary"),
    "SAM": (
        lambda: transformers.SamVisionModel(
            transformers.SamVisionConfig(
                hidden_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=64, global_attn_indexes=[1],
                output_channels=16,
            )
        ),
        "map of all patches",
    ),
    "a detector": (
        lambda: transformers.YolosModel(transformers.YolosConfig(**(SMALL | {"image_size": [64, 64]}))), "boxes",
    ),
    "ConvNeXt": (
        lambda: transformers.ConvNextModel(
            transformers.ConvNextConfig(hidden_sizes=[8, 8], depths=[1, 1], num_stages=2)
        ),
        "no tokens",
    ),
}  # fmt: skip


def refusal(weights, config=None, **more):
    with pytest.raises(CheckpointError) as caught:
        identified(weights, config, **more)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_code == 2
    return message


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    make, reason = FAMILIES[request.param]
    return request.param, *written(make(), tmp_path_factory.mktemp("family")), reason


def test_a_family_is_refused_by_its_config(family):
    name, weights, config, reason = family
    message = refusal(weights, config)
    assert f"a checkpoint of {name}" in message
    assert reason in message
    assert "can be converted" in message  # what is possible instead
    assert "config.json" in message


def test_a_family_is_refused_by_its_tensors(family):
    name, weights, _, reason = family
    message = refusal(weights)
    # data2vec's tensors have the names of BEiT's.
    assert f"a checkpoint of {'BEiT' if name == 'data2vec' else name}" in message
    assert reason in message


def test_what_only_a_config_can_refuse_is_refused_with_it():
    message = refusal({"a.weight": torch.ones(2)}, {"model_type": "depth_anything"})
    assert "a dense prediction model" in message
    assert "every patch of several blocks" in message


# What timm's hub writes beside its weights.


@pytest.mark.parametrize(
    ("name", "args", "reason"),
    [
        ("vit_base_patch16_siglip_224", {"depth": 1}, "pools all patch tokens by attention"),
        ("beit_base_patch16_224", {"depth": 1}, "relative position bias"),
        ("eva02_tiny_patch14_224", {"depth": 1}, "rotary"),
        ("swin_tiny_patch4_window7_224", {}, "windows"),
        ("resnet18", {}, "no vision transformer with a class token"),
    ],
)
def test_an_architecture_of_timm_that_cannot_be_reduced(name, args, reason):
    with torch.device("meta"):
        weights = timm.create_model(name, **args).state_dict()
    message = refusal(weights, {"architecture": name, "model_args": args, "num_classes": 1000})
    assert reason in message
    assert name in message


@pytest.mark.parametrize("name", ["vit_tiny_patch16_225", 7, None, ["vit_tiny_patch16_224"]])
def test_an_architecture_that_timm_does_not_know(name):
    message = refusal({"cls_token": torch.ones(1, 1, 4)}, {"architecture": name})
    assert "timm does not know" in message
    assert repr(name) in message


@pytest.mark.parametrize("args", [{"no_such_argument": 1}, {"depth": "much"}, {"img_size": -3}])
def test_arguments_that_timm_does_not_take(args):
    message = refusal({"cls_token": torch.ones(1, 1, 4)}, {"architecture": "vit_tiny_patch16_224", "model_args": args})
    assert "timm cannot build" in message
