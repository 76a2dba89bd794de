"""Evo-LeViT: published sizes, the released layouts, the arithmetic by hand and the official code's own answers."""

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx.inliner
import onnx.shape_inference
import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from evit_deploy.errors import CheckpointError, InputError, UnsupportedModelError
from evit_deploy.export.precision import set_precision
from evit_deploy.models import levit
from evit_deploy.models.checkpoint import Checkpoint, build_model, read_checkpoint, resolve_tokens
from evit_deploy.models.identify import identify
from evit_deploy.models.layouts import levit as layouts
from evit_deploy.models.layouts.found import Held
from evit_deploy.models.levit import HEADS, SIZES, Downsample, EvoLeViT
from evit_deploy.models.levit_lowered import lower
from evit_deploy.tokens.choices import original_patches, patch_margins, patch_rows
from evit_deploy.tokens.plan import TokenSpec
from evit_deploy.tokens.reduce import capture, dense_twin, reduce_tokens_, set_keep_rate_, token_plan
from tests.support import levit_oracle as oracle
from tests.support.checkpoints import saved
from tests.support.exports import answers, assert_close, export_onnx, nodes, operators
from tests.support.levit_golden import CLASSES_KEPT, GOLDEN, TINY_SEED
from tests.support.models import hollow, preprocess_for
from tests.support.official import read_official

# What the README of LeViT says: millions of parameters, millions of multiply-adds (our figure where it rounds).
PUBLISHED = {
    "levit_128s": (7.8, 305),
    "levit_128": (9.2, 406),
    "levit_192": (11, 658),
    "levit_256": (19, 1120),
    "levit_384": (39, 2353),
}
LAST = {2: 24, 5: 8, 9: 2}
"""The tiny model's choices: half of 49, 16 and 4 candidates, from each stage's first block that is not dense."""
each_size = pytest.mark.parametrize("name", SIZES)


def filled(name: str = "evo_levit_128s", seed: int = 0, **args: Any) -> EvoLeViT:
    """A model with the oracle's weights; the tiny one, unless arguments are given."""
    model: Any = timm.create_model(name, **(args or oracle.TINY_ARGS))
    drawn = oracle.weights({key: value.shape for key, value in model.state_dict().items()}, seed)
    model.load_state_dict({key: torch.from_numpy(value) for key, value in drawn.items()})
    return model.eval()


def weights_of(model: EvoLeViT) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in model.state_dict().items()}


def sizes_of(name: str) -> oracle.Sizes:
    return oracle.Sizes(SIZES[name]["num_heads"], SIZES[name]["key_dim"], SIZES[name]["depth"])


def counts(model: EvoLeViT) -> dict[int, int]:
    """Block -> candidates."""
    grids = [model.patch_embed.grid_size]
    grids += [levit.halved(block.grid) for block in model.blocks if isinstance(block, Downsample)]
    pairs = zip(levit.stages(model), grids, strict=True)
    return {block: math.prod(grid) for blocks, grid in pairs for block in blocks}


def reduce_(model: EvoLeViT, keep: dict[int, int]) -> EvoLeViT:
    """Reduces a model to so many informative candidates at these blocks."""
    of = counts(model)
    rates = tuple((keep[block] + 0.5) / of[block] for block in keep)
    spec = TokenSpec(keep_rate=rates or 1.0, locations=tuple(keep) or None, method="evo-vit")
    reduce_tokens_(model, spec)
    assert {row.block: row.keep for row in token_plan(model).locations} == keep
    return model


HALF = TokenSpec(keep_rate=0.5, method="evo-vit")
"""As released: the method's own locations."""


# ---- sizes


@each_size
def test_parameters_and_multiply_adds_are_those_of_levit(name):
    plain: Any = timm.create_model(name.removeprefix("evo_")).eval()
    millions, macs = PUBLISHED[name.removeprefix("evo_")]
    count = sum(parameter.numel() for parameter in plain.parameters())
    assert count / 1e6 == pytest.approx(millions, rel=0.01)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        plain(torch.zeros(1, 3, 224, 224))
    assert counter.get_total_flops() / 2e6 == pytest.approx(macs, rel=0.007)  # 256's own counter says 1128
    # The Evo form: less the attention biases; a class token, position embeddings, an α an attention, two more heads.
    model: Any = timm.create_model(name)
    biases = sum(value.numel() for key, value in plain.named_parameters() if "attention_biases" in key)
    widths = SIZES[name]["embed_dim"]
    positions = 197 * 2 * widths[0] + 50 * widths[1] + widths[0]
    alphas = sum(SIZES[name]["depth"]) + 2
    heads = 2 * (1000 * (widths[-1] + 1) + 2 * widths[-1])
    assert sum(p.numel() for p in model.parameters()) == count - biases + positions + alphas + heads


