"""``evit-deploy predict``: a table, JSON, embeddings, and images that cannot be read."""

import shutil

import msgspec
import numpy as np
import onnx
import pytest

from evit_deploy.bundle.bundle import read_bundle, write_manifest
from evit_deploy.bundle.manifest import MODEL, TensorSpec
from evit_deploy.data.images import sample_photographs
from evit_deploy.inference.model import load


@pytest.fixture
def photographs(tmp_path):
    """A folder with two photographs and a file that is no image."""
    folder = tmp_path / "holiday"
    (folder / "more").mkdir(parents=True)
    for name, image in zip(("china.png", "more/flower[1].png"), sample_photographs(), strict=True):
        image.save(folder / name)
    (folder / "broken.jpg").write_text("no image")
    return folder


def rewritten(path, **changes):
    write_manifest(path, msgspec.structs.replace(read_bundle(path).manifest, **changes))
    return path


@pytest.fixture
def embedding(converted, tmp_path):
    """A bundle whose model has no classes."""
    path = shutil.copytree(converted.path, tmp_path / "embedding")
    proto = onnx.load(path / MODEL)
    proto.graph.output[0].name = "embedding"
    for node in proto.graph.node:
        node.output[:] = ["embedding" if name == "logits" else name for name in node.output]
    onnx.save(proto, path / MODEL)
    return rewritten(path, outputs=(TensorSpec("embedding", "float32", (None, 10)),))


def test_a_table_with_the_best_classes(cli, converted, photographs, tmp_path):
    labels = [f"kind {number} [b]" for number in range(10)]
    bundle = rewritten(shutil.copytree(converted.path, tmp_path / "labeled"), labels=labels)
    files = [photographs / "china.png", photographs / "more" / "flower[1].png"]
    result = cli("predict", bundle, *files, "--top", 2, "--threads", 1)
    assert (result.code, result.err) == (0, "")
    header, _, *lines = result.out.splitlines()
    assert header.split() == ["image", "label", "probability", "%", "class"]
    with load(bundle) as model:
        found = model.predict(files, top=2)
    rows = [row for prediction in found for row in prediction.rows()]
    assert [line.split()[-5:] for line in lines] == [[*label.split(), share, index] for label, share, index in rows]
    assert [line.split()[0] for line in lines[::2]] == [str(file) for file in files]


def test_images_that_cannot_be_read_are_named_and_the_others_answered(cli, converted, photographs):
    result = cli("predict", converted.path, photographs, photographs / "gone.png", "--threads", 1)
    assert result.code == 1
    assert [line.split()[0] for line in result.out.splitlines()[2::5]] == [
        str(photographs / "china.png"), str(photographs / "more" / "flower[1].png")
    ]  # fmt: skip
    broken, gone, said = result.err.splitlines()
    assert broken.startswith(f"{photographs / 'broken.jpg'}: the image cannot be read")
    assert gone == f"{photographs / 'gone.png'}: no such image."
    assert said.startswith("evit-deploy: 2 of 4 images cannot be read (got ")
    assert said.endswith("Those that can be were answered.")


def test_one_document(cli, converted, photographs):
    result = cli("predict", converted.path, photographs, "--json", "--top", 1, "--runtime", "onnxruntime")
    assert result.code == 1
    document = result.document
    assert (document["bundle"], document["runtime"]) == (str(converted.path), "onnxruntime")
    assert [one["image"] for one in document["predictions"]] == [
        str(photographs / "china.png"), str(photographs / "more" / "flower[1].png")
    ]  # fmt: skip
    with load(converted.path) as model:
        best = model.predict(photographs / "china.png")
    (share,) = document["predictions"][0]["probabilities"]
    assert document["predictions"][0]["classes"] == [best.index]
    assert share == pytest.approx(best.probability, abs=1e-5)
    (unreadable,) = document["unreadable"]
    assert unreadable["image"] == str(photographs / "broken.jpg")
    assert "cannot be read" in unreadable["message"]


def test_no_image_at_all_that_can_be_read(cli, converted, photographs):
    result = cli("predict", converted.path, photographs / "broken.jpg", "-q")
    assert (result.code, result.out.strip()) == (1, "")
    assert result.err.count("\n") == 1
    assert "1 of 1 images cannot be read" in result.err


def test_embeddings_are_listed_and_written(cli, embedding, photographs, tmp_path):
    out = tmp_path / "found.npy"
    result = cli("predict", embedding, photographs, "--out", out, "--threads", 1)
    assert result.code == 1
    found = np.load(out)
    with load(embedding) as model:
        np.testing.assert_allclose(found, model.embed(sample_photographs()), atol=1e-5)
    assert (found.shape, found.dtype) == ((2, 10), np.float32)
    header, _, *lines = result.out.splitlines()
    assert header.split() == ["image", "numbers", "norm"]
    assert [line.split()[1:] for line in lines] == [["10", f"{np.linalg.norm(row):.4g}"] for row in found]
    before = out.read_bytes()
    cli("predict", embedding, photographs / "china.png", "--out", out).refused(2, "it exists already", "--force")
    assert out.read_bytes() == before
    assert cli("predict", embedding, photographs / "china.png", "--out", out, "--force").code == 0
    assert np.load(out).shape == (1, 10)


@pytest.mark.parametrize(
    ("arguments", "hints"),
    [
        (["--out", "{tmp}/x.npy"], ["--out is for embeddings", "--json"]),
        (["--top", "0"], ["--top", "got 0", "from 1 to"]),
        (["--runtime", "onnxruntme"], ["'onnxruntme'", "Did you mean 'onnxruntime'?"]),
        (["--runtime", "triton"], ["asks a server"]),
        (["--threads", "no"], ["--threads"]),
        (["--batch-size", "0"], ["--batch-size", "got 0"]),
    ],
)  # fmt: skip
def test_what_is_refused(arguments, hints, cli, converted, photographs, tmp_path):
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    cli("predict", converted.path, photographs / "china.png", *arguments).refused(2, *hints)


@pytest.mark.parametrize(
    ("out", "hints"), [("x.txt", [".npy", "x.npy"]), ("gone/x.npy", ["its folder is not there"]), (".", [".npy"])]
)  # fmt: skip
def test_where_embeddings_cannot_go(out, hints, cli, embedding, photographs, tmp_path):
    cli("predict", embedding, photographs / "china.png", "--out", tmp_path / out).refused(2, *hints)


def test_without_images_or_a_bundle(cli, converted, tmp_path):
    cli("predict", converted.path).refused(2, "IMAGES")
    (tmp_path / "empty").mkdir()
    cli("predict", converted.path, tmp_path / "empty").refused(2, "no images here")
    cli("predict", tmp_path / "empty", "x.png").refused(2, "not a bundle")
