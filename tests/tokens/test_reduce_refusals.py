"""Models that cannot be reduced exactly are refused, with every reason."""

import pytest
import timm
from timm.layers import PatchDropout
from timm.models.vision_transformer import ParallelScalingBlock
from torch import nn

from evit_deploy.errors import UnsupportedModelError
from evit_deploy.models.timm_vit import TimmViT
from evit_deploy.tokens.plan import TokenSpec
from evit_deploy.tokens.reduce import reduce_tokens_
from tests.support.families import SPEC


def with_option(name: str, **options):
    return lambda: timm.create_model(name, pretrained=False, device="meta", **options)


@pytest.mark.parametrize(
    ("make", "model", "reason"),
    [
        (with_option("swin_tiny_patch4_window7_224"), "SwinTransformer", "it computes attention in windows"),
        (with_option("eva02_tiny_patch14_224"), "Eva", "its position embedding is rotary"),
        (with_option("beit_base_patch16_224", depth=2), "Beit", "its relative position bias"),
        (with_option("levit_128s"), "a LeViT with the method 'evit'", "its attention biases need every token"),
        (with_option("levit_conv_128s"), "LevitDistilled", "it is LeViT's convolutional form"),
        (with_option("resnet10t"), "ResNet", "it is not a timm VisionTransformer"),
        (lambda: nn.Linear(2, 2), "Linear", "it is not a timm VisionTransformer"),
        (
            with_option("vit_tiny_patch16_224", depth=2, class_token=False, global_pool="avg"),
            "VisionTransformer",
            "it has no class token",
        ),
        (
            with_option("vit_tiny_patch16_224", depth=2, global_pool="avg"),
            "VisionTransformer",
            "its head pools the patch tokens, and the method 'evit' neither keeps them all nor carries their sizes",
        ),
        (
            with_option("vit_tiny_patch16_224", depth=2, global_pool=""),
            "VisionTransformer",
            "it returns every token",
        ),
        (
            with_option("vit_tiny_patch16_224", depth=2, global_pool="map"),
            "VisionTransformer",
            "its head pools all patch tokens by attention",
        ),
        (
            with_option("vit_tiny_patch16_224", depth=2, patch_drop_rate=0.1),
            "VisionTransformer",
            "it drops patches at random",
        ),
        (
            with_option("vit_tiny_patch16_224", depth=2, block_fn=ParallelScalingBlock),
            "VisionTransformer",
            "block 0 is a ParallelScalingBlock, not a Block",
        ),
    ],
)
def test_models_that_do_not_fit_are_refused_with_the_reason(make, model, reason):
    refused = make()
    with pytest.raises(UnsupportedModelError, match=f"{model} cannot be token-reduced exactly: .*{reason}") as error:
        reduce_tokens_(refused, SPEC)
    assert len(error.value.reasons) >= 1
    assert not hasattr(refused, "token_spec")


def test_only_a_head_that_pools_is_told_what_serves_pooling():
    pooling = timm.create_model("vit_tiny_patch16_224", depth=2, global_pool="avg", device="meta")
    with pytest.raises(UnsupportedModelError, match="Take evit's options normalize=true and sized=true"):
        reduce_tokens_(pooling, SPEC)
    narrow = timm.create_model("vit_tiny_patch16_224", depth=2, embed_dim=54, device="meta")
    with pytest.raises(UnsupportedModelError, match="cannot be divided by 4") as error:
        reduce_tokens_(narrow, TokenSpec(keep_rate=0.6, method="dynamicvit", fuse=False))
    assert "Take evit's options" not in str(error.value)


def test_every_reason_is_named_at_once():
    model = timm.create_model("vit_tiny_patch16_224", depth=2, class_token=False, global_pool="avg", device="meta")
    with pytest.raises(UnsupportedModelError) as error:
        reduce_tokens_(model, SPEC)
    assert [reason.split(",")[0] for reason in error.value.reasons] == [
        "it has no class token",
        "its head pools the patch tokens",
    ]
    model = timm.create_model("vit_tiny_patch16_224", depth=2, global_pool="map", device="meta")
    model.patch_drop = PatchDropout(0.5)
    assert [reason.split(",")[0] for reason in TimmViT.unsupported(model)] == [
        "its head pools all patch tokens by attention",
        "it drops patches at random while training (patch_drop_rate > 0)",
    ]