def test_tensors_are_those_of_the_release():
    def normed(name: str, *shape: int) -> dict[str, list[int]]:
        norm = {f"{name}.bn.{key}": [shape[0]] for key in ("weight", "bias", "running_mean", "running_var")}
        return norm | {f"{name}.bn.num_batches_tracked": [], f"{name}.c.weight": list(shape)}

    wanted = {"cls_token": [1, 1, 128], "poss": [1, 197, 128]}
    for i, (into, out) in enumerate([(3, 16), (16, 32), (32, 64), (64, 128)]):
        wanted |= normed(f"patch_embed.{2 * i}", out, into, 3, 3)
    kinds = "BBDMBBBDMBBBB"
    widths, heads, stage = (128, 256, 384), (4, 6, 8), 0
    for i, kind in enumerate(kinds):
        width, key = widths[stage], 16 * heads[stage]
        if kind == "B":
            wanted |= normed(f"blocks.{i}.m1.m.qkv", 4 * key, width) | normed(f"blocks.{i}.m1.m.proj.1", width, 2 * key)
            wanted |= normed(f"blocks.{i}.m2.m.0", 2 * width, width) | normed(f"blocks.{i}.m2.m.2", width, 2 * width)
            wanted |= {f"blocks.{i}.m1.m.learn_tradeoff": [1]}
        elif kind == "D":
            wanted |= normed(f"blocks.{i}.kv", 5 * width, width) | normed(f"blocks.{i}.q.1", width, width)
            wanted |= normed(f"blocks.{i}.proj.1", widths[stage + 1], 4 * width)
            wanted |= {f"blocks.{i}.learn_tradeoff": [1], f"blocks.{i}.poss": [1, (197, 50)[stage], width]}
            stage += 1
        else:
            wanted |= normed(f"blocks.{i}.m.0", 2 * width, width) | normed(f"blocks.{i}.m.2", width, 2 * width)
    for head in HEADS:
        wanted |= {f"{head}.bn.{key}": [384] for key in ("weight", "bias", "running_mean", "running_var")}
        wanted |= {f"{head}.bn.num_batches_tracked": [], f"{head}.l.weight": [1000, 384], f"{head}.l.bias": [1000]}
    assert {key: list(value.shape) for key, value in hollow("evo_levit_128s").items()} == wanted


# ---- the arithmetic


@pytest.mark.parametrize("alpha", [None, 0.5], ids=["α learned", "α fixed"])
@pytest.mark.parametrize(
    "keep",
    [{}, LAST, {2: 10, 5: 3, 9: 1}, {1: 24, 2: 10, 5: 8, 6: 3, 9: 2}, {2: 24}, {9: 3}],
    ids=["dense", "halves", "fewer", "twice a stage", "first stage alone", "last stage alone"],
)
@torch.inference_mode()
def test_the_model_is_what_the_papers_say(keep, alpha):
    model, x = filled(), oracle.pictures(3, 112, TINY_SEED)
    wanted = oracle.evo_levit(weights_of(model), x, oracle.TINY, keep, alpha)
    reduce_(model, keep)
    model.learn_alpha_(alpha is None)
    with capture(model) as seen:
        logits = model(torch.from_numpy(x))
    heads, orders = model.head_logits(model.forward_features(torch.from_numpy(x))), seen.kept
    assert np.abs(logits.numpy() - wanted.logits).max() < 5e-5
    for name in HEADS:
        assert np.abs(heads[name].numpy() - wanted.heads[name]).max() < 5e-5
    assert len(orders) == len(wanted.choices) == len(keep)
    stages = [next(s for s, blocks in enumerate(levit.stages(model)) if block in blocks) for block in keep]
    for place, (order, choice) in enumerate(zip(orders, wanted.choices, strict=True)):
        if stages[place] not in stages[:place]:  # later ones number the candidates as they stand by then
            assert np.array_equal(order.numpy(), choice)


@torch.inference_mode()
def test_the_smallest_real_size_is_what_the_papers_say():
    model, x = filled("evo_levit_128s", num_classes=1000), oracle.pictures(2, 224)
    reduce_tokens_(model, HALF)
    keep = {row.block: row.keep for row in token_plan(model).locations}
    assert keep == {4: 24, 9: 8}
    wanted = oracle.evo_levit(weights_of(model), x, sizes_of("evo_levit_128s"), keep)
    with capture(model) as seen:
        logits = model(torch.from_numpy(x))
    assert np.abs(logits.numpy() - wanted.logits).max() < 5e-5
    for order, choice in zip(seen.kept, wanted.choices, strict=True):
        assert np.array_equal(order.numpy(), choice)


