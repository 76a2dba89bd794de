"""How class folders are taken for a model's classes, and folders of images without any."""

from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image

from evit_deploy.bundle.bundle import Bundle
from evit_deploy.bundle.manifest import Manifest
from evit_deploy.errors import InputError
from evit_deploy.verification.answers.pictures import check_images, embeds, pictures_of

LABELS = ["ant", "bee", "cat", "crane", "dog", "eel", "fox", "crane", "gnu", "hen"]


def folder(root: Path, names: list[str]) -> Path:
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True)
        Image.new("RGB", (30, 20), (10 * number, 90, 30)).save(root / name / "one.png")
    return root


def labeled(bundle: Bundle, labels: list[str] | None) -> Manifest:
    return msgspec.structs.replace(bundle.manifest, labels=labels)


def truth(data: Path, manifest: Manifest) -> dict[str, int]:
    """Of each class folder the class it was taken for."""
    pictures = pictures_of(data, manifest)
    names = [Path(pictures.folder.name(i)).parent.name for i in range(len(pictures))]
    labels = np.concatenate([labels for _, labels in pictures.batches(manifest, 3)])
    return dict(zip(names, labels.tolist(), strict=True))


def test_folders_that_are_called_as_labels_are_these_classes(converted, tmp_path):
    data = folder(tmp_path / "data", ["hen", "bee", "fox"])
    manifest = labeled(converted, LABELS)
    assert truth(data, manifest) == {"hen": 9, "bee": 1, "fox": 6}
    assert pictures_of(data, manifest).notes == ()


def test_as_many_folders_as_classes_are_taken_in_order_and_that_is_said(converted, tmp_path):
    names = [f"n{number}" for number in range(10)]
    data = folder(tmp_path / "data", names)
    assert truth(data, labeled(converted, LABELS)) == {name: number for number, name in enumerate(names)}
    (note,) = pictures_of(data, labeled(converted, LABELS)).notes
    assert note == (
        "The 10 class folders of data are not called as the model's labels, and were taken for its classes in order: "
        "'n0' for 'ant'."
    )
    assert truth(data, labeled(converted, None)) == {name: number for number, name in enumerate(names)}
    assert pictures_of(data, labeled(converted, None)).notes == ()  # there are no names to differ from


def test_few_folders_of_other_names_are_refused_where_the_labels_are_known(converted, tmp_path):
    data = folder(tmp_path / "data", ["bee", "crane", "zebra"])
    with pytest.raises(InputError, match=r"not among the model's labels .got crane, zebra, .*10 labels.*a folder for"):
        pictures_of(data, labeled(converted, LABELS))  # there are two cranes
    (note,) = pictures_of(data, labeled(converted, None)).notes
    assert "taken for its first 3" in note


def test_more_folders_than_classes_are_refused(converted, tmp_path):
    data = folder(tmp_path / "data", [str(number) for number in range(11)])
    with pytest.raises(InputError, match=r"more class folders than .*got 11, expected at most 10"):
        pictures_of(data, converted.manifest)


def test_images_outside_folders_have_no_labels(converted, tmp_path):
    for number in range(4):
        Image.new("RGB", (30, 20)).save(tmp_path / f"{number}.png")
    (tmp_path / "empty").mkdir()
    pictures = pictures_of(tmp_path, converted.manifest)
    parts = list(pictures.batches(converted.manifest, 3))
    assert (len(pictures), pictures.folder) == (4, None)
    assert [(images.shape, labels) for images, labels in parts] == [((3, 3, 96, 96), None), ((1, 3, 96, 96), None)]


def test_a_model_without_classes_takes_any_class_folders(converted, embedding, tmp_path):
    assert (embeds(converted.manifest), embeds(embedding.manifest)) == (False, True)
    data = folder(tmp_path / "data", [f"{number}" for number in range(60)])  # more than the embedding is wide
    assert truth(data, embedding.manifest)["59"] == 59


def test_images_of_another_number_of_channels(embedding, converted, tmp_path):
    inputs = msgspec.structs.replace(converted.manifest.inputs[0], shape=(None, 1, 96, 96))
    manifest = msgspec.structs.replace(converted.manifest, inputs=(inputs,))
    for data in (folder(tmp_path / "data", ["a", "b"]), tmp_path / "data" / "a"):
        (images, _), *_ = pictures_of(data, manifest).batches(manifest, 8)
        assert images.shape[1:] == (1, 96, 96)


@pytest.mark.parametrize("names", [["train/a", "val/a"], ["train/a", "VAL/a", "docs"], ["test/a"], ["train", "val"]])
def test_the_folder_above_train_and_val_is_no_two_classes(converted, tmp_path, names):
    data = folder(tmp_path / "data", names)
    best = next(name.split("/")[0] for name in reversed(names) if name != "docs")
    for check in (check_images, lambda place: pictures_of(place, converted.manifest)):
        with pytest.raises(InputError, match=rf"parts of a data set.*Give one of them: {data / best}") as raised:
            check(data)
        assert raised.value.where == data
    assert check_images(data / names[0]) is None


@pytest.mark.parametrize("names", [["train", "plane", "bus"], ["test"], ["a/train", "a/val", "b/train"]])
def test_classes_may_be_called_like_parts_and_hold_folders(converted, tmp_path, names):
    data = folder(tmp_path / "data", names)
    assert len(pictures_of(data, converted.manifest)) == len(names)


def test_what_is_no_folder_of_images_is_refused(converted, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for name, message in (("absent", "no such folder"), ("file", "this is a file"), ("empty", "no labeled images")):
        with pytest.raises(InputError, match=message):
            pictures_of(tmp_path / name, converted.manifest)
