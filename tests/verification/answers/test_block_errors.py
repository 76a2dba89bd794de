"""The error of each block, against values picked by hand from files, and against damage in one block."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, numpy_helper

from evit_deploy.export.portable import export_onnx
from evit_deploy.registry import METHODS
from evit_deploy.report.report import Report
from evit_deploy.tokens.plan import TokenSpec
from evit_deploy.verification.answers.block_errors import block_errors
from tests.support.exports import copied, exported, lowered, reduced
from tests.support.models import KINDS, images, of_kind, preprocess_for

RUNTIME = "onnxruntime"


def measured(model: Any, proto: ModelProto, folder: Path, inputs: np.ndarray | None = None) -> Report:
    path = folder / "model.onnx"
    onnx.save(proto, path)
    return block_errors(model, path, images(model, 4) if inputs is None else inputs, 1)


def errors(report: Report) -> list[Any]:
    assert report.notes == ()
    assert [row.block for row in report.block_errors] == list(range(len(report.block_errors)))
    return [row.error for row in report.block_errors]


def multiply(proto: ModelProto, block: int, factor: float) -> None:
    """Damages the second layer of a block's MLP."""
    names = [one.name for one in proto.graph.initializer]
    (place,) = [i for i, name in enumerate(names) if name == f"blocks.{block}.mlp.inner.fc2.weight"]
    tensor = proto.graph.initializer[place]
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(factor), tensor.name))


def residuals(proto: ModelProto) -> list[str]:
    """What each block of a plain ViT hands on: what the next one's first norm reads, or the last norm."""
    norms = [node for node in proto.graph.node if node.name.startswith(("blocks.", "norm/"))]
    names = [f"blocks.{block}.norm1/LayerNormalization" for block in (1, 2, 3)] + ["norm/LayerNormalization"]
    return [next(node.input[0] for node in norms if node.name == name) for name in names]


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_errors_are_those_of_the_class_token(precision, tmp_path):
    import onnxruntime

    model, proto = reduced("plain"), lowered("plain", precision)
    inputs = images(model, 9, seed=2)
    found = errors(measured(model, proto, tmp_path, inputs))
    chosen = inputs[[0, 2, 5, 8]]
    copy = copied(proto)
    names = residuals(copy)
    infos = {info.name: info for info in copy.graph.value_info}
    copy.graph.output.extend(infos[name] for name in names)
    session = onnxruntime.InferenceSession(copy.SerializeToString(), providers=["CPUExecutionProvider"])
    of_file = session.run(names, {"input": chosen})
    with torch.inference_mode():
        x = model._pos_embed(model.patch_embed(torch.from_numpy(chosen)))
        for block, (values, error) in enumerate(zip(of_file, found, strict=True)):
            x = model.blocks[block](x)
            exact = x[:, 0].double().numpy()
            expected = np.sqrt(((values[:, 0] - exact) ** 2).sum() / ((exact - exact.mean(axis=0)) ** 2).sum())
            assert error == pytest.approx(expected, rel=1e-2)
    assert 1e-5 < max(found) < 1


@pytest.mark.parametrize("damaged", [0, 2, 3])
def test_damage_in_a_block_shows_from_that_block_on(damaged, tmp_path):
    proto = copied(exported("plain"))
    multiply(proto, damaged, 1.1)
    found = errors(measured(reduced("plain"), proto, tmp_path))
    assert all(error < 1e-5 for error in found[:damaged])
    assert all(error > 1e-3 for error in found[damaged:])


@pytest.mark.parametrize("kind", KINDS)
def test_fp32_files_of_every_kind_have_no_error(kind, tmp_path):
    model = reduced(kind)
    found = errors(measured(model, exported(kind), tmp_path))
    assert len(found) == len(of_kind(kind).blocks)
    assert max(found) < 1e-4


def test_a_dense_model_has_errors_too(tmp_path):
    found = errors(measured(of_kind("plain"), exported("plain", None), tmp_path))
    assert max(found) < 1e-5
    assert len(found) == 4


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name in METHODS.offered() if not METHODS.get(name).needs_own_weights])
def test_fp32_files_of_every_method_have_no_error(method, tmp_path):
    spec = TokenSpec(method="tome", options={"merge": 3}) if method == "tome" else TokenSpec(0.6, method=method)
    model = reduced("plain", spec)
    proto = export_onnx(model, name="a", preprocess=preprocess_for(model))
    assert max(errors(measured(model, proto, tmp_path))) < 1e-4


def test_a_file_that_the_runtime_does_not_run_has_a_reason(tmp_path):
    report = measured(reduced("plain"), lowered("plain", "bf16"), tmp_path)
    assert report.block_errors == ()
    assert report.notes == (
        "The error of each block was not measured: ONNX Runtime cannot run the file (its CPU provider has no bf16).",
    )


def test_what_is_not_finite_is_no_number(tmp_path):
    proto = copied(exported("plain"))
    multiply(proto, 1, np.inf)
    found = errors(measured(reduced("plain"), proto, tmp_path))
    assert found[0] < 1e-5
    assert found[1:] == [None] * 3
