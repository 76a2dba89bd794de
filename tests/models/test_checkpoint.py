"""What a checkpoint is: architecture, image size, classes and token reduction, read from the layouts people release."""

import argparse
from typing import Any

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from evit_deploy.errors import InputError
from evit_deploy.models.checkpoint import Checkpoint, build_model, preprocess_of, read_checkpoint, resolve_tokens
from evit_deploy.tokens.plan import TokenSpec
from tests.support.checkpoints import refusal, saved
from tests.support.models import hollow, of_kind, seeded, write_checkpoint

IMAGENET = (0.485, 0.456, 0.406)
HALF = (0.5, 0.5, 0.5)


# Layouts, as they are released.


@pytest.fixture(scope="module")
def deit_tiny() -> dict[str, Tensor]:
    """The smallest real architecture with weights from a seed."""
    return dict(seeded("deit_tiny_patch16_224", num_classes=1000).state_dict())


def as_deit(weights: dict[str, Tensor]) -> dict[str, Any]:
    return {"model": weights}


def as_evit(weights: dict[str, Tensor]) -> dict[str, Any]:
    args = argparse.Namespace(
        model="deit_tiny_patch16_shrink_base", base_keep_rate=0.7, drop_loc="(3, 6, 9)", fuse_token=True, lr=2e-5,
        output_dir=None, distributed=True,
    )  # fmt: skip
    return {
        "model": weights,
        "optimizer": {"state": {0: {"step": 1, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 8e-5}]},
        "lr_scheduler": {"base_values": [8e-5]},
        "epoch": 29,
        "model_ema": {name: value + 1 for name, value in weights.items()},
        "scaler": {"scale": 65536.0},
        "args": args,
    }


def as_timm_trainer(weights: dict[str, Tensor]) -> dict[str, Any]:
    return {
        "epoch": 9, "arch": "deit_tiny_patch16_224", "version": 2, "metric": 71.1,
        "state_dict": {f"module.{name}": value + 1 for name, value in weights.items()},
        "state_dict_ema": {f"module.{name}": value for name, value in weights.items()},
        "args": argparse.Namespace(model="deit_tiny_patch16_224"),
    }  # fmt: skip


@pytest.mark.parametrize("layout", [as_deit, as_evit, as_timm_trainer, dict])
def test_a_layout_gives_the_same_model(tmp_path, deit_tiny, layout):
    checkpoint = read_checkpoint(saved(tmp_path, layout(deit_tiny)))
    assert checkpoint.model == "deit_tiny_patch16_224"
    assert checkpoint.model_args == {"num_classes": 1000, "img_size": 224}
    model = build_model(checkpoint)
    assert not model.training
    assert model.state_dict().keys() == deit_tiny.keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, deit_tiny[name]), name


def test_which_set_was_used_is_noted(tmp_path, deit_tiny):
    notes = read_checkpoint(saved(tmp_path, as_evit(deit_tiny))).notes
    assert any("model_ema" in note and "'model' is used" in note for note in notes)


# Recognizing an architecture takes names and shapes only.

ARCHITECTURES = [
    "deit_tiny_patch16_224",
    "deit_small_patch16_224",
    "deit_base_patch16_384",
    "deit_small_distilled_patch16_224",
    "deit_base_distilled_patch16_384",
    "deit3_small_patch16_224",
    "vit_small_patch32_224",
    "vit_base_patch8_224",
    "vit_small_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
    "vit_base_patch16_clip_224",
]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_is_recognized(tmp_path, name):
    with torch.device("meta"):
        wanted = timm.create_model(name, pretrained=False)
    checkpoint = read_checkpoint(saved(tmp_path, {"model": hollow(name)}))
    # One network has one name here, whatever its image size; that is an argument.
    assert checkpoint.model.rsplit("_", 1)[0] == name.rsplit("_", 1)[0]
    assert checkpoint.model_args["img_size"] == wanted.patch_embed.img_size[0]
    assert checkpoint.model_args["num_classes"] == wanted.num_classes
    with torch.device("meta"):
        rebuilt = timm.create_model(checkpoint.model, pretrained=False, **checkpoint.model_args)
    assert {k: v.shape for k, v in rebuilt.state_dict().items()} == {k: v.shape for k, v in checkpoint.weights.items()}


def test_deit_or_augreg_vit_is_said_and_model_decides(tmp_path):
    path = saved(tmp_path, {"model": hollow("vit_small_patch16_224")})
    checkpoint = read_checkpoint(path)
    assert checkpoint.model == "deit_small_patch16_224"
    note, warning = checkpoint.notes
    assert "deit_small_patch16_224 and vit_small_patch16_224" in note
    assert warning.startswith("Warning: nothing in the checkpoint says how its images were normalized. mean 0.485")
    assert "--model" in note
    decided = read_checkpoint(path, "vit_small_patch16_224")
    assert decided.model == "vit_small_patch16_224"
    assert decided.notes == []
    assert preprocess_of(checkpoint, build_model(checkpoint)).mean == IMAGENET
    assert preprocess_of(decided, build_model(decided)).mean == HALF


