"""Files without their weights: what is left out, that it is found again, and one file written tensor by tensor."""

import numpy as np
import onnx
import pytest

from evit_deploy.errors import InputError
from evit_deploy.export.outline import Outline, read_outline
from evit_deploy.export.portable import export_onnx, portable
from evit_deploy.export.variants import slice_twin
from evit_deploy.runtimes.onnxruntime import OnnxRuntimeCudaRunner, OnnxRuntimeRunner
from tests.support.exports import answers, exported, reduced
from tests.support.models import images, of_kind, preprocess_for


@pytest.fixture
def file(tmp_path):
    onnx.save(exported("plain"), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def answers_of(artifact, inputs, *, indices=False):
    with OnnxRuntimeRunner(artifact, threads=1, with_indices=indices) as runner:
        return runner.infer({"input": inputs})


def test_the_outline_is_the_file_but_for_large_weights(file):
    outline = read_outline(file)
    external = {tensor.name for tensor in outline.proto.graph.initializer if tensor.external_data}
    assert "blocks.0.mlp.inner.fc1.weight" in external
    assert "blocks.0.norm1.weight" not in external
    assert outline.proto.ByteSize() < file.stat().st_size / 3
    back = onnx.ModelProto()
    back.CopyFrom(outline.proto)
    onnx.load_external_data_for_model(back, str(outline.folder))
    for tensor in back.graph.initializer:
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
    assert back == exported("plain")


@pytest.mark.parametrize("indices", [False, True])
def test_it_answers_like_the_file(file, indices):
    inputs = images(of_kind("plain"), 3)
    expected = answers(exported("plain"), inputs, indices=indices)
    for artifact in (file, read_outline(file)):
        found = answers_of(artifact, inputs, indices=indices)
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_twins_are_made_from_it(file):
    inputs, outline = images(of_kind("plain"), 2), read_outline(file)
    found = answers_of(Outline(slice_twin(outline.proto), outline.folder), inputs)
    expected = answers(slice_twin(exported("plain")), inputs)
    assert np.array_equal(found["logits"], expected["logits"])


def test_a_gpu_takes_models_in_one_piece(file):
    assert OnnxRuntimeCudaRunner.accepts(read_outline(file)) == ["it takes a model in one piece"]


@pytest.mark.parametrize("indices", [False, True])
def test_one_file_is_written_from_where_the_weights_are(tmp_path, indices):
    model = reduced("plain")
    found = portable(model, name="x", preprocess=preprocess_for(model))
    found.save(tmp_path / "model.onnx", indices=indices)
    read = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(read, full_check=True)
    whole = export_onnx(model, name="x", preprocess=preprocess_for(model))
    assert len(read.graph.output) == (1 + len(model.token_plan.locations) if indices else 1)
    del read.graph.output[1:]
    assert read == whole
    assert (tmp_path / "model.onnx").stat().st_size == whole.ByteSize() or indices


@pytest.mark.parametrize("content", [b"", b"no model", b"\x3a\xff\xff\xff\x7f", b"\x3a\x02\x2a\x7f"])
def test_what_is_no_model_is_refused(tmp_path, content):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(InputError, match="not an ONNX model"):
        read_outline(path)


def test_half_a_file_is_refused(file):
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match="not an ONNX model"):
        read_outline(file)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_outline(tmp_path / "model.onnx")
