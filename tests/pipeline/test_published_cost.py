"""The cost that is quoted in advance is the paper's, of the model that the paper measured, and of no other."""

import pytest
import torch

from evit_deploy.models.checkpoint import Checkpoint
from evit_deploy.pipeline.convert import _training_notes
from evit_deploy.tokens.plan import TokenSpec

SMALL = "deit_small_patch16_224"
TASK = {"num_classes": 1000, "img_size": 224}


def told(model=SMALL, args=TASK, image_size=None, **tokens):
    checkpoint = Checkpoint("weights.pth", "0" * 64, {"cls_token": torch.zeros(1)}, model, args)
    (note,) = _training_notes(checkpoint, TokenSpec(**({"keep_rate": 0.7} | tokens)), image_size)
    assert "never trained with token reduction" in note
    return note


def test_of_deit_s_the_figure_of_its_rate_is_told():
    assert "For DeiT-S at 0.7 that costs 1.3 points of ImageNet top-1 (EViT paper, table 1)." in told()
    assert "costs 6.0 points" in told(keep_rate=0.5)
    assert "costs, in points of ImageNet top-1, 0.1 at 0.9, 0.6 at 0.8" in told(keep_rate=0.75)
    assert "1.3 points" in told(f"{SMALL}.fb_in1k", locations=(3, 6, 9), image_size=224)


@pytest.mark.parametrize(
    "model",
    ["deit_base_patch16_224", "deit_tiny_patch16_224", "deit_small_distilled_patch16_224", "deit3_small_patch16_224",
     "vit_small_patch16_224", "deit_base_patch16_384", "lvvit_s", "vit_small_patch14_dinov2"],
)  # fmt: skip
def test_of_other_models_none_is_told(model):
    assert "costs" not in told(model)


@pytest.mark.parametrize(
    "changes",
    [{"args": TASK | {"num_classes": 10}}, {"args": TASK | {"img_size": 384}}, {"image_size": 384},
     {"args": TASK | {"depth": 6}}, {"fuse": False}, {"locations": (2, 6, 9)}, {"method": "dynamicvit"}],
    ids=str,
)  # fmt: skip
def test_of_another_task_or_way_of_reducing_none_is_told(changes):
    assert "costs" not in told(**changes)
