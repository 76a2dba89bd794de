"""Variants of an exported file: kept indices as outputs, the slice twin, and the choice given from outside."""

import copy

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import ModelProto

from evit_deploy.errors import InputError
from evit_deploy.export.answer import answer_in
from evit_deploy.export.card import INPUT, LOGITS, kept_name, read_card
from evit_deploy.export.portable import OPSET
from evit_deploy.export.variants import slice_twin, with_choice, with_indices
from evit_deploy.runtimes.onnxruntime import OnnxRuntimeRunner
from evit_deploy.tokens.choices import FLOOR
from evit_deploy.tokens.operators.token_reorg import NAME
from evit_deploy.tokens.plan import BlockPlan, TokenPlan
from evit_deploy.tokens.reduce import capture, token_plan
from evit_deploy.verification.golden import _replayed
from tests.support.exports import (
    DROP,
    answers,
    assert_close,
    copied,
    each,
    exported,
    lowered,
    nodes,
    operators,
    reduced,
    shape,
)
from tests.support.models import KEEP, images, of_kind


def test_indices_are_outputs_when_asked_for():
    proto = exported("plain")
    plan = token_plan(reduced("plain"))
    extended = with_indices(proto)
    onnx.checker.check_model(extended, full_check=True)
    assert [output.name for output in extended.graph.output] == [LOGITS] + [kept_name(r.block) for r in plan.locations]
    assert [shape(output)[1:] for output in extended.graph.output[1:]] == [[row.keep] for row in plan.locations]
    assert len(proto.graph.output) == 1  # the given one is left alone
    assert with_indices(extended) == extended


# The slice twin.


@each
def test_the_slice_twin_slices(kind, spec):
    proto = exported(kind, spec)
    before = proto.SerializeToString()
    twin = slice_twin(proto)
    assert proto.SerializeToString() == before
    onnx.checker.check_model(twin, full_check=True)
    assert NAME not in operators(twin)
    assert not twin.functions
    assert [(entry.domain, entry.version) for entry in twin.opset_import] == [("", OPSET)]
    used = {name for node in twin.graph.node for name in node.input} | {output.name for output in twin.graph.output}
    made = {name for node in twin.graph.node for name in node.output}
    assert all(used & set(node.output) for node in twin.graph.node)  # scoring went with its only reader
    assert {tensor.name for tensor in twin.graph.initializer} <= used
    assert used <= made | {tensor.name for tensor in twin.graph.initializer} | {INPUT, ""}
    assert len(twin.graph.node) < len(proto.graph.node)
    card, own = read_card(twin), read_card(proto)
    assert card is not None
    assert own is not None
    assert card == msgspec.structs.replace(own, kind="slice")
    assert tokens_seen(twin, own.plan) == tokens_seen(proto, own.plan) == [row.tokens_in for row in own.plan.blocks]


