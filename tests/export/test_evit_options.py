"""What EViT's options are in an exported file, its precisions, its twins and its engines."""

import functools
import xml.etree.ElementTree as ElementTree
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto

from evit_deploy.engines.audit import engine_checks
from evit_deploy.export.card import INPUT, LOGITS, kept_name
from evit_deploy.export.portable import export_onnx
from evit_deploy.export.precision import set_precision
from evit_deploy.export.variants import slice_twin, with_choice
from evit_deploy.recipe.options import BuildOptions
from evit_deploy.runtimes.onnxruntime import OnnxRuntimeRunner
from evit_deploy.tokens.choices import original_patches
from evit_deploy.tokens.plan import TokenSpec
from evit_deploy.tokens.reduce import capture, dense_twin, reduce_tokens_, token_plan
from evit_deploy.verification.agreement import agreement
from evit_deploy.verification.golden import _replayed, make_golden
from tests.support.exports import answers, assert_close, nodes, operators
from tests.support.models import TINY, images, preprocess_for, seeded
from tests.support.openvino_model import NEEDS_OPENVINO

SQUEEZE, MEAN, SIZED = {"squeeze": True}, {"normalize": True}, {"normalize": True, "sized": True}
FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "squeeze": (SQUEEZE, {}),
    "squeeze, mean": (SQUEEZE, {"global_pool": "avg"}),
    "mean": (MEAN, {}),
    "sized": (SIZED, {"global_pool": "avg"}),
}
each = pytest.mark.parametrize("form", FORMS)
each_in_openvino = pytest.mark.parametrize("form", [pytest.param(form, marks=NEEDS_OPENVINO) for form in FORMS])


@functools.cache
def made(form: str) -> Any:
    options, args = FORMS[form]
    return reduce_tokens_(seeded(**TINY, **args), TokenSpec(keep_rate=0.6, options=options))


@functools.cache
def exported(form: str, precision: str = "fp32", base: str = "fp32", dense: bool = False) -> ModelProto:
    """Shared: copy it to change it."""
    model = dense_twin(made(form)) if dense else made(form)
    if precision == "fp32":
        return export_onnx(model, name="vit_tiny_patch16_224", preprocess=preprocess_for(model))
    calibration = images(model, 24, seed=1) if precision in ("int8", "fp8") else None
    return set_precision(exported(form, dense=dense), precision, base=base, calibration=calibration)


def choices_of(form: str, inputs: np.ndarray) -> list[np.ndarray]:
    with capture(made(form)) as seen:
        made(form)(torch.from_numpy(inputs))
    return [choice.numpy() for choice in seen.kept]


@each
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_the_file_answers_like_pytorch(form, batch):
    inputs = images(made(form), batch)
    found = answers(exported(form), inputs, indices=True)
    assert_close(found[LOGITS], made(form), inputs)
    for row, choice in zip(token_plan(made(form)).locations, choices_of(form, inputs), strict=True):
        np.testing.assert_array_equal(found[kept_name(row.block)], choice)


@each
def test_the_slice_twin_has_no_scores(form):
    twin = slice_twin(exported(form))
    onnx.checker.check_model(twin, full_check=True)
    assert not twin.functions
    assert not {"TopK", "ArgMax"} & set(operators(twin))
    blocks = {row.block for row in token_plan(made(form)).locations}
    assert not [n.name for n in twin.graph.node if n.op_type == "Softmax" and int(n.name.split(".")[1]) in blocks]
    assert answers(twin, images(made(form), 3))[LOGITS].shape == (3, 10)


@each
def test_a_file_that_is_told_its_choice_follows_it(form):
    """With other choices than its own, rows and fused token included."""
    model, inputs = made(form), images(made(form), 3)
    plan = token_plan(model)
    given = choices_of(form, images(model, 3, seed=7))
    feeds = {INPUT: inputs} | {f"choice_{row.block}": c for row, c in zip(plan.locations, given, strict=True)}
    with OnnxRuntimeRunner(with_choice(exported(form)), threads=1) as runner:
        found = runner.infer(feeds)
    logits, evidence = _replayed(model, inputs, given)
    np.testing.assert_allclose(found[LOGITS], logits, rtol=0, atol=2e-5)
    for row, wanted in zip(plan.locations, evidence, strict=True):
        parts = wanted if isinstance(wanted, tuple) else (wanted,)
        for index, part in enumerate(parts):
            name = f"scores_{row.block}" + (f"_{index}" if index else "")
            np.testing.assert_allclose(found[name], part, rtol=0, atol=2e-5)
    assert np.abs(answers(exported(form), inputs)[LOGITS] - logits).max() > 1e-3