@torch.inference_mode()
def test_every_part_of_it_matters():
    model, x = filled(), torch.from_numpy(oracle.pictures(3, 112, TINY_SEED))
    dense = model(x)
    halved = reduce_tokens_(model, HALF)(x)
    assert (halved - dense).abs().max() > 0.1
    for change in ({2: 12, 5: 8, 9: 2}, {2: 24, 5: 4, 9: 2}, {2: 24, 5: 8, 9: 1}, {5: 8, 9: 2}):
        assert (reduce_(model, change)(x) - halved).abs().max() > 1e-3
    reduce_tokens_(model, HALF)
    assert torch.equal(model(x), halved)
    model.learn_alpha_(False)
    assert (model(x) - halved).abs().max() > 0.01


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize(
    ("name", "options", "learned"),
    [
        ("tiny", {}, True),
        ("tiny, alpha fixed", {}, False),
        ("tiny, sorted in every block", {"layer_wise": True}, True),
    ],
)
@torch.inference_mode()
def test_the_tiny_model_answers_as_the_official_code(name, options, learned, precision):
    spec = TokenSpec(keep_rate=0.5, method="evo-vit", options=options)
    golden, model = np.load(GOLDEN)[name], reduce_tokens_(filled(), spec)
    model.learn_alpha_(learned)
    x = torch.from_numpy(oracle.pictures(3, 112, TINY_SEED))
    answer = model.double()(x.double()) if precision == "fp64" else model(x)
    assert np.abs(answer.numpy() - golden).max() < (1e-10 if precision == "fp64" else 1e-4)


def test_the_golden_answers_differ():
    golden = np.load(GOLDEN)
    for other in ("tiny, alpha fixed", "tiny, sorted in every block"):
        assert np.abs(golden["tiny"] - golden[other]).max() > 0.1


@each_size
@torch.inference_mode()
def test_every_size_answers_as_the_official_code(name):
    model = reduce_tokens_(filled(name, num_classes=1000), HALF)
    x = torch.from_numpy(oracle.pictures(1, 224))
    assert np.abs(model(x).numpy()[:, :CLASSES_KEPT] - np.load(GOLDEN)[name]).max() < 1e-4


@torch.inference_mode()
def test_another_image_size_is_resampled():
    model = filled()
    wanted = resample_abs_pos_embed(model.poss.detach(), [5, 9], [7, 7], num_prefix_tokens=1)
    inner = [block for block in model.blocks if isinstance(block, Downsample)]
    wanted_inner = resample_abs_pos_embed(inner[1].poss.detach(), [3, 5], [4, 4], num_prefix_tokens=1)
    model.set_input_size(img_size=(80, 144))
    assert torch.equal(model.poss, wanted)
    assert torch.equal(inner[1].poss, wanted_inner)
    x = np.random.RandomState(3).standard_normal((2, 3, 80, 144)).astype(np.float32)
    for keep in ({}, {2: 22, 5: 7, 9: 3}):
        answer = reduce_(model, keep)(torch.from_numpy(x)).numpy()
        assert np.abs(answer - oracle.evo_levit(weights_of(model), x, oracle.TINY, keep).logits).max() < 5e-5
    with pytest.raises(AssertionError, match=r"built for \(80, 144\)"):
        model(torch.zeros(1, 3, 112, 112))
    model.set_input_size(img_size=112)
    with pytest.raises(UnsupportedModelError, match="another image size needs reduce_tokens_ again"):
        model(torch.zeros(1, 3, 112, 112))
    with pytest.raises(InputError, match="multiples of 16"):
        timm.create_model("evo_levit_128s", img_size=100)


# ---- plan and choices


@each_size
def test_plan_has_the_true_counts(name):
    model: Any = timm.create_model(name).eval()
    seen: list[int] = []
    for block in model.blocks:
        block.register_forward_hook(
            lambda _, inputs, output: seen.append((output[0] if isinstance(output, tuple) else output).shape[1])
        )
    for spec in (TokenSpec(keep_rate=1.0), HALF, TokenSpec(keep_rate=1.0)):
        plan = token_plan(reduce_tokens_(model, spec))
        seen.clear()
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            model(torch.zeros(1, 3, 224, 224))
        assert [row.tokens_out for row in plan.blocks] == seen
        # What stands for those that wait is a sum over them, which the plan leaves out as published figures do.
        widths = dict(
            zip((row.block for row in plan.locations), SIZES[name]["embed_dim"][-len(plan.locations) :], strict=False)
        )
        sums = sum(row.aside * widths[row.block] for row in plan.locations)
        assert plan.macs() == counter.get_total_flops() / 2 - sums
        assert plan.dense().macs() == token_plan(dense_twin(model)).macs()
        assert plan.dense().blocks == token_plan(dense_twin(model)).blocks
        for row, dense in zip(plan.blocks, plan.dense().blocks, strict=True):
            assert row.tokens_in + row.aside == dense.tokens_in + (row.aside > 0)


