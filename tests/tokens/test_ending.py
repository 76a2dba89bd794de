"""The last block computed for what the head sees: the same answers, for as many multiply-adds less as the plan says."""

import copy

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from evit_deploy.export.portable import portable
from evit_deploy.models.timm_vit import EndingBlock
from evit_deploy.tokens.ending import for_inference
from evit_deploy.tokens.plan import TokenSpec
from evit_deploy.tokens.reduce import reduce_tokens_, token_plan
from tests.support.exports import answers
from tests.support.models import KINDS, TINY, images, of_kind, preprocess_for, seeded

EARLY = {"locations": (1, 2)}
SPECS = [
    TokenSpec(keep_rate=1.0),
    TokenSpec(keep_rate=0.6, **EARLY),
    TokenSpec(keep_rate=0.6, fuse=False, **EARLY),
    TokenSpec(keep_rate=0.6, options={"normalize": True}, **EARLY),
    TokenSpec(keep_rate=0.6, options={"squeeze": True}, **EARLY),
    TokenSpec(method="tome", options={"merge": (5, 5, 5)}),
    TokenSpec(method="merge", keep_rate=0.6, fuse=False, **EARLY),
    TokenSpec(method="dynamicvit", keep_rate=0.6, fuse=False, **EARLY),
]
SEEING_ALL = [kind for kind in KINDS if kind == "LV-ViT"]
each = pytest.mark.parametrize(
    "spec", SPECS, ids=lambda spec: f"{spec.method} {spec.rates} {spec.options or spec.fuse}"
)


@each
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in SEEING_ALL])
def test_the_answers_are_the_same(kind, spec):
    if kind == "distilled" and spec.method == "dynamicvit":
        pytest.skip("the method takes no distilled model")
    model = reduce_tokens_(of_kind(kind), spec).double()
    before = copy.deepcopy(model.state_dict())
    x = torch.from_numpy(images(model, 3)).double()
    made = for_inference(model)
    assert isinstance(made.blocks[-1], EndingBlock)
    with torch.inference_mode():
        assert made.blocks(torch.ones(1, token_plan(model).blocks[0].tokens_in, 48).double()).shape[1] == 2
        assert torch.allclose(made(x), model(x), rtol=0, atol=1e-12)
    assert {name: value.data_ptr() for name, value in made.state_dict().items()} == {
        name: value.data_ptr() for name, value in model.state_dict().items()
    }
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@each
def test_it_costs_what_the_plan_says(spec):
    if spec.method == "dynamicvit":
        pytest.skip("what decides is counted from its formulas")
    model = reduce_tokens_(of_kind("plain"), spec)
    plan = token_plan(model)
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as whole:
        model(torch.from_numpy(images(model, 1)))
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as less:
        for_inference(model)(torch.from_numpy(images(model, 1)))
    assert whole.get_total_flops() - less.get_total_flops() == 2 * (plan.macs() - plan.computed_macs()) > 0


@each
def test_files_do_so_too(spec):
    model = reduce_tokens_(of_kind("plain"), spec)
    inputs = images(model, 3)
    file = portable(model, name="x", preprocess=preprocess_for(model)).whole()
    attentions = [node for node in file.graph.node if node.op_type == "Attention"]
    for node in attentions:
        value = file.graph.output.add()
        value.name = node.output[0]
    found = list(answers(file, inputs).values())
    with torch.inference_mode():
        expected = model(torch.from_numpy(inputs)).numpy()
    assert np.abs(found[0] - expected).max() < 2e-6
    assert [value.shape[1] for value in found[1:]] == [row.tokens_in for row in token_plan(model).blocks[:-1]] + [2]


@pytest.mark.parametrize("kind", SEEING_ALL)
def test_a_head_that_sees_the_patches_needs_them(kind):
    model = reduce_tokens_(of_kind(kind), TokenSpec(keep_rate=0.6, **EARLY))
    assert type(for_inference(model).blocks[-1]) is type(model.blocks[-1])
    assert token_plan(model).computed_macs() == token_plan(model).macs()


def test_pooled_patches_and_reductions_in_the_last_block_are_computed():
    pooling = reduce_tokens_(seeded(**TINY, global_pool="avg"), TokenSpec(method="tome", options={"merge": (5, 5)}))
    last = reduce_tokens_(of_kind("plain"), TokenSpec(keep_rate=0.6, locations=(1, 3)))
    for model in (pooling, last):
        assert type(for_inference(model).blocks[-1]) is type(model.blocks[-1])
        assert not token_plan(model).ends_early
        assert token_plan(model).computed_macs() == token_plan(model).macs()
