"""The C++ example, built with OpenVINO behind it: the same answers as Python, and a kind refusal of everything else."""

import json
import re
import shutil
import subprocess

import msgspec
import numpy as np
import PIL
import pytest

from evit_deploy.bundle.bundle import Bundle, read_bundle
from evit_deploy.bundle.manifest import GOLDEN, OPENVINO
from evit_deploy.data.images import preprocess_image
from evit_deploy.data.preprocess import Preprocess
from evit_deploy.files import sha256
from evit_deploy.runtimes.openvino import OpenVINORunner
from evit_deploy.verification.golden import Golden, load_golden
from tests.support.cpp_example import KINDS, SOURCE, change_manifest, may_differ, need_toolchain

pytestmark = [pytest.mark.cpp, pytest.mark.slow, pytest.mark.timeout(600)]  # building takes a minute or two

PILLOW = int(PIL.__version__.split(".")[0])


# ---- golden answers


def python_verdict(bundle: Bundle, golden: Golden) -> tuple[float, float]:
    """Error and limit of the image that comes closest to its limit, as ``verify`` finds them without kept patches."""
    with OpenVINORunner(bundle.file(OPENVINO), threads=1) as runner:
        answers = runner.infer({"input": golden.inputs})[bundle.manifest.answer]
    errors, limits = np.abs(answers - golden.reference).max(axis=1), golden.tie_limits()
    worst = int(np.argmax(errors / limits))
    return float(errors[worst]), float(limits[worst])


@pytest.mark.parametrize("kind", KINDS)
def test_golden_answers(program, bundles, kind):
    bundle = bundles(kind)
    result = program(bundle.path, "--json")
    assert result.code == 0, result.err
    verdict = json.loads(result.out)["golden"]
    error, limit = python_verdict(bundle, load_golden(bundle.file(GOLDEN), bundle.manifest))
    assert verdict["passed"]
    assert verdict["limit"] == pytest.approx(limit, rel=1e-6)
    assert verdict["error"] == pytest.approx(error, rel=0.5)  # another batch is summed in another order
    assert "golden check: passed, largest error" in program(bundle.path).out


@pytest.mark.parametrize(("close", "code"), [(0, 1), (1, 1), (2, 0)])
def test_an_image_on_a_tie_has_more_room(program, broken, close, code):
    """One patch within rounding has nothing to change places with; two have."""
    bundle = read_bundle(broken)
    golden = load_golden(broken / GOLDEN, bundle.manifest)
    margin = {block: np.full_like(rows, np.inf) for block, rows in golden.margin.items()}
    margin[2][3, :close] = 0.5
    reference, swapped = golden.reference.copy(), golden.reference.copy()
    reference[3] += 3 * golden.limit()
    swapped[3] -= 3 * golden.limit()
    expected = golden.expected.copy()
    expected[3] = reference[3]
    changed = msgspec.structs.replace(
        golden, margin=margin, reference=reference, swapped=swapped, expected=expected, expected_free=expected
    )
    changed.save(broken / GOLDEN)
    change_manifest(broken, files={GOLDEN: sha256(broken / GOLDEN)})
    result = program(broken, "--json")
    assert result.code == code, result.err
    verdict = json.loads(result.out)["golden"]
    error, limit = python_verdict(read_bundle(broken), changed)
    assert (verdict["passed"], verdict["limit"]) == (code == 0, pytest.approx(limit, rel=1e-6))
    assert verdict["error"] == pytest.approx(error, rel=0.1)


@pytest.mark.parametrize("answer", [1.0, float("nan")])
def test_an_engine_that_answers_otherwise_is_not_asked_about_images(program, broken, image_files, answer):
    golden = load_golden(broken / GOLDEN, read_bundle(broken).manifest)
    golden.reference[5, 0] = golden.expected[5, 0] = answer + golden.reference[5, 0]
    golden.save(broken / GOLDEN)
    change_manifest(broken, files={GOLDEN: sha256(broken / GOLDEN)})
    result = program(broken, image_files["china.jpg"])
    result.refused(1, str(broken), "not PyTorch's")
    assert result.out.startswith("golden check: FAILED")
    assert "china" not in result.out
    document = json.loads(program(broken, image_files["china.jpg"], "--json").out)
    assert (document["golden"]["passed"], document["images"]) == (False, [])


# ---- images


@pytest.mark.parametrize("kind", ["plain", "distilled", "registers, no classes", "int8"])
def test_images_get_the_answers_of_python(program, bundles, image_files, kind):
    bundle, files = bundles(kind), list(image_files.values())
    result = program(bundle.path, "--json", *files, *files)  # more than one batch
    assert result.code == 0, result.err
    answers = json.loads(result.out)["images"]
    assert [answer["file"] for answer in answers] == [str(file) for file in files * 2]
    inputs = np.stack([preprocess_image(file, bundle.manifest.preprocess) for file in files])
    with OpenVINORunner(bundle.file(OPENVINO), threads=1) as runner:
        wanted = runner.infer({"input": inputs})[bundle.manifest.answer]
    key = bundle.manifest.answer
    assert key == ("embedding" if kind == "registers, no classes" else "logits")
    for file, answer, again, logits in zip(files, answers, answers[len(files) :], wanted, strict=False):
        room = 1e-2 if may_differ(file.name) else 1e-4
        np.testing.assert_allclose(answer[key], logits, rtol=0, atol=room, err_msg=file.name)
        np.testing.assert_allclose(answer[key], again[key], rtol=0, atol=1e-4)
        if kind == "registers, no classes":
            assert "top" not in answer
            assert answer["length"] == pytest.approx(np.linalg.norm(answer[key]), rel=1e-6)
            continue
        top = answer["top"]
        shares = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        assert top[0]["class"] == logits.argmax(), file.name
        assert [guess["label"] for guess in top] == [f"class {guess['class']}" for guess in top]
        for guess in top:
            assert guess["probability"] == pytest.approx(shares[guess["class"]], abs=5e-3)


