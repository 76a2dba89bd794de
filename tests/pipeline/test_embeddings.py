"""Models without classes through the whole of convert: what comes out, normalized and not, and what is refused."""

import shutil

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest

from evit_deploy.bundle.bundle import read_bundle, write_manifest
from evit_deploy.bundle.manifest import GOLDEN, MODEL
from evit_deploy.errors import InputError
from evit_deploy.models.parent import parent_model
from evit_deploy.pipeline.convert import convert
from evit_deploy.pipeline.run import run
from evit_deploy.recipe.options import ConvertOptions, ConvertSection, ProfileOptions
from evit_deploy.verification.golden import load_golden
from evit_deploy.verification.verify import verify
from tests.support.models import tree, write_checkpoint
from tests.support.shared import made_once
from tests.support.training import recipe

KIND = "registers, no classes"
MEASURE = ProfileOptions(batch_sizes=(1,), duration=0.01, threads=1)


@pytest.fixture(scope="module", params=[False, True], ids=["as it is", "normalized"])
def bundle(request):
    def make(path):
        checkpoint = write_checkpoint(path.with_name("features.safetensors"), KIND)
        options = ConvertOptions(targets=("onnx",), normalize=request.param, indices=True)
        convert(checkpoint, keep_rate=0.7, options=options, measure=MEASURE, out=path)

    return read_bundle(made_once(f"embeddings/{'normalized' if request.param else 'plain'}", make))


def test_the_bundle_says_what_it_answers(bundle):
    manifest = bundle.manifest
    assert manifest.answer == "embedding"
    assert manifest.outputs[0].shape == (None, 48)
    assert manifest.normalized == (bundle.path.name == "normalized")
    session = onnxruntime.InferenceSession(bundle.file(MODEL))
    assert [output.name for output in session.get_outputs()] == [spec.name for spec in manifest.outputs]
    golden = load_golden(bundle.file(GOLDEN), manifest)
    (answer,) = session.run(["embedding"], {"input": golden.inputs})
    np.testing.assert_allclose(answer, golden.reference, rtol=0, atol=golden.limit())
    lengths = np.linalg.norm(golden.reference, axis=1)
    if manifest.normalized:
        np.testing.assert_allclose(lengths, 1, rtol=0, atol=1e-12)
        assert golden.limit() < 1e-5  # relative to numbers of at most 1
    else:
        assert lengths.min() > 2


def test_pytorch_and_the_file_agree(bundle):
    """The model that is built again from the checkpoint is normalized like the one that was exported."""
    model, why_not = parent_model(bundle)
    assert model is not None, why_not
    report = verify(bundle.path, runtimes=("eager", "onnxruntime"), batch_sizes=(2,), threads=1)
    assert report.passed
    names = {check.name for check in report.checks}
    assert {"eager, batch 2: embedding", "onnxruntime, batch 2: embedding"} <= names
    assert "onnxruntime: dense twin's embedding" in names
    assert not any("logits" in name for name in names)


def test_a_file_that_is_not_normalized_is_found_out(bundle, tmp_path):
    """Another scale of the answers is another answer."""
    golden = load_golden(bundle.file(GOLDEN), bundle.manifest)
    proto = onnx.load(bundle.file(MODEL))
    last = proto.graph.node[-1]
    assert last.output[0] == "embedding"
    last.output[0] = "unscaled"
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(1.01), "scale"))
    proto.graph.node.append(onnx.helper.make_node("Mul", ["unscaled", "scale"], ["embedding"]))
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    (answer,) = session.run(["embedding"], {"input": golden.inputs})
    assert np.abs(answer - golden.reference).max() > 100 * golden.limit()


@pytest.mark.parametrize("normalize", [False, True])
def test_half_precision(tmp_path, normalize):
    checkpoint = write_checkpoint(tmp_path / "features.safetensors", KIND)
    options = ConvertOptions(targets=("onnx",), precision="fp16", normalize=normalize)
    bundle, report = convert(checkpoint, keep_rate=0.7, options=options, measure=MEASURE)
    assert report.passed
    (spread,) = [check for check in report.checks if check.name == "fp16: error over spread of embedding"]
    assert 0 < spread.value < 0.05  # type: ignore[operator]
    golden = load_golden(bundle.file(GOLDEN), bundle.manifest)
    assert spread.value == golden.noise(embedding=True)


def test_logits_are_not_normalized(checkpoint_file, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(InputError, match=r"--normalize: logits cannot be normalized.*10 classes"):
        convert(checkpoint_file, keep_rate=0.7, options=ConvertOptions(normalize=True), out=out)
    assert tree(tmp_path) == {}


def test_a_recipe_that_asks_for_it_is_refused_before_training(tmp_path):
    with pytest.raises(InputError, match=r"convert\.normalize: the trained model has classes"):
        run(recipe(convert=ConvertSection(normalize=True)), tmp_path / "out")
    assert tree(tmp_path) == {}


def test_a_bundle_of_an_earlier_version_is_read(bundle, tmp_path):
    """It called every answer ``logits`` and did not say whether it is normalized."""
    old = tmp_path / "old"
    shutil.copytree(bundle.path, old)
    shutil.copy(bundle.path / bundle.manifest.parents[0].source, tmp_path)
    for name in (MODEL, "dense/model.onnx"):
        proto = onnx.load(old / name)
        for node in proto.graph.node:
            node.output[:] = ["logits" if value == "embedding" else value for value in node.output]
        proto.graph.output[0].name = "logits"
        onnx.save(proto, old / name)
    manifest = bundle.manifest
    first = msgspec.structs.replace(manifest.outputs[0], name="logits")
    parents = [msgspec.structs.replace(manifest.parents[0], source="../features.safetensors")]
    changed = msgspec.structs.replace(manifest, outputs=(first, *manifest.outputs[1:]), parents=parents)
    write_manifest(old, changed)
    report = verify(old, runtimes=("eager", "onnxruntime"), batch_sizes=(2,), threads=1)
    assert report.passed
    assert "onnxruntime, batch 2: logits" in {check.name for check in report.checks}
