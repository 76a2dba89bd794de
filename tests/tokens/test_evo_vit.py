"""Evo-ViT as a method: against the oracle, a slow one in PyTorch, and counted arithmetic; exported and trained."""

import copy
import math
from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from torch import Tensor, nn

from evit_deploy.errors import InputError, UnsupportedModelError
from evit_deploy.export.portable import export_onnx
from evit_deploy.export.precision import set_precision
from evit_deploy.export.variants import slice_twin, with_indices
from evit_deploy.tokens.choices import original_patches
from evit_deploy.tokens.plan import TokenSpec
from evit_deploy.tokens.reduce import capture, reduce_tokens_, set_keep_rate_, token_label, token_plan
from evit_deploy.tokens.reducer import TokenReducer
from tests.support.families import create, each_model, images, logits
from tests.support.method_oracles import evo_vit
from tests.support.method_oracles.vit import Model
from tests.support.models import TINY, preprocess_for, seeded
from tests.support.models import images as drawn_images

SPEC = TokenSpec(keep_rate=0.6, method="evo-vit")
each_form = pytest.mark.parametrize("layer_wise", [False, True], ids=["stage", "layer"])
each_path = pytest.mark.parametrize("representative", [False, True], ids=["placeholders", "representative"])


def options(spec: TokenSpec, **options: bool) -> TokenSpec:
    return TokenSpec(spec.keep_rate, spec.locations, method="evo-vit", options=options)


def tiny(**more: Any) -> Any:
    return seeded("vit_tiny_patch16_224", **(TINY | {"depth": 6} | more))


# ---- against the oracle


@pytest.mark.parametrize("pool", ["token", "avg"])
@each_path
@each_form
def test_it_is_the_oracle(layer_wise, representative, pool):
    model = tiny(global_pool=pool)
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    oracle = Model(weights, TINY["num_heads"], "mean" if pool == "avg" else "token")
    spec = options(TokenSpec(keep_rate=0.55, locations=(2, 4)), layer_wise=layer_wise, representative=representative)
    schedule = evo_vit.stage_wise(6, (2, 4), 0.55, representative)
    if layer_wise:
        schedule = evo_vit.layer_wise(6, 2, 0.55, representative)
    pictures = drawn_images(model, 3)
    wanted = evo_vit.forward(oracle, pictures, schedule)
    dense = model(torch.from_numpy(pictures)).detach().numpy()
    reduce_tokens_(model, spec)
    with capture(model) as seen:
        result = model(torch.from_numpy(pictures)).numpy()
    scale = np.abs(wanted.logits).max()
    assert np.abs(result - wanted.logits).max() <= 2e-5 * scale
    assert np.abs(dense - wanted.logits).max() > 1e-2 * scale
    plan = token_plan(model)
    found = original_patches([choice.numpy() for choice in seen.kept], plan)
    assert len(found) == len(wanted.chosen) == (4 if layer_wise else 2)
    for numbers, oracle_numbers in zip(found, wanted.chosen, strict=True):
        np.testing.assert_array_equal(numbers, np.stack(oracle_numbers)[:, : numbers.shape[1]])


def test_every_location_has_its_own_rate():
    model = tiny()
    oracle = Model({name: value.numpy() for name, value in model.state_dict().items()}, TINY["num_heads"])
    schedule = evo_vit.Schedule((1, 3, 4), (2, 3, 5), (0.8, 0.3, 0.55), [1.0] + [0.5] * 5, True)
    reduce_tokens_(model, options(TokenSpec(keep_rate=(0.8, 0.3, 0.55), locations=(1, 3, 4)), representative=True))
    pictures = drawn_images(model, 2)
    wanted = evo_vit.forward(oracle, pictures, schedule).logits
    result = logits_of(model, pictures)
    assert np.abs(result - wanted).max() <= 2e-5 * np.abs(wanted).max()


@torch.inference_mode()
def logits_of(model: nn.Module, pictures: np.ndarray) -> np.ndarray:
    return model(torch.from_numpy(pictures)).numpy()