def test_locations_and_rates_are_those_that_were_asked_for():
    model: Any = timm.create_model("evo_levit_128")
    halved = {row.block: (row.keep, row.aside, row.tokens_in, row.choice_length) for row in reduced_rows(model, HALF)}
    assert halved == {2: (98, 98, 100, 196), 6: (24, 25, 26, 49), 12: (8, 8, 10, 16)}
    spec = TokenSpec(keep_rate=(1.0, 0.3, 0.99), method="evo-vit")
    assert [(row.block, row.keep) for row in reduced_rows(model, spec)] == [(6, 14), (12, 15)]
    spec = TokenSpec(keep_rate=(0.29, 0.7), locations=(3, 8), method="evo-vit")
    assert [(row.block, row.keep) for row in reduced_rows(model, spec)] == [(3, 56), (8, 34)]
    spec = TokenSpec(method="evo-vit", options={"layer_wise": True, "representative": True}, locations=(7, 13))
    sorted_in = [(row.block, row.keep, bool(row.places)) for row in reduced_rows(model, spec)]
    assert sorted_in == [(7, 24, True), (8, 24, False), (9, 24, False), *((i, 8, i == 13) for i in (13, 14, 15))]
    spec = TokenSpec(keep_rate=(0.29, 0.7), locations=(3, 8), method="evo-vit")
    reduce_tokens_(model, spec)
    middle = set_keep_rate_(model, 0.5)
    assert [(row.block, row.keep) for row in middle.locations] == [(3, 126), (8, 41)]
    assert not set_keep_rate_(model, 0.0).locations


def reduced_rows(model: EvoLeViT, spec: TokenSpec) -> tuple[Any, ...]:
    return token_plan(reduce_tokens_(model, spec)).locations


@torch.inference_mode()
def test_the_schedule_runs_from_dense_to_the_spec():
    model, x = filled(), torch.from_numpy(oracle.pictures(2, 112))
    dense = model(x)
    halved = reduce_tokens_(model, HALF)(x)
    set_keep_rate_(model, 0.0)
    assert (model(x) - dense).abs().max() < 1e-5
    set_keep_rate_(model, 1.0)
    assert torch.equal(model(x), halved)
    assert torch.equal(reduce_tokens_(model, TokenSpec(keep_rate=1.0))(x), dense)
    assert model.state_dict().keys() == filled().state_dict().keys()


@torch.inference_mode()
def test_choices_are_told_in_patches_of_the_image():
    model, x = reduce_(filled(), {2: 24, 5: 8, 6: 3, 9: 2}), oracle.pictures(3, 112, TINY_SEED)
    with capture(model) as seen:
        model(torch.from_numpy(x))
    plan, choices = token_plan(model), [choice.numpy() for choice in seen.kept]
    by_hand = oracle.evo_levit(weights_of(model), x, oracle.TINY, {2: 24, 5: 8, 6: 3, 9: 2}).choices
    grids = [np.arange(49), *[np.arange(49).reshape(7, 7)[::2, ::2].ravel()] * 2, np.array([0, 4, 28, 32])]
    told, rows = original_patches(choices, plan), patch_rows(choices, plan)
    margins = patch_margins([score.numpy() for score in seen.scores], choices, plan)
    for grid, patches, where, keep, order, margin in zip(
        grids, told, rows, (24, 8, 3, 2), by_hand, margins, strict=True
    ):
        assert np.array_equal(patches, grid[order[:, :keep]])
        for image in range(3):
            assert np.array_equal(where[image, grid[order[image]]], np.arange(len(grid)))
        assert (np.delete(where, grid, axis=1) == -1).all()
        assert np.isfinite(margin[:, grid]).all()
        assert np.isinf(np.delete(margin, grid, axis=1)).all()
    # The scores that are given are g itself: in the oracle's order they fall.
    for margin, order, grid in zip(margins, by_hand, grids, strict=True):
        assert (np.diff(np.take_along_axis(margin, grid[order], axis=1), axis=1) <= 0).all()


# ---- refusals


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (TokenSpec(keep_rate=0.7), "this method drops some. Use --method evo-vit"),
        (TokenSpec(keep_rate=0.7, method="slice"), "an Evo-LeViT with the method 'slice'"),
        (TokenSpec(keep_rate=(0.5, 0.5), method="evo-vit"), "got 2 rates for 3 locations (2,5,9)"),
        (TokenSpec(keep_rate=0.5, locations=(3,), method="evo-vit"), "a downsampling is no location"),
        (TokenSpec(keep_rate=0.5, locations=(0,), method="evo-vit"), "no attention before it to sort by"),
        (TokenSpec(keep_rate=0.5, locations=(11,), method="evo-vit"), "outside the model"),
        (TokenSpec(keep_rate=0.2, method="evo-vit"), "0.2 of 4, expected 0.25 or more"),
        (TokenSpec(method="evo-vit", options={"representative": False}), "always have a representative"),
        (TokenSpec(method="evo-vit", options={"alpha": 0.5}), "does not take these options"),
    ],
)
def test_what_it_cannot_do_is_refused(spec, words):
    model = filled()
    with pytest.raises(InputError) as caught:
        reduce_tokens_(model, spec)
    assert words in str(caught.value)
    assert caught.value.exit_code == 2
    assert not token_plan(model).locations


