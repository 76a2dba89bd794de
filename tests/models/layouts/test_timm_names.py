"""timm's own names: the config of its hub, sizes that timm has no name for, and what others publish under its names."""

import pytest
import torch
import transformers

from evit_deploy.errors import CheckpointError
from evit_deploy.models.checkpoint import build_model, read_checkpoint
from tests.support.layouts import apart, checkpoint_of, draw_, identified, pictures
from tests.support.models import hollow, seeded


def config(architecture, **args):
    return {"architecture": architecture, "num_classes": 5, "model_args": args, "global_pool": "token",
            "pretrained_cfg": {"input_size": [3, 64, 64]}}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("vit_small_patch16_224", {"img_size": 64, "depth": 2}),
        ("deit3_small_patch16_224", {"img_size": 64, "depth": 2}),
        ("vit_base_patch16_clip_quickgelu_224", {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 4}),
    ],
)
@torch.inference_mode()
def test_the_config_of_the_hub_decides(name, args):
    model = seeded(name, num_classes=5, **args)
    identity = identified(dict(model.state_dict()), config(name, **args))
    assert identity.model == name
    assert identity.notes == []
    assert apart(build_model(checkpoint_of(identity))(pictures(2, 64)), model(pictures(2, 64))) == 0


@torch.inference_mode()
def test_timm_within_transformers(tmp_path):
    config = transformers.TimmWrapperConfig(
        architecture="vit_tiny_patch16_224", num_labels=5, model_args={"img_size": 64, "depth": 2}
    )
    model = draw_(transformers.TimmWrapperForImageClassification(config))
    model.save_pretrained(tmp_path)
    checkpoint = read_checkpoint(tmp_path)
    assert (checkpoint.model, checkpoint.model_args["depth"]) == ("vit_tiny_patch16_224", 2)
    assert apart(build_model(checkpoint)(pictures(2, 64)), model(pictures(2, 64)).logits) <= 1e-6


def test_the_config_of_the_hub_contradicts_the_tensors():
    weights = hollow("vit_small_patch16_224", num_classes=5)
    with pytest.raises(CheckpointError) as caught:
        identified(weights, config("vit_tiny_patch16_224"))
    assert "the weights are not those of vit_tiny_patch16_224, which its config.json names" in str(caught.value)
    with pytest.raises(CheckpointError, match="weights are not those of vit_tiny_patch16_224"):
        identified(weights, {"architecture": "vit_tiny_patch16_224"})
    with pytest.raises(CheckpointError, match="num_classes 5 in the config and 1000 rows in the classifier"):
        identified(hollow("vit_small_patch16_224"), config("vit_small_patch16_224"))
    with pytest.raises(CheckpointError, match=r"model_args in its config\.json that are not valid"):
        identified(weights, config("vit_small_patch16_224") | {"model_args": [1]})


def test_a_levit_that_timm_saved_is_no_other_staged_network():
    assert identified(hollow("levit_128s")).model == "levit_128s"
    assert identified(hollow("levit_128s"), {"architecture": "levit_128s", "num_classes": 1000}).model == "levit_128s"
    with pytest.raises(CheckpointError, match="weights are not those of levit_128"):
        identified(hollow("levit_128s"), {"architecture": "levit_128"})


def test_model_goes_before_the_config():
    identity = identified(hollow("vit_small_patch16_224"), config("vit_tiny_patch16_224"), "vit_small_patch16_224")
    assert identity.model == "vit_small_patch16_224"


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("deit_tiny_patch16_224", {"embed_dim": 128, "num_heads": 2, "depth": 3, "mlp_ratio": 1.5}),
        ("vit_small_patch16_224", {"depth": 5, "qkv_bias": False, "init_values": 0.1}),
        ("vit_small_patch16_224", {"depth": 2, "patch_size": 8, "reg_tokens": 2, "qk_norm": True}),
        ("vit_small_patch16_224", {"depth": 2, "reg_tokens": 2, "no_embed_class": True, "pre_norm": True}),
        ("vit_small_patch16_224", {"depth": 2, "global_pool": "avg"}),
        ("deit_small_distilled_patch16_224", {"depth": 2}),
    ],
)
@torch.inference_mode()
def test_a_size_that_timm_has_no_name_for(name, args):
    model = seeded(name, num_classes=5, img_size=64, **args)
    identity = identified(dict(model.state_dict()))
    assert any("no architecture of timm has this size" in note for note in identity.notes)
    assert apart(build_model(checkpoint_of(identity))(pictures(2, 64)), model(pictures(2, 64))) <= 1e-6


def test_mae_as_its_authors_publish_the_pre_training():
    encoder = hollow("vit_base_patch16_224", num_classes=0)
    decoder = {"mask_token": torch.ones(1, 1, 512), "decoder_pos_embed": torch.ones(1, 197, 512),
               "decoder_embed.weight": torch.ones(512, 768), "decoder_embed.bias": torch.ones(512)}  # fmt: skip
    identity = identified(encoder | decoder)
    assert identity.output == "embedding"
    assert identity.weights.keys() == encoder.keys()
    assert any("2 tensors of decoder_embed" in note and "mask_token" in note for note in identity.notes)


def test_the_linear_classifier_of_dinov2_is_refused():
    backbone = {f"backbone.{name}": value for name, value in hollow("vit_small_patch14_dinov2").items()}
    with pytest.raises(CheckpointError, match=r"mean of all patches.*Save the backbone"):
        identified(backbone | {"linear_head.weight": torch.ones(1000, 768), "linear_head.bias": torch.ones(1000)})


@pytest.mark.parametrize("name", ["blocks.0.mlp.fc1.weight", "reg_token"])
def test_tensors_of_another_number_of_dimensions_are_refused(name):
    weights = seeded("vit_tiny_patch16_224", depth=2, embed_dim=48, num_heads=3).state_dict()
    with pytest.raises(CheckpointError):
        identified(weights | {name: torch.tensor(1.0)})
