"""``evit-deploy show``: a picture, its numbers as JSON, and what cannot be drawn."""

import json
import os
import shutil
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from evit_deploy.data.images import sample_photographs
from evit_deploy.inference.model import load
from evit_deploy.visualization.show import PAGE, show
from tests.support.models import tree


@pytest.fixture
def photographs(tmp_path):
    """A folder with two photographs and a file that is no image."""
    folder = tmp_path / "holiday"
    (folder / "more").mkdir(parents=True)
    for name, image in zip(("china.png", "more/flower[1].png"), sample_photographs(), strict=True):
        image.save(folder / name)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder."""
    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)
    return place


def test_a_picture_of_a_bundle_here(cli, converted, photographs, here):
    result = cli("show", converted.path, photographs)
    assert (result.code, result.err) == (0, "")
    name = f"{converted.path.name}-kept.png"
    assert list(tree(here)) == [name]
    files = [photographs / "china.png", photographs / "more/flower[1].png"]
    assert (here / name).read_bytes() == show(converted.path, files).sheet().png()
    lines = result.out.splitlines()
    assert lines[0] == "vit_tiny_patch16_224, evit-k0.6, fp32, onnxruntime, 2 images."
    assert lines[1].strip() == "block 1: 22 of 36 patches kept"
    assert lines[-1] == name


def test_an_svg_of_chosen_blocks_without_scores(cli, converted, photographs, here):
    result = cli("show", converted.path, photographs / "china.png", "--blocks", "3", "--no-heat", "--out", "a.SVG")
    assert result.code == 0, result.err
    root = ElementTree.parse(here / "a.SVG").getroot()
    large = cli("show", converted.path, photographs / "china.png", "--side", "480", "--out", "a.png")
    assert large.code == 0, large.err
    assert Image.open(here / "a.png").width == 8 + 4 * (480 + 8)
    assert len(list(root.iter("{http://www.w3.org/2000/svg}image"))) == 2


def test_json_has_the_numbers_of_every_location(cli, converted, photographs, here):
    result = cli("show", converted.path, photographs, "--blocks", "1", "--json")
    document = result.document
    with load(converted.path, "onnxruntime") as model:
        kept = model.kept([photographs / "china.png", photographs / "more/flower[1].png"])
    assert document["pictures"] == [f"{converted.path.name}-kept.png"]
    assert document["grid"] == [6, 6]
    assert [image["image"] for image in document["images"]] == [
        str(photographs / "china.png"), str(photographs / "more/flower[1].png"),
    ]  # fmt: skip
    for number, image in enumerate(document["images"]):
        assert [stage["block"] for stage in image["stages"]] == list(kept)
        for stage in image["stages"]:
            numbers = [patch for patch in kept[stage["block"]][number].tolist() if patch >= 0]
            assert stage["kept"] == sorted(numbers)
            assert sorted(sum(stage["tokens"], stage["kept"])) == list(range(36))


def test_a_checkpoint_is_shown_by_the_method_that_is_asked_for(cli, checkpoint_file, photographs, here):
    result = cli("show", checkpoint_file, photographs, "--method", "merge", "--keep-rate", 0.5, "--json")
    assert result.code == 0, result.err
    assert result.document["about"] == "vit_tiny_patch16_224, merge-k0.5"
    assert {stage["does"] for image in result.document["images"] for stage in image["stages"]} == {"merged"}
    assert list(tree(here)) == ["tiny-kept.png"]
    cli("show", checkpoint_file, photographs).refused(2, "--keep-rate")


@pytest.mark.openvino
def test_runtimes_are_compared(cli, converted, photographs, here):
    asked = [option for name in ("openvino", "eager", "onnxruntime") for option in ("--runtime", name)]
    result = cli("show", converted.path, photographs, *asked)
    assert result.code == 0, result.err
    assert "openvino and eager and onnxruntime choose the same patches in all 2 images." in result.out


def test_an_image_that_cannot_be_read_is_named_and_the_others_are_drawn(cli, converted, photographs, here):
    (photographs / "broken.jpg").write_text("no image")
    result = cli("show", converted.path, photographs, photographs / "gone.png", "--json")
    assert result.code == 1
    assert len(result.document["images"]) == 2
    unreadable = [entry["image"] for entry in result.document["unreadable"]]
    assert unreadable == [str(photographs / "broken.jpg"), str(photographs / "gone.png")]
    assert "2 of 4 images cannot be read" in result.err


def test_images_of_which_none_can_be_read_leave_nothing(cli, converted, tmp_path, here):
    broken = tmp_path / "broken.jpg"
    broken.write_text("no image")
    result = cli("show", converted.path, broken)
    assert result.code == 1
    assert "1 of 1 images cannot be read" in result.err
    assert tree(here) == {}


def test_a_picture_is_not_replaced_unasked(cli, converted, photographs, here):
    (here / "mine.png").write_text("mine")
    arguments = ("show", converted.path, photographs, "--out", "mine.png")
    cli(*arguments).refused(2, "mine.png", "exists already", "--force")
    assert (here / "mine.png").read_text() == "mine"
    assert cli(*arguments, "--force").code == 0
    assert (here / "mine.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "hints"),
    [
        (("--out", "kept.jpg"), ("kept.jpg", ".png or .svg")),
        (("--out", "."), ("this is a folder",)),
        (("--out", "gone/kept.png"), ("its folder is not there",)),
        (("--blocks", "0"), ("block", "1, 2, 3")),
        (("--blocks", "x"), ("whole numbers",)),
        (("--keep-rate", "0.5"), ("a bundle is shown as it is", "keep_rate")),
        (("--runtime", "triton"), ("server",)),
        (("--runtime", "onxruntime"), ("Did you mean 'onnxruntime'?",)),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_anything_is_written(
    arguments, hints, cli, converted, photographs, here
):
    cli("show", converted.path, photographs, *arguments).refused(2, *hints)
    assert tree(here) == {}


def test_no_images_no_bundle_and_no_place_to_write(cli, converted, photographs, here, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    cli("show", converted.path, empty).refused(2, "no images here")
    cli("show", tmp_path / "gone", photographs, "--keep-rate", 0.5).refused(2, "gone")
    cli("show", empty, photographs, "--keep-rate", 0.5).refused(2, "empty")
    cli("show", converted.path).refused(2, "IMAGES")
    changed = shutil.copytree(converted.path, tmp_path / "changed")
    (changed / "model.onnx").write_bytes(b"other")
    cli("show", changed, photographs).refused(2, "have changed")
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    here.chmod(0o500)
    cli("show", converted.path, photographs).refused(2, "cannot write there")


def test_many_images_are_drawn_on_numbered_sheets(cli, converted, tmp_path, here):
    folder = tmp_path / "many"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(2 * PAGE + 1):
        Image.fromarray(generator.integers(0, 256, (20, 30, 3), np.uint8)).save(folder / f"{number:03}.png")
    (here / "kept-2.png").write_text("mine")
    cli("show", converted.path, folder, "--out", "kept.png").refused(2, "kept-2.png", "exists already")
    assert list(tree(here)) == ["kept-2.png"]
    result = cli("show", converted.path, folder, "--out", "kept.png", "--force", "--json")
    assert result.code == 0, result.err
    assert list(tree(here)) == json.loads(result.out)["pictures"] == ["kept-1.png", "kept-2.png", "kept-3.png"]
    heights = [Image.open(here / f"kept-{page}.png").height for page in (1, 2, 3)]
    assert heights[0] == heights[1] > 10 * heights[2] / 2


def test_a_name_with_control_characters_is_shown_and_not_obeyed(cli, converted, photographs, here):
    strange = photographs / "a\x1b[31m<b>.png"
    shutil.copy(photographs / "china.png", strange)
    result = cli("show", converted.path, strange, "--out", "kept.svg")
    assert result.code == 0, result.err
    assert "\x1b" not in result.out + result.err + (here / "kept.svg").read_text()
    ElementTree.parse(here / "kept.svg")


def test_a_curve_is_a_table_and_a_chart(cli, converted, photographs, here):
    result = cli("show", converted.path, photographs, "--curve", "--rates", "0.5,0.8", "--sample", 1)
    assert result.code == 0, result.err
    assert "1 image: % with the dense model's class." in result.out
    assert "most attended first" in result.out
    assert list(tree(here)) == [f"{converted.path.name}-curve.svg"]
    ElementTree.parse(here / f"{converted.path.name}-curve.svg")
    cli("show", converted.path, photographs, "--curve").refused(2, "exists already")


def test_a_curve_as_csv_and_json(cli, checkpoint_file, photographs, here):
    asked = ("--curve", "--rates", "0.5", "--out", "curve.csv", "--json", "--locations", "2")
    result = cli("show", checkpoint_file, photographs, *asked)
    assert result.code == 0, result.err
    assert result.document["measure"] == "same class as the dense model"
    assert result.document["locations"] == [2]
    assert (here / "curve.csv").read_text().startswith("removed,keep_rate,tokens,gmacs,images,agreement,")


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("--rates", "0.5"), "--curve"),
        (("--sample", "5"), "--curve"),
        (("--curve", "--blocks", "3"), "--blocks"),
        (("--curve", "--no-heat"), "--heat"),
        (("--curve", "--runtime", "openvino"), "--runtime"),
        (("--curve", "--rates", "1"), "keep rate"),
        (("--curve", "--rates", "7"), "0 to 1"),
        (("--curve", "--out", "a.png"), ".svg or .csv"),
    ],
)
def test_options_that_do_not_belong_together_are_refused(arguments, hint, cli, converted, photographs, here):
    cli("show", converted.path, photographs, *arguments).refused(2, hint)
    assert tree(here) == {}
