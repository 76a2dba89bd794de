"""Preprocessing and labels, from beside the weights through ``convert`` into bundles, packages and predictions."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image

from evit_deploy.bundle.bundle import Bundle, read_bundle
from evit_deploy.data.images import sample_photographs
from evit_deploy.errors import InputError
from evit_deploy.inference.model import load
from evit_deploy.models.parent import parent_model
from evit_deploy.pipeline.convert import convert
from evit_deploy.recipe.options import ConvertOptions, PreprocessOptions, ProfileOptions
from tests.support.logs import listen
from tests.support.packages import make_package

LABELS = ["cat", "dog", "cow", "fox", "owl"]
QUICK = ProfileOptions(batch_sizes=(1,), duration=0.01, threads=1)
MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A Hugging Face folder. Read only."""
    place = tmp_path_factory.mktemp("saved") / "vit"
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=2, intermediate_size=96, image_size=64,
        id2label=dict(enumerate(LABELS)), label2id={name: i for i, name in enumerate(LABELS)},
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(place)
    size = {"height": 64, "width": 64}
    transformers.ViTImageProcessor(size=size, image_mean=MEAN, image_std=STD).save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def bundle(folder, tmp_path_factory) -> Bundle:
    out = tmp_path_factory.mktemp("converted") / "bundle"
    options = ConvertOptions(targets=("onnx", "openvino"))
    return convert(folder, keep_rate=0.7, options=options, measure=QUICK, out=out)[0]


def test_the_manifest_has_them_and_says_where_from(bundle):
    manifest = bundle.manifest
    preprocess = manifest.preprocess
    assert (preprocess.mean, preprocess.std, preprocess.interpolation) == (MEAN, STD, "bilinear")
    assert (preprocess.size, preprocess.crop_mode, preprocess.crop_pct) == ((64, 64), "squash", 1.0)
    assert manifest.labels == LABELS
    assert manifest.origins == {"preprocess": "preprocessor_config.json", "labels": "config.json, id2label"}
    assert not [note for note in manifest.notes if "Warning" in note]
    with load(bundle.path, threads=1) as model:
        (prediction,) = model.predict(sample_photographs()[:1], top=5)
    assert sorted(prediction.labels) == sorted(LABELS)


def test_packages_have_them(bundle, tmp_path):
    place, _ = make_package([bundle.path], "triton", name="vit", out=tmp_path / "triton")
    repository = place / "model_repository"
    assert (repository / "vit_model" / "labels.txt").read_text().splitlines() == LABELS
    config = (repository / "vit_preprocess" / "config.pbtxt").read_text()
    assert all(str(value) in config for value in (*MEAN, *STD))
    cpp, _ = make_package([bundle.path], "cpp", name="vit", out=tmp_path / "cpp")
    for packaged in (place, cpp / "bundle"):
        manifest = json.loads((packaged / "manifest.json").read_text())
        assert manifest["preprocess"]["mean"] == list(MEAN)
        assert manifest["labels"] == LABELS


def test_the_parent_is_found_again(bundle, folder, tmp_path):
    model, why_not = parent_model(bundle)
    assert (why_not, model is not None) == ("", True)
    moved = Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    assert parent_model(bundle, moved)[1] == ""
    (moved / "model.safetensors").unlink()
    assert "without weights" in parent_model(bundle, moved)[1]


def test_a_hub_id_goes_into_the_current_directory(folder, tmp_path, monkeypatch):
    commit, place = "0" * 40, tmp_path / "hub" / "models--someone--vit"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    shutil.copytree(folder, place / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    made, _ = convert("someone/vit", keep_rate=0.7, measure=QUICK)
    assert made.path == Path("vit-evit-k0.7")
    assert made.manifest.parents[0].source == "hf-hub:someone/vit"
    assert parent_model(made)[1] == ""
    shutil.rmtree(place)
    assert "hf-hub:someone/vit is gone" in parent_model(made)[1]


def test_a_guess_is_a_warning_in_the_log_and_in_the_manifest(checkpoint_file, folder, tmp_path):
    lines: list[str] = []
    listen(lines.append, progress=False)
    shutil.copy(folder / "model.safetensors", tmp_path / "mine.safetensors")
    asked = PreprocessOptions(crop_pct=0.9)
    made, _ = convert(
        tmp_path / "mine.safetensors", keep_rate=0.7, measure=QUICK, options=ConvertOptions(preprocess=asked)
    )
    (warning,) = [line for line in lines if line.startswith("Warning:")]
    assert warning in made.manifest.notes
    assert "mean 0.5 0.5 0.5" in warning
    assert [
        line for line in lines if line.startswith("Preprocessing: resize the shorter side to 71, center crop 64×64")
    ]
    assert made.manifest.preprocess.crop_pct == 0.9


def test_without_another_source_folders_name_the_classes(folder, tmp_path):
    shutil.copy(folder / "model.safetensors", tmp_path / "mine.safetensors")
    names = ["ant", "bee", "cat", "dog", "eel"]
    for name in names:
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (64, 64)).save(tmp_path / "data" / name / "0.png")
    options = ConvertOptions(data=str(tmp_path / "data"), preprocess=PreprocessOptions(mean=MEAN, std=STD))
    made, _ = convert(tmp_path / "mine.safetensors", keep_rate=0.7, measure=QUICK, options=options)
    assert read_bundle(made.path).manifest.labels == names
    assert made.manifest.origins["labels"] == "the folders of --data"


def test_another_image_size_beside_the_weights_is_said(folder, tmp_path):
    place = Path(shutil.copytree(folder, tmp_path / "vit"))
    config = json.loads((place / "preprocessor_config.json").read_text())
    (place / "preprocessor_config.json").write_text(json.dumps(config | {"size": {"height": 32, "width": 32}}))
    made, _ = convert(place, keep_rate=0.7, measure=QUICK)
    (note,) = [note for note in made.manifest.notes if "preprocessor_config.json" in note]
    assert "makes images of 32×32 pixels" in note
    assert made.manifest.preprocess.size == (64, 64)


def test_what_does_not_fit_is_refused_before_the_work(folder, tmp_path):
    (tmp_path / "names.txt").write_text("one\ntwo\n")
    for asked, what in (
        (PreprocessOptions(labels=str(tmp_path / "names.txt")), "the number of labels is not the number of classes"),
        (PreprocessOptions(mean=(0.5, 0.5)), "one number per channel"),
        (PreprocessOptions(mean=(0.5, 0.5), std=(0.5, 0.5)), "normalization needs three channels"),
    ):
        with pytest.raises(InputError, match=what):
            convert(folder, keep_rate=0.7, out=tmp_path / "out", options=ConvertOptions(preprocess=asked))
    assert not (tmp_path / "out").exists()
