"""LV-ViT: published sizes and multiply-adds, the released layout, the arithmetic by hand, and the way to a bundle."""

import copy
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor
from torch.nn import functional as F

from evit_deploy.errors import InputError, MissingRequirement, UnsupportedModelError
from evit_deploy.models.checkpoint import build_model, preprocess_of, read_checkpoint
from evit_deploy.models.identify import check_model_name
from evit_deploy.models.lvvit import AUX_WEIGHT, LVViTBackbone
from evit_deploy.models.timm_vit import ReducedBlock
from evit_deploy.tokens.plan import TokenSpec
from evit_deploy.tokens.reduce import capture, reduce_tokens_, set_keep_rate_, token_plan
from tests.support import oracle
from tests.support.checkpoints import refusal, saved
from tests.support.exports import exported, nodes, operators
from tests.support.models import TINY, hollow, images, of_kind, seeded, write_checkpoint

# What the README of TokenLabeling says of its releases: millions of parameters at an image size.
PUBLISHED = [
    ("lvvit_t", 224, 8.53),
    ("lvvit_s", 224, 26.15),
    ("lvvit_s", 384, 26.30),
    ("lvvit_m", 224, 55.83),
    ("lvvit_m", 384, 56.03),
    ("lvvit_m", 448, 56.13),
    ("lvvit_l", 448, 150.47),
    ("lvvit_l", 512, 150.66),
]
WIDTHS = {"lvvit_t": (240, 12, 64), "lvvit_s": (384, 16, 64), "lvvit_m": (512, 20, 64), "lvvit_l": (768, 24, 128)}
HEADS_AND_LAMBDA = {"lvvit_t": (4, 1), "lvvit_s": (6, 2), "lvvit_m": (8, 2), "lvvit_l": (12, 3)}


def tiny(**more: Any) -> Any:
    return seeded("lvvit_s", **(TINY | more))


# ---- sizes


@pytest.mark.parametrize(("name", "size", "millions"), PUBLISHED)
def test_parameters_are_as_many_as_published(name, size, millions):
    with torch.device("meta"):
        model = timm.create_model(name, img_size=size)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 2) == millions


@pytest.mark.parametrize(("rate", "published", "exact"), [(1.0, 6.6, 6.551), (0.7, 4.7, 4.707), (0.5, 3.9, 3.875)])
def test_multiply_adds_are_those_of_the_paper(rate, published, exact):
    with torch.device("meta"):
        model = reduce_tokens_(timm.create_model("lvvit_s"), TokenSpec(keep_rate=rate))
    plan = token_plan(model)
    assert round(plan.macs() / 1e9, 3) == exact
    assert round(plan.macs() / 1e9, 1) == published
    assert [row.block for row in plan.locations] == ([] if rate == 1 else [4, 8, 12])


@pytest.mark.parametrize(
    ("rate", "size", "published"),  # table 6
    [(1, 384, 21.9), (0.9, 240, 6.79), (0.8, 256, 6.93), (0.7, 256, 6.22), (0.7, 272, 7.07), (0.5, 304, 7.38),
     (0.7, 448, 21.5)],
)  # fmt: skip
def test_multiply_adds_at_higher_resolution_are_those_of_the_paper(rate, size, published):
    with torch.device("meta"):
        model = reduce_tokens_(timm.create_model("lvvit_s", img_size=size), TokenSpec(keep_rate=rate))
    assert token_plan(model).macs() / 1e9 == pytest.approx(published, rel=0.002)


@pytest.mark.parametrize("name", WIDTHS)
def test_tensors_are_those_of_the_release(name):
    width, depth, stem = WIDTHS[name]
    norm = {"weight": [stem], "bias": [stem], "running_mean": [stem], "running_var": [stem], "num_batches_tracked": []}
    wanted = {
        "cls_token": [1, 1, width],
        "pos_embed": [1, 197, width],
        "patch_embed.conv1.weight": [stem, 3, 7, 7],
        "patch_embed.conv2.weight": [stem, stem, 3, 3],
        "patch_embed.conv3.weight": [stem, stem, 3, 3],
        "patch_embed.proj.weight": [width, stem, 8, 8],
        "patch_embed.proj.bias": [width],
        **{f"patch_embed.bn{i}.{key}": shape for i in (1, 2, 3) for key, shape in norm.items()},
        **{f"{head}.weight": [1000, width] for head in ("head", "aux_head")},
        **{f"{head}.bias": [1000] for head in ("head", "aux_head")},
        **{f"norm.{key}": [width] for key in ("weight", "bias")},
    }  # fmt: skip
    for i in range(depth):
        wanted |= {f"blocks.{i}.norm{j}.{key}": [width] for j in (1, 2) for key in ("weight", "bias")}
        wanted |= {
            f"blocks.{i}.attn.qkv.weight": [3 * width, width],
            f"blocks.{i}.attn.proj.weight": [width, width],
            f"blocks.{i}.attn.proj.bias": [width],
            f"blocks.{i}.mlp.fc1.weight": [3 * width, width],
            f"blocks.{i}.mlp.fc1.bias": [3 * width],
            f"blocks.{i}.mlp.fc2.weight": [width, 3 * width],
            f"blocks.{i}.mlp.fc2.bias": [width],
        }
    assert {key: list(value.shape) for key, value in hollow(name).items()} == wanted


