"""Every layout through the whole of convert: dense, the file answers like the owner's own code; EViT's checks hold."""

from pathlib import Path

import onnxruntime
import pytest
import safetensors.torch
import torch

from evit_deploy.bundle.bundle import read_bundle
from evit_deploy.files import sha256
from evit_deploy.models.parent import parent_model
from evit_deploy.pipeline.convert import Job, convert, convert_checkpoint
from evit_deploy.pipeline.lowering import lowering
from evit_deploy.recipe.options import ConvertOptions, ProfileOptions
from evit_deploy.tokens.plan import TokenSpec
from tests.support.layouts import FAMILIES, OWNERS, SIZE, apart, checkpoint_of, identified, owned, pictures, written
from tests.support.models import seeded

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


@pytest.mark.slow
def test_the_small_epsilon_of_transformers_in_fp16(tmp_path):
    weights, config = written(owned("ViT"), tmp_path)
    checkpoint = checkpoint_of(identified(weights, config))
    assert checkpoint.model_args["norm_eps"] == 1e-12  # nothing, in FP16
    made = lowering(ConvertOptions(targets=("onnx",), precision="fp16"))
    _, report = convert_checkpoint(checkpoint, TokenSpec(0.7), Job(made, measure=MEASURE, out=tmp_path / "bundle"))
    assert report.checks
    assert not report.failed


@pytest.mark.slow
@torch.inference_mode()
def test_dino_by_a_part_of_its_file(tmp_path):
    """DINO's own code is no package; its names are timm's."""
    model = seeded("vit_small_patch16_224", num_classes=0, img_size=SIZE, depth=4)
    backbone = {f"backbone.{name}": value for name, value in model.state_dict().items()}
    student = {name: value + 1 for name, value in backbone.items()}
    torch.save({"student": student, "teacher": backbone}, tmp_path / "d.pth")
    bundle, report = convert(f"{tmp_path / 'd.pth'}#teacher", keep_rate=0.7, measure=MEASURE)
    assert not report.failed
    assert bundle.path.name == "d-teacher-evit-k0.7"
    assert apart(answered(bundle.path / "dense" / "model.onnx"), model(pictures())) <= 1e-5
    again, why_not = parent_model(bundle)
    assert again is not None, why_not
    assert apart(answered(bundle.path / "model.onnx"), again(pictures())) <= 1e-5


def answered(path: Path) -> torch.Tensor:
    """The first output of an ONNX file for :func:`pictures`."""
    session = onnxruntime.InferenceSession(str(path))
    (name, *_) = (given.name for given in session.get_inputs())
    return torch.from_numpy(session.run(None, {name: pictures().numpy()})[0])
