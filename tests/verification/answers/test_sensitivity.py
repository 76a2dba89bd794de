"""What quantizing each layer costs, against the quantizer's own exclusion; and which layers a limit leaves out."""

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from onnx import numpy_helper

from evit_deploy.errors import GateFailed
from evit_deploy.export.quantization import Quantized, layer_of, quantize
from evit_deploy.verification.answers import sensitivity
from evit_deploy.verification.answers.sensitivity import Shown, kept_within, layer_costs, of_array
from evit_deploy.verification.tolerances import noise
from tests.support.exports import answers, calibration_of, copied, exported
from tests.support.models import images, of_kind

BAD = "blocks.2.mlp.fc1"


@functools.cache
def quantized(kind: str = "plain", precision: str = "int8") -> Quantized:
    return quantize(exported(kind), precision, "fp32", calibration_of(kind))


def with_coarse_activations(found: Quantized, *layers: str) -> Quantized:
    """Ranges of what these layers read are 60 times as wide as they should be."""
    proto = copied(found.proto)
    read = {node.input[0] for node in proto.graph.node if node.op_type == "Gemm" and layer_of(node.name) in layers}
    scales = {
        node.input[1] for node in proto.graph.node if node.op_type == "DequantizeLinear" and node.output[0] in read
    }
    for tensor in proto.graph.initializer:
        if tensor.name in scales:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(60), tensor.name))
    return Quantized(found.original, proto)


def shown(kind: str = "plain", count: int = 48, labels: Any = None, *, embeds: bool = False) -> Shown:
    inputs = images(of_kind(kind), count, seed=3)

    def labeled() -> Iterator[Any]:
        for start in range(0, count, 20):
            yield inputs[start : start + 20], labels[start : start + 20]

    return Shown(of_array(inputs) if labels is None else labeled, embeds, 1)


def never() -> Any:
    raise AssertionError("nothing has to be left out, and so nothing is to be measured")


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_a_layer_s_cost_is_the_noise_when_the_quantizer_takes_it_alone(precision):
    calibration, inputs = calibration_of("plain"), images(of_kind("plain"), sensitivity.IMAGES)
    found = {row.layer: row for row in layer_costs(quantized(precision=precision), inputs, threads=1)}
    exact = answers(exported("plain"), inputs)["logits"]
    for name in ("blocks.1.attn.proj", "blocks.3.mlp.fc2", "head"):
        others = [n.name for n in exported("plain").graph.node if n.op_type == "Gemm" and layer_of(n.name) != name]
        alone = quantize(exported("plain"), precision, "fp32", calibration, others).proto
        wanted = noise(answers(alone, inputs)["logits"], exact)
        assert found[name].noise == pytest.approx(wanted, rel=1e-3), name


def test_the_rows_are_all_layers_in_order_of_their_cost_and_their_shares_add_up():
    rows = layer_costs(quantized(), images(of_kind("plain"), 40), threads=1)
    assert {row.layer for row in rows} == set(quantized().layers)
    assert [row.noise for row in rows] == sorted((row.noise for row in rows), reverse=True)
    assert sum(row.share for row in rows) == pytest.approx(1)
    assert sum(row.weights for row in rows) == pytest.approx(1)
    assert rows[0].share == pytest.approx(rows[0].noise ** 2 / sum(row.noise**2 for row in rows))
    assert not any(row.kept for row in rows)


def test_only_so_many_images_are_shown_and_from_all_over(monkeypatch):
    monkeypatch.setattr(sensitivity, "IMAGES", 3)
    inputs = images(of_kind("plain"), 9)
    assert layer_costs(quantized(), inputs, threads=1) == layer_costs(quantized(), inputs[[0, 4, 8]], threads=1)


def test_a_layer_with_a_wrong_range_comes_first():
    rows = layer_costs(with_coarse_activations(quantized(), BAD), images(of_kind("plain"), 4), threads=1)
    assert rows[0].layer == BAD
    assert rows[0].share > 0.9


def test_within_the_limit_nothing_is_left_out_and_no_layer_measured():
    found = kept_within(quantized(), 50, shown(), (), never)
    assert found.layers == ()
    assert found.costs == ()
    assert (found.check.name, found.check.limit, found.check.passed) == ("drop of agreement, points", 50, True)


def test_what_was_named_stays_whatever_the_limit():
    assert kept_within(quantized(), 50, shown(), ("head", "blocks.0.attn.q"), never).layers == (
        "blocks.0.attn.q",
        "head",
    )


