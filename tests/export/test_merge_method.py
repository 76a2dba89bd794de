"""Exported files of the method merge: what runtimes answer, what is in the file, its precisions, and an engine."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from evit_deploy.engines.audit import engine_checks
from evit_deploy.engines.build import build_engine
from evit_deploy.engines.rtx_listing import plan_layers
from evit_deploy.export.answer import answer_in
from evit_deploy.export.variants import slice_twin
from evit_deploy.recipe.options import BuildOptions
from evit_deploy.runtimes.onnxruntime import OnnxRuntimeRunner
from evit_deploy.tokens.plan import TokenSpec
from evit_deploy.tokens.reduce import capture, token_plan
from tests.support.exports import exported, lowered, nodes, operators, reduced
from tests.support.models import images
from tests.support.openvino_model import NEEDS_OPENVINO

MERGE = TokenSpec((0.8, 0.6), (0, 2), fuse=False, method="merge")
KINDS = ("plain", "distilled", "registers, no classes", "qk-norm, one channel", "LV-ViT")


def eager(kind: str, count: int) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    model = reduced(kind, MERGE)
    inputs = images(model, count)
    with capture(model) as seen:
        logits = model(torch.from_numpy(inputs))
    choices = zip(token_plan(model).locations, seen.kept, strict=True)
    return inputs, logits.numpy(), {f"kept_{row.block}": choice.numpy() for row, choice in choices}


def assert_equal(outputs: dict[str, np.ndarray], logits: np.ndarray, choices: dict[str, np.ndarray]) -> None:
    for name, choice in choices.items():
        np.testing.assert_array_equal(outputs[name], choice)
    np.testing.assert_allclose(outputs[answer_in(outputs)], logits, atol=2e-5 * np.abs(logits).max(), rtol=0)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_onnx_runtime_answers_like_pytorch(kind, count):
    inputs, logits, choices = eager(kind, count)
    assert sorted(choices) == ["kept_0", "kept_2"]
    with OnnxRuntimeRunner(exported(kind, MERGE), threads=1, with_indices=True) as runner:
        assert_equal(runner.infer({"input": inputs}), logits, choices)


class TestOpenVino:
    pytestmark = NEEDS_OPENVINO

    @pytest.mark.parametrize("count", [1, 3])
    def test_it_answers_like_pytorch(self, count):
        from evit_deploy.runtimes.openvino import OpenVINORunner

        inputs, logits, choices = eager("plain", count)
        with OpenVINORunner(exported("plain", MERGE), threads=1, with_indices=True) as runner:
            assert_equal(runner.infer({"input": inputs}), logits, choices)


def masks(proto: onnx.ModelProto) -> list[str]:
    return [node.input[3] if len(node.input) > 3 else "" for node in nodes(proto, "Attention")]


def test_attention_has_one_number_for_each_key_where_sizes_differ():
    """``[B, 1, 1, N]``, spelled out for each query and no head, as ONNX Runtime's kernel wants it."""
    proto = exported("plain", MERGE)
    first, second, third, last = masks(proto)
    assert first == ""
    assert second == third != ""
    assert last not in ("", third)
    shapes = {info.name: [d.dim_value for d in info.type.tensor_type.shape.dim] for info in proto.graph.value_info}
    plan = token_plan(reduced("plain", MERGE))
    given = {node.output[0]: node.input[0] for node in nodes(proto, "Expand")}
    assert shapes[given[second]][1:] == [1, 1, plan.blocks[1].tokens_in]
    assert shapes[given[last]][1:] == [1, 1, plan.blocks[3].tokens_in]
    assert shapes[second][1] == shapes[last][1] == 1


def test_nothing_is_added_up_by_scattering():
    proto = exported("plain", MERGE)
    found = operators(proto) + [node.op_type for function in proto.functions for node in function.node]
    assert not [name for name in found if name.startswith("Scatter")]
    assert found.count("TokenMerge") == 2
    assert found.count("TopK") == 2


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_keeps_what_decides(precision):
    proto = lowered("plain", precision, spec=MERGE)
    onnx.checker.check_model(proto, full_check=True)
    types = {info.name: info.type.tensor_type.elem_type for info in proto.graph.value_info}
    for node in nodes(proto, "TokenMerge"):
        assert [types[name] for name in node.input[3:]] == [onnx.TensorProto.FLOAT] * 2
    for kind in ("Log", "Sqrt", "Greater", "Where"):
        for node in nodes(proto, kind):
            assert {types.get(name, onnx.TensorProto.FLOAT) for name in node.output} <= {
                onnx.TensorProto.FLOAT, onnx.TensorProto.BOOL,
            }  # fmt: skip


def test_half_precision_answers_nearly_the_same():
    inputs, logits, choices = eager("plain", 3)
    with OnnxRuntimeRunner(lowered("plain", "fp16", spec=MERGE), threads=1, with_indices=True) as runner:
        outputs = runner.infer({"input": inputs})
    keep = [row.keep for row in token_plan(reduced("plain", MERGE)).locations]
    for (name, choice), kept in zip(choices.items(), keep, strict=True):
        same = [len({*a[:kept]} & {*b[:kept]}) / kept for a, b in zip(outputs[name], choice, strict=True)]
        assert min(same) > 0.8
    assert np.abs(outputs[answer_in(outputs)] - logits).max() < 0.05 * np.abs(logits).max()


def test_the_slice_twin_has_the_same_counts_and_compares_nothing():
    twin = slice_twin(exported("plain", MERGE))
    assert not {"TokenMerge", "TopK", "ArgMax", "Greater"} & set(operators(twin))
    with OnnxRuntimeRunner(twin, threads=1) as runner:
        assert np.isfinite(runner.infer({"input": images(reduced("plain", MERGE), 3)})["logits"]).all()


@pytest.mark.tensorrt_rtx
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_an_engine_for_an_a100_keeps_its_attention_in_one_kernel(precision, tmp_path: Path):
    pytest.importorskip("tensorrt_rtx")
    onnx.save(lowered("plain", precision, spec=MERGE), tmp_path / "model.onnx")
    path = tmp_path / "engine.plan"
    options = BuildOptions(batches=((1, 4, 8),), gpus=("sm80",))
    result = build_engine(tmp_path / "model.onnx", path, "tensorrt-rtx", precision, options)
    report = engine_checks(result, path, token_plan(reduced("plain", MERGE)), listing=plan_layers)
    assert report.passed, report.failed
    assert result.attentions == 4