def test_blocks_that_somebody_replaced_are_refused():
    model = filled()
    model.blocks[2] = torch.nn.Identity()
    with pytest.raises(UnsupportedModelError, match="block 2 is a Identity"):
        reduce_tokens_(model, HALF)


# ---- training


def test_gradients_are_those_of_finite_differences():
    torch.manual_seed(0)
    model = reduce_(filled().double(), LAST)
    x = torch.from_numpy(oracle.pictures(2, 112, TINY_SEED)).double()
    target = torch.randn(2, 10, dtype=torch.float64)

    def loss() -> Tensor:
        heads = model.head_logits(model.forward_features(x))
        return sum(((logits - target) * (1 + i)).square().sum() for i, logits in enumerate(heads.values()))  # type: ignore[return-value]

    loss().backward()
    checked = 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None or ".learn_tradeoff" in name, name
        if name in ("cls_token", "poss", "blocks.3.poss") or name.endswith(("learn_tradeoff", "qkv.c.weight")):
            direction = torch.randn_like(parameter)
            direction = direction / direction.norm()
            step = 1e-6
            with torch.no_grad():
                parameter += step * direction
                above = loss()
                parameter -= 2 * step * direction
                below = loss()
                parameter += step * direction
            slope = 0.0 if parameter.grad is None else float((parameter.grad * direction).sum())
            assert float(above - below) / (2 * step) == pytest.approx(slope, rel=1e-4, abs=1e-4), name
            checked += slope != 0.0
    assert checked > 12


def test_training_mode_reaches_every_part():
    model = reduce_(filled(**oracle.TINY_ARGS, drop_path_rate=0.2).train(), LAST)
    running = model.patch_embed[0].bn.running_mean.clone()
    torch.manual_seed(0)
    x = torch.from_numpy(oracle.pictures(8, 112))
    sum(logits.square().sum() for logits in model.head_logits(model.forward_features(x)).values()).backward()  # type: ignore[union-attr]
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    # The first block has nothing to mix with, and nothing is chosen after the last choice.
    assert without <= {f"blocks.{i}.m1.m.learn_tradeoff" for i in (0, 9, 10)}
    assert not torch.equal(model.patch_embed[0].bn.running_mean, running)
    assert model.no_weight_decay() == {"poss", "blocks.3.poss", "blocks.7.poss"}


def test_classifiers_begin_anew():
    model = filled().train()
    with pytest.raises(InputError, match="mean over patches"):
        model.reset_classifier(3, "token")
    model.reset_classifier(3)
    assert {getattr(model, name).l.out_features for name in HEADS} == {3}
    assert all(getattr(model, name).training for name in HEADS)
    x = torch.zeros(2, 3, 112, 112)
    assert model.eval()(x).shape == (2, 3)
    model.reset_classifier(0)
    assert model(x).shape == (2, 64)
    one: Any = timm.create_model("evo_levit_128s", **oracle.TINY_ARGS, heads=("head",)).eval()
    assert [name for name, _ in one.named_children() if name.startswith("head")] == ["head"]
    assert torch.equal(one(x), one.head_logits(one.forward_features(x))["head"])


# ---- released layouts


@pytest.mark.parametrize("wrap", [lambda weights: {"model": weights, "epoch": 299}, lambda weights: weights])
def test_a_released_evo_levit_opens_as_it_is(tmp_path, wrap):
    file = read_official("evo_levit_128s")
    weights = {name: torch.from_numpy(value) for name, value in file.weights.items()}
    assert [name for name in weights if name.startswith("stage_blocks")]
    checkpoint = read_checkpoint(saved(tmp_path, wrap(weights)))
    assert (checkpoint.model, checkpoint.model_args) == ("evo_levit_128s", {"num_classes": 100, "img_size": 224})
    assert (checkpoint.tokens, checkpoint.notes) == (layouts.TRAINED, [])
    spec, notes = resolve_tokens(checkpoint)
    assert (spec, notes) == (layouts.TRAINED, [])
    assert (spec.method, spec.keep_rate, spec.locations) == ("evo-vit", 0.5, None)
    model: Any = reduce_tokens_(build_model(checkpoint), spec)
    with capture(model) as seen:
        logits = model(torch.from_numpy(file.images))
    assert np.abs(logits.numpy() - file.arrays["stage:logits"]).max() < 1e-4
    told = original_patches([choice.numpy() for choice in seen.kept], token_plan(model))
    for patches, number in zip(told, (1, 3), strict=True):
        assert np.array_equal(patches, file.arrays[f"stage:order:{number}"][:, : patches.shape[1]])