def dropped(found: Quantized, layers: Any, asked: Shown) -> float:
    """Points of agreement that are lost, computed apart."""
    exact, own = (asked.answers(proto)[0].argmax(1) for proto in (found.original, found.without(layers)))
    return 100 * float((exact != own).mean())


def test_the_layer_that_costs_most_is_left_out_first_and_no_more_than_needed():
    found, asked = with_coarse_activations(quantized(), BAD), shown()
    limit = (dropped(found, (), asked) + dropped(found, (BAD,), asked)) / 2
    assert dropped(found, (BAD,), asked) < limit < dropped(found, (), asked)
    kept = kept_within(found, limit, asked, (), lambda: layer_costs(found, calibration_of("plain"), threads=1))
    assert kept.layers == (BAD,)
    assert kept.check.value == pytest.approx(dropped(found, (BAD,), asked), abs=1e-3)
    assert kept.check.passed
    assert kept.costs[0].layer == BAD


def test_as_many_are_left_out_as_it_takes_and_one_fewer_is_too_few():
    bad = ("blocks.0.mlp.fc2", "blocks.1.attn.proj", BAD, "blocks.2.mlp.fc2", "blocks.3.mlp.fc1")
    found, asked = with_coarse_activations(quantized(), *bad), shown(count=96)
    rows = layer_costs(found, calibration_of("plain"), threads=1)
    order = [row.layer for row in rows]
    limit = dropped(found, bad, asked) + 1.5
    kept = kept_within(found, limit, asked, (), lambda: rows)
    count = len(kept.layers)
    assert count > 2
    assert set(kept.layers) == set(order[:count])
    assert dropped(found, kept.layers, asked) <= limit < dropped(found, order[: count - 1], asked)
    assert any(f"with {count}" in note for note in kept.notes)


def test_a_limit_that_nothing_holds_is_a_failed_gate():
    found = with_coarse_activations(quantized(), *quantized().layers)
    rows = layer_costs(found, calibration_of("plain")[:4], threads=1)
    last = rows[-1].layer
    asked = shown(count=200)
    best = dropped(found, [name for name in found.layers if name != last], asked)
    assert best > 0.1
    with pytest.raises(GateFailed, match=r"--max-drop: the drop of agreement cannot be kept.*even with one layer"):
        kept_within(found, 0.1, asked, (), lambda: rows)


def test_where_all_but_one_were_named_there_is_nothing_to_leave_out():
    found = with_coarse_activations(quantized(), BAD)
    others = [name for name in found.layers if name != BAD]
    rows = layer_costs(found, calibration_of("plain")[:4], threads=1)
    with pytest.raises(GateFailed, match="no layer would be quantized"):
        kept_within(found, 1, shown(), others, lambda: rows)


def test_with_labels_it_is_top1_that_is_lost():
    found, asked = with_coarse_activations(quantized(), BAD), shown()
    right = asked.answers(found.original)[0].argmax(1)
    lost = dropped(found, (), asked)
    assert kept_within(found, 99, shown(labels=right), (), never).check.value == pytest.approx(lost, abs=1e-3)
    wrong = (right + 1) % 10  # never right before: nothing can be lost
    check = kept_within(found, 0.5, shown(labels=wrong), (), never).check
    assert check.name == "drop of top-1, points"
    assert isinstance(check.value, float)
    assert check.value <= 0


def test_of_embeddings_it_is_the_nearest_neighbors():
    kind = "registers, no classes"
    found = with_coarse_activations(quantized(kind), BAD)
    check = kept_within(found, 99.9, shown(kind, embeds=True), (), never).check
    assert check.name == "drop of nearest neighbors in common, points"
    assert isinstance(check.value, float)
    assert check.value > kept_within(quantized(kind), 99.9, shown(kind, embeds=True), (), never).check.value  # type: ignore[operator]


def test_with_labels_it_is_their_recall():
    kind, labels = "registers, no classes", np.arange(48) % 6
    check = kept_within(quantized(kind), 99.9, shown(kind, labels=labels, embeds=True), (), never).check
    assert check.name == "drop of recall@1, points"


def test_a_limit_below_one_image_is_said():
    (note,) = kept_within(quantized(), 2, shown(count=48, labels=np.zeros(48, np.int64)), (), never).notes
    assert "One of 48 images is 2.1 points: --max-drop 2 lets none be lost." in note
