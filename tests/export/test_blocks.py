"""Blocks that are alike, exported once: the file is the one that the exporter writes of the whole model."""

from typing import Any

import numpy as np
import onnx.numpy_helper
import pytest
import torch

from evit_deploy.export import portable as exporting
from evit_deploy.export.blocks import Known
from evit_deploy.export.kinds import numbers_in, renumbered, signature_of
from evit_deploy.export.portable import portable
from evit_deploy.tokens.backbone import backbone_of
from evit_deploy.tokens.plan import BlockPlan, TokenSpec
from evit_deploy.tokens.reduce import dense_twin, reduce_tokens_
from tests.support.exports import answers, copied
from tests.support.models import KEEP, KINDS, images, of_kind, preprocess_for, seeded

EARLY = TokenSpec(keep_rate=0.6, locations=(1, 2))
OTHER = TokenSpec(keep_rate=(0.9, 0.5), locations=(0, 2))
OPTIONS = [
    TokenSpec(keep_rate=0.6, fuse=False),
    TokenSpec(keep_rate=0.6, options={"normalize": True}),
    TokenSpec(keep_rate=0.6, options={"squeeze": True}),
    TokenSpec(method="tome", options={"merge": 3}),
    TokenSpec(method="merge", keep_rate=0.6, fuse=False),
    TokenSpec(method="evo-vit", keep_rate=0.6),
    TokenSpec(method="dynamicvit", keep_rate=0.6, fuse=False),
]


def canonical(proto):
    """All that a file says but for the names of values and the order of initializers."""
    weights = {
        t.name: (t.data_type, tuple(t.dims), onnx.numpy_helper.to_array(t).tobytes()) for t in proto.graph.initializer
    }
    made = {name for node in proto.graph.node for name in node.output}
    infos = {info.name: str(info.type) for info in proto.graph.value_info if info.name in made}
    numbers = {}

    def value(name):
        return weights.get(name) or (numbers.setdefault(name, len(numbers)), infos.get(name)) if name else ""

    return {
        "nodes": [
            (node.name, node.domain, node.op_type, [value(name) for name in (*node.input, *node.output)],
             sorted(map(str, node.attribute)))
            for node in proto.graph.node
        ],
        "initializers": sorted(weights.values()),
        "ends": [str(end) for end in (*proto.graph.input, *proto.graph.output)],
        "opsets": sorted((entry.domain, entry.version) for entry in proto.opset_import),
        "functions": list(map(str, proto.functions)),
        "properties": sorted(map(str, proto.metadata_props)),
    }  # fmt: skip


@pytest.fixture
def runs(monkeypatch):
    """How many blocks each run of the exporter was given."""
    found, real = [], exporting._run_exporter

    def counted(model, *more):
        found.append(len(model.blocks))
        return real(model, *more)

    monkeypatch.setattr(exporting, "_run_exporter", counted)
    return found


def answer(proto, inputs):
    """What a file answers: logits, or the embedding of a model without classes."""
    return answers(proto, inputs)[proto.graph.output[0].name]


