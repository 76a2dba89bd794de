"""`--data` of convert, verify and profile as a user gives it."""

import shutil
from pathlib import Path

import pytest
from PIL import Image

from evit_deploy.bundle.bundle import read_bundle
from evit_deploy.bundle.manifest import MODEL
from evit_deploy.data.sources.class_folders import Folder
from tests.support.models import tree

VERIFY = ["--runtime", "onnxruntime", "--threads", "1", "--batch-sizes", "1"]
PROFILE = [*VERIFY, "--duration", "0.01"]


def test_profile_prints_accuracy_beside_latency(cli, converted, pictures, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    result = cli("profile", converted.path, *PROFILE, "--data", pictures)
    assert (result.code, result.err) == (0, "")
    first = result.out.split("A row's figures")[0]
    for word in ("40 images, answered by onnxruntime", "top-5 %", "to dense", "batch 1", "dense ", "model "):
        assert word in first
    verdict, _, _, header, *_ = first.splitlines()
    assert header.split()[-2:] == ["ms", "images/s"]
    assert "he same class as its dense twin on " in verdict
    assert " % of 40 images" in verdict


def test_json_has_the_same_names_in_both_tables(cli, converted, pictures):
    document = cli("profile", converted.path, *PROFILE, "--data", pictures, "--json").document
    compared = [(row["runtime"], row["name"]) for row in document["compared"]]
    assert compared == [("onnxruntime", "dense"), ("onnxruntime", "model")]
    assert set(compared) < {(row["runtime"], row["variant"]) for row in document["rows"]}
    assert document["compared"][1]["to_dense"]["other"] == "dense"


def test_convert_tells_what_it_costs(cli, checkpoint_file, pictures, tmp_path):
    out = tmp_path / "bundle"
    document = cli(
        "convert", checkpoint_file, "--keep-rate", "0.6", "--data", pictures, "--out", out, "--threads", "1", "--json"
    ).document
    dense, model = document["compared"]
    assert (dense["images"], dense["name"], model["name"]) == (40, "dense", "model")
    results = cli("verify", out, *VERIFY, "--data", pictures, "--json").document["compared"]
    assert results == document["compared"]
    kept = read_bundle(out).manifest.results
    assert kept["accuracy"] == {"onnxruntime": model["top1"]}
    assert kept["to_dense"] == {"onnxruntime": model["to_dense"]["value"]}
    assert kept["cosine"] == {}


def test_convert_of_a_model_without_classes_tells_cosine_and_recall(cli, embedding, pictures, tmp_path):
    checkpoint = embedding.path / embedding.manifest.parents[0].source
    arguments = ["--keep-rate", "0.6", "--data", pictures, "--out", tmp_path / "bundle", "--threads", "1", "--json"]
    _, model = cli("convert", checkpoint, *arguments).document["compared"]
    assert 0 < model["cosine_centered"] < model["cosine"] <= 1
    assert model["top1"] is None
    assert model["to_dense"]["low"] < model["to_dense"]["high"]


@pytest.fixture
def parts(pictures, tmp_path) -> Path:
    for split in ("train", "val"):
        shutil.copytree(pictures, tmp_path / "data" / split)
    return tmp_path / "data"


@pytest.mark.parametrize("command", ["convert", "verify", "profile"])
def test_train_and_val_are_not_taken_for_classes(cli, command, converted, checkpoint_file, parts):
    before = tree(parts.parent)
    subject, options = {
        "convert": (checkpoint_file, ["--keep-rate", "0.6", "--out", parts.parent / "out"]),
        "verify": (converted.path, VERIFY),
        "profile": (converted.path, PROFILE),
    }[command]
    cli(command, subject, *options, "--data", parts).refused(2, "parts of a data set", f"{parts}/val or {parts}/train")
    assert tree(parts.parent) == before


def test_more_class_folders_than_classes_are_refused_before_the_work(cli, checkpoint_file, tmp_path):
    for number in range(11):
        (tmp_path / "data" / str(number)).mkdir(parents=True)
        Image.new("RGB", (20, 20)).save(tmp_path / "data" / str(number) / "one.png")
    arguments = [checkpoint_file, "--keep-rate", "0.6", "--data", tmp_path / "data", "--out", tmp_path / "out"]
    cli("convert", *arguments).refused(2, "more class folders than the model has classes", "got 11")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", ["file", "checkpoint"])
def test_profile_takes_images_for_a_bundle_alone(cli, converted, checkpoint_file, pictures, target):
    subject = converted.file(MODEL) if target == "file" else checkpoint_file
    cli("profile", subject, *PROFILE, "--data", pictures).refused(2, "--data", "only a bundle's answers")


def test_compare_names_images_without_labels(cli, converted, fewer, pictures, tmp_path):
    shutil.copy(Folder(pictures).files[0], tmp_path / "one.png")
    arguments = ["compare", converted.path, fewer.path, *PROFILE, "--data", tmp_path]
    cli(*arguments).refused(2, "these images have no labels", "--images")