@each
@pytest.mark.parametrize(
    ("precision", "base"), [("fp16", "fp32"), ("bf16", "fp32"), ("int8", "fp32"), ("int8", "fp16"), ("fp8", "fp16")]
)
def test_every_precision_agrees_with_its_golden_answers(form, precision, base):
    proto, inputs = exported(form, precision, base), images(made(form), 8)
    onnx.checker.check_model(proto, full_check=True)
    quantized = (proto, exported(form, precision, base, True)) if precision in ("int8", "fp8") else None
    golden = make_golden(made(form), dense_twin(made(form)), inputs, precision, quantized)
    assert golden.noise() < 0.2
    if precision == "bf16":
        return  # ONNX Runtime's CPU provider has none
    found = agreement(golden, np.arange(8), answers(proto, inputs, indices=True), token_plan(made(form)))
    assert found.wrong == 0
    assert not found.error > found.limit
    assert not found.tie_error > found.tie_limit


@each
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_choosing_and_dividing_stay_in_fp32(form, precision):
    proto = exported(form, precision, "fp16" if precision == "int8" else "fp32")
    inferred = onnx.shape_inference.infer_shapes(proto)
    types = {info.name: info.type.tensor_type.elem_type for info in inferred.graph.value_info}
    float32 = onnx.TensorProto.FLOAT
    for node in nodes(proto, "TopK") + nodes(proto, "ArgMax") + nodes(proto, "Div"):
        assert types[node.input[0]] == float32, node.name
    wanted = {"squeeze": 3, "squeeze, mean": 3, "mean": 3, "sized": 3}[form]  # of each location
    assert len(nodes(proto, "Div")) == wanted
    compared = [node for node in nodes(proto, "MatMul") if ".reducer/" in node.name]
    assert len(compared) == (3 if "squeeze" in form else 0)
    makers = {name: node.op_type for node in proto.graph.node for name in node.output}
    assert all(makers[value] != "DequantizeLinear" for node in compared for value in node.input)


@each_in_openvino
def test_openvino_compares_in_fp32_and_answers_alike(form, tmp_path):
    from evit_deploy.export.openvino import save_openvino
    from evit_deploy.runtimes.openvino import OpenVINORunner

    save_openvino(exported(form), tmp_path / "model.xml")
    layers = list(ElementTree.parse(tmp_path / "model.xml").getroot().iter("layer"))
    marked = {
        layer.get("name"): layer for layer in layers if layer.find("rt_info/attribute[@name='precise']") is not None
    }
    for block in (1, 2, 3):
        expected = ("MatMul", "Div", "ReduceL2") if "squeeze" in form else ()
        assert {f"blocks.{block}.reducer/{operator}" for operator in expected} <= set(marked)
        assert "squeeze" in form or f"blocks.{block}.reducer.exact/Div" in marked
    assert not [name for name, layer in marked.items() if "attn" in str(name) or "mlp" in str(name)]
    inputs = images(made(form), 3)
    with OpenVINORunner(tmp_path / "model.xml", threads=1, with_indices=True) as runner:
        found = runner.infer({INPUT: inputs})
    assert_close(found[LOGITS], made(form), inputs)
    plan = token_plan(made(form))
    told = original_patches([found[kept_name(row.block)] for row in plan.locations], plan)
    for one, other in zip(told, original_patches(choices_of(form, inputs), plan), strict=True):
        np.testing.assert_array_equal(np.sort(one), np.sort(other))


@pytest.mark.tensorrt_rtx
@each
def test_a_plan_for_sm80_has_fused_attention(form, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    from evit_deploy.engines.build import build_engine
    from evit_deploy.engines.rtx_listing import plan_layers

    onnx.save(exported(form, "fp16"), tmp_path / "model.onnx")
    options = BuildOptions(batches=((1, 4, 8),), gpus=("sm80",))
    built = build_engine(tmp_path / "model.onnx", tmp_path / "engine.plan", "tensorrt-rtx", "fp16", options)
    report = engine_checks(built, tmp_path / "engine.plan", token_plan(made(form)), listing=plan_layers)
    assert report.passed, report.failed
    assert built.attentions == 4
