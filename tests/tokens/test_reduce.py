"""``reduce_tokens_`` on every family: against a slow EViT written by hand, the dense model, and counted arithmetic."""

import copy
import math
from fractions import Fraction

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from evit_deploy.errors import InputError, UnsupportedModelError
from evit_deploy.models.lvvit import Divide
from evit_deploy.models.timm_vit import ReducedBlock
from evit_deploy.tokens.backbone import backbone_of
from evit_deploy.tokens.plan import TokenSpec
from evit_deploy.tokens.reduce import capture, reduce_tokens_, set_keep_rate_, token_plan, token_spec
from tests.support import oracle
from tests.support.families import SPEC, create, each_method, each_model, images, logits, spec_of

SPECS = {
    "fuse": SPEC,
    "no_fuse": TokenSpec(keep_rate=0.6, fuse=False),
    "per_location": TokenSpec(keep_rate=(0.9, 0.4), locations=(0, 2)),
}


def spoiled(model: nn.Module) -> dict[str, torch.Tensor]:
    """Other weights of the same shapes."""
    generator = torch.Generator().manual_seed(99)
    return {
        key: value + 0.1 * torch.randn(value.shape, generator=generator) for key, value in model.state_dict().items()
    }


# ---- the slow EViT


def layer_norm(x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
    if isinstance(norm, nn.Identity):
        return x
    centered = x - x.mean(-1, keepdim=True)
    return centered / (centered.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


def linear(x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def layer_scale(x: torch.Tensor, scale: nn.Module) -> torch.Tensor:
    if isinstance(scale, Divide):  # LV-ViT's λ
        return x / scale.by
    return x if isinstance(scale, nn.Identity) else x * scale.gamma


@torch.inference_mode()
def slow_evit(dense: nn.Module, x: torch.Tensor, spec: TokenSpec) -> tuple[torch.Tensor, list[np.ndarray]]:
    """Algorithm 1 in float64: blocks by hand, scores and reorganization by the oracle, stem and head not.

    Also gives the kept candidates of every location, after making sure that FP32 can tell their scores apart.
    """
    dense = copy.deepcopy(dense).double()
    x = dense.norm_pre(dense._pos_embed(dense.patch_embed(x.double())))
    prefix, depth = dense.num_prefix_tokens, len(dense.blocks)
    locations = spec.locations or [depth // 4, depth // 2, 3 * depth // 4]
    rates = spec.keep_rate if isinstance(spec.keep_rate, tuple) else [spec.keep_rate] * len(locations)
    kept_everywhere = []
    for index, block in enumerate(dense.blocks):
        attn = block.attn
        normed = layer_norm(x, block.norm1)
        q, k, v = linear(normed, attn.qkv).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (attn.num_heads, -1)) for part in (q, k, v))  # [B, N, H, d]
        q, k = layer_norm(q, attn.q_norm), layer_norm(k, attn.k_norm)
        scale = 1 / math.sqrt(q.shape[-1])
        attention = (torch.einsum("bnhd,bmhd->bhnm", q, k) * scale).softmax(-1)
        attended = layer_norm(torch.einsum("bhnm,bmhd->bnhd", attention, v).flatten(2), attn.norm)
        x = x + layer_scale(linear(attended, attn.proj), block.ls1)
        if index in locations:
            scores = oracle.class_scores(q.numpy(), k.numpy(), scale, prefix)
            gaps = -np.diff(-np.sort(-scores, axis=1), axis=1)
            assert gaps.min() > 1e-6, "an unlucky seed: two scores are too close for FP32, choose another"
            keep = math.ceil(Fraction(str(rates[list(locations).index(index)])) * scores.shape[1])
            y, kept = oracle.token_reorg(x.numpy(), scores, keep, spec.fuse, prefix)
            x = torch.from_numpy(y)
            kept_everywhere.append(kept)
        hidden = linear(layer_norm(x, block.norm2), block.mlp.fc1)
        hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
        x = x + layer_scale(linear(hidden, block.mlp.fc2), block.ls2)
    return dense.forward_head(dense.norm(x)), kept_everywhere


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@each_model
def test_a_reduced_model_is_the_slow_evit(name, spec):
    model = create(name)
    wanted, wanted_kept = slow_evit(model, images(model), spec)
    dense = logits(model)
    reduce_tokens_(model, spec)
    with capture(model) as seen:
        result = model(images(model))
    for kept, wanted_here in zip(seen.kept, wanted_kept, strict=True):
        np.testing.assert_array_equal(kept.numpy(), wanted_here)
    scale = wanted.abs().max()
    assert (result.double() - wanted).abs().max() <= 2e-5 * scale  # FP32 against float64 through the whole model
    assert (result - dense).abs().max() > 1e-2 * scale  # and the reduction matters


# ---- the dense model, untouched and given back


@each_model
def test_keep_rate_1_is_the_dense_model_bit_for_bit(name):
    model = create(name)
    dense = logits(model)
    modules = dict(model.named_modules())
    assert reduce_tokens_(model, TokenSpec(keep_rate=1.0)) is model
    assert torch.equal(logits(model), dense)
    reduce_tokens_(model, SPEC)
    assert not torch.equal(logits(model), dense)
    reduce_tokens_(model, TokenSpec(keep_rate=1.0))
    assert torch.equal(logits(model), dense)
    assert dict(model.named_modules()) == modules  # the very same modules are back


@each_model
def test_state_dict_keys_never_change(name):
    model = create(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    reduce_tokens_(model, SPEC)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert [key for key, _ in model.named_parameters()] == [
        key for key in before if key in dict(model.named_parameters())
    ]


@each_model
def test_weights_may_come_before_or_after(name):
    before, after = create(name), create(name)
    weights = spoiled(before)
    before.load_state_dict(weights)
    reduce_tokens_(before, SPEC)
    reduce_tokens_(after, SPEC)
    stale = logits(after)
    after.load_state_dict(weights)
    assert torch.equal(logits(after), logits(before))
    assert not torch.equal(logits(after), stale)
    reduce_tokens_(after, TokenSpec(keep_rate=1.0))  # the weights stay when the reduction goes
    dense = create(name)
    dense.load_state_dict(weights)
    assert torch.equal(logits(after), logits(dense))


def test_reducing_again_replaces_and_does_not_stack():
    model, other = create("deit"), create("deit")
    reduce_tokens_(model, TokenSpec(keep_rate=0.3, locations=(0, 1)))
    reduce_tokens_(model, SPEC)
    reduce_tokens_(other, SPEC)
    assert torch.equal(logits(model), logits(other))
    assert sum(isinstance(module, ReducedBlock) for module in model.modules()) == 3
    assert token_spec(model) == SPEC


def test_training_and_evaluation_mode_reach_every_module_also_after_undoing():
    model = create("deit").train()
    reduce_tokens_(model, SPEC)
    assert all(module.training for module in model.modules())
    model.eval()
    assert not any(module.training for module in model.modules())
    reduce_tokens_(model, TokenSpec(keep_rate=1.0))
    assert not any(module.training for module in model.modules())


def test_a_failed_reduction_leaves_the_model_as_it_was():
    model = create("deit")
    dense = logits(model)
    for spec in (
        TokenSpec(keep_rate=0.5, locations=(2, 4)),
        TokenSpec(keep_rate=0.5, method="evit", options={"seed": 1}),
        TokenSpec(keep_rate=0.5, method="nothing"),
    ):
        with pytest.raises(InputError):
            reduce_tokens_(model, spec)
    assert torch.equal(logits(model), dense)
    assert token_spec(model) == TokenSpec(keep_rate=1.0)


# ---- image sizes, copies, batches


def test_another_image_size_needs_reducing_again():
    model = create("deit")
    reduce_tokens_(model, SPEC)
    model.set_input_size(img_size=(96, 64))
    with pytest.raises(UnsupportedModelError, match=r"25 tokens arrived, the plan has 17.*reduce_tokens_ again"):
        logits(model)
    reduce_tokens_(model, SPEC)
    assert token_plan(model).patches == 24
    fresh = create("deit")
    fresh.set_input_size(img_size=(96, 64))
    wanted, _ = slow_evit(fresh, images(fresh), SPEC)
    torch.testing.assert_close(logits(model).double(), wanted, rtol=1e-4, atol=1e-4)


def test_a_dynamic_image_size_is_refused_where_it_does_not_fit_the_plan():
    model = create("test_vit")  # takes any size
    larger = torch.zeros(1, 3, 96, 96)
    assert model(larger).shape == (1, 1000)
    reduce_tokens_(model, SPEC)
    with pytest.raises(UnsupportedModelError, match="37 tokens arrived, the plan has 17"):
        model(larger)


def test_a_mask_is_refused():
    model = create("deit")
    reduce_tokens_(model, SPEC)
    with pytest.raises(UnsupportedModelError, match="mask"):
        model.blocks[1](torch.zeros(1, 17, 192), attn_mask=torch.zeros(17, 17))


@each_method
def test_deep_copies_stand_alone(method):
    model = create("deit")
    dense = logits(model)
    reduce_tokens_(model, spec_of(method))
    logits(model)  # whatever a reducer makes on its first call is copied too
    clone = copy.deepcopy(model)
    wanted = logits(model)
    assert torch.equal(logits(clone), wanted)
    assert token_plan(clone) == token_plan(model)
    with torch.no_grad():
        for parameter in clone.parameters():
            parameter.add_(0.1)
    reduce_tokens_(model, TokenSpec(keep_rate=1.0))
    assert torch.equal(logits(model), dense)
    reduce_tokens_(clone, TokenSpec(keep_rate=1.0))  # the copy's undoing gives the copy's weights
    restored = create("deit")
    restored.load_state_dict(clone.state_dict())
    assert torch.equal(logits(clone), logits(restored))


@pytest.mark.parametrize("name", ["deit", "dinov2_registers"])
def test_an_image_does_not_see_its_batch(name):
    model = create(name)
    reduce_tokens_(model, SPEC)
    everything = images(model, batch=4)
    with capture(model) as seen:
        together = model(everything)
    for i in range(4):
        with capture(model) as seen_alone:
            alone = model(everything[i : i + 1])
        for kept_alone, kept in zip(seen_alone.kept, seen.kept, strict=True):
            assert torch.equal(kept_alone[0], kept[i])
        torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-5)


# ---- the schedule and what can be looked at


def test_the_schedule_runs_from_dense_to_the_spec():
    model = create("deit")
    dense = logits(model)
    reduce_tokens_(model, SPEC)
    static, plan = logits(model), token_plan(model)
    assert set_keep_rate_(model, 0.0) == token_plan(model) == plan.dense()
    torch.testing.assert_close(logits(model), dense, rtol=1e-5, atol=1e-5)
    halfway = set_keep_rate_(model, 0.5)  # rate 0.8: 13 of 16 patches, and so on
    assert [row.keep for row in halfway.locations] == [13, 12, 11]
    between = logits(model)
    assert not torch.equal(between, dense)
    assert not torch.equal(between, static)
    assert set_keep_rate_(model, 1.0) == plan
    assert torch.equal(logits(model), static)
    assert token_spec(model) == SPEC


def test_options_of_the_schedule_take_the_place_of_the_specs_own_until_the_next_call():
    def tome(*merged: int) -> nn.Module:
        return reduce_tokens_(create("deit"), TokenSpec(method="tome", options={"merge": merged}))

    model, plan = tome(3, 2, 1), token_plan(tome(1, 1, 1))
    assert set_keep_rate_(model, 1.0, {"merge": (1, 1, 1)}) == token_plan(model) == plan
    assert set_keep_rate_(model, 1.0) == token_plan(tome(3, 2, 1)) != plan


@pytest.mark.parametrize("progress", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_the_schedule_also_passes_where_a_location_only_reduces_on_the_way(progress):
    # At the end ceil(0.1 · 16) = 2 candidates are left and ceil(0.7 · 2) = 2, so that later locations do nothing. On
    # the way there they have more candidates, and reduce them.
    model = create("deit")
    reduce_tokens_(model, TokenSpec(keep_rate=(0.1, 0.7, 0.7), fuse=False))
    assert [row.block for row in token_plan(model).locations] == [1]
    plan = set_keep_rate_(model, progress)
    with capture(model) as seen:
        model(images(model))
    assert [kept.shape[1] for kept in seen.kept] == [row.keep for row in plan.locations]


def test_capture_sees_what_was_kept_and_why():
    model = create("dinov2_registers")
    reduce_tokens_(model, SPEC)
    plain = logits(model)
    with capture(model) as seen:
        assert torch.equal(model(images(model)), plain)
    plan = token_plan(model)
    assert [kept.shape for kept in seen.kept] == [(3, row.keep) for row in plan.locations]
    assert [scores.shape for scores in seen.scores] == [(3, row.tokens_in - plan.prefix) for row in plan.locations]
    for kept, scores in zip(seen.kept, seen.scores, strict=True):
        assert kept.dtype == torch.int32
        np.testing.assert_array_equal(kept.numpy(), oracle.select(scores.numpy(), kept.shape[1]))
    logits(model)
    assert len(seen.kept) == len(plan.locations)  # nothing is recorded afterwards


def test_a_dense_model_has_a_dense_plan():
    model = create("deit")
    plan = token_plan(model)
    assert plan.locations == ()
    assert (plan.prefix, plan.patches, len(plan.blocks)) == (1, 16, 4)
    with capture(model) as seen:
        model(images(model))
    assert seen.kept == []


def test_reducers_print_what_they_do():
    model = create("deit")
    reduce_tokens_(model, SPEC)
    assert "EViT(block=1, tokens 17 -> 12, keep=10, fused=True)" in str(model)


# ---- arithmetic


def counted_flops(model: nn.Module) -> int:
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():  # the counter misses fused attention on a CPU
        model(images(model, batch=1))
    return counter.get_total_flops()


@each_model
def test_the_plan_counts_what_pytorch_counts(name):
    model = create(name)
    dense = counted_flops(model)
    assert dense == 2 * token_plan(model).macs()
    reduce_tokens_(model, TokenSpec(keep_rate=0.6, method="slice"))
    assert counted_flops(model) == 2 * token_plan(model).macs() < dense


def test_evit_adds_less_than_a_thousandth():
    model = timm.create_model("deit_tiny_patch16_224", pretrained=False).eval()
    reduce_tokens_(model, TokenSpec(keep_rate=0.7, method="slice"))
    without = counted_flops(model)
    assert without == 2 * token_plan(model).macs()
    reduce_tokens_(model, TokenSpec(keep_rate=0.7))
    # The counter sees matmuls only: the fused row, 2·N·C. The scores are a product and a sum of the same size.
    fused_rows = sum(2 * (row.tokens_in - 1) * 192 for row in token_plan(model).locations)
    assert counted_flops(model) - without == fused_rows
    assert 2 * fused_rows < without / 1000


# ---- the lowered form


@pytest.mark.parametrize("spec", [TokenSpec(keep_rate=1.0), SPEC], ids=["dense", "reduced"])
@each_model
def test_the_lowered_form_gives_the_same_logits_and_leaves_the_model_alone(name, spec):
    model = create(name)
    reduce_tokens_(model, spec)
    before, keys, modules = logits(model), list(model.state_dict()), dict(model.named_modules())
    lowered = backbone_of(model).lower(model)
    with torch.inference_mode():
        result = lowered(images(model))
    torch.testing.assert_close(result, before, rtol=1e-4, atol=1e-5 * float(before.abs().max()))
    assert lowered is not model
    assert list(model.state_dict()) == keys
    assert dict(model.named_modules()) == modules
    assert torch.equal(logits(model), before)
    shared = {parameter.data_ptr() for parameter in model.parameters()}
    assert {p.data_ptr() for p in lowered.head.parameters()} <= shared  # weights are shared, not copied
    pieces = [block.attn.q.weight.data_ptr() for block in lowered.blocks]
    assert pieces == [block.attn.qkv.weight.data_ptr() for block in model.blocks]