def as_a_whole(model, linear: Any = "gemm"):
    """What the exporter writes when it is given the whole model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "assemble", lambda *_: None)
        return portable(model, name="x", preprocess=preprocess_for(model), linear=linear).whole()


@pytest.mark.parametrize(
    ("kind", "linear"), [*((kind, "gemm") for kind in KINDS), ("plain", "matmul"), ("LV-ViT", "matmul")]
)
def test_one_run_makes_the_files_of_two(kind, linear, runs):
    known, inputs = Known(), images(of_kind(kind), 3)
    model = reduce_tokens_(of_kind(kind), EARLY)
    models = [model, dense_twin(model)]
    found = [portable(m, name="x", preprocess=preprocess_for(m), linear=linear, known=known).whole() for m in models]
    # One block that reduces, one that does not, and the last one, unless its head sees the patches.
    assert runs == [2 if kind == "LV-ViT" else 3]
    for proto, one in zip(found, models, strict=True):
        whole = as_a_whole(one, linear)
        assert canonical(proto) == canonical(whole)
        assert np.array_equal(answer(proto, inputs), answer(whole, inputs))


def test_other_rates_and_locations_need_no_run(runs):
    known = Known()
    for spec in (EARLY, OTHER):
        model = reduce_tokens_(of_kind("plain"), spec)
        proto = portable(model, name="x", preprocess=preprocess_for(model), known=known).whole()
    assert runs == [3]
    assert canonical(proto) == canonical(as_a_whole(model))


@pytest.mark.parametrize("spec", OPTIONS, ids=lambda spec: f"{spec.method} {spec.options or spec.fuse}")
def test_other_methods_are_the_same_too(spec):
    model = reduce_tokens_(of_kind("plain"), spec)
    proto = portable(model, name="x", preprocess=preprocess_for(model)).whole()
    assert canonical(proto) == canonical(as_a_whole(model))


def test_a_dense_model_alone_takes_two_blocks(runs):
    model = of_kind("plain")
    portable(model, name="x", preprocess=preprocess_for(model))
    assert runs == [2]


def test_equal_weights_become_one_as_in_the_exporter(runs):
    """Fresh from timm all biases are 0, which the exporter folds into one initializer."""
    import timm

    name, model_args = KINDS["plain"]
    model = reduce_tokens_(timm.create_model(name, **model_args).eval(), KEEP)
    proto = portable(model, name="x", preprocess=preprocess_for(model)).whole()
    assert runs == [2]
    small = [t for t in proto.graph.initializer if np.prod(t.dims) <= 1024]
    assert len({(t.data_type, tuple(t.dims), onnx.numpy_helper.to_array(t).tobytes()) for t in small}) == len(small)
    whole, inputs = as_a_whole(model), images(model, 2)
    assert [(node.name, node.op_type) for node in proto.graph.node] == [
        (node.name, node.op_type) for node in whole.graph.node
    ]
    assert np.array_equal(answer(proto, inputs), answer(whole, inputs))


def test_counts_that_could_be_something_else_are_exported_on_their_own(runs):
    """48 patches in a model of width 48: whose 48 it is, cannot be seen."""
    model = reduce_tokens_(seeded(embed_dim=48, num_heads=3, depth=4, img_size=(96, 128), num_classes=10), KEEP)
    proto = portable(model, name="x", preprocess=preprocess_for(model)).whole()
    assert runs[-1] > 2
    assert canonical(proto) == canonical(as_a_whole(model))


def test_other_weights_around_the_blocks_are_not_taken_for_known(runs):
    known, inputs = Known(), images(of_kind("plain"), 2)
    for seed in (0, 1):
        model = of_kind("plain", seed)
        proto = portable(model, name="x", preprocess=preprocess_for(model), known=known).whole()
        with torch.inference_mode():
            expected = model(torch.from_numpy(inputs)).numpy()
        np.testing.assert_allclose(answers(proto, inputs)["logits"], expected, atol=1e-4)
    assert runs == [2, 2]


def test_the_model_is_left_alone():
    model: Any = reduce_tokens_(of_kind("plain"), KEEP)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    blocks = list(model.blocks)
    exported = portable(model, name="x", preprocess=preprocess_for(model))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert list(model.blocks) == blocks
    assert not set(exported.weights) & {tensor.name for tensor in exported.proto.graph.initializer}
    pointers = {parameter.data_ptr() for parameter in model.parameters()}
    assert exported.weights["blocks.2.mlp.inner.fc1.weight"].data_ptr() in pointers  # no copy


def test_signatures_tell_blocks_apart():
    lowered = backbone_of(of_kind("plain")).lower(of_kind("plain"))
    first, second = lowered.blocks[0], lowered.blocks[1]
    assert signature_of(first) == signature_of(second)
    assert {48, 192, 16, 3} <= numbers_in(signature_of(first))
    second.attn.num_heads = 6
    assert signature_of(first) != signature_of(second)
    second.attn.num_heads = 3
    second.norm1.register_buffer("note", torch.zeros(1))
    assert signature_of(first) != signature_of(second)


def test_counts_are_renumbered_or_refused():
    old, new = BlockPlan(0, 37, 22, True, 24), BlockPlan(3, 24, 14, True, 16)
    assert renumbered(old, new, 1, {48}) == {37: 24, 36: 23, 22: 14, 24: 16, 23: 15}
    assert renumbered(old, old, 1, {37}) == {}
    assert renumbered(old, new, 1, {37}) is None
    assert renumbered(BlockPlan(0, 9, 4, True, 6), new, 1, set()) is None  # too small to be told from an axis
    assert renumbered(BlockPlan(0, 37, 36, False, 37), new, 1, set()) is None  # 36 would become two numbers


def test_a_copy_is_not_the_original():
    model = of_kind("plain")
    exported = portable(model, name="x", preprocess=preprocess_for(model))
    before = copied(exported.proto)
    exported.whole()
    assert exported.proto == before
