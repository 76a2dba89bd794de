"""Where a checkpoint's files are: folders of several libraries, shards, the hub's cache."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from timm.models import save_for_hf

from evit_deploy.errors import CheckpointError, InputError, MissingRequirement
from evit_deploy.models.checkpoint import build_model, read_checkpoint
from evit_deploy.models.files.sources import find_source

LABELS = ["cat", "dog", "cow", "fox", "owl"]


def hugging_face(folder: Path, **options: Any) -> transformers.ViTForImageClassification:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=2, intermediate_size=96, image_size=96,
        id2label=dict(enumerate(LABELS)), label2id={name: i for i, name in enumerate(LABELS)},
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config).eval()
    model.save_pretrained(folder, **options)
    size = {"height": 96, "width": 96}
    transformers.ViTImageProcessor(size=size, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(
        folder
    )
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A Hugging Face folder. Read only."""
    place = tmp_path_factory.mktemp("saved") / "vit"
    hugging_face(place)
    return place


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "vit"))


def check(source: str | Path, folder: Path) -> None:
    """Its tensors, preprocessing and labels are those of the Hugging Face folder."""
    found, wanted = read_checkpoint(source), read_checkpoint(folder)
    assert found.weights.keys() == wanted.weights.keys()
    assert all(torch.equal(value, wanted.weights[name]) for name, value in found.weights.items())
    assert (found.model, found.model_args, found.preprocess) == (wanted.model, wanted.model_args, wanted.preprocess)
    assert found.labels == LABELS
    assert found.preprocess is not None
    assert found.preprocess.mean == (0.1, 0.2, 0.3)
    assert found.origins == {"preprocess": "preprocessor_config.json", "labels": "config.json, id2label"}


def test_a_file_of_a_standard_name_is_read_as_its_folder(folder):
    check(folder / "model.safetensors", folder)


def test_another_file_is_read_alone(folder, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    shutil.copy(folder / "model.safetensors", tmp_path / "mine.safetensors")
    found = read_checkpoint(tmp_path / "mine.safetensors", "vit_tiny_patch16_224")
    assert found.labels is None
    assert found.origins == {"preprocess": "timm's vit_tiny_patch16_224"}


def test_shards_are_put_together(tmp_path, folder):
    hugging_face(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    check(tmp_path / "sharded", folder)
    check(tmp_path / "sharded" / "model.safetensors.index.json", folder)
    assert read_checkpoint(tmp_path / "sharded").sha256 != read_checkpoint(folder).sha256


def test_a_folder_of_timm_keeps_its_preprocessing_and_labels(tmp_path):
    args = {"embed_dim": 48, "depth": 4, "num_heads": 3, "img_size": 96}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **args)
    save_for_hf(model, tmp_path, model_config={"label_names": LABELS}, model_args=args)
    found = read_checkpoint(tmp_path)
    assert found.preprocess is not None
    assert (found.model, found.labels, found.preprocess.mean) == ("vit_tiny_patch16_224", LABELS, (0.5, 0.5, 0.5))
    assert found.origins == {"preprocess": "config.json", "labels": "config.json, label_names"}
    assert found.notes == []
    images = torch.rand(2, 3, 96, 96)
    with torch.inference_mode():
        assert torch.equal(build_model(found)(images), model.eval()(images))


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"architecture": "vit_tiny_patch16_224", "model_args": {"checkpoint_path": "PATH"}}, "not where timm loads"),
        (
            {"architecture": "vit_tiny_patch16_224", "model_args": {"pretrained_cfg": {"file": "PATH"}}},
            "not where timm",
        ),
        ({"architecture": "local-dir:PATH"}, "an architecture that timm does not know"),
        ({"architecture": "hf-hub:someone/vit"}, "an architecture that timm does not know"),
    ],
)
def test_a_configuration_reaches_for_nothing_else(tmp_path, config, what):
    other = tmp_path / "other.pth"
    other.write_text("not to be opened")
    torch.save(timm.create_model("vit_tiny_patch16_224", num_classes=5).state_dict(), tmp_path / "model.pth")
    (tmp_path / "folder").mkdir()
    (tmp_path / "model.pth").rename(tmp_path / "folder" / "model.pth")
    (tmp_path / "folder" / "config.json").write_text(json.dumps(config).replace("PATH", str(other)))
    refused(tmp_path / "folder", what)


def test_the_same_weights_in_two_forms_are_read_once(copy):
    torch.save({}, copy / "pytorch_model.bin")
    assert find_source(copy).notes == ("model.safetensors is read; pytorch_model.bin is left alone",)
    check(copy, copy)


def test_one_file_of_any_name_is_the_folders(copy, folder):
    (copy / "model.safetensors").rename(copy / "epoch=7.safetensors")
    check(copy, folder)


