"""Checkpoints of Evo-ViT in the layout of its authors: recognized, opened, written and read back."""

import argparse

import numpy as np
import pytest
import torch

from evit_deploy.data.preprocess import Preprocess
from evit_deploy.errors import InputError
from evit_deploy.models.checkpoint import build_model, read_checkpoint, resolve_tokens, save_checkpoint
from evit_deploy.models.layouts import evo_vit
from evit_deploy.tokens.choices import original_patches
from evit_deploy.tokens.plan import TokenSpec
from evit_deploy.tokens.reduce import capture, reduce_tokens_, token_plan
from tests.support.official import read_official


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    path = tmp_path_factory.mktemp("evo") / "evo_deit_tiny.pth"
    weights = {name: torch.from_numpy(value) for name, value in read_official("evo_deit_tiny").weights.items()}
    torch.save({"model": weights, "epoch": 299, "args": argparse.Namespace(model="evo_deit_tiny_patch16_224")}, path)
    return path


def test_a_released_file_is_known_without_a_flag(released):
    checkpoint = read_checkpoint(released)
    assert checkpoint.model == "deit_tiny_patch16_224"
    assert checkpoint.model_args == {"num_classes": 100, "img_size": 224, "global_pool": "avg"}
    assert checkpoint.tokens == TokenSpec(keep_rate=0.5, fuse=False, method="evo-vit")
    assert sorted(checkpoint.method_weights) == ["head_cls.bias", "head_cls.weight", "norm_cls.bias", "norm_cls.weight"]
    assert checkpoint.notes == []
    assert resolve_tokens(checkpoint) == (checkpoint.tokens, [])
    with pytest.raises(InputError, match="was trained with the method 'evo-vit'"):
        resolve_tokens(checkpoint, method="evit", keep_rate=0.7)


@pytest.mark.parametrize("form", ["stage", "layer"])
def test_its_answers_are_the_official_ones(released, form):
    file = read_official("evo_deit_tiny")
    checkpoint = read_checkpoint(released)
    spec = TokenSpec(0.5, method="evo-vit", options={"layer_wise": form == "layer"})
    model = reduce_tokens_(build_model(checkpoint), spec)
    with capture(model) as seen:
        logits = model(torch.from_numpy(file.images)).numpy()
    assert np.abs(logits - file.arrays[f"{form}:logits"]).max() < 1e-4
    chosen = original_patches([choice.numpy() for choice in seen.kept], token_plan(model))
    for ours, theirs in zip(chosen, file.arrays[f"{form}:chosen"], strict=True):
        assert [set(row) for row in ours.tolist()] == [set(row[:98]) for row in theirs.tolist()]


def test_the_names_go_both_ways(released):
    theirs = {name: torch.from_numpy(value) for name, value in read_official("evo_deit_tiny").weights.items()}
    there = evo_vit.to_timm(theirs)
    back = evo_vit.to_released(there)
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)


def test_what_is_saved_has_all_that_was_opened(released, tmp_path):
    checkpoint = read_checkpoint(released)
    assert checkpoint.tokens is not None
    model = reduce_tokens_(build_model(checkpoint), checkpoint.tokens)
    checkpoint.preprocess = Preprocess.from_model(model)
    save_checkpoint(tmp_path / "own.safetensors", model, checkpoint)
    again = read_checkpoint(tmp_path / "own.safetensors")
    assert (again.model, again.model_args, again.tokens) == (
        checkpoint.model, checkpoint.model_args, checkpoint.tokens,
    )  # fmt: skip
    for before, after in (
        (checkpoint.weights, again.weights), (checkpoint.method_weights, again.method_weights),
    ):  # fmt: skip
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