# ---- the arithmetic


@torch.inference_mode()
def by_hand(
    weights: dict[str, Tensor], x: Tensor, heads: int, by: float, rate: float | None, fuse: bool = True
) -> tuple[Tensor, bool]:
    """LV-ViT in float64 from its tensors alone, EViT by the oracle; and whether the last token is some class's best."""
    w, x = {key: value.double() for key, value in weights.items()}, x.double()
    depth = 1 + max(int(key.split(".")[1]) for key in w if key.startswith("blocks."))
    for i, stride in ((1, 2), (2, 1), (3, 1)):
        bn = [w[f"patch_embed.bn{i}.{key}"][:, None, None] for key in ("running_mean", "running_var", "weight", "bias")]
        x = F.conv2d(x, w[f"patch_embed.conv{i}.weight"], stride=stride, padding=3 if i == 1 else 1)
        x = ((x - bn[0]) / (bn[1] + 1e-5).sqrt() * bn[2] + bn[3]).clamp(min=0)
    x = F.conv2d(x, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=8).flatten(2).transpose(1, 2)
    x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x], dim=1) + w["pos_embed"]

    def norm(name: str, x: Tensor) -> Tensor:
        centered = x - x.mean(-1, keepdim=True)
        return (
            centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"]
            + w[f"{name}.bias"]
        )

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    for i in range(depth):
        name = f"blocks.{i}"
        qkv = norm(f"{name}.norm1", x) @ w[f"{name}.attn.qkv.weight"].T
        q, k, v = (part.unflatten(-1, (heads, -1)) for part in qkv.chunk(3, dim=-1))
        scale = 1 / math.sqrt(q.shape[-1])
        attention = (torch.einsum("bnhd,bmhd->bhnm", q, k) * scale).softmax(-1)
        x = x + linear(f"{name}.attn.proj", torch.einsum("bhnm,bmhd->bnhd", attention, v).flatten(2)) / by
        if rate is not None and i in (depth // 4, depth // 2, 3 * depth // 4):
            scores = oracle.class_scores(q.numpy(), k.numpy(), scale, 1)
            keep = math.ceil(round(rate * scores.shape[1], 9))
            x = torch.from_numpy(oracle.token_reorg(x.numpy(), scores, keep, fuse, 1)[0])
        hidden = linear(f"{name}.mlp.fc1", norm(f"{name}.norm2", x))
        x = x + linear(f"{name}.mlp.fc2", 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))) / by
    x = norm("norm", x)
    tokens = linear("aux_head", x[:, 1:])
    return linear("head", x[:, 0]) + 0.5 * tokens.amax(1), bool((tokens.argmax(1) == tokens.shape[1] - 1).any())


@pytest.mark.parametrize("rate", [None, 0.6, 0.3])
@pytest.mark.parametrize("name", WIDTHS)
def test_the_model_is_what_the_paper_says(name, rate):
    heads, by = HEADS_AND_LAMBDA[name]
    model = seeded(name, **(TINY | {"embed_dim": 12 * heads, "num_heads": heads}))
    x = torch.from_numpy(images(model, 3))
    wanted, fused_is_best = by_hand(model.state_dict(), x, heads, by, rate)
    if rate is not None:
        reduce_tokens_(model, TokenSpec(keep_rate=rate))
        assert fused_is_best or rate != 0.3  # or its part in the maximum would go untested
    with torch.inference_mode():
        found = model(x)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_lambda_and_aux_head_matter():
    model, x = tiny(), torch.from_numpy(images(tiny(), 2))
    with torch.inference_mode():
        logits, other, features = model(x), seeded("lvvit_s", **TINY, skip_lam=1.0)(x), model.forward_features(x)
        assert (logits - other).abs().max() > 0.1
        assert torch.allclose(
            logits, model.class_logits(features) + AUX_WEIGHT * model.token_logits(features).max(dim=1).values
        )
        assert (logits - model.class_logits(features)).abs().max() > 0.1