def test_two_clips_with_other_activations_are_told(tmp_path):
    path = saved(tmp_path, hollow("vit_base_patch32_clip_quickgelu_224"))
    (note,) = read_checkpoint(path).notes
    assert "vit_base_patch32_clip_quickgelu_224" in note
    assert read_checkpoint(path, "vit_base_patch32_clip_quickgelu_224").model == "vit_base_patch32_clip_quickgelu_224"


@pytest.mark.parametrize("name", ["deit_small_distilled_patch16_224", "deit3_small_patch16_224"])
def test_an_architecture_of_its_own_is_not_in_doubt(tmp_path, name):
    assert read_checkpoint(saved(tmp_path, hollow(name))).notes == []


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("deit_small_patch16_224", 512),
        ("deit_small_distilled_patch16_224", 288),
        ("deit3_small_patch16_224", 160),
        ("vit_small_patch14_reg4_dinov2", 224),
    ],
)
def test_the_image_size_is_read_from_the_position_embedding(tmp_path, name, size):
    checkpoint = read_checkpoint(saved(tmp_path, hollow(name, img_size=size)))
    assert checkpoint.model == name
    assert checkpoint.model_args["img_size"] == size


@pytest.mark.parametrize("classes", [0, 1, 10, 21843])
@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_the_class_count_is_read_from_the_head(tmp_path, name, classes):
    checkpoint = read_checkpoint(saved(tmp_path, hollow(name, num_classes=classes)))
    assert checkpoint.model == name
    assert checkpoint.model_args["num_classes"] == classes


def published_dinov2(name: str) -> dict[str, Tensor]:
    """DINOv2's own names: a position for the class token, none for the registers, and a mask token."""
    weights = dict(seeded(name, img_size=518, num_classes=0).state_dict())
    width = weights["cls_token"].shape[-1]
    weights["mask_token"] = torch.zeros(1, width)
    if "reg_token" in weights:
        weights["register_tokens"] = weights.pop("reg_token")
        weights["pos_embed"] = torch.cat([torch.full((1, 1, width), 0.5), weights["pos_embed"]], dim=1)
    return weights


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"])
def test_dinov2_as_it_is_published(tmp_path, name):
    published = published_dinov2(name)
    checkpoint = read_checkpoint(saved(tmp_path, published, f"{name}.pth"))
    assert checkpoint.model == name
    assert checkpoint.model_args == {"num_classes": 0, "img_size": 518}
    model: Any = build_model(checkpoint)
    assert "mask_token" not in model.state_dict()
    if "register_tokens" in published:  # timm has no position for the class token here: it is in the token
        assert torch.equal(model.reg_token, published["register_tokens"])
        assert torch.equal(model.cls_token, published["cls_token"] + published["pos_embed"][:, :1])
        assert torch.equal(model.pos_embed, published["pos_embed"][:, 1:])
    else:
        assert torch.equal(model.pos_embed, published["pos_embed"])


def test_deit3_as_it_is_published(tmp_path):
    ours = seeded("deit3_small_patch16_224", num_classes=1000).state_dict()
    published = {
        name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): value for name, value in ours.items()
    }
    assert "blocks.11.gamma_2" in published
    checkpoint = read_checkpoint(saved(tmp_path, {"model": published}))
    assert checkpoint.model == "deit3_small_patch16_224"
    assert checkpoint.model_args == {"num_classes": 1000, "img_size": 224}
    for name, value in build_model(checkpoint).state_dict().items():
        assert torch.equal(value, ours[name]), name


# The reduction that the weights were trained with.


def evit_args(**values: Any) -> dict[str, Any]:
    return {"model": hollow("deit_tiny_patch16_224"), "args": argparse.Namespace(**values)}


@pytest.mark.parametrize(
    ("values", "spec"),
    [
        (
            {"base_keep_rate": 0.7, "drop_loc": "(3, 6, 9)", "fuse_token": True},
            TokenSpec(keep_rate=0.7, locations=(3, 6, 9), fuse=True),
        ),
        (
            {"base_keep_rate": 0.5, "drop_loc": "(4, 8)", "fuse_token": False},
            TokenSpec(keep_rate=0.5, locations=(4, 8), fuse=False),
        ),
        ({"base_keep_rate": 0.9}, TokenSpec(keep_rate=0.9, locations=(3, 6, 9), fuse=False)),
        ({"base_keep_rate": 0.9, "drop_loc": "[3]"}, TokenSpec(keep_rate=0.9, locations=(3,), fuse=False)),
        ({"base_keep_rate": 0.9, "drop_loc": "6"}, TokenSpec(keep_rate=0.9, locations=(6,), fuse=False)),
        ({"base_keep_rate": 0.9, "drop_loc": (2, 5)}, TokenSpec(keep_rate=0.9, locations=(2, 5), fuse=False)),
        (
            {"base_keep_rate": [0.9, 0.8], "drop_loc": "(3, 6)"},
            TokenSpec(keep_rate=(0.9, 0.8), locations=(3, 6), fuse=False),
        ),
    ],
)
def test_the_arguments_of_official_evit(tmp_path, values, spec):
    content = evit_args(**values)
    assert read_checkpoint(saved(tmp_path, content), "deit_tiny_patch16_224").tokens == spec


