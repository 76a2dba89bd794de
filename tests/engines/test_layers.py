"""The engine inspector's JSON, what must hold of an engine's layers, and the layers in a plan's own text."""

import json

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evit_deploy.engines.audit import dtype_check, fusion_check
from evit_deploy.engines.layers import (
    Layer,
    Tensor,
    compute_dtypes,
    dtype_of,
    is_fused_attention,
    parse_layers,
)
from evit_deploy.engines.rtx_listing import plan_layers
from evit_deploy.errors import InputError
from evit_deploy.tokens.plan import TokenSpec, make_plan
from tests.support.paths import DATA
from tests.support.plans import rtx_plan, tiny_blocks

DEPTH = 2
PLAN = make_plan(TokenSpec(keep_rate=0.4, locations=(0,)), prefix=1, patches=16, depth=DEPTH)


@pytest.fixture(params=[10, 11], ids=["TensorRT 10", "TensorRT 11"])
def layers(request) -> tuple[Layer, ...]:
    return parse_layers((DATA / f"engine_trt{request.param}.json").read_text())


def changed(layers: tuple[Layer, ...], part: str, **fields) -> tuple[Layer, ...]:
    """The layers, those with ``part`` in their name with other fields; there must be some."""
    assert any(part in layer.name for layer in layers)
    return tuple(msgspec.structs.replace(layer, **fields) if part in layer.name else layer for layer in layers)


def retyped(layers: tuple[Layer, ...], part: str, dtype: str) -> tuple[Layer, ...]:
    """The layers, those with ``part`` in their name reading another dtype."""
    assert any(part in layer.name for layer in layers)

    def reading(layer: Layer) -> Layer:
        inputs = tuple(msgspec.structs.replace(tensor, dtype=dtype) for tensor in layer.inputs)
        return msgspec.structs.replace(layer, inputs=inputs, weights=layer.weights and dtype)

    return tuple(reading(layer) if part in layer.name else layer for layer in layers)


# ---- parsing


def test_both_forms_hold_the_same_engine():
    ten, eleven = (parse_layers((DATA / f"engine_trt{form}.json").read_text()) for form in (10, 11))
    assert len(ten) == 18
    assert ten == eleven


def test_a_layer_s_parts(layers):
    attention = next(layer for layer in layers if "mha" in layer.name)
    assert attention == Layer(
        "_gemm_mha_v2_myl0_3",
        "kgen",
        (
            Tensor("__mye013", "fp16", (-1, 17, 64)),
            Tensor("__mye014", "fp16", (-1, 64, 17)),
            Tensor("__mye015", "fp16", (-1, 17, 64)),
        ),
        (Tensor("__mye016", "fp16", (-1, 17, 64)),),
        "_gemm_mha_v2_0xf30343c17e165d7e2b22d671f539cf75",
        "[ONNX Layer: blocks.0.attn/Attention]",
    )
    convolution = next(layer for layer in layers if layer.kind == "CaskConvolution")
    assert convolution.weights == "fp16"
    assert convolution.blocks is None


def test_nodes_are_separated_by_control_characters(layers):
    span = next(layer for layer in layers if "blocks.0/Add_1" in layer.metadata)
    assert "\x1f" in span.metadata
    assert span.nodes == ("blocks.0/Add_1", "blocks.1.norm1/LayerNormalization")
    assert span.blocks == (0, 1)


def test_a_node_inside_a_function_is_told_with_its_caller(layers):
    selection = next(layer for layer in layers if layer.kind == "TopK")
    assert selection.nodes == ("blocks.0.token_reorg/node_of_top_scores",)
    assert selection.blocks == (0, 0)


@pytest.mark.parametrize(
    ("text", "dtype"),
    [
        ("Half", "fp16"),
        ("Float", "fp32"),
        ("BFloat16", "bf16"),
        ("FP8", "fp8"),
        ("Int8", "int8"),
        ("UInt8", "uint8"),
        ("Int64", "int64"),
        ("Bool", "bool"),
        ("Row major linear FP32", "fp32"),
        ("Row major linear FP16 format", "fp16"),
        ("Row major linear BFloat16 format", "bf16"),
        ("Row major linear FP8 format", "fp8"),
        ("Row major Int8 format", "int8"),
        ("Channel major INT8 format where channel % 16 == 0", "int8"),
        ("Channel major FP16 format where channel % 8 == 0", "fp16"),
        ("Thirty-two wide channel vectorized row major FP32 format", "fp32"),
        ("Row major linear FP32 format (kLINEAR)", "fp32"),
        ("half", "fp16"),
        ("Unknown format", "Unknown format"),
        ("", ""),
    ],
)
def test_dtypes_of_all_writings(text, dtype):
    assert dtype_of(text) == dtype