def test_gradients_reach_every_token_through_the_fused_one():
    for fuse in (True, False):
        model = tiny()
        reduce_tokens_(model, TokenSpec(keep_rate=0.3, locations=(1,), fuse=fuse))
        (block,) = (module for module in model.modules() if isinstance(module, ReducedBlock))
        seen: list[Tensor] = []

        def keep(_: Any, inputs: tuple[Tensor, ...], seen: list[Tensor] = seen) -> None:
            inputs[0].retain_grad()
            seen.append(inputs[0])

        block.reducer.register_forward_pre_hook(keep)
        model(torch.from_numpy(images(model, 2))).sum().backward()
        reached = seen[0].grad.abs().sum(-1) > 0
        assert reached.shape == (2, 37)
        assert reached.all() if fuse else reached.sum().item() == 2 * (1 + math.ceil(0.3 * 36))


def test_training_mode_reaches_every_parameter():
    model = tiny(drop_path_rate=0.2).train()
    reduce_tokens_(model, TokenSpec(keep_rate=0.5))
    assert [round(block.drop_path1.drop_prob, 3) for block in list(model.blocks)[1:]] == [0.067, 0.133, 0.2]
    model.blocks[3].drop_path1.drop_prob = model.blocks[3].drop_path2.drop_prob = 0.0
    running = model.patch_embed.bn1.running_mean.clone()
    torch.manual_seed(0)
    model(torch.from_numpy(images(model, 8))).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name
    assert not torch.equal(model.patch_embed.bn1.running_mean, running)


def test_the_schedule_runs_from_dense_to_the_spec():
    model, x = tiny(), torch.from_numpy(images(tiny(), 2))
    dense = model(x)
    reduce_tokens_(model, TokenSpec(keep_rate=0.6))
    reduced = model(x)
    set_keep_rate_(model, 0.0)
    assert torch.equal(model(x), dense)
    set_keep_rate_(model, 1.0)
    assert torch.equal(model(x), reduced)


# ---- classifiers, sizes, refusals


def test_both_classifiers_begin_anew():
    model = tiny().train()
    with pytest.raises(InputError, match="class token"):
        model.reset_classifier(3, "avg")
    model.reset_classifier(3)
    assert (model.head.out_features, model.aux_head.out_features) == (3, 3)
    assert model.aux_head.training
    assert model.eval()(torch.from_numpy(images(model, 2))).shape == (2, 3)
    model.reset_classifier(0)
    features = model(torch.from_numpy(images(model, 2)))
    assert features.shape == (2, 48)
    assert token_plan(model).cost.token_head == 0


def test_another_image_size_is_resampled_and_a_wrong_one_refused():
    model = tiny()
    wanted = resample_abs_pos_embed(model.pos_embed.detach(), [8, 4], num_prefix_tokens=1)
    model.set_input_size(img_size=(128, 64))
    assert torch.equal(model.pos_embed, wanted)
    assert LVViTBackbone.patches(model) == 32
    assert model(torch.zeros(1, 3, 128, 64)).shape == (1, 10)
    with pytest.raises(AssertionError, match=r"built for \(128, 64\)"):
        model(torch.zeros(1, 3, 96, 96))


def test_blocks_that_somebody_replaced_are_refused():
    model = tiny()
    model.blocks[2] = torch.nn.Identity()
    with pytest.raises(UnsupportedModelError, match="block 2 is a Identity"):
        reduce_tokens_(model, TokenSpec(keep_rate=0.5))


def test_names_are_known_where_timms_are():
    check_model_name("lvvit_s", where="--model")
    with pytest.raises(InputError, match="lvvit_s"):
        check_model_name("lvvit_small", where="--model")
    with pytest.raises(MissingRequirement, match="no weights can be downloaded") as caught:
        read_checkpoint("lvvit_s")
    assert "--model lvvit_s" in str(caught.value.fix)


@pytest.mark.parametrize("door", ["named", "own", "sweep"])
def test_no_door_needs_the_names_to_be_registered_before(tmp_path, door):
    # Other tests have imported the backbone; a process of its own has not.
    path = tmp_path / "own.safetensors"
    if door == "own":
        write_checkpoint(path, "LV-ViT")
    code = {
        "named": "from evit_deploy.models.identify import check_model_name; check_model_name('lvvit_s', where='x')",
        "own": f"from evit_deploy import *; build_model(read_checkpoint({str(path)!r}))",
        "sweep": "from evit_deploy.profiling.sweep import _variants; from evit_deploy.recipe.recipe import load_sweep; "
        "next(_variants('lvvit_t', load_sweep('a100', [])))",
    }[door]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---- checkpoints


def as_released(weights: dict[str, Tensor]) -> Any:
    return weights


def as_wrapped(weights: dict[str, Tensor]) -> Any:
    other = {f"module.{key}": value + 1 for key, value in weights.items()}
    return {"epoch": 3, "arch": "lvvit_t", "state_dict": other,
            "state_dict_ema": {f"module.{key}": value for key, value in weights.items()}}  # fmt: skip