def refused(source: Path | str, what: str) -> CheckpointError:
    with pytest.raises(CheckpointError, match=what) as caught:
        read_checkpoint(source)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return caught.value


def test_folders_that_hold_no_one_checkpoint(copy):
    (copy / "model.safetensors").rename(copy / "a.safetensors")
    shutil.copy(copy / "a.safetensors", copy / "b.safetensors")
    refused(copy, r"several weight files .*a\.safetensors, b\.safetensors")
    for file in copy.glob("*.safetensors"):
        file.unlink()
    refused(copy, "without weights .*config.json, preprocessor_config.json")
    (copy / "manifest.json").write_text("{}")
    refused(copy, "a bundle, not a checkpoint")


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("preprocessor_config.json", "{", r"preprocessor_config\.json: not valid JSON"),
        ("config.json", "[" * 100_000, r"config\.json: nested too deeply"),
        ("config.json", "[1]", r"config\.json: expected `object`"),
        ("preprocessor_config.json", '{"image_mean": [0.5, "x", 0.5]}', "cannot be understood"),
        ("preprocessor_config.json", '{"size": {"longest_edge": 224}}', "cannot be understood"),
        ("preprocessor_config.json", '{"size": -3}', "not a number of pixels"),
        ("preprocessor_config.json", '{"do_resize": false}', "not resized"),
        ("preprocessor_config.json", '{"image_std": [0, 1, 1]}', "divided"),
        ("preprocessor_config.json", '{"resample": 17}', "resample is 17, none of PIL's filters"),
        ("preprocessor_config.json", '{"image_mean": [NaN, 1, 1]}', "not valid JSON"),
    ],
)
def test_configurations_that_say_nothing_sensible(copy, name, content, what):
    (copy / name).write_text(content)
    refused(copy, what)


def test_labels_of_another_number_of_classes(copy, tmp_path):
    config = json.loads((copy / "config.json").read_text())
    del config["id2label"]["2"]
    (copy / "config.json").write_text(json.dumps(config))
    refused(copy, "its config.json contradicts the tensors .got 4 labels")


def test_indexes_that_cannot_be_followed(tmp_path):
    hugging_face(tmp_path, max_shard_size="100KB")
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    first, second, *_ = sorted(set(content["weight_map"].values()))
    tensor = next(name for name, file in content["weight_map"].items() if file == second)
    for weight_map, what in (
        (content["weight_map"] | {tensor: "../" + second}, "not a weight file next to its index"),
        (content["weight_map"] | {tensor: "config.json"}, "not a weight file next to its index"),
        (content["weight_map"] | {tensor: first}, "does not hold the tensors that its index names"),
        (content["weight_map"] | {"absent": second}, "does not hold the tensors that its index names"),
        ({}, "without a weight_map"),
        ([1], "without a weight_map"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        refused(tmp_path, what)
    index.write_text(json.dumps(content))
    (tmp_path / second).unlink()
    refused(tmp_path, f"shards are missing .*{second}")


# ---- the hub


@pytest.fixture
def cache(monkeypatch, tmp_path, folder) -> Path:
    """The hub's cache with one repository in it, and no network."""
    commit, place = "0" * 40, tmp_path / "hub" / "models--someone--vit"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    (place / "refs" / "v1").write_text(commit)
    shutil.copytree(folder, place / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return place / "snapshots" / commit


@pytest.mark.parametrize("name", ["someone/vit", "hf-hub:someone/vit", "hf_hub:someone/vit", "hf-hub:someone/vit@v1"])
def test_a_hub_id_is_read_from_the_cache(cache, folder, name):
    check(name, folder)
    found = read_checkpoint(name)
    assert found.source == "hf-hub:someone/vit" + ("@v1" if "@" in name else "")
    assert found.sha256 == read_checkpoint(folder).sha256


def test_a_hub_id_that_is_not_in_the_cache(cache):
    for name in ("someone/other", "hf-hub:someone/vit@v2"):
        with pytest.raises(MissingRequirement, match="not in the hub's cache") as caught:
            read_checkpoint(name)
        assert caught.value.exit_code == 3
    (cache / "model.safetensors").unlink()
    with pytest.raises(MissingRequirement, match="HF_HUB_OFFLINE is set"):
        read_checkpoint("someone/vit")


@pytest.mark.parametrize("name", ["hf-hub:vit", "hf-hub:a/b/c", "hf-hub:../x", "hf-hub:a/b@", "hf-hub:a/-b"])
def test_what_has_the_prefix_and_is_no_hub_id(cache, name):
    with pytest.raises(InputError, match="not a hub id"):
        read_checkpoint(name)


@pytest.mark.parametrize("name", ["absent/deit_s.pth", "./absent/vit", "a/b/c", "absent\\vit"])
def test_what_looks_like_a_path_is_one(cache, name):
    refused(name, "no such file")
