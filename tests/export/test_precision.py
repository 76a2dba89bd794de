"""FP16 and BF16: what is cast and what is not, and answers as far from FP64 as PyTorch's own in that precision."""

import copy
from collections import Counter
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
import onnx
import onnx.inliner
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator

from evit_deploy.errors import InputError
from evit_deploy.export.answer import answer_in
from evit_deploy.export.card import INPUT, kept_name, read_card
from evit_deploy.export.portable import OPSET, export_onnx
from evit_deploy.export.precision import DTYPES, set_precision
from evit_deploy.export.variants import block_of, reorganizations, with_indices
from evit_deploy.runtimes.openvino import OpenVINORunner
from evit_deploy.tokens.choices import FLOOR
from evit_deploy.tokens.operators.token_reorg import DOMAIN, NAME
from evit_deploy.tokens.plan import TokenSpec
from evit_deploy.tokens.reduce import reduce_tokens_, token_plan
from evit_deploy.verification.golden import _replayed, make_golden
from tests.support.exports import DROP, KEEP, answers, copied, each, exported, lowered, nodes, reduced, widened
from tests.support.models import images, of_kind, preprocess_for, seeded

LOW = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
NUMPY = {"fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
both = pytest.mark.parametrize("precision", ["fp16", "bf16"])
HEAVY = ("Gemm", "MatMul", "Conv", "Attention", "LayerNormalization", "RMSNormalization", "Gelu")


def inlined(proto: ModelProto) -> ModelProto:
    """Standard operators only, every type and shape worked out anew and held against what the file says."""
    plain = onnx.inliner.inline_local_functions(proto)
    onnx.checker.check_model(plain, full_check=True)
    return onnx.shape_inference.infer_shapes(plain, check_type=True, strict_mode=True, data_prop=True)


def types(proto: ModelProto) -> dict[str, int]:
    """Type of every value of a graph."""
    infos = (*proto.graph.input, *proto.graph.output, *proto.graph.value_info)
    found = {info.name: info.type.tensor_type.elem_type for info in infos}
    return found | {tensor.name: tensor.data_type for tensor in proto.graph.initializer}


def score_row(proto: ModelProto) -> list[onnx.NodeProto]:
    """The nodes between the casts of q and k and the scores that ``TokenReorg`` takes."""
    made = {output: node for node in proto.graph.node for output in node.output}
    row: list[onnx.NodeProto] = []
    pending = [node.input[1] for node in reorganizations(proto)]
    while pending:
        node = made.get(pending.pop())
        if node is not None and node.op_type != "Cast":
            row.append(node)
            pending.extend(node.input)
    return row


def assert_sound(proto: ModelProto, precision: str) -> None:
    """Everything that must hold of a file in FP16 or BF16, whatever the model."""
    whole, low = inlined(proto), LOW[precision]
    kinds = types(whole)
    for node in proto.graph.node:
        if node.op_type in HEAVY:
            assert {kinds[name] for name in (*node.input, *node.output) if name} == {low}, node.name
        if node.op_type == "LayerNormalization":  # the type of its statistics, FP32 where nothing is said
            assert all(a.i == TensorProto.FLOAT for a in node.attribute if a.name == "stash_type")
    for node in score_row(proto):
        floats = {kinds[name] for name in (*node.input, *node.output)} - {TensorProto.INT64}
        assert floats == {TensorProto.FLOAT}, node.name
    for node in reorganizations(proto):
        assert [kinds[name] for name in (*node.input, *node.output)] == [low, TensorProto.FLOAT, low, TensorProto.INT32]
    ends = [info.type.tensor_type.elem_type for info in (*proto.graph.input, *proto.graph.output)]
    assert ends == [TensorProto.FLOAT, TensorProto.FLOAT]
    read = Counter(name for node in proto.graph.node for name in node.input) + Counter(
        o.name for o in proto.graph.output
    )
    casts = nodes(proto, "Cast")
    assert all(read[cast.output[0]] for cast in casts)
    assert max(Counter((cast.input[0], cast.attribute[0].i) for cast in casts).values()) == 1
    assert all(kinds[cast.input[0]] != kinds[cast.output[0]] for cast in casts)
    made = [name for node in proto.graph.node for name in node.output]
    assert len(made) == len(set(made))


# What stands in the file.


@both
@each
def test_everything_heavy_is_narrow_and_scores_are_not(kind, spec, precision):
    proto = lowered(kind, precision, spec=spec)
    assert_sound(proto, precision)
    assert len(score_row(proto)) >= 4 * len(reorganizations(proto))
    # in, out, and q and k of each location: nothing else changes its type
    assert len(nodes(proto, "Cast")) == 2 + 2 * len(reorganizations(proto))


@both
def test_the_selection_and_the_fused_sum_are_fp32(precision):
    whole = inlined(lowered("plain", precision))
    kinds, count = types(whole), len(reorganizations(exported("plain")))
    top, sums = nodes(whole, "TopK"), nodes(whole, "MatMul")
    assert len(top) == len(sums) == count
    assert {kinds[node.input[0]] for node in top} == {TensorProto.FLOAT}
    assert {kinds[name] for node in sums for name in (*node.input, *node.output)} == {TensorProto.FLOAT}
    assert {kinds[name] for node in nodes(whole, "GatherND") for name in node.output} == {LOW[precision]}


@both
@each
def test_weights_are_rounded_once_and_to_the_nearest(kind, spec, precision):
    before = {tensor.name: numpy_helper.to_array(tensor) for tensor in exported(kind, spec).graph.initializer}
    rows = {name for node in score_row(lowered(kind, precision, spec=spec)) for name in node.input}
    after = lowered(kind, precision, spec=spec).graph.initializer
    assert {tensor.name for tensor in after} == before.keys()
    for tensor in after:
        wanted = before[tensor.name]
        if wanted.dtype == np.float32 and tensor.name not in rows:
            wanted = wanted.astype(NUMPY[precision])
        found = numpy_helper.to_array(tensor)
        assert found.dtype == wanted.dtype, tensor.name
        assert found.tobytes() == wanted.tobytes(), tensor.name


@both
@each
def test_nodes_and_function_are_those_of_the_fp32_file(kind, spec, precision):
    before, after = exported(kind, spec), lowered(kind, precision, spec=spec)
    assert [onnx.printer.to_text(f) for f in after.functions] == [onnx.printer.to_text(f) for f in before.functions]
    assert {entry.domain: entry.version for entry in after.opset_import} == {"": OPSET, DOMAIN: 1}
    unlike = [node.name for node in before.graph.node if node.op_type == "Cast"]
    kept = [(node.name, node.op_type, node.attribute) for node in after.graph.node if node.op_type != "Cast"]
    assert kept == [(n.name, n.op_type, n.attribute) for n in before.graph.node if n.name not in unlike]
    assert [list(node.output) for node in reorganizations(after)] == [list(n.output) for n in reorganizations(before)]
    assert [node.domain for node in after.graph.node if node.op_type == NAME] == [DOMAIN] * len(reorganizations(before))


@both
def test_the_card_says_the_precision_and_the_original_is_left_alone(precision):
    original = copied(exported("plain"))
    before = original.SerializeToString(deterministic=True)
    found = set_precision(original, precision)
    assert original.SerializeToString(deterministic=True) == before
    own, card = read_card(original), read_card(found)
    assert own is not None
    assert card == msgspec.structs.replace(own, precision=precision)
    again = set_precision(original, precision)
    assert found.SerializeToString(deterministic=True) == again.SerializeToString(deterministic=True)


def test_fp32_is_a_copy():
    original = exported("plain")
    found = set_precision(original, "fp32")
    assert found is not original
    assert found == original


@both
def test_a_dense_twin_has_no_casts_but_at_its_ends(precision):
    twin = lowered("registers, no classes", precision, spec=None)
    kinds = types(inlined(twin))
    assert [(cast.input[0], cast.output[0]) for cast in nodes(twin, "Cast")] == [
        (INPUT, f"{INPUT}.cast"), (f"embedding.{NUMPY[precision].name}", "embedding"),
    ]  # fmt: skip
    for node in twin.graph.node:
        if node.op_type in HEAVY:
            assert {kinds[name] for name in node.input if name} == {LOW[precision]}


@both
@settings(max_examples=2)
@given(data=st.data())
def test_any_model_is_sound(precision, data):
    heads, depth = data.draw(st.sampled_from([1, 2, 3])), data.draw(st.integers(1, 3))
    model = seeded(
        "vit_tiny_patch16_224", data.draw(st.integers(0, 99)), img_size=data.draw(st.sampled_from([32, 48, 64])),
        embed_dim=16 * heads, num_heads=heads, depth=depth, num_classes=data.draw(st.integers(0, 5)),
        qk_norm=data.draw(st.booleans()), reg_tokens=data.draw(st.integers(0, 2)),
    )  # fmt: skip
    rate = data.draw(st.floats(0.1, 0.8).map(lambda rate: round(rate, 3)))
    reduce_tokens_(model, TokenSpec(keep_rate=rate, locations=(depth - 1,), fuse=data.draw(st.booleans())))
    proto = set_precision(export_onnx(model, name="x", preprocess=preprocess_for(model)), precision)
    assert_sound(proto, precision)


# What it answers.


def assert_within_eagers_error(
    found: dict[str, np.ndarray], model: Any, inputs: np.ndarray, precision: str, factor: float = 2
) -> None:
    """Twice the error of PyTorch in that precision, told to keep the same patches."""
    plan = token_plan(model)
    kept = [found[kept_name(row.block)] for row in plan.locations]
    exact, _ = _replayed(copy.deepcopy(model).double(), inputs, kept)
    eager, _ = _replayed(copy.deepcopy(model).to(DTYPES[precision]), inputs, kept)
    floor = FLOOR * np.finfo(np.float32).eps * np.abs(exact).max()
    error, own = np.abs(found[answer_in(found)] - exact).max(), np.abs(eager - exact).max()
    assert found[answer_in(found)].dtype == np.float32
    assert error <= max(factor * own, floor)
    assert error > floor  # or nothing was narrow


@each
def test_fp16_answers_like_pytorch_in_fp16(kind, spec):
    model, inputs = reduced(kind, spec), images(of_kind(kind), 6)
    found = answers(lowered(kind, "fp16", spec=spec), inputs, indices=True)
    assert_within_eagers_error(found, model, inputs, "fp16")


@each
def test_bf16_answers_like_pytorch_in_bf16(kind, spec):
    """Weights that are rounded and arithmetic that is not: ONNX Runtime has no BF16 on a CPU."""
    model, inputs = reduced(kind, spec), images(of_kind(kind), 6)
    found = answers(widened(lowered(kind, "bf16", spec=spec)), inputs, indices=True)
    assert_within_eagers_error(found, model, inputs, "bf16")


@pytest.mark.parametrize(("kind", "spec"), [("plain", KEEP), ("distilled", DROP)])
def test_bf16_answers_in_onnxs_own_evaluator(kind, spec):
    """Every rounding where the graph has it, and more: it also rounds inside of LayerNorm, softmax and Gelu."""
    model, inputs = reduced(kind, spec), images(of_kind(kind), 3)
    proto = with_indices(lowered(kind, "bf16", spec=spec))
    names = [output.name for output in proto.graph.output]
    found: Any = ReferenceEvaluator(proto).run(names, {INPUT: inputs})
    assert_within_eagers_error(dict(zip(names, found, strict=True)), model, inputs, "bf16", factor=4)


@pytest.mark.openvino
def test_bf16_answers_in_openvino():
    if OpenVINORunner.missing() is not None:
        pytest.skip("OpenVINO is not installed")
    model, inputs = reduced("plain"), images(of_kind("plain"), 6)
    with OpenVINORunner(lowered("plain", "bf16"), threads=1, with_indices=True) as runner:
        assert_within_eagers_error(runner.infer({INPUT: inputs}), model, inputs, "bf16")


@both
def test_kept_sets_are_those_of_fp32_but_for_ties(precision):
    model, dense, inputs = reduced("plain"), of_kind("plain"), images(of_kind("plain"), 6)
    golden = make_golden(model, dense, inputs, precision)
    proto = lowered("plain", precision)
    found = answers(widened(proto) if precision == "bf16" else proto, inputs, indices=True)
    block = block_of(reorganizations(proto)[0])
    same = [set(a) == set(b) for a, b in zip(found[kept_name(block)], golden.kept[block][:, :-1], strict=True)]
    near: Any = (golden.margin[block] < 1).any(axis=1)
    assert any(same)
    assert all(s or n for s, n in zip(same, near, strict=True))


# Weights that do not fit.


def with_weight(value: float, name: str = "head.bias") -> ModelProto:
    proto = copied(exported("plain"))
    tensor = next(tensor for tensor in proto.graph.initializer if tensor.name == name)
    array = numpy_helper.to_array(tensor).copy()
    array.flat[3] = value
    tensor.CopyFrom(numpy_helper.from_array(array, name))
    return proto


@pytest.mark.parametrize("value", [65536.0, -1e6, np.inf, -np.inf, np.nan])
def test_a_weight_that_fp16_cannot_hold_is_named_and_refused(value):
    with pytest.raises(InputError, match=r"fp16 cannot hold: head\.bias") as caught:
        set_precision(with_weight(value), "fp16")
    assert "bf16" in str(caught.value)


@pytest.mark.parametrize("value", [65504.0, -65504.0, 1e-9])
def test_a_weight_that_just_fits_is_taken(value):
    found = set_precision(with_weight(value), "fp16")
    tensor = next(tensor for tensor in found.graph.initializer if tensor.name == "head.bias")
    assert np.isfinite(numpy_helper.to_array(tensor)).all()
    assert numpy_helper.to_array(tensor)[3] == np.float16(value)


def test_bf16_takes_what_fp16_cannot():
    found = set_precision(with_weight(1e30), "bf16")
    tensor = next(tensor for tensor in found.graph.initializer if tensor.name == "head.bias")
    assert float(numpy_helper.to_array(tensor)[3]) == pytest.approx(1e30, rel=2**-8)
    with pytest.raises(InputError, match=r"bf16 cannot hold.*--precision fp32"):
        set_precision(with_weight(3.4e38), "bf16")


def test_of_many_weights_the_first_five_are_named():
    proto = copied(exported("plain"))
    for tensor in proto.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and len(tensor.dims) > 1:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1e8), tensor.name))
    with pytest.raises(InputError, match=r"and \d+ more") as caught:
        set_precision(proto, "fp16")
    assert str(caught.value).count("e+0") == 5


# What is refused.


def test_an_unknown_precision():
    with pytest.raises(InputError, match=r"unknown precision.*fp64.*fp32, fp16, bf16, int8, fp8"):
        set_precision(exported("plain"), "fp64")


@pytest.mark.parametrize("target", ["fp32", "fp16", "int8"])
@both
def test_a_file_that_was_narrowed_before(precision, target):
    with pytest.raises(InputError, match=f"exported in FP32.*{precision}"):
        set_precision(lowered("plain", precision), target, calibration=images(of_kind("plain"), 1))


def test_a_file_of_somebody_else():
    identity = '<ir_version: 10, opset_import: ["": 23]> g (float[N] x) => (float[N] y) { y = Identity(x) }'
    with pytest.raises(InputError, match="no card"):
        set_precision(onnx.parser.parse_model(identity), "fp16")