@pytest.mark.parametrize("values", [{}, {"drop_loc": "(3, 6, 9)"}, {"lr": 1e-3, "model": "deit_tiny_patch16_224"}])
def test_arguments_of_another_training_say_nothing_about_tokens(tmp_path, values):
    checkpoint = read_checkpoint(saved(tmp_path, evit_args(**values)), "deit_tiny_patch16_224")
    assert checkpoint.tokens is None


@pytest.mark.parametrize(
    "values",
    [
        {"base_keep_rate": 0},
        {"base_keep_rate": 1.5},
        {"base_keep_rate": -0.7},
        {"base_keep_rate": float("nan")},
        {"base_keep_rate": "much"},
        {"base_keep_rate": None},
        {"base_keep_rate": {}},
        {"base_keep_rate": []},
        {"base_keep_rate": 0.7, "drop_loc": "__import__('os').system('touch {marker}')"},
        {"base_keep_rate": 0.7, "drop_loc": "(3, 6"},
        {"base_keep_rate": 0.7, "drop_loc": "(9, 6, 3)"},
        {"base_keep_rate": 0.7, "drop_loc": "(3, 3)"},
        {"base_keep_rate": 0.7, "drop_loc": "(-1, 3)"},
        {"base_keep_rate": 0.7, "drop_loc": "(3.5,)"},
        {"base_keep_rate": 0.7, "drop_loc": "{'a': 1}"},
        {"base_keep_rate": 0.7, "drop_loc": None},
        {"base_keep_rate": 0.7, "drop_loc": "(" * 5000},
        {"base_keep_rate": 0.7, "drop_loc": "-" * 100000 + "1"},
        {"base_keep_rate": 0.7, "drop_loc": "\0"},
        {"base_keep_rate": 0.7, "drop_loc": "9" * 5000},
        {"base_keep_rate": (0.7, 0.6), "drop_loc": "(3, 6, 9)"},
    ],
    ids=lambda values: str(values)[:60],
)
def test_arguments_that_make_no_sense(tmp_path, values):
    marker = tmp_path / "ran"
    values = {key: v.replace("{marker}", str(marker)) if isinstance(v, str) else v for key, v in values.items()}
    message = refusal(saved(tmp_path, evit_args(**values)), model="deit_tiny_patch16_224")
    assert "make no sense" in message
    assert "base_keep_rate" in message
    assert len(message) < 1500
    assert not marker.exists()


def checkpoint_with(tokens: TokenSpec | None) -> Checkpoint:
    return Checkpoint("weights.pth", None, {}, "deit_tiny_patch16_224", {}, tokens=tokens)


def test_the_callers_tokens_win_and_that_is_said():
    own = TokenSpec(keep_rate=0.7, locations=(3, 6, 9), fuse=False)
    assert resolve_tokens(checkpoint_with(own)) == (own, [])
    spec, notes = resolve_tokens(checkpoint_with(own), keep_rate=0.5, fuse=True)
    assert spec == TokenSpec(keep_rate=0.5, locations=(3, 6, 9), fuse=True)
    assert len(notes) == 2
    assert "0.5 replaces" in notes[0]
    assert "0.7" in notes[0]
    assert resolve_tokens(checkpoint_with(own), keep_rate=0.7) == (own, [])
    assert resolve_tokens(checkpoint_with(None), keep_rate=0.7) == (TokenSpec(keep_rate=0.7), [])


def test_somebody_must_give_a_keep_rate():
    with pytest.raises(InputError, match="--keep-rate"):
        resolve_tokens(checkpoint_with(None), locations=(3,))


# Image sizes.


@pytest.mark.parametrize("kind", ["plain", "distilled", "layer scale"])
@pytest.mark.parametrize("size", [64, 128, 144])
def test_position_embedding_is_resampled_as_timm_does(tmp_path, kind, size):
    path = write_checkpoint(tmp_path / "weights.safetensors", kind)
    before: Any = of_kind(kind)
    after: Any = build_model(read_checkpoint(path), size)
    prefix = 0 if before.no_embed_class else before.num_prefix_tokens
    wanted = resample_abs_pos_embed(before.pos_embed.detach(), [size // 16] * 2, num_prefix_tokens=prefix)
    assert torch.equal(after.pos_embed, wanted)
    assert after.patch_embed.img_size == (size, size)
    assert after(torch.zeros(1, 3, size, size)).shape == (1, 10)


@pytest.mark.parametrize("size", [0, -16, 1, 15, 97, 100])
def test_an_image_size_that_the_patches_do_not_divide(checkpoint_file, size):
    with pytest.raises(InputError) as caught:
        build_model(read_checkpoint(checkpoint_file), size)
    message = str(caught.value)
    assert f"got {size}" in message
    assert "multiple of 16" in message