def test_a_released_evo_levit_is_refused_as_another():
    with pytest.raises(CheckpointError, match="not those of evo_levit_128") as caught:
        identify(Path("file"), hollow("evo_levit_128s"), "evo_levit_128")
    assert "evo_levit_128s" in str(caught.value)
    own = hollow("evo_levit_128s")
    with pytest.raises(CheckpointError, match=r"missing head\.l\.bias"):
        identify(Path("file"), {name: value for name, value in own.items() if name != "head.l.bias"})
    with pytest.raises(InputError, match="trained with the method 'evo-vit'"):
        resolve_tokens(
            Checkpoint("file", None, {}, "evo_levit_128s", {}, tokens=layouts.TRAINED), method="evit", keep_rate=0.7
        )


def official(name: str) -> dict[str, Tensor]:
    """A released Evo-LeViT's tensors, every block twice: written out by hand for 128S, from its stage-wise pass."""
    own = dict(filled(name, num_classes=1000).state_dict())
    return own | {second: own[first] for first, second in twice_of(own)}


SECOND = {  # of 128S
    "blocks.0.m1": "stage_blocks.0", "blocks.0.m2": "stage_blocks.1",
    "blocks.1.m1": "stage_blocks.2", "blocks.1.m2": "stage_blocks.3",
    "blocks.2": "stage_blocks.4", "blocks.3": "stage_blocks.5",
    "blocks.4.m1": "stage_blocks.6.m.0", "blocks.4.m2": "stage_blocks.6.m.1",
    "blocks.5.m1": "stage_blocks.6.m.2", "blocks.5.m2": "stage_blocks.6.m.3",
    "blocks.6.m1": "stage_blocks.6.m.4", "blocks.6.m2": "stage_blocks.6.m.5",
    "blocks.7": "stage_blocks.7", "blocks.8": "stage_blocks.8",
    "blocks.9.m1": "stage_blocks.9.m.0", "blocks.9.m2": "stage_blocks.9.m.1",
    "blocks.10.m1": "stage_blocks.9.m.2", "blocks.10.m2": "stage_blocks.9.m.3",
    "blocks.11.m1": "stage_blocks.9.m.4", "blocks.11.m2": "stage_blocks.9.m.5",
    "blocks.12.m1": "stage_blocks.9.m.6", "blocks.12.m2": "stage_blocks.9.m.7",
}  # fmt: skip


def twice_of(own: dict[str, Tensor]) -> list[tuple[str, str]]:
    pairs = []
    for name in own:
        for first, second in SECOND.items():
            if name.startswith(f"{first}."):
                pairs.append((name, second + name.removeprefix(first)))
    return pairs


def test_what_a_released_file_has_twice_is_dropped_and_put_back():
    released = official("evo_levit_128s")
    found = layouts.find_evo_levit("file", released)
    assert (found.model, found.model_args) == ("evo_levit_128s", {"num_classes": 1000, "img_size": 224})
    assert not [name for name in found.weights if name.startswith("stage_blocks")]
    assert set(found.weights) == set(hollow("evo_levit_128s"))
    back = layouts.with_duplicates(found.weights)
    assert back.keys() == released.keys()
    assert all(torch.equal(back[name], value) for name, value in released.items())


def test_two_copies_that_differ_are_refused():
    released = official("evo_levit_128s")
    for name, value in (
        ("stage_blocks.6.m.3.m.0.c.weight", released["blocks.5.m2.m.0.c.weight"] + 1e-3),
        ("stage_blocks.6.m.3.m.0.c.weight", torch.zeros(2, 2)),
        ("stage_blocks.99.m.0.c.weight", torch.zeros(2, 2)),
    ):
        with pytest.raises(CheckpointError, match="holds twice") as caught:
            layouts.find_evo_levit("file", released | {name: value})
        assert name in str(caught.value)


@pytest.mark.parametrize("pixels", [224, 384])
@each_size
def test_sizes_are_told_from_tensors(name, pixels):
    own = hollow(name, num_classes=100, img_size=pixels)
    found = layouts.find_evo_levit("file", layouts.with_duplicates(own))
    assert (found.model, found.model_args) == (name, {"num_classes": 100, "img_size": pixels})
    assert found.weights.keys() == own.keys()


def test_what_is_no_size_is_refused():
    own = hollow("evo_levit_128s")
    for weights, seen in (
        ({k: v for k, v in own.items() if not k.startswith("blocks.12.")}, "blocks (2, 3, 3)"),
        (own | {"poss": torch.zeros(1, 190, 128)}, "189 patches"),
        (hollow("evo_levit_128s", embed_dim=(32, 48, 64)), "widths (32, 48, 64)"),
    ):
        with pytest.raises(CheckpointError) as caught:
            layouts.find_evo_levit("file", weights)
        assert seen in str(caught.value)


