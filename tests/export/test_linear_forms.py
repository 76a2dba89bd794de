"""The two forms of a linear layer: 2-D ``Gemm`` with its bias inside, and 3-D ``MatMul`` with an ``Add``.

They answer alike, in every precision, and TensorRT-RTX builds an engine of each with the same kernels fused.
"""

import functools
from collections import Counter
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnx.inliner
import pytest
from onnx import ModelProto, numpy_helper

from evit_deploy.engines.audit import engine_checks
from evit_deploy.engines.build import build_engine
from evit_deploy.engines.rtx_listing import plan_layers
from evit_deploy.errors import InputError
from evit_deploy.export.answer import answer_name
from evit_deploy.export.card import ModelCard, card_fields, parse_card, read_card
from evit_deploy.export.portable import export_onnx
from evit_deploy.export.precision import QUANTIZED, set_precision
from evit_deploy.export.variants import slice_twin
from evit_deploy.models.timm_vit import LoweredMlp, TimmViT
from evit_deploy.recipe.options import BuildOptions
from evit_deploy.tokens.reduce import token_plan
from tests.support import exports
from tests.support.exports import answers, assert_close, calibration_of, exported, nodes, reduced
from tests.support.models import KINDS, images, of_kind, preprocess_for

FORMS = ("gemm", "matmul")
BASES = [("fp16", "fp32"), ("int8", "fp32"), ("int8", "fp16"), ("fp8", "fp32"), ("fp8", "fp16")]
each_kind = pytest.mark.parametrize("kind", KINDS)


@functools.cache
def matmul(kind: str, *, dense: bool = False) -> ModelProto:
    """A model's file in the second form; the first is :func:`tests.support.exports.exported`."""
    model = of_kind(kind) if dense else reduced(kind)
    return export_onnx(model, name=KINDS[kind][0], preprocess=preprocess_for(model), linear="matmul")


def form(kind: str, linear: str) -> ModelProto:
    return exported(kind) if linear == "gemm" else matmul(kind)


@functools.cache
def lowered(kind: str, linear: str, precision: str, base: str = "fp32") -> ModelProto:
    if linear == "gemm":
        return exports.lowered(kind, precision, base)
    calibration = calibration_of(kind) if precision in QUANTIZED else None
    return set_precision(matmul(kind), precision, base=base, calibration=calibration)


def weights(proto: ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}


# ---- what stands in the files


@each_kind
def test_every_linear_layer_of_a_block_has_the_form_that_was_asked_for(kind):
    flat, deep = form(kind, "gemm"), form(kind, "matmul")
    known = weights(deep)
    in_blocks = [node for node in nodes(flat, "Gemm") if node.name.startswith("blocks.")]
    products = [node for node in nodes(deep, "MatMul") if node.name.startswith("blocks.")]
    assert [node.name.replace("/Gemm", "/MatMul") for node in in_blocks] == [node.name for node in products]
    assert len(products) == 6 * len(token_plan(reduced(kind)).blocks)
    assert nodes(flat, "MatMul") == []
    assert all(not node.name.startswith(("blocks.", "aux_head")) for node in nodes(deep, "Gemm"))
    for gemm, product in zip(in_blocks, products, strict=True):  # one name, one the other's transpose
        assert gemm.input[1] == product.input[1]
        np.testing.assert_array_equal(known[product.input[1]], weights(flat)[gemm.input[1]].T)
        if len(gemm.input) == 3:  # LV-ViT's queries, keys and values have no bias
            (user,) = [node for node in deep.graph.node if product.output[0] in node.input]
            assert (user.op_type, user.input[1]) == ("Add", gemm.input[2])


@each_kind
def test_nothing_else_is_different(kind):
    flat, deep = (Counter(node.op_type for node in form(kind, linear).graph.node) for linear in FORMS)
    own = ("Gemm", "MatMul", "Add", "Reshape")
    assert {operator: count for operator, count in flat.items() if operator not in own} == {
        operator: count for operator, count in deep.items() if operator not in own
    }
    assert deep["Reshape"] < flat["Reshape"] / 2
    proto = form(kind, "matmul")
    onnx.checker.check_model(onnx.inliner.inline_local_functions(proto), full_check=True)
    used = {name for node in proto.graph.node for name in node.input}
    assert {tensor.name for tensor in proto.graph.initializer} <= used
    made = {output: node for node in proto.graph.node for output in node.output}
    for gelu in nodes(proto, "Gelu"):  # what TensorRT and ONNX Runtime fuse: no Reshape in between
        (after,) = [node for node in proto.graph.node if gelu.output[0] in node.input]
        assert (made[gelu.input[0]].op_type, after.op_type) == ("Add", "MatMul")


@pytest.mark.parametrize("linear", FORMS)
def test_the_card_says_which_form_a_file_has(linear):
    for proto in (form("plain", linear), lowered("plain", linear, "fp16"), slice_twin(form("plain", linear))):
        card = read_card(proto)
        assert card is not None
        assert card.linear == linear


