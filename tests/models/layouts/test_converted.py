"""Every layout through the whole of convert: dense, the file answers like the owner's own code; EViT's checks hold."""

from pathlib import Path

import onnxruntime
import pytest
import safetensors.torch
import torch

from evit_deploy.bundle.bundle import read_bundle
from evit_deploy.files import sha256
from evit_deploy.models.parent import parent_model
from evit_deploy.pipeline.convert import Job, convert_checkpoint
from evit_deploy.pipeline.lowering import lowering
from evit_deploy.recipe.options import ConvertOptions, ProfileOptions
from evit_deploy.tokens.plan import TokenSpec
from tests.support.layouts import FAMILIES, OWNERS, apart, checkpoint_of, identified, owned, pictures, written

MEASURE = ProfileOptions(batch_sizes=(1,), duration=0.01, threads=1)


@pytest.mark.slow  # 8 conversions
@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_the_whole_of_convert(tmp_path, name):
    model = owned(name)
    weights, config = written(model, tmp_path)
    file = tmp_path / "model.safetensors"
    if not file.exists():
        safetensors.torch.save_file(weights, file)
    checkpoint = checkpoint_of(identified(weights, config), str(file))
    checkpoint.sha256 = sha256(file)
    job = Job(lowering(ConvertOptions(targets=("onnx",))), measure=MEASURE, out=tmp_path / "bundle")
    bundle, report = convert_checkpoint(checkpoint, TokenSpec(0.7), job)
    assert report.checks
    assert not report.failed
    theirs = OWNERS[name].answer(model, pictures())
    assert apart(answered(bundle.path / "dense" / "model.onnx"), theirs) <= 1e-5
    # From the manifest alone the model is built again: the file has no config beside its tensors.
    (tmp_path / "config.json").unlink(missing_ok=True)
    again, why_not = parent_model(read_bundle(tmp_path / "bundle"))
    assert again is not None, why_not
    assert apart(answered(bundle.path / "model.onnx"), again(pictures())) <= 1e-5


def answered(path: Path) -> torch.Tensor:
    """The first output of an ONNX file for :func:`pictures`."""
    session = onnxruntime.InferenceSession(str(path))
    (name, *_) = (given.name for given in session.get_inputs())
    return torch.from_numpy(session.run(None, {name: pictures().numpy()})[0])