@torch.inference_mode()
def slow(dense: Any, pixels: Tensor, rate: float, representative: bool) -> tuple[Tensor, list[Tensor]]:
    """Stage-wise Evo-ViT in float64, out of a model's own layers, an index at a time: any timm ViT has these.

    Also gives the informative patches of each stage, after making sure that FP32 can tell their g apart.
    """
    dense = copy.deepcopy(dense).double()
    x = dense.norm_pre(dense._pos_embed(dense.patch_embed(pixels.double())))
    prefix, depth = dense.num_prefix_tokens, len(dense.blocks)
    front, patches = x[:, :prefix], x[:, prefix:]
    count = patches.shape[1]
    keep, starts, chosen = math.floor(Fraction(str(rate)) * count), (depth // 3, 2 * depth // 3), []
    everyone = torch.arange(count).expand(len(x), -1)
    g, present, learned = torch.zeros(len(x), count).double(), everyone, torch.zeros(len(x), 1, x.shape[2]).double()
    waiting, began = everyone[:, :0], learned

    def taught() -> Tensor:
        there = waiting[..., None].expand(-1, -1, x.shape[2])
        return patches.scatter_add(1, there, learned.expand(-1, waiting.shape[1], -1))

    for index, block in enumerate(dense.blocks):
        if index in starts:
            patches = taught()
            ranked = g.sort(dim=1, descending=True)
            assert (ranked.values.diff(dim=1).abs() > 1e-6).all(), "an unlucky seed: choose another"
            present, waiting = ranked.indices[:, :keep], ranked.indices[:, keep:]
            chosen.append(present)
            learned = torch.zeros_like(learned)
            if representative:
                of_waiting = g.gather(1, waiting)[..., None]
                everything = patches.gather(1, waiting[..., None].expand(-1, -1, x.shape[2]))
                began = (of_waiting * everything).sum(1, keepdim=True) / of_waiting.sum(1, keepdim=True)
        here = present[..., None].expand(-1, -1, x.shape[2])
        parts = [front, patches.gather(1, here)] + ([began + learned] if representative and index >= starts[0] else [])
        tokens = torch.cat(parts, dim=1)
        attn = block.attn
        q, k, _ = attn.qkv(block.norm1(tokens)).unflatten(-1, (3, attn.num_heads, -1)).unbind(2)
        row = torch.einsum("bhd,bnhd->bhn", attn.q_norm(q)[:, 0], attn.k_norm(k)) * attn.scale
        seen = row.softmax(-1)[..., prefix : prefix + present.shape[1]].sum(1)
        alpha = 1 if index < starts[0] else 0.5
        g = g.scatter(1, present, (1 - alpha) * g.gather(1, present) + alpha * seen)
        tokens = block(tokens)
        front = tokens[:, :prefix]
        patches = patches.scatter(1, here, tokens[:, prefix : prefix + present.shape[1]])
        if representative and index >= starts[0]:
            learned = tokens[:, -1:] - began
    return dense.forward_head(dense.norm(torch.cat([front, taught()], dim=1))), chosen


@each_path
@each_model
def test_any_family_is_the_slow_one(name, representative):
    model = create(name)
    if name == "deit_distilled":
        with pytest.raises(UnsupportedModelError, match="it is distilled: Evo-ViT ranks patches by one class token"):
            reduce_tokens_(model, SPEC)
        return
    wanted, chosen = slow(model, images(model), 0.6, representative)
    dense = logits(model)
    reduce_tokens_(model, options(SPEC, representative=representative))
    with capture(model) as seen:
        result = model(images(model))
    found = original_patches([choice.numpy() for choice in seen.kept], token_plan(model))
    for numbers, wanted_here in zip(found, chosen, strict=True):
        np.testing.assert_array_equal(numbers, wanted_here.numpy())
    scale = wanted.abs().max()
    assert (result.double() - wanted).abs().max() <= 2e-5 * scale
    assert (result - dense).abs().max() > 1e-2 * scale


# ---- counts


@pytest.mark.parametrize(("size", "gmacs"), [("tiny", 0.818), ("small", 3.033), ("base", 11.658)])
def test_the_plan_is_the_published_one(size, gmacs):
    with torch.device("meta"):
        model = timm.create_model(f"deit_{size}_patch16_224", global_pool="avg")
    plan = token_plan(reduce_tokens_(model, TokenSpec(method="evo-vit")))
    assert [row.block for row in plan.locations] == [4, 8]
    assert [row.tokens_in for row in plan.blocks] == [197] * 4 + [99] * 8
    assert [row.tokens_out for row in plan.blocks] == [197] * 4 + [99] * 8
    assert [(row.keep, row.aside, row.choice_length) for row in plan.locations] == [(98, 98, 196)] * 2
    assert [row.block for row in plan.blocks if row.ranks] == [3, 4, 5, 6, 7]
    assert plan.macs() / 1e9 == pytest.approx(gmacs, abs=5e-4)
    reduce_tokens_(model, TokenSpec(method="evo-vit", options={"representative": True, "layer_wise": True}))
    plan = token_plan(model)
    assert [row.tokens_in for row in plan.blocks] == [197] * 4 + [100] * 8
    assert [row.block for row in plan.locations] == list(range(4, 12))
    assert [row.block for row in plan.blocks if row.ranks] == list(range(3, 11))


@each_path
@each_form
def test_blocks_see_as_many_tokens_as_planned_and_g_is_computed_where_it_matters(layer_wise, representative):
    model = create("deit")
    reduce_tokens_(model, options(SPEC, layer_wise=layer_wise, representative=representative))
    plan, counts, ranked = token_plan(model), [], []
    for index, block in enumerate(model.blocks):
        block.attn.qkv.register_forward_hook(lambda _, inputs, __: counts.append(inputs[0].shape[1]))
        block.mlp.register_forward_hook(lambda _, inputs, __: counts.append(inputs[0].shape[1]))
        block.reducer.refresh.register_forward_hook(lambda *_, index=index: ranked.append(index))
    logits(model)
    assert counts == [tokens for row in plan.blocks for tokens in (row.tokens_in, row.tokens_out)]
    assert counts[2] == 1 + 9 + representative  # int(.6 · 16) of 16 patches
    assert ranked == [row.block for row in plan.blocks if row.ranks] == ([0, 1, 2] if layer_wise else [0, 1])


def test_labels_say_what_was_asked_for():
    assert token_label(TokenSpec(method="evo-vit")) == "evo-vit-k0.5"
    assert token_label(options(SPEC, representative=True, layer_wise=True)) == "evo-vit-k0.6-representative-layer-wise"


# ---- the keep-rate schedule


@each_path
def test_a_schedule_moves_from_the_dense_model_to_the_spec(representative):
    model = create("deit")
    dense = logits(model)
    spec = options(TokenSpec(keep_rate=(0.5, 1.0), locations=(1, 3)), representative=representative)
    reduce_tokens_(model, spec)
    end = logits(model)
    assert not torch.equal(end, dense)
    assert torch.equal(logits(model), end)
    for progress, tokens in ((0.0, 16), (0.5, 12), (1.0, 8)):  # a stage at rate 1 sees those that waited again
        plan = set_keep_rate_(model, progress)
        assert [row.tokens_in for row in plan.blocks] == [17, *[1 + tokens + (representative and tokens < 16)] * 2, 17]
        assert logits(model).isfinite().all()
        assert torch.equal(logits(model), dense) == (progress == 0)
    assert torch.equal(logits(model), end)


# ---- refused


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (TokenSpec(locations=(0, 2), method="evo-vit"), "block 0 cannot sort its patches"),
        (TokenSpec(keep_rate=0.05, method="evo-vit"), "no patch would be informative.*0.05.*at least 0.0625"),
        (TokenSpec(keep_rate=(0.5, 0.5, 0.5), method="evo-vit"), "the numbers of keep rates and locations differ"),
        (TokenSpec(locations=(1, 4), method="evo-vit"), "a location is outside the model"),
        (TokenSpec(method="evo-vit", options={"representative": 2}), "does not take these options"),
    ],
)
def test_specs_that_do_not_fit(spec, words):
    with pytest.raises(InputError, match=f"(?s){words}"):
        reduce_tokens_(create("deit"), spec)


