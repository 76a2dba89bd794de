"""Every layout against its owner's own code: the same answers, and the same tensors on the way back."""

import pytest
import torch
import torchvision

from evit_deploy.models.checkpoint import build_model
from evit_deploy.models.create import create_model
from tests.support.layouts import (
    OWNERS,
    SIZE,
    apart,
    checkpoint_of,
    draw_,
    found_in,
    identified,
    name_in_file,
    owned,
    pictures,
    written,
)  # fmt: skip

each_owner = pytest.mark.parametrize("name", OWNERS)
# What is written, and what a model has in memory: transformers 5 renames as it reads and writes.
each_form = pytest.mark.parametrize("form", ["file", "memory"])


def tensors_of(model, form, folder):
    weights, config = written(model, folder)
    return (weights if form == "file" else dict(model.state_dict())), config


@each_owner
@each_form
@torch.inference_mode()
def test_its_answers_are_the_owners(tmp_path, name, form):
    model, owner = owned(name), OWNERS[name]
    identity = identified(*tensors_of(model, form, tmp_path))
    assert (identity.model, identity.output) == (owner.model, owner.output)
    assert identity.model_args["img_size"] == SIZE
    assert identity.model_args["num_classes"] == (5 if owner.output == "logits" else 0)
    ours = build_model(checkpoint_of(identity))(pictures())
    assert apart(ours, owner.answer(model, pictures())) <= 1e-5


@each_owner
@each_form
def test_the_names_go_both_ways(tmp_path, name, form):
    weights, config = tensors_of(owned(name), form, tmp_path)
    found, prefix = found_in(weights, config)
    assert found.table is not None
    assert all(left.startswith(OWNERS[name].left_out) for left in found.left_out)
    back = found.table.to_released(found.weights) | found.left_out
    again = {name_in_file(key, prefix): value for key, value in back.items()}
    assert again.keys() == weights.keys()
    for key, value in weights.items():
        assert again[key].dtype == value.dtype
        assert torch.equal(again[key], value), key


@each_owner
def test_what_is_left_out_is_said(tmp_path, name):
    weights, config = written(owned(name), tmp_path)
    notes = " ".join(identified(weights, config).notes)
    for beginning in OWNERS[name].left_out:
        assert beginning.removeprefix("../").split(".")[0] in notes
    assert ("left out" in notes) == bool(OWNERS[name].left_out)


def test_the_released_names_of_torchvision():
    weights = {
        key.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): value
        for key, value in owned("torchvision").state_dict().items()
    }
    found, _ = found_in(weights)
    assert found.table is not None
    assert found.table.to_released(found.weights).keys() == weights.keys()
    with torch.inference_mode():
        ours = build_model(checkpoint_of(identified(weights)))(pictures())
        assert apart(ours, owned("torchvision")(pictures())) <= 1e-5


@pytest.mark.slow  # 86 million parameters
@torch.inference_mode()
def test_vit_b_16_of_torchvision_in_full_size():
    model = draw_(torchvision.models.vit_b_16())
    identity = identified(dict(model.state_dict()))
    assert (identity.model, identity.model_args) == ("deit_base_patch16_224", {"num_classes": 1000, "img_size": 224})
    assert identity.notes == []
    images = pictures(2, 224)
    assert apart(build_model(checkpoint_of(identity))(images), model(images)) <= 1e-5


@pytest.mark.parametrize(
    ("build", "name"),
    [
        ("vit_b_32", "vit_base_patch32_224"), ("vit_l_16", "vit_large_patch16_224"),
        ("vit_l_32", "vit_large_patch32_224"), ("vit_h_14", "vit_huge_patch14_224"),
    ],
)  # fmt: skip
def test_the_sizes_of_torchvision(build, name):
    with torch.device("meta"):
        model = getattr(torchvision.models, build)()
    identity = identified(dict(model.state_dict()))
    assert identity.model == name
    # vit_h_14 has 16 heads of width 80: they come with timm's name and not from the usual width.
    with torch.device("meta"):
        built = create_model(identity.model, identity.model_args)
    assert built.blocks[0].attn.num_heads == model.encoder.layers[0].num_heads
    assert identity.notes == []