@pytest.fixture(scope="module")
def lvvit_t() -> dict[str, Tensor]:
    """The smallest size with weights from a seed."""
    return dict(seeded("lvvit_t", num_classes=1000).state_dict())


@pytest.mark.parametrize("layout", [as_released, as_wrapped])
def test_a_released_file_gives_the_same_model(tmp_path, lvvit_t, layout):
    checkpoint = read_checkpoint(saved(tmp_path, layout(lvvit_t), "lvvit_t-8M-224-79.1.pth.tar"))
    assert (checkpoint.model, checkpoint.model_args) == ("lvvit_t", {"num_classes": 1000, "img_size": 224})
    assert checkpoint.tokens is None
    model = build_model(checkpoint)
    for name, value in model.state_dict().items():
        assert torch.equal(value, lvvit_t[name]), name
    resized: Any = build_model(checkpoint, 128)
    wanted = resample_abs_pos_embed(lvvit_t["pos_embed"], [8, 8], num_prefix_tokens=1)
    assert torch.equal(resized.pos_embed, wanted)


@pytest.mark.parametrize(("name", "size"), [(name, size) for name, size, _ in PUBLISHED])
def test_sizes_are_told_from_tensors(tmp_path, name, size):
    checkpoint = read_checkpoint(saved(tmp_path, hollow(name, img_size=size, num_classes=100)))
    assert (checkpoint.model, checkpoint.model_args) == (name, {"num_classes": 100, "img_size": size})
    assert checkpoint.notes == []
    with torch.device("meta"):
        model = timm.create_model(name, **checkpoint.model_args)
    preprocess = preprocess_of(checkpoint, model)
    assert preprocess.size == (size, size)
    assert preprocess.crop_pct == (0.9 if name in ("lvvit_t", "lvvit_s") else 1.0)
    assert preprocess.mean == (0.485, 0.456, 0.406)


def test_tensors_of_no_size_are_refused(tmp_path):
    whole = hollow("lvvit_t")
    assert "LV-ViT's stem" in refusal(saved(tmp_path, hollow("lvvit_t", embed_dim=48, num_heads=4)))
    assert "no known architecture" in refusal(saved(tmp_path, {k: v for k, v in whole.items() if "aux" not in k}))
    message = refusal(saved(tmp_path, {k: v for k, v in whole.items() if "bn2.bias" not in k}), model="lvvit_t")
    assert "missing patch_embed.bn2.bias" in message
    assert "not those of lvvit_s" in refusal(saved(tmp_path, whole), model="lvvit_s")


# ---- the exported file; what every kind must do is in test_export.py, test_quantization.py and test_build.py


def test_norms_and_lambda_are_folded_into_weights():
    proto = exported("LV-ViT")
    assert not {"BatchNormalization", "Div"} & set(operators(proto))
    assert len(nodes(proto, "Conv")) == 4
    assert [node.name for node in nodes(proto, "MatMul")] == []  # q, k and v too are Gemms, without a bias
    assert {len(node.input) for node in nodes(proto, "Gemm")} == {2, 3}


def test_the_lowered_stem_is_the_stem():
    model = of_kind("LV-ViT")
    before = copy.deepcopy(model.state_dict())
    lowered, x = LVViTBackbone.lower(model), torch.from_numpy(images(model, 2))
    with torch.inference_mode():
        wanted = model.patch_embed(x)
        torch.testing.assert_close(lowered.patch_embed(x), wanted, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.slow
def test_the_whole_way_from_a_released_file(tmp_path, lvvit_t, cli):
    path = saved(tmp_path, lvvit_t, "lvvit_t.pth")
    out = tmp_path / "lvvit_t-evit-k0.7"
    result = cli("convert", path, "--keep-rate", "0.7", "--image-size", "64", "--threads", "1")
    assert result.code == 0, result.err
    assert "never trained with token reduction. To fine-tune: " in result.err
    assert "DeiT" not in result.err  # the paper's figure without training is of DeiT-S
    assert (out / "dense" / "model.onnx").exists()
    assert cli("verify", out).code == 0
    result = cli("profile", out, "--batch-sizes", "1", "--threads", "1", "--duration", "0.05", "--json")
    assert result.code == 0, result.err


@torch.inference_mode()
def test_capture_and_plan_agree():
    model = reduce_tokens_(tiny(), TokenSpec(keep_rate=0.6))
    with capture(model) as seen:
        model(torch.from_numpy(images(model, 2)))
    assert [kept.shape[1] for kept in seen.kept] == [row.keep for row in token_plan(model).locations]
    assert np.all([oracle.is_valid_choice(kept.numpy(), 36) for kept in seen.kept])
