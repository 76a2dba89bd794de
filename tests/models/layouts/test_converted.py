"""Every layout through the whole of convert: dense, the file answers like the owner's own code; EViT's checks hold."""

from pathlib import Path

import onnxruntime
import pytest
import torch

from evit_deploy.bundle.bundle import read_bundle
from evit_deploy.models.parent import parent_model
from evit_deploy.pipeline.convert import convert
from evit_deploy.recipe.options import ConvertOptions, ProfileOptions
from tests.support.layouts import FAMILIES, OWNERS, SIZE, apart, owned, pictures, written
from tests.support.models import seeded

ONNX = ConvertOptions(targets=("onnx",))
MEASURE = ProfileOptions(batch_sizes=(1,), duration=0.01, threads=1)


@pytest.mark.slow  # 8 conversions
@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_the_whole_of_convert(tmp_path, name):
    model = owned(name)
    weights, config = written(model, tmp_path)
    if config is None:
        torch.save(weights, tmp_path / "weights.pth")
    source = tmp_path / "weights.pth" if config is None else tmp_path
    bundle, report = convert(source, keep_rate=0.7, out=tmp_path / "bundle", options=ONNX, measure=MEASURE)
    assert report.checks
    assert not report.failed
    theirs = OWNERS[name].answer(model, pictures())
    assert apart(answered(bundle.path / "dense" / "model.onnx"), theirs) <= 1e-5
    again, why_not = parent_model(read_bundle(tmp_path / "bundle"))
    assert again is not None, why_not
    assert apart(answered(bundle.path / "model.onnx"), again(pictures())) <= 1e-5


@pytest.mark.slow
@torch.inference_mode()
def test_the_small_epsilon_of_transformers_in_fp16(tmp_path):
    model = owned("ViT")
    model.save_pretrained(tmp_path)
    fp16 = ConvertOptions(targets=("onnx",), precision="fp16")
    bundle, report = convert(tmp_path, keep_rate=0.7, out=tmp_path / "bundle", options=fp16, measure=MEASURE)
    assert bundle.manifest.model_args["norm_eps"] == 1e-12  # nothing, in FP16
    assert report.checks
    assert not report.failed
    assert apart(answered(bundle.path / "dense" / "model.onnx"), OWNERS["ViT"].answer(model, pictures())) <= 0.01


@pytest.mark.slow
def test_the_manifest_knows_what_a_config_said(tmp_path):
    owned("ViT").save_pretrained(tmp_path)
    bundle, _ = convert(tmp_path, keep_rate=0.7, out=tmp_path / "bundle", options=ONNX, measure=MEASURE)
    before, _ = parent_model(bundle)
    (tmp_path / "config.json").unlink()
    after, why_not = parent_model(bundle)
    assert before is not None
    assert after is not None, why_not
    assert after.blocks[0].attn.num_heads == 4  # 48 wide: tensors alone would say one
    assert torch.equal(before(pictures()), after(pictures()))


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