def test_a_listing_of_names_only_gives_names():
    names = ["_gemm_mha_v2_myl0_3", "{ForeignNode[w...blocks.0.relu]}"]
    assert parse_layers(json.dumps({"Layers": names, "Bindings": []})) == tuple(Layer(name) for name in names)


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "nothing", '{"Layers": 3}', '{"Layers": [{}]}', '{"Layers": [4]}', "null"]
)
def test_what_is_no_listing_is_refused(text):
    with pytest.raises(InputError, match="not an engine inspector's listing"):
        parse_layers(text)


@given(st.recursive(
    st.none() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["Layers", "Name", "LayerType", "Inputs", "Dimensions", "Weights", "Type", "DataType"]),
        inner, max_size=4),
    max_leaves=12,
))  # fmt: skip
def test_any_json_is_layers_or_an_input_error(document):
    try:
        found = parse_layers(json.dumps(document))
    except InputError:
        return
    assert all(isinstance(layer, Layer) for layer in found)


# ---- dtypes


def test_an_fp16_engine_passes(layers):
    check = dtype_check(layers, "fp16")
    assert (check.passed, check.value) == (True, "12 of 12"), check.reason


@pytest.mark.parametrize("part", ["blocks.1.mlp.inner.fc1/Gemm", "_gemm_mha_v2_myl0_10", "head/Gemm", "patch_embed"])
def test_a_matmul_silently_in_fp32_fails_and_is_named(layers, part):
    check = dtype_check(retyped(layers, part, "fp32"), "fp16")
    assert not check.passed
    assert "in fp32" in check.reason
    assert ("blocks.1.attn/Attention" if "mha" in part else part) in check.reason


def test_the_fused_token_s_sum_may_be_in_fp32(layers):
    summing = next(layer for layer in layers if "node_of_sum_float" in layer.name)
    assert compute_dtypes(summing) == {"fp32"}  # and yet the engine passed above
    assert dtype_check(layers, "fp16").passed


def test_scalars_are_not_what_a_matmul_runs_in(layers):
    gemm = next(layer for layer in layers if layer.kind == "gemm")
    assert {tensor.dtype for tensor in gemm.inputs} == {"fp16", "fp32"}
    assert compute_dtypes(gemm) == {"fp16"}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "fp8"])
def test_an_fp16_engine_is_not_one_of_another_precision(layers, precision):
    assert not dtype_check(layers, precision).passed


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_a_quantized_engine_may_keep_attention_stem_and_head_in_16_bits(layers, precision):
    quantized = layers
    for part in ("attn.v/Gemm", "attn.proj/Gemm", "fc1/Gemm", "fc2/Gemm"):
        quantized = retyped(quantized, part, precision)
    assert dtype_check(quantized, precision).passed
    assert not dtype_check(retyped(quantized, "blocks.0.mlp.inner.fc2", "fp16"), precision).passed
    assert not dtype_check(retyped(quantized, "_gemm_mha_v2_myl0_3", "fp32"), precision).passed


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_layers_that_were_left_out_of_quantizing_may_be_in_16_bits_and_no_others(layers, precision):
    quantized = layers
    for part in ("attn.v/Gemm", "attn.proj/Gemm", "fc1/Gemm", "fc2/Gemm"):
        quantized = retyped(quantized, part, precision)
    kept = retyped(quantized, "blocks.0.mlp.inner.fc2", "fp16")
    assert dtype_check(kept, precision, ["blocks.0.mlp.fc2"]).passed
    assert not dtype_check(kept, precision, ["blocks.1.mlp.fc2"]).passed
    assert not dtype_check(retyped(quantized, "blocks.0.mlp.inner.fc2", "fp32"), precision, ["blocks.0.mlp.fc2"]).passed


def test_more_than_three_offenders_are_counted(layers):
    check = dtype_check(layers, "bf16")
    assert check.value == "0 of 12"
    assert "and 9 more" in check.reason