def test_a_card_of_an_earlier_version_is_of_a_file_with_gemms():
    card = read_card(matmul("plain"))
    assert card is not None
    fields = {name: value for name, value in card_fields(card).items() if name not in ("linear", "unquantized")}
    assert parse_card(fields) == msgspec.structs.replace(card, linear="gemm")
    assert parse_card({name: value for name, value in fields.items() if name != "precision"}) is None
    assert ModelCard.__struct_fields__[-2:] == ("linear", "unquantized")


def test_a_family_with_one_form_is_told(monkeypatch):
    lower = TimmViT.lower

    def fixed(model):
        found = lower(model)
        for module in found.modules():
            if hasattr(module, "flat"):
                module.flat = 1  # true, and nothing that can be chosen
        return found

    monkeypatch.setattr(TimmViT, "lower", staticmethod(fixed))
    model = reduced("plain")
    with pytest.raises(InputError, match=r"one form of linear layers \(got matmul, expected gemm\)"):
        export_onnx(model, name="plain", preprocess=preprocess_for(model), linear="matmul")


def test_the_form_is_chosen_on_the_lowered_copy_alone():
    assert LoweredMlp.flat is True
    proto = matmul("plain")
    again = export_onnx(reduced("plain"), name=KINDS["plain"][0], preprocess=preprocess_for(of_kind("plain")))
    assert nodes(again, "MatMul") == []
    assert nodes(proto, "MatMul")


# ---- how they answer


@each_kind
@pytest.mark.parametrize("batch", [1, 3])
def test_both_answer_like_pytorch(kind, batch):
    model = reduced(kind)
    inputs = images(model, batch)
    found = {linear: answers(form(kind, linear), inputs, indices=True) for linear in FORMS}
    answer = answer_name(model)
    assert_close(found["matmul"][answer], model, inputs)
    for name, kept in found["gemm"].items():
        if name != answer:
            np.testing.assert_array_equal(kept, found["matmul"][name])
    spread = np.ptp(found["gemm"][answer])
    assert np.abs(found["gemm"][answer] - found["matmul"][answer]).max() <= 1e-5 * spread


@each_kind
def test_the_dense_twin_answers_like_pytorch(kind):
    model = of_kind(kind)
    assert_close(answers(matmul(kind, dense=True), images(model, 2))[answer_name(model)], model, images(model, 2))


@pytest.mark.parametrize("kind", ["plain", "LV-ViT"])
@pytest.mark.parametrize(("precision", "base"), BASES)
def test_a_precision_costs_the_same_in_both(kind, precision, base):
    inputs = images(reduced(kind), 4)
    exact = answers(exported(kind), inputs)["logits"]
    flat, deep = (
        float(np.sqrt(np.mean((answers(lowered(kind, linear, precision, base), inputs)["logits"] - exact) ** 2)))
        for linear in FORMS
    )
    assert 0 < deep <= 1.5 * flat
    assert deep <= 0.25 * float(exact.std())


@pytest.mark.parametrize(("precision", "base"), BASES[1:])
def test_every_matmul_is_quantized_with_a_scale_for_each_output(precision, base):
    proto = lowered("plain", "matmul", precision, base)
    made, known = {output: node for node in proto.graph.node for output in node.output}, weights(proto)
    before = weights(matmul("plain"))
    products = nodes(proto, "MatMul")
    assert [node.name for node in products] == [node.name for node in nodes(matmul("plain"), "MatMul")]
    for node in products:
        activation, weight = made[node.input[0]], made[node.input[1]]
        assert (activation.op_type, weight.op_type) == ("DequantizeLinear", "DequantizeLinear")
        assert [attribute.i for attribute in weight.attribute if attribute.name == "axis"] == [1]
        scale, stored = known[weight.input[1]], known[weight.input[0]]
        exact = before[weight.input[0].removesuffix("_quantized")]
        assert scale.shape == exact.shape[1:]
        error = np.abs(stored.astype(np.float32) * scale.astype(np.float32) - exact)
        largest = np.abs(exact).max(0)
        assert (error <= largest * (0.006 if precision == "int8" else 0.04)).all()
        assert any(error.ravel() > 0)


# ---- engines


@pytest.mark.tensorrt_rtx
@pytest.mark.parametrize(("precision", "gpu"), [("fp16", "sm80"), ("bf16", "sm89"), ("int8", "sm80"), ("fp8", "sm89")])
def test_tensorrt_rtx_makes_the_same_kernels_of_both(precision, gpu, tmp_path: Path):
    pytest.importorskip("tensorrt_rtx")
    kinds = []
    for linear in FORMS:
        model, plan = tmp_path / f"{linear}.onnx", tmp_path / f"{linear}.plan"
        onnx.save(lowered("plain", linear, precision, "fp16"), model)
        options = BuildOptions(batches=((1, 4, 8),), gpus=(gpu,))
        built = build_engine(model, plan, "tensorrt-rtx", precision, options)
        report = engine_checks(built, plan, token_plan(reduced("plain")), listing=plan_layers)
        assert report.passed, report.failed
        layers = plan_layers(plan)
        operators = [{node.rpartition("/")[2] for node in layer.nodes} for layer in layers]
        name = "Gemm" if linear == "gemm" else "MatMul"
        assert sum({"Gelu", name} <= found for found in operators) == 4  # one kernel a block, activation inside
        kinds.append(Counter(layer.kind for layer in layers))
    assert kinds[0] == kinds[1]