def test_labels_and_embeddings_in_print(program, bundles, broken, image_files):
    change_manifest(broken, labels=[f"label of {number}" for number in range(10)])
    photograph = image_files["china.jpg"]
    check, name, *lines = program(broken, photograph).out.splitlines()
    assert check.startswith("golden check: passed")
    assert name == str(photograph)
    assert len(lines) == 5
    assert all(" %  label of " in line for line in lines)
    plain = bundles("registers, no classes")
    _, _, embedding = program(plain.path, photograph).out.splitlines()
    with OpenVINORunner(plain.file(OPENVINO), threads=1) as runner:
        (wanted,) = runner.infer({"input": preprocess_image(photograph, plain.manifest.preprocess)[None]})["embedding"]
    assert embedding.startswith(f"  48 numbers of length {np.linalg.norm(wanted):.4g}: {wanted[0]:.4g} ")
    assert embedding.endswith("…")


def test_an_embedding_that_an_earlier_version_called_logits(program, broken, image_files):
    """As every output was called."""
    change_manifest(broken, model_args={"num_classes": 0})
    document = json.loads(program(broken, image_files["china.jpg"], "--json").out)
    assert len(document["images"][0]["embedding"]) == 10


PREPROCESSES = [
    Preprocess((96, 96)),
    Preprocess((96, 96), 1.0, "center", "bilinear"),
    Preprocess((96, 96), 0.9, "center-floor"),
    Preprocess((64, 112), 0.9),
    Preprocess((112, 64), 0.9, "center", "bilinear"),
    Preprocess((96, 80), 0.95, "squash"),
    Preprocess((96, 96), 1.0, "border", "bicubic", (0.1, 0.5, 0.9), (0.5, 0.2, 0.3)),
    Preprocess((91, 60), 0.9, "border"),
    Preprocess((97, 97), 1.3),  # a border around everything, by one pixel wider on one side
    Preprocess((97, 60), 1.3, "squash", "bilinear"),
]


@pytest.mark.parametrize("preprocess", PREPROCESSES, ids=str)
def test_inputs_are_those_of_python(probe, bundles, image_files, tmp_path, preprocess):
    shutil.copy(bundles("plain").path / "manifest.json", tmp_path)
    change_manifest(tmp_path, preprocess=msgspec.to_builtins(preprocess))
    for name, file in image_files.items():
        try:
            wanted = preprocess_image(file, preprocess)
        except ValueError:  # so narrow that nothing would be left of it
            assert name in ("wide.png", "tall.png")
            continue
        found = np.frombuffer(probe("preprocess", tmp_path, file), np.float32).reshape(wanted.shape)
        levels = 255 * np.abs(found - wanted) * np.array(preprocess.std, np.float32)[:, None, None]
        assert levels.max() < (1.01 if may_differ(name) else 0.01), name
        assert levels.mean() < 0.01, name


@pytest.mark.parametrize(
    ("count", "profiles", "batches"),
    [
        (5, "1 32", "5"),
        (70, "1 32", "32 32 6"),
        (3, "4 8", "4"),
        (9, "4 8", "8 4"),
        (12, "1 8 16 16", "16"),
        (20, "1 8 16 16", "16 4"),
        (40, "16 16 1 8", "16 16 8"),
    ],
)
def test_batches_are_split_and_filled_up(probe, count, profiles, batches):
    assert probe("batches", count, *profiles.split()).decode() == f"{batches} same\n"


# ---- building it


@pytest.mark.parametrize("runtime", ["", "triton"])
def test_a_runtime_has_to_be_chosen(tmp_path, runtime):
    need_toolchain()
    command = ["cmake", "-S", str(SOURCE), "-B", str(tmp_path), f"-DEVIT_RUNTIME={runtime}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "give -DEVIT_RUNTIME=tensorrt, tensorrt-rtx or openvino" in " ".join(done.stderr.split())


def test_the_program_in_the_readme_compiles():
    need_toolchain()
    (block,) = re.findall(r"^```cpp\n(.*?)^```", (SOURCE / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    source = f'#include "image.h"\n#include "runner.h"\nint main() {{\n{block}}}\n'
    command = ["c++", "-std=c++20", "-Wall", "-Werror", "-fsyntax-only", "-I", str(SOURCE), "-x", "c++", "-"]
    done = subprocess.run(command, input=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