# ---- training, compiling


@each_path
def test_gradients_reach_every_weight_also_where_activations_are_computed_again(representative):
    model = tiny(global_pool="avg", drop_path_rate=0.0).train()
    reduce_tokens_(model, options(SPEC, representative=representative))
    pictures, gradients = torch.from_numpy(drawn_images(model, 3)), []
    for again in (False, True):
        model.blocks.checkpointing = again
        model.zero_grad()
        model(pictures).square().sum().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.slow
@each_path
def test_it_compiles_without_a_break(representative):
    model = tiny()
    reduce_tokens_(model, options(SPEC, representative=representative))
    pictures = torch.from_numpy(drawn_images(model, 3))
    with torch.inference_mode():
        wanted = model(pictures)
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(pictures), wanted, rtol=1e-4, atol=1e-5)


# ---- exported


@each_path
@each_form
def test_the_exported_file_answers_like_pytorch(layer_wise, representative):
    model = tiny(global_pool="avg")
    reduce_tokens_(model, options(SPEC, layer_wise=layer_wise, representative=representative))
    plan = token_plan(model)
    proto = export_onnx(model, name="vit_tiny_patch16_224", preprocess=preprocess_for(model))
    assert Counter(node.op_type for node in proto.graph.node)["TokenReorg"] == len(plan.locations)
    session = onnxruntime.InferenceSession(with_indices(proto).SerializeToString())
    for batch in (1, 3, 8):
        pictures = drawn_images(model, batch, seed=batch)
        with capture(model) as seen:
            wanted = model(torch.from_numpy(pictures)).numpy()
        found, *choices = session.run(None, {"input": pictures})
        np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())
        for choice, wanted_choice in zip(choices, seen.kept, strict=True):
            np.testing.assert_array_equal(choice, wanted_choice.numpy())


