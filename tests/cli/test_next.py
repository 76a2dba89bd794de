"""What is suggested after a command: lines of this call's own paths that can be run as they stand."""

import shutil

import pytest

from tests.support.command_line import CLI
from tests.support.terminal import screens_of

PROGRAM = "python -m evit_deploy "
USES = [("predict", " IMAGES"), ("show", " IMAGES"), ("verify", ""), ("profile", ""), ("package", " --for triton")]


@pytest.fixture
def folder(made, pictures, tmp_path):
    """Where a user is: a bundle called "mine", and pictures."""
    place = tmp_path / "user"
    place.mkdir()
    shutil.copytree(made[0], place / "mine")
    shutil.copytree(pictures, place / "holiday")
    return place


def suggested(arguments, folder):
    """The commands that are suggested, without the name of this program."""
    lines = screens_of([*CLI, *arguments], 200, cwd=folder)[-1]
    first = next(place for place, line in enumerate(lines) if line.startswith("next: "))
    return [line.strip().removeprefix("next: ").removeprefix(PROGRAM) for line in lines[first:]]


def test_after_predict_it_is_shown_what_was_looked_at(folder):
    picture = str(sorted((folder / "holiday").rglob("*.png"))[0].relative_to(folder))
    found = suggested(("predict", "mine", picture, "--runtime", "onnxruntime"), folder)
    assert found == [f"show mine '{picture}'", "profile mine"]  # there is a blank in it


def test_after_package_the_server_is_started_and_verified(folder):
    assert suggested(("package", "mine", "--for", "triton", "--name", "a", "--out", "served"), folder) == [
        "docker compose --file served/compose.yaml up --build",
        "verify served --url http://localhost:8000 --model-name a",
    ]
    alone = ("package", "mine", "--for", "triton", "--name", "a", "--preprocess", "none", "--out", "alone")
    assert suggested(alone, folder)[1] == "verify alone --url http://localhost:8000 --model-name a_model"
    readme = (folder / "alone" / "README.md").read_text(encoding="utf-8")
    assert "--url http://localhost:8000 --model-name a_model" in readme


@pytest.mark.slow
@pytest.mark.openvino
def test_after_compare_and_after_a_package_for_cpp(folder, smallest):
    other = ("convert", smallest, "--keep-rate", "0.5", "--target", "openvino", "--out", "other", "--threads", "1")
    found = suggested(other, folder)
    assert found == [f"{use} other{more}" for use, more in USES]
    asked = ("compare", "mine", "other", "--runtime", "onnxruntime", "--threads", "1", "--batch-sizes", "1",
             "--duration", "0.01")  # fmt: skip
    assert suggested(asked, folder) == [f"{' '.join(asked)} --data IMAGES --out comparison"]
    whole = (*asked, "--data", "holiday", "--out", "comparison")
    assert suggested(whole, folder) == ["package mine --for triton", "package other --for triton"]
    built = suggested(("package", "other", "--for", "cpp", "--out", "c"), folder)
    assert built == ["cmake -S c -B c/build -DEVIT_RUNTIME=openvino"]
    assert built[0].split()[-1] in (folder / "c" / "README.md").read_text(encoding="utf-8")


def test_after_doctor_something_is_converted(folder):
    found = suggested(("doctor",), folder)
    assert found[0].startswith("convert CHECKPOINT")
    assert found[1] == "run digits"
