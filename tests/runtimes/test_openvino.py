"""OpenVINO: the same answers as PyTorch, in the precision of the file, whatever OpenVINO would rather compute in."""

import os
import subprocess
import sys
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto

from evit_deploy.errors import InputError, MissingRequirement, StageError
from evit_deploy.export.answer import answer_in
from evit_deploy.export.card import INPUT, LOGITS, kept_name, read_card, write_card
from evit_deploy.export.openvino import save_openvino
from evit_deploy.export.variants import with_indices
from evit_deploy.runtimes.onnxruntime import OnnxRuntimeRunner
from evit_deploy.runtimes.openvino import OpenVINORunner
from evit_deploy.tokens.reduce import dense_twin, reduce_tokens_, token_plan
from evit_deploy.verification.golden import Golden, make_golden
from evit_deploy.verification.verify import verify_dense, verify_runtime
from tests.support.exports import copied, exported, lowered, reduced
from tests.support.models import KEEP, KINDS, images, of_kind
from tests.support.openvino_model import NEEDS_OPENVINO, inputs, run

pytestmark = NEEDS_OPENVINO
BATCHES = (1, 2, 5)
each_kind = pytest.mark.parametrize("kind", KINDS)
_made: dict[Any, Any] = {}


def once(key: Any, make: Any) -> Any:
    """What takes seconds to make is made once and shared."""
    if key not in _made:
        _made[key] = make()
    return _made[key]


def golden_of(kind: str) -> Golden:
    model = reduced(kind)
    return once(("golden", kind), lambda: make_golden(model, dense_twin(model), images(model, 3)))


def relabeled(precision: str) -> ModelProto:
    """An FP32 file that says that it is in another precision, and so is to be computed in that."""
    copy = copied(exported("plain"))
    card = read_card(copy)
    assert card is not None
    write_card(copy, msgspec.structs.replace(card, precision=precision))
    return copy


def computes(precision: str) -> bool:
    """Whether this processor computes in a precision, as OpenVINO sees it."""
    import openvino

    return precision == "fp32" or precision.upper() in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def refuses(artifact: Any) -> None:
    """What has to happen on a processor without the precision."""
    with pytest.raises(MissingRequirement, match="cannot compute in the file's precision"), OpenVINORunner(artifact):
        pass


# Answers.


@each_kind
def test_it_gives_the_golden_answers(kind):
    report, _ = verify_runtime(
        "openvino", exported(kind), golden_of(kind), token_plan(reduced(kind)), BATCHES, threads=1
    )
    assert report.passed, [check for check in report.checks if not check.passed]
    assert len(report.checks) == 3 * len(BATCHES)


@each_kind
def test_its_own_format_gives_the_same_bits(kind, tmp_path):
    save_openvino(exported(kind), tmp_path / "model.xml")
    feeds = {INPUT: golden_of(kind).inputs}
    from_onnx, from_ir = (run(a, feeds, with_indices=True) for a in (exported(kind), tmp_path / "model.xml"))
    assert from_onnx.keys() == from_ir.keys() == {answer_in(from_onnx), *(kept_name(b) for b in (1, 2, 3))}
    for name in from_onnx:
        np.testing.assert_array_equal(from_onnx[name], from_ir[name])


def test_the_dense_twin(tmp_path):
    golden = golden_of("plain")
    dense = exported("plain", None)
    assert verify_dense("openvino", dense, golden, threads=1).passed
    save_openvino(dense, tmp_path / "model.xml")
    assert verify_dense("openvino", tmp_path / "model.xml", golden, threads=1).passed
    with OpenVINORunner(tmp_path / "model.xml", with_indices=True) as runner:
        assert [spec.name for spec in runner.outputs] == [LOGITS]


@pytest.mark.parametrize("source", ["onnx in memory", "onnx", "xml"])
def test_what_goes_in_and_comes_out(source, ir, tmp_path):
    onnx.save(exported("plain"), tmp_path / "model.onnx")
    artifact = {"onnx in memory": exported("plain"), "onnx": tmp_path / "model.onnx", "xml": str(ir)}[source]
    with (
        OnnxRuntimeRunner(exported("plain"), with_indices=True) as other,
        OpenVINORunner(artifact, with_indices=True) as runner,
    ):
        assert runner.inputs == other.inputs
        assert runner.outputs == other.outputs
        answers, wanted = runner.infer(inputs()), other.infer(inputs())
    assert [(name, a.dtype, a.shape) for name, a in answers.items()] == [
        (name, a.dtype, a.shape) for name, a in wanted.items()
    ]
    for row in token_plan(reduced("plain")).locations:  # seeded scores have no ties, so the order is the same too
        np.testing.assert_array_equal(answers[kept_name(row.block)], wanted[kept_name(row.block)])


def test_without_indices_only_the_logits(ir):
    for artifact in (ir, exported("plain")):
        with OpenVINORunner(artifact) as runner:
            assert [spec.name for spec in runner.outputs] == [LOGITS]
            assert list(runner.infer(inputs())) == [LOGITS]


def test_a_file_that_has_the_indices_as_outputs_keeps_them(tmp_path):
    proto = with_indices(exported("plain"))
    save_openvino(proto, tmp_path / "model.xml")
    names = [output.name for output in proto.graph.output]
    for options in ({}, {"with_indices": True}):
        with OpenVINORunner(tmp_path / "model.xml", **options) as runner:
            assert [spec.name for spec in runner.outputs] == names
            assert {spec.dtype for spec in runner.outputs[1:]} == {"int32"}