@each_path
def test_the_slice_twin_sorts_nothing(representative):
    model = tiny()
    reduce_tokens_(model, options(SPEC, representative=representative))
    proto = export_onnx(model, name="vit_tiny_patch16_224", preprocess=preprocess_for(model))
    twin = slice_twin(proto)
    left = Counter(node.op_type for node in twin.graph.node)
    assert left["TokenReorg"] == 0
    assert not twin.functions
    assert left["Softmax"] == 0  # nothing is left of g either; a representative is an even mean
    shapes = []
    for file in (proto, twin):
        inferred = onnx.shape_inference.infer_shapes(file)
        known = {info.name: [dim.dim_value for dim in info.type.tensor_type.shape.dim]
                 for info in inferred.graph.value_info}  # fmt: skip
        attention = [node for node in file.graph.node if node.op_type == "Attention"]
        shapes.append([known[node.input[0]][1:] for node in attention])
    assert shapes[0] == shapes[1] == [[row.tokens_in, TINY["embed_dim"]] for row in token_plan(model).blocks]
    pictures = drawn_images(model, 2)
    result = onnxruntime.InferenceSession(twin.SerializeToString()).run(None, {"input": pictures})[0]
    if representative:
        return
    taken = copy.deepcopy(model)  # the same with every choice the order that is there
    for reducer in (module for module in taken.modules() if isinstance(module, TokenReducer)):
        reducer.given = torch.arange(36, dtype=torch.int32).expand(2, -1)
    np.testing.assert_allclose(result, logits_of(taken, pictures), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@each_path
def test_g_stays_exact_in_half_precision(representative, precision):
    model = tiny()
    reduce_tokens_(model, options(SPEC, representative=representative))
    proto = export_onnx(model, name="vit_tiny_patch16_224", preprocess=preprocess_for(model))
    lowered = onnx.shape_inference.infer_shapes(set_precision(proto, precision))
    types = {info.name: info.type.tensor_type.elem_type for info in lowered.graph.value_info}
    exact = [node for node in lowered.graph.node if ".refresh/" in node.name or ".exact/" in node.name]
    checked = [node for node in exact if node.op_type in ("Softmax", "ReduceMean", "Div", "MatMul")]
    assert len(checked) == 2 * 3 + (4 if representative else 0)
    assert {types[node.output[0]] for node in checked} == {onnx.TensorProto.FLOAT}
    if precision == "fp16":  # ONNX Runtime has no BF16 convolution for the CPU
        pictures = drawn_images(model, 4)
        found = onnxruntime.InferenceSession(lowered.SerializeToString()).run(["logits"], {"input": pictures})[0]
        np.testing.assert_allclose(found, logits_of(model, pictures), rtol=0, atol=2e-2)
