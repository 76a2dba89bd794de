"""Checkpoints of something else, names that fit nothing, and what is said of them."""

import pytest
import timm
import torch
from torch import Tensor

from evit_deploy.errors import InputError, MissingRequirement
from evit_deploy.models.checkpoint import read_checkpoint, set_image_size_
from evit_deploy.models.identify import check_model_name
from tests.support.checkpoints import refusal, saved
from tests.support.models import hollow


def names(*keys: str) -> dict[str, Tensor]:
    return {key: torch.zeros(2) for key in keys}


def foreign(key: str) -> dict[str, Tensor]:
    """A DeiT's tensors and one that only the other family has."""
    return hollow("deit_tiny_patch16_224") | names(key)


FOREIGN = {
    "ResNet": names("conv1.weight", "layer1.0.conv1.weight", "fc.weight"),
    "Swin": names("patch_embed.proj.weight", "layers.0.blocks.0.attn.relative_position_bias_table"),
    "ConvNeXt": names("stem.0.weight", "stages.0.blocks.0.conv_dw.weight"),
    "Evo-ViT": foreign("qks.0.qk.weight"),
    "LV-ViT": foreign("patch_embed.conv1.weight") | names("aux_head.weight"),
    "Hugging Face": names("vit.embeddings.cls_token", "vit.encoder.layer.0.attention.attention.query.weight"),
    "torchvision": names("class_token", "conv_proj.weight", "encoder.layers.encoder_layer_0.ln_1.weight"),
    "not a checkpoint of a vision transformer": names("net.weight"),
}


@pytest.mark.parametrize("family", FOREIGN)
def test_another_family_is_refused_by_its_name(tmp_path, family):
    assert family in refusal(saved(tmp_path, FOREIGN[family]))
    assert family in refusal(saved(tmp_path, {"model": FOREIGN[family]}), model="deit_tiny_patch16_224")


def changed(**tensors: Tensor | None) -> dict[str, Tensor]:
    weights = hollow("deit_tiny_patch16_224") | {key.replace("__", "."): value for key, value in tensors.items()}
    return {key: value for key, value in weights.items() if value is not None}


@pytest.mark.parametrize(
    ("weights", "hint"),
    [
        (changed(head__bias=torch.zeros(7)), "head.bias [7]"),
        (changed(head__weight=torch.zeros(3, 100)), "head.weight [3, 100]"),
        (changed(head__weight=None), "head.bias [1000]"),
        (changed(pos_embed=torch.zeros(1, 200, 192)), "pos_embed [1, 200, 192]"),
        (changed(pos_embed=torch.zeros(1, 0, 192)), "pos_embed [1, 0, 192]"),
        (changed(pos_embed=torch.zeros(1, 0, 192), mask_token=torch.zeros(1, 192)), "pos_embed [1, 0, 192]"),
        (changed(blocks__11__norm2__weight=None), "no known architecture"),
        (changed(blocks__3__attn__qkv__bias=torch.zeros(3)), "no known architecture"),
        (changed(extra=torch.zeros(3)), "no known architecture"),
        (changed(head__weight=torch.zeros(())), "no known architecture"),
        (changed(cls_token=torch.zeros(3)), "not a checkpoint of a vision transformer"),
        (changed(patch_embed__proj__weight=torch.zeros(192, 768)), "not a checkpoint of a vision transformer"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tensors_that_fit_nothing(tmp_path, weights, hint):
    path = saved(tmp_path, {"model": weights})
    assert hint in refusal(path)
    refusal(path, model="deit_tiny_patch16_224")


def test_the_differences_to_a_named_model_are_said(tmp_path):
    path = saved(tmp_path, changed(blocks__11__norm2__weight=None, extra=torch.zeros(3)))
    message = refusal(path, model="deit_tiny_patch16_224")
    assert "missing blocks.11.norm2.weight" in message
    assert "unexpected extra" in message
    message = refusal(saved(tmp_path, hollow("deit_tiny_patch16_224")), model="deit_small_patch16_224")
    assert "width 192, 12 blocks, patch 16" in message


def test_an_unknown_model_has_a_near_name(tmp_path):
    path = saved(tmp_path, hollow("deit_tiny_patch16_224"))
    with pytest.raises(InputError, match="deit_tiny_patch16_224"):
        read_checkpoint(path, "deit_tiny_patch16_244")
    with pytest.raises(InputError, match=r"CHECKPOINT.*Did you mean 'deit_tiny_patch16_224' or '"):
        read_checkpoint("deit_tiny_patch16_244")
    with pytest.raises(InputError, match="resnet18"):
        read_checkpoint(path, "resnet18")
    check_model_name("deit_tiny_patch16_224", where="--model")


def test_a_name_that_cannot_be_one_is_refused(tmp_path):
    for source in ("x" * 300, "x" * 5000 + ".pth", ""):
        with pytest.raises(InputError):
            read_checkpoint(source)


def test_a_timm_name_and_another_model(tmp_path):
    with pytest.raises(InputError, match="already says which model"):
        read_checkpoint("deit_tiny_patch16_224", "deit_small_patch16_224")


def test_a_timm_name_without_network(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MissingRequirement, match="not in the hub's cache") as caught:
        read_checkpoint("deit_tiny_patch16_224.fb_in1k")
    assert caught.value.exit_code == 3


def test_an_image_size_that_no_memory_holds():
    model = timm.create_model("test_vit")
    with pytest.raises(InputError, match="too large for memory"):
        set_image_size_(model, 16 * 10**11)