def test_answers_are_not_overwritten_by_the_next_ones(ir):
    with OpenVINORunner(ir) as runner:
        first = runner.infer(inputs())[LOGITS]
        kept = first.copy()
        runner.infer({INPUT: -inputs()[INPUT]})
    np.testing.assert_array_equal(first, kept)


# Precision.


@pytest.mark.parametrize(("precision", "wanted"), [("fp32", "f32"), ("bf16", "bf16"), ("fp16", "f16"), ("int8", "f32")])
def test_it_computes_in_the_files_precision(precision, wanted):
    if not computes(precision.replace("int8", "fp32")):
        refuses(relabeled(precision))
        return
    with OpenVINORunner(relabeled(precision), threads=1) as runner:
        assert runner.computes_in == wanted
        assert runner.card is not None
        assert runner.card.precision == precision


def test_another_precision_than_the_files_is_refused(tmp_path):
    onnx.save(relabeled("fp16"), tmp_path / "model.onnx")
    code = (
        "import sys; from evit_deploy.errors import MissingRequirement\n"
        "from evit_deploy.runtimes.openvino import OpenVINORunner\n"
        "try:\n    OpenVINORunner(sys.argv[1]).__enter__()\n"
        "except MissingRequirement as error:\n    print(error)\n"
    )
    # As far as OpenVINO's kernels can tell, an older processor: it has BF16 at best, and would take that for FP16.
    # A processor that really is one refuses without being told.
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model.onnx")],
        env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "cannot compute in the file's precision" in done.stdout
    assert "expected f16" in done.stdout


def test_fp8_is_refused():
    assert OpenVINORunner.accepts(relabeled("fp8")) == ["it has no fp8"]
    with pytest.raises(InputError, match=r"no such precision \(got fp8"), OpenVINORunner(relabeled("fp8")):
        pass


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("weights", ["short", "fp32"])
def test_scores_stay_in_fp32_and_looking_at_the_choice_changes_nothing(dtype, weights, tmp_path):
    precision = "fp16" if dtype == torch.float16 else "bf16"
    save_openvino(lowered("plain", precision) if weights == "short" else relabeled(precision), tmp_path / "model.xml")
    if not computes(precision):
        refuses(tmp_path / "model.xml")
        return
    answers = []
    for indices in (False, True):
        with OpenVINORunner(tmp_path / "model.xml", threads=1, with_indices=indices) as runner:
            answers.append(runner.infer(inputs(8))[LOGITS])
            layers = [
                (node.get_rt_info()["layerType"].astype(str), node.get_rt_info()["runtimePrecision"].astype(str))
                for node in runner._compiled.get_runtime_model().get_ops()
            ]
        locations = len(token_plan(reduced("plain")).locations)
        short = {"fp16": "f16", "bf16": "bf16"}[precision]
        assert layers.count(("TopK", "f32")) == locations
        assert layers.count(("Softmax", "f32")) == locations
        assert ("TopK", short) not in layers
        assert not any(kind == "Reduce" and computed == short for kind, computed in layers)
        assert layers.count(("FullyConnected", short)) > locations
    np.testing.assert_array_equal(*answers)
    exact = golden_reference(8)
    with torch.inference_mode():
        model = reduce_tokens_(of_kind("plain"), KEEP).to(dtype)
        eager = model(torch.from_numpy(inputs(8)[INPUT]).to(dtype)).float().numpy()
    # Near-ties choose otherwise in 8 or 11 bits, with another answer then; most images have none.
    error, limit = (np.median(np.abs(a - exact).max(axis=1)) for a in (answers[0], eager))
    assert error <= 2 * limit


def golden_reference(count: int) -> np.ndarray:
    model = reduce_tokens_(of_kind("plain"), KEEP).double()
    with torch.inference_mode():
        return model(torch.from_numpy(inputs(count)[INPUT]).double()).numpy()


# Threads and modes.


@pytest.mark.parametrize("threads", [1, 2])
def test_threads(ir, threads):
    with OpenVINORunner(ir, threads=threads) as runner:
        assert runner._compiled.get_property("INFERENCE_NUM_THREADS") == threads
        assert runner.requests == 1
        np.testing.assert_allclose(runner.infer(inputs())[LOGITS], run(ir, inputs())[LOGITS], rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["latency", "throughput"])
def test_many_batches_come_back_in_order(ir, mode):
    batches = [{INPUT: images(reduced("plain"), 1 + seed % 3, seed)} for seed in range(9)]
    with OpenVINORunner(ir, threads=2, mode=mode, with_indices=True) as runner:
        assert (runner.requests > 1) == (mode == "throughput")
        answers = runner.infer_many(batches)
        one_by_one = [runner.infer(feeds) for feeds in batches]
        assert runner.infer_many([]) == []
        assert len(runner.infer_many(batches[:1])) == 1
    for many, one in zip(answers, one_by_one, strict=True):
        assert many.keys() == one.keys()
        for name in many:
            np.testing.assert_array_equal(many[name], one[name])


def test_a_bad_batch_among_many_is_told_and_does_no_harm(ir):
    good = inputs()
    with OpenVINORunner(ir, threads=2, mode="throughput") as runner:
        with pytest.raises(StageError, match="OpenVINO failed: Can't set the input"):
            runner.infer_many([good, good, {INPUT: good[INPUT][:, :1]}, good])
        assert len(runner.infer_many([good] * 3)) == 3