def tokens_seen(proto: ModelProto, plan: TokenPlan) -> list[int]:
    """How many tokens are each attention's keys, at run time."""
    spied = copied(proto)
    for node in nodes(spied, "Attention"):
        spied.graph.output.append(onnx.ValueInfoProto(name=node.input[1]))
    session = onnxruntime.InferenceSession(spied.SerializeToString(), providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    outputs = session.run(None, {INPUT: np.zeros((2, *given.shape[1:]), np.float32)})
    return [value.shape[1] for value in outputs[-len(plan.blocks) :]]  # type: ignore[union-attr]


@pytest.mark.parametrize(("kind", "spec"), [("plain", KEEP), ("distilled", DROP)])
def test_the_slice_twin_is_the_slice_method(kind, spec):
    inputs = images(of_kind(kind), 3)
    model = reduced(kind, msgspec.structs.replace(spec, method="slice"))
    twin = slice_twin(exported(kind, spec))
    assert_close(answers(twin, inputs)[LOGITS], model, inputs)
    assert np.abs(answers(exported(kind, spec), inputs)[LOGITS] - answers(twin, inputs)[LOGITS]).max() > 0.01


def test_the_slice_twin_of_a_file_with_indices():
    twin = slice_twin(with_indices(exported("plain")))
    assert [output.name for output in twin.graph.output] == [LOGITS]
    inputs = images(of_kind("plain"), 2)
    wanted = answers(slice_twin(exported("plain")), inputs)[LOGITS]
    np.testing.assert_array_equal(answers(twin, inputs)[LOGITS], wanted)


def test_there_is_nothing_to_slice_in_a_dense_file():
    with pytest.raises(InputError, match="nothing to slice"):
        slice_twin(exported("plain", None))


# The choice given from outside.


def told(proto: ModelProto, inputs: np.ndarray, choice: dict[int, np.ndarray]) -> dict[str, np.ndarray]:
    """Answers of a file that is told which candidates to keep at each location."""
    feeds = {INPUT: inputs} | {f"choice_{block}": kept for block, kept in choice.items()}
    with OnnxRuntimeRunner(with_choice(proto), threads=1) as runner:
        return runner.infer(feeds)


@each
def test_a_file_that_is_told_its_own_choice_answers_the_same(kind, spec):
    proto, model = exported(kind, spec), reduced(kind, spec)
    inputs, blocks = images(model, 3), [row.block for row in token_plan(model).locations]
    own = answers(proto, inputs, indices=True)
    found = told(proto, inputs, {block: own[kept_name(block)] for block in blocks})
    assert list(found) == [answer_in(found), *(f"scores_{block}" for block in blocks)]
    np.testing.assert_array_equal(found[answer_in(found)], own[answer_in(own)])
    with capture(model) as seen:
        model(torch.from_numpy(inputs))
    for block, scores in zip(blocks, seen.scores, strict=True):
        np.testing.assert_allclose(found[f"scores_{block}"], scores.numpy(), rtol=1e-4)


@each
def test_another_choice_gives_what_pytorch_gives_with_it(kind, spec):
    proto, model = exported(kind, spec), reduced(kind, spec)
    inputs, rows = images(model, 3), token_plan(model).locations
    random = np.random.default_rng(0)
    choice = {r.block: random.permuted(np.tile(np.arange(_candidates(r)), (3, 1)), axis=1)[:, : r.keep] for r in rows}
    choice = {block: kept.astype(np.int32) for block, kept in choice.items()}
    eager, _ = _replayed(model, inputs, list(choice.values()))
    exact, scores = _replayed(copy.deepcopy(model).double(), inputs, list(choice.values()))
    found = told(proto, inputs, choice)
    floor = FLOOR * np.finfo(np.float32).eps * np.abs(exact).max()
    assert np.abs(found[answer_in(found)] - exact).max() <= max(2 * np.abs(eager - exact).max(), floor)
    assert np.abs(found[answer_in(found)] - answers(proto, inputs)[answer_in(found)]).max() > 0.01
    for block, wanted in zip(choice, scores, strict=True):
        np.testing.assert_allclose(found[f"scores_{block}"], wanted, rtol=1e-4)


def _candidates(row: BlockPlan) -> int:
    return row.tokens_in - (row.tokens_out - row.keep - row.fused)  # type: ignore[operator]


@pytest.mark.parametrize("precision", ["fp16", "int8", "fp8"])
def test_files_of_every_precision_can_be_told(precision):
    proto, inputs = lowered("plain", precision), images(of_kind("plain"), 2)
    own = answers(proto, inputs, indices=True)
    choice = {row.block: own[kept_name(row.block)] for row in token_plan(reduced("plain")).locations}
    found = told(proto, inputs, choice)
    # another graph may be optimized otherwise, and then a rounding falls otherwise
    np.testing.assert_allclose(found[answer_in(found)], own[answer_in(own)], atol=0.01)
    assert all(found[f"scores_{block}"].dtype == np.float32 for block in choice)


def test_telling_the_choice_leaves_the_file_alone():
    proto = exported("plain")
    before = proto.SerializeToString()
    extended = with_choice(proto)
    onnx.checker.check_model(extended, full_check=True)
    assert proto.SerializeToString() == before
    blocks = [row.block for row in token_plan(reduced("plain")).locations]
    assert [value.name for value in extended.graph.input] == [INPUT, *(f"choice_{block}" for block in blocks)]
    assert not any(node.op_type == "TopK" for node in extended.functions[0].node)


def test_there_is_nothing_to_choose_in_a_dense_file():
    with pytest.raises(InputError, match="nothing to choose"):
        with_choice(exported("plain", None))