def test_an_engine_that_does_not_say_its_types_fails(layers):
    check = dtype_check([Layer(layer.name) for layer in layers], "fp16")
    assert not check.passed
    assert "without detailed profiling verbosity" in check.reason


# ---- fusion


def test_a_fused_engine_passes(layers):
    check = fusion_check(layers, DEPTH)
    assert (check.passed, check.value, check.limit) == (True, 2, 2)


def test_an_attention_taken_apart_fails_and_its_block_is_named(layers):
    apart = changed(layers, "_gemm_mha_v2_myl0_10", name="__myl_MaxSubExpSumDiv_myl2_10", tactic="")
    check = fusion_check(apart, DEPTH)
    assert (check.passed, check.value) == (False, 1)
    assert "not in block 1" in check.reason


def test_an_engine_without_any_attention_kernel_fails(layers):
    check = fusion_check([layer for layer in layers if not is_fused_attention(layer)], DEPTH)
    assert (check.passed, check.value) == (False, 0)


def test_two_kernels_of_one_attention_count_once(layers):
    second = next(layer for layer in layers if "mha" in layer.name)
    assert fusion_check([*layers, msgspec.structs.replace(second, name="_gemm_mha_v2_reduce")], DEPTH).passed


def test_names_alone_are_enough_to_count(layers):
    assert fusion_check([Layer(layer.name) for layer in layers], DEPTH).passed


def test_a_region_that_is_not_listed_counts_for_its_attentions():
    nodes = "\x1f".join(f"[ONNX Layer: blocks.{block}.attn/Attention]" for block in range(3))
    region = Layer("{ForeignNode[pos_embed...head/Gemm]}", "Myelin", metadata=nodes)
    check = fusion_check([region], 3)
    assert check.passed
    assert "3 inside regions that are not listed" in check.reason
    assert not fusion_check([region], 4).passed


@pytest.mark.parametrize(
    ("layer", "fused"),
    [
        (Layer("_gemm_mha_v2_myl0_172", "kgen"), True),
        (Layer("_gemv_mha_v1_myl0_3", "kgen"), True),
        (Layer("blocks.0.attn/Attention", "kgen", tactic="fmha_v2_flash_attention_fp16_64_64_S_64_sm80"), True),
        (Layer("__mye8037_gemm_mha_v2", "kgen"), True),
        (Layer("blocks.0.attn", "MultiHeadAttention"), True),
        (Layer("/encoder/layers_1/mha/attn/mha_prob/key/MatMul_myl0_9", "gemm"), False),
        (Layer("blocks.0.attn.proj/Gemm_myl0_4", "gemm", metadata="[ONNX Layer: blocks.0.attn/Attention]"), False),
        (Layer("node_attention__3_AttentionInput", "NoOp"), False),
    ],
    ids=lambda value: value.name if isinstance(value, Layer) else "",
)
def test_which_layers_are_fused_attentions(layer, fused):
    assert is_fused_attention(layer) is fused


# ---- blocks


# ---- the text in a plan of TensorRT-RTX


@pytest.mark.tensorrt_rtx
def test_a_real_fp16_plan_has_fused_attentions_and_matmuls_in_fp16(tmp_path):
    path = tmp_path / "engine.plan"
    path.write_bytes(rtx_plan(tiny_blocks(3)))
    found = plan_layers(path)
    assert fusion_check(found, 3).passed, fusion_check(found, 3)
    assert not fusion_check(found, 4).passed
    assert dtype_check(found, "fp16").passed, dtype_check(found, "fp16")
    assert not dtype_check(found, "fp32").passed
    assert {layer.blocks for layer in found if is_fused_attention(layer)} == {(0, 0), (1, 1), (2, 2)}


@pytest.mark.tensorrt_rtx
def test_a_real_fp32_plan_was_taken_apart_and_fails_both_audits_of_an_fp16_one(tmp_path):
    path = tmp_path / "engine.plan"
    path.write_bytes(rtx_plan(tiny_blocks(2, np.float32), decomposable=True))
    found = plan_layers(path)
    assert found
    assert not fusion_check(found, 2).passed
    assert not dtype_check(found, "fp16").passed
    assert dtype_check(found, "fp32").passed, dtype_check(found, "fp32")


def test_a_plan_without_text_has_no_layers(tmp_path):
    path = tmp_path / "engine.plan"
    path.write_bytes(b"ftrt" + bytes(1000))
    assert plan_layers(path) == ()
