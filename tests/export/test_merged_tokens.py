"""Exported ToMe: what runtimes answer at every batch size, what is in the file, its twins and its precisions."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from evit_deploy.bundle.manifest import BatchProfile
from evit_deploy.engines.audit import engine_checks
from evit_deploy.engines.build import build_engine
from evit_deploy.engines.rtx_listing import plan_layers
from evit_deploy.export.answer import answer_in
from evit_deploy.export.openvino import save_openvino
from evit_deploy.export.variants import slice_twin
from evit_deploy.recipe.options import BuildOptions
from evit_deploy.runtimes.onnxruntime import OnnxRuntimeRunner
from evit_deploy.tokens.plan import TokenSpec
from evit_deploy.tokens.reduce import capture, token_plan
from tests.support.exports import attributes, exported, lowered, nodes, operators, reduced
from tests.support.models import images
from tests.support.openvino_model import NEEDS_OPENVINO

MERGED = TokenSpec(method="tome", options={"merge": [9, 0, 9, 4]}, fuse=False)
UNWEIGHTED = TokenSpec(method="tome", options={"merge": 5, "proportional_attention": False}, fuse=False)
KINDS = ("plain", "distilled", "registers, no classes", "qk-norm, one channel", "LV-ViT")


def eager(kind: str, count: int) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    model = reduced(kind, MERGED)
    inputs = images(model, count)
    with capture(model) as seen:
        logits = model(torch.from_numpy(inputs))
    choices = zip(token_plan(model).locations, seen.kept, strict=True)
    return inputs, logits.numpy(), {f"kept_{row.block}": choice.numpy() for row, choice in choices}


def assert_equal(outputs: dict[str, np.ndarray], logits: np.ndarray, choices: dict[str, np.ndarray]) -> None:
    for name, choice in choices.items():
        np.testing.assert_array_equal(outputs[name], choice)
        assert outputs[name].dtype == np.int32
    np.testing.assert_allclose(outputs[answer_in(outputs)], logits, atol=2e-5 * np.abs(logits).max(), rtol=0)


@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_onnx_runtime_answers_like_pytorch(kind, count):
    inputs, logits, choices = eager(kind, count)
    assert sorted(choices) == ["kept_0", "kept_2", "kept_3"]
    with OnnxRuntimeRunner(exported(kind, MERGED), threads=1, with_indices=True) as runner:
        assert_equal(runner.infer({"input": inputs}), logits, choices)


class TestOpenVino:
    pytestmark = NEEDS_OPENVINO

    @pytest.mark.parametrize("count", [1, 3, 8])
    def test_it_answers_like_pytorch(self, count):
        from evit_deploy.runtimes.openvino import OpenVINORunner

        inputs, logits, choices = eager("plain", count)
        with OpenVINORunner(exported("plain", MERGED), threads=1, with_indices=True) as runner:
            assert_equal(runner.infer({"input": inputs}), logits, choices)

    def test_similarities_stay_fp32(self, tmp_path):
        """What is marked does not become BF16 where the rest does."""
        from xml.etree import ElementTree

        save_openvino(lowered("plain", "bf16", spec=MERGED), tmp_path / "model.xml")
        layers = {layer.get("name"): layer for layer in ElementTree.parse(tmp_path / "model.xml").iter("layer")}
        marked = {n for n, layer in layers.items() if any(a.get("name") == "precise" for a in layer.iter("attribute"))}
        for block in (0, 2, 3):
            for step in ("ReduceMean", "ReduceL2", "Div", "MatMul", "ReduceMax", "TopK"):
                assert f"blocks.{block}.reducer/{step}" in marked
            assert f"blocks.{block}.attn.k/Gemm" not in marked


# ---- the file


def test_nothing_is_added_up_by_scattering():
    proto = exported("plain", MERGED)
    inside = [node.op_type for function in proto.functions for node in function.node]
    found = operators(proto) + inside
    assert not [name for name in found if name.startswith("Scatter")]
    assert found.count("TokenMerge") == 3
    assert found.count("TopK") == 6  # the most similar pairs, and the order of what stays


def masks(proto: onnx.ModelProto) -> list[str]:
    return [node.input[3] if len(node.input) > 3 else "" for node in nodes(proto, "Attention")]


def test_attention_has_a_mask_only_where_sizes_differ():
    first, second, third, last = masks(exported("plain", MERGED))
    assert first == ""
    assert second == third != ""  # nothing merges between the two
    assert last not in ("", third)
    assert masks(exported("plain", UNWEIGHTED)) == [""] * 4
    assert "Log" not in operators(exported("plain", UNWEIGHTED))


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_keeps_sizes_and_similarities(precision):
    proto = lowered("plain", precision, spec=MERGED)
    onnx.checker.check_model(proto, full_check=True)
    low = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}[precision]
    types = {info.name: info.type.tensor_type.elem_type for info in proto.graph.value_info}
    for node in nodes(proto, "TokenMerge"):
        assert [types[name] for name in (node.output[0], node.output[1])] == [low, onnx.TensorProto.FLOAT]
        assert types[node.input[3]] == onnx.TensorProto.FLOAT  # the similarities
    assert {types[mask] for mask in masks(proto) if mask} == {low}
    for node in nodes(proto, "Log"):
        assert types[node.output[0]] == onnx.TensorProto.FLOAT


def test_half_precision_answers_nearly_the_same():
    inputs, logits, choices = eager("plain", 3)
    with OnnxRuntimeRunner(lowered("plain", "fp16", spec=MERGED), threads=1, with_indices=True) as runner:
        outputs = runner.infer({"input": inputs})
    agree = [(outputs[name] == choice).mean() for name, choice in choices.items()]
    assert min(agree) > 0.8
    assert np.abs(outputs[answer_in(outputs)] - logits).max() < 0.05 * np.abs(logits).max()


def test_the_slice_twin_has_the_same_counts_and_matches_nothing():
    twin = slice_twin(exported("plain", MERGED))
    assert not {"TokenMerge", "TopK", "ArgMax"} & set(operators(twin))
    assert [attributes(node) for node in nodes(twin, "Attention")] == [
        attributes(node) for node in nodes(exported("plain", MERGED), "Attention")
    ]
    assert [bool(mask) for mask in masks(twin)] == [False, True, True, True]
    with OnnxRuntimeRunner(twin, threads=1) as runner:
        assert np.isfinite(runner.infer({"input": images(reduced("plain", MERGED), 3)})["logits"]).all()


# ---- engines


@pytest.mark.tensorrt_rtx
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_an_engine_for_an_a100_keeps_its_attention_in_one_kernel(precision, tmp_path: Path):
    pytest.importorskip("tensorrt_rtx")
    onnx.save(lowered("plain", precision, spec=MERGED), tmp_path / "model.onnx")
    path = tmp_path / "engine.plan"
    options = BuildOptions(batches=((1, 4, 8),), gpus=("sm80",))
    result = build_engine(tmp_path / "model.onnx", path, "tensorrt-rtx", precision, options)
    report = engine_checks(result, path, token_plan(reduced("plain", MERGED)), listing=plan_layers)
    assert report.passed, report.failed
    assert result.attentions == 4
    assert result.engine.profiles == (BatchProfile(1, 4, 8),)