def test_classifiers_that_a_file_lacks_are_not_made_up():
    own = {k: v for k, v in hollow("evo_levit_128s").items() if not k.startswith(("head_cls", "head_dist"))}
    found = layouts.find_evo_levit("file", own)
    assert found.model_args["heads"] == ["head"]
    with torch.device("meta"):
        model: Any = timm.create_model(found.model, **found.model_args)
    assert model.state_dict().keys() == own.keys()


def facebook(name: str) -> dict[str, Tensor]:
    """Names and shapes of a LeViT of Facebook's, with weights from the seed of the golden answers."""
    size = SIZES[f"evo_{name}"]
    shapes: dict[str, tuple[int, ...]] = {}

    def normed(key: str, *shape: int) -> None:
        shapes.update({f"{key}.bn.{part}": shape[:1] for part in ("weight", "bias", "running_mean", "running_var")})
        shapes.update({f"{key}.bn.num_batches_tracked": (), f"{key}.c.weight": shape})

    tables, number, grid, d = {}, 0, 14, size["key_dim"]
    channels = [3, *(size["embed_dim"][0] // part for part in (8, 4, 2, 1))]
    for i in range(4):
        normed(f"patch_embed.{2 * i}", channels[i + 1], channels[i], 3, 3)

    def mlp(width: int) -> None:
        normed(f"blocks.{number}.m.0", 2 * width, width)
        normed(f"blocks.{number}.m.2", width, 2 * width)

    for stage, (width, heads, count) in enumerate(
        zip(size["embed_dim"], size["num_heads"], size["depth"], strict=True)
    ):
        if stage:
            before = size["embed_dim"][stage - 1]
            normed(f"blocks.{number}.kv", 5 * before, before)
            normed(f"blocks.{number}.q.1", before, before)
            normed(f"blocks.{number}.proj.1", width, 4 * before)
            shapes[f"blocks.{number}.attention_biases"] = (before // d, grid * grid)
            tables[f"blocks.{number}.attention_bias_idxs"] = distances(grid, 2)
            grid, number = (grid + 1) // 2, number + 1
            mlp(width)
            number += 1
        for _ in range(count):
            normed(f"blocks.{number}.m.qkv", 4 * d * heads, width)
            normed(f"blocks.{number}.m.proj.1", width, 2 * d * heads)
            shapes[f"blocks.{number}.m.attention_biases"] = (heads, grid * grid)
            tables[f"blocks.{number}.m.attention_bias_idxs"] = distances(grid, 1)
            number += 1
            mlp(width)
            number += 1
    for head in ("head", "head_dist"):
        shapes |= {f"{head}.bn.{part}": (width,) for part in ("weight", "bias", "running_mean", "running_var")}
        shapes |= {f"{head}.bn.num_batches_tracked": (), f"{head}.l.weight": (1000, width), f"{head}.l.bias": (1000,)}
    return {key: torch.from_numpy(value) for key, value in oracle.weights(shapes).items()} | tables


def distances(side: int, stride: int) -> Tensor:
    """Numbers of the offsets between places of a grid, in the order in which they are first met."""
    points = [(row, column) for row in range(side) for column in range(side)]
    numbers: dict[tuple[int, int], int] = {}
    rows = []
    for row, column in points:
        if row % stride == 0 and column % stride == 0:
            offsets = [(abs(row - r), abs(column - c)) for r, c in points]
            rows.append([numbers.setdefault(offset, len(numbers)) for offset in offsets])
    return torch.tensor(rows)


@each_size
@torch.inference_mode()
def test_a_levit_of_facebooks_is_timms(name):
    released = facebook(name.removeprefix("evo_"))
    assert layouts.is_levit(released)
    assert not layouts.is_evo_levit(released)
    found = layouts.find_levit("file", released)
    assert (found.model, found.model_args) == (name.removeprefix("evo_"), {"num_classes": 1000, "img_size": 224})
    again = layouts.find(Held("file", found.weights))  # a file that timm saved
    assert again is not None
    assert (again.model, again.model_args) == (found.model, found.model_args)
    assert again.weights.keys() == found.weights.keys()
    model: Any = timm.create_model(found.model, **found.model_args)
    model.load_state_dict(found.weights)
    answer = model.eval()(torch.from_numpy(oracle.pictures(1, 224))).numpy()[:, :CLASSES_KEPT]
    assert np.abs(answer - np.load(GOLDEN)[found.model]).max() < 1e-4
    back = layouts.to_facebook(dict(model.state_dict()), released)
    assert back.keys() == released.keys()
    assert all(torch.equal(back[key], value) for key, value in released.items())


def test_a_levit_of_another_grid_is_refused():
    released = facebook("levit_128s")
    key = "blocks.0.m.attention_bias_idxs"
    with pytest.raises(CheckpointError, match="a different grid"):
        layouts.find_levit("file", released | {key: released[key].flip(0)})


# ---- the form that is exported


@pytest.mark.parametrize("keep", [{}, LAST], ids=["dense", "halves"])
def test_the_lowered_model_is_the_model(keep):
    model = reduce_(filled(), keep)
    before = copy.deepcopy(model.state_dict())
    lowered, x = lower(model), torch.from_numpy(oracle.pictures(2, 112))
    with torch.inference_mode():
        for flat in (True, False):
            for module in lowered.modules():
                if isinstance(getattr(module, "flat", None), bool):
                    module.flat = flat
            torch.testing.assert_close(lowered(x), model(x), rtol=1e-4, atol=5e-5)
        wide = lower(model.double())
        torch.testing.assert_close(wide(x.double()), model(x.double()), rtol=1e-10, atol=1e-10)
    kinds = {type(module).__name__ for module in lowered.modules()}
    assert not [kind for kind in kinds if "Norm" in kind]
    assert all(torch.equal(value, before[name]) for name, value in model.float().state_dict().items())


# ---- the exported file


@pytest.mark.parametrize("spec", [TokenSpec(keep_rate=1.0), HALF], ids=["dense", "halves"])
def test_the_exported_file_answers_like_the_model(spec):
    model = reduce_tokens_(filled(), spec)
    proto = export_onnx(model, name="evo_levit_128s", preprocess=preprocess_for(model))
    assert proto.opset_import[0].version == 23
    assert "BatchNormalization" not in operators(proto)
    assert len(nodes(proto, "TokenReorg")) == (3 if spec is HALF else 0)
    names = [node.name for node in proto.graph.node if node.op_type in ("Softmax", "HardSwish", "MatMul")]
    assert all(name.startswith(("blocks.", "patch_embed.")) for name in names)
    x = oracle.pictures(8, 112, TINY_SEED)
    for batch in (1, 3, 8):
        found = answers(proto, x[:batch], indices=True)
        assert_close(found["logits"], model, x[:batch])
        with capture(model) as seen:
            model(torch.from_numpy(x[:batch]))
        for row, order in zip(token_plan(model).locations, seen.kept, strict=True):
            told = found[f"kept_{row.block}"]
            assert np.array_equal(np.sort(told[:, : row.keep]), np.sort(order.numpy()[:, : row.keep]))
            assert np.array_equal(np.sort(told), np.sort(order.numpy()))


def test_half_precision_ranks_in_fp32():
    model = reduce_tokens_(filled(), HALF)
    proto = set_precision(export_onnx(model, name="evo_levit_128s", preprocess=preprocess_for(model)), "fp16")
    inferred = onnx.shape_inference.infer_shapes(onnx.inliner.inline_local_functions(proto), data_prop=True)
    types = {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}
    softmax = [node for node in inferred.graph.node if node.op_type == "Softmax"]
    # Seven blocks and two downsamplings; of those, five and two come before the last choice and rank as well.
    ranking = [node for node in softmax if types[node.output[0]] == onnx.TensorProto.FLOAT]
    assert (len(softmax), len(ranking)) == (16, 7)
    ranked = [node.input[1] for node in proto.graph.node if node.op_type == "TokenReorg"]
    assert len(ranked) == 3
    assert {types[name] for name in ranked} == {onnx.TensorProto.FLOAT}


@pytest.mark.slow
def test_the_whole_way_from_a_released_file(tmp_path, cli):
    model = filled("evo_levit_128s", num_classes=10, img_size=112)
    content = {"model": layouts.with_duplicates(dict(model.state_dict()))}
    path = saved(tmp_path, content, "EvoLeViT_128S.pth")
    result = cli("convert", path, "--threads", "1", "--precision", "fp16")
    assert result.code == 0, result.err
    out = tmp_path / "EvoLeViT_128S-evo-vit-k0.5"
    assert "never trained with token reduction" not in result.err
    assert cli("verify", out).code == 0
    result = cli("profile", out, "--batch-sizes", "1", "--threads", "1", "--duration", "0.05", "--json")
    assert result.code == 0, result.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--method", "evit", "--keep-rate", "0.7"), "trained with the method 'evo-vit'"),
        (("--keep-rate", "0.5,0.5,0.5"), "got 3 rates for 2 locations (4,9)"),
        (("--locations", "2"), "a downsampling is no location"),
        (("--image-size", "100"), "--image-size"),
        (("--model", "evo_levit_128"), "the weights are not those of evo_levit_128"),
    ],
)
def test_bad_input_on_the_command_line(tmp_path, cli, arguments, words):
    model = filled("evo_levit_128s", num_classes=10, img_size=64)
    path = saved(tmp_path, {"model": layouts.with_duplicates(dict(model.state_dict()))})
    result = cli("convert", path, *arguments)
    assert result.code == 2
    assert words in result.err
    assert sorted(file.name for file in tmp_path.iterdir()) == [path.name]
