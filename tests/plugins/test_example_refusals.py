"""What the C++ example refuses: wrong uses, broken bundles, files that are no images, damaged bytes."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
from PIL import Image

from evit_deploy.bundle.manifest import GOLDEN
from evit_deploy.data.images import sample_photographs
from evit_deploy.files import sha256
from tests.support.cpp_example import SOURCE, change_manifest, replace_file

pytestmark = [pytest.mark.cpp, pytest.mark.slow, pytest.mark.timeout(600)]  # building takes a minute or two

PILLOW = int(PIL.__version__.split(".")[0])


def test_help(program):
    result = program("--help")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith("Usage: evit_example BUNDLE")


@pytest.mark.parametrize(
    ("arguments", "hints"),
    [
        ([], ["BUNDLE", "missing", "--help"]),
        (["--fast", "bundle"], ["--fast", "no such option"]),
        (["bundle", "--plugin"], ["--plugin", "missing"]),
        (["{folder}/absent"], ["absent", "no such bundle"]),
        (["{folder}/" + "x" * 300], ["no such bundle"]),
        ([str(SOURCE / "README.md")], ["README.md", "not a bundle"]),
        (["{folder}"], ["not a bundle (no manifest.json in it)"]),
        (["{bundle}", "--plugin", "plugin.so"], ["--plugin", "TensorRT", "built for OpenVINO"]),
    ],
    ids=lambda value: " ".join(value)[-40:],
)
def test_usage(program, bundles, tmp_path, arguments, hints):
    places = {"{folder}": str(tmp_path), "{bundle}": str(bundles("plain").path)}
    for mark, place in places.items():
        arguments = [argument.replace(mark, place) for argument in arguments]
    program(*arguments).refused(2, *hints)


def remove(name: str) -> Callable[[Path], None]:
    return lambda bundle: (bundle / name).unlink()


def content(name: str, what: bytes | Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Other content with the right hash."""
    return lambda bundle: replace_file(bundle, name, what((bundle / name).read_bytes()) if callable(what) else what)


def manifest(**fields: Any) -> Callable[[Path], None]:
    return lambda bundle: change_manifest(bundle, **fields)


def raw_manifest(what: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def change(bundle: Path) -> None:
        (bundle / "manifest.json").write_bytes(what((bundle / "manifest.json").read_bytes()))

    return change


def flip(name: str) -> Callable[[Path], None]:
    def change(bundle: Path) -> None:
        damaged = bytearray((bundle / name).read_bytes())
        damaged[len(damaged) // 2] ^= 1
        (bundle / name).write_bytes(damaged)

    return change


def without_openvino(bundle: Path) -> None:
    text = json.loads((bundle / "manifest.json").read_text())
    text["files"] = {name: digest for name, digest in text["files"].items() if "openvino" not in name}
    (bundle / "manifest.json").write_text(json.dumps(text))


def link_outside(bundle: Path) -> None:
    (bundle.parent / "model.bin").write_bytes((bundle / "openvino/model.bin").read_bytes())
    remove("openvino/model.bin")(bundle)
    (bundle / "openvino/model.bin").symlink_to(bundle.parent / "model.bin")


def compressed(bundle: Path) -> None:
    with np.load(bundle / GOLDEN) as archive:
        np.savez_compressed(bundle / GOLDEN, **dict(archive))
    change_manifest(bundle, files={GOLDEN: sha256(bundle / GOLDEN)})


def golden_with(**arrays: np.ndarray | None) -> Callable[[Path], None]:
    """Replaces arrays, or takes them out."""

    def change(bundle: Path) -> None:
        with np.load(bundle / GOLDEN) as archive:
            kept = {name: value for name, value in (dict(archive) | arrays).items() if value is not None}
        np.savez(bundle / GOLDEN, **kept)
        change_manifest(bundle, files={GOLDEN: sha256(bundle / GOLDEN)})

    return change


SQUARE = {"size": [96, 96], "crop_pct": 0.9, "crop_mode": "center", "interpolation": "bicubic"}
COLORS = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
BREAKAGES: list[tuple[str, Callable[[Path], None], int, list[str]]] = [
    ("no manifest", remove("manifest.json"), 2, ["not a bundle"]),
    ("manifest cut short", raw_manifest(lambda text: text[:500]), 2, ["manifest cannot be read", "parse error"]),
    ("manifest is a list", raw_manifest(lambda _: b"[]"), 2, ["manifest cannot be read"]),
    ("manifest is empty", raw_manifest(lambda _: b""), 2, ["manifest cannot be read"]),
    ("manifest is binary", raw_manifest(lambda _: bytes(range(256))), 2, ["manifest cannot be read"]),
    ("manifest nests deeply", raw_manifest(lambda _: b"[" * 100_000), 2, ["manifest cannot be read"]),
    ("another format", manifest(format=2), 2, ["another version (got 2, expected 1)"]),
    ("a path upwards", manifest(files={"../secret": "00"}), 2, ["outside the bundle", "../secret"]),
    ("an absolute path", manifest(files={"/etc/passwd": "00"}), 2, ["outside the bundle", "/etc/passwd"]),
    ("a link outwards", link_outside, 2, ["outside the bundle", "openvino/model.bin"]),
    ("std of zero", manifest(preprocess=SQUARE | COLORS | {"std": [0.5, 0, 0.5]}), 2, ["out of range"]),
    ("half a pixel", manifest(preprocess=SQUARE | COLORS | {"size": [96.5, 96]}), 2, ["out of range"]),
    ("a huge size", manifest(preprocess=SQUARE | COLORS | {"size": [10**9, 96]}), 2, ["out of range"]),
    ("no size", manifest(preprocess=COLORS), 2, ["manifest cannot be read", "size"]),
    ("no openvino files", without_openvino, 2, ["has no openvino/model.xml", "--target"]),
    ("weights gone", remove("openvino/model.bin"), 2, ["model.bin", "no such file"]),
    ("weights changed", flip("openvino/model.bin"), 2, ["model.bin", "damaged", "SHA-256"]),
    ("weights cut short", content("openvino/model.bin", lambda data: data[:1000]), 4, ["OpenVINO refuses the model"]),
    ("graph is text", content("openvino/model.xml", b"hello"), 4, ["OpenVINO refuses the model"]),
    ("graph cut short", content("openvino/model.xml", lambda data: data[: len(data) // 2]), 4, ["refuses the model"]),
    (
        "no precision",
        content("openvino/model.xml", lambda data: data.replace(b"<precision value", b"<precision_ value")),
        2,
        ["does not say its precision"],
    ),
    (
        "unknown precision",
        content("openvino/model.xml", lambda data: data.replace(b'<precision value="fp32"', b'<precision value="fp8"')),
        2,
        ["no such precision (got 'fp8')"],
    ),
    ("golden gone", remove(GOLDEN), 2, [GOLDEN, "no such file"]),
    ("golden changed", flip(GOLDEN), 2, [GOLDEN, "damaged", "SHA-256"]),
    ("golden is text", content(GOLDEN, b"not an archive, but long enough"), 2, ["not a golden file"]),
    ("golden is empty", content(GOLDEN, b""), 2, ["not a golden file", "cut short"]),
    ("golden cut short", content(GOLDEN, lambda data: data[:-100]), 2, ["not a golden file"]),
    ("golden compressed", compressed, 2, ["not a golden file", "compressed"]),
    ("golden of something else", golden_with(reference=None), 2, ["it has no 'reference'"]),
    ("golden in one dimension", golden_with(inputs=np.zeros(9, np.float32)), 2, ["'inputs' has another shape"]),
    ("golden of integers", golden_with(inputs=np.zeros((8, 3, 96, 96), np.int64)), 2, ["it has no 'inputs'"]),
    ("golden in Fortran's order", golden_with(reference=np.zeros((8, 10), order="F")), 2, ["another order"]),
    ("golden without images", golden_with(inputs=np.zeros((0, 3, 96, 96))), 2, ["'inputs' has another shape"]),
    ("golden of other counts", golden_with(inputs=np.zeros((5, 3, 96, 96))), 2, ["differ in shape"]),
    ("golden of another size", golden_with(inputs=np.zeros((8, 3, 64, 64))), 2, ["not of the engine's size"]),
]


@pytest.mark.parametrize(
    ("breakage", "code", "hints"), [row[1:] for row in BREAKAGES], ids=[row[0] for row in BREAKAGES]
)
def test_broken_bundles(program, broken, breakage, code, hints):
    breakage(broken)
    result = program(broken)
    result.refused(code, *hints)
    assert result.out == ""


@pytest.mark.parametrize(
    ("fields", "hints"),
    [
        ({"preprocess": SQUARE | COLORS | {"crop_mode": "random"}}, ["crop_mode (got 'random', expected center"]),
        ({"preprocess": SQUARE | COLORS | {"interpolation": "lanczos"}}, ["interpolation (got 'lanczos'"]),
        ({"preprocess": SQUARE | COLORS | {"size": [64, 64]}}, ["3 channels of 64 × 64", "takes 3 of 96 × 96"]),
        ({"labels": ["cat", "dog"]}, ["labels do not fit", "got 2, expected 10"]),
    ],
    ids=["crop_mode", "interpolation", "size", "labels"],
)
def test_manifests_that_images_cannot_be_prepared_by(program, broken, image_files, fields, hints):
    change_manifest(broken, **fields)
    assert program(broken).code == 0  # the engine itself is sound
    program(broken, image_files["china.jpg"]).refused(2, "manifest.json", *hints)


def test_a_model_of_one_channel_takes_no_images(program, bundles, image_files):
    program(bundles("qk-norm, one channel").path, image_files["gray.png"]).refused(2, "3 channels", "takes 1 of")


@pytest.mark.parametrize(
    ("name", "hints"),
    [
        ("absent.jpg", ["no such file"]),
        ("folder", ["this is not a file"]),
        ("pipe", ["this is not a file"]),
        ("empty.jpg", ["neither a JPEG nor a PNG"]),
        ("text.jpg", ["neither a JPEG nor a PNG"]),
        ("bitmap.bmp", ["neither a JPEG nor a PNG"]),
        ("cut.jpg", ["JPEG cannot be read", "Premature end"]),
        ("header.jpg", ["JPEG cannot be read"]),
        ("cut.png", ["PNG cannot be read"]),
        ("header.png", ["PNG cannot be read"]),
        ("cmyk.jpg", ["CMYK", "RGB"]),
        ("deep.png", ["16 bits"]),
        ("narrow.png", ["too narrow"]),
    ],
)
def test_files_that_are_no_images(program, broken, image_files, tmp_path, name, hints):
    china, _ = sample_photographs()
    jpeg, png = image_files["china.jpg"].read_bytes(), image_files["china.png"].read_bytes()
    contents = {
        "empty.jpg": b"", "text.jpg": b"not an image", "cut.jpg": jpeg[:-2000], "header.jpg": jpeg[:30],
        "cut.png": png[:-2000], "header.png": png[:30],
    }  # fmt: skip
    path = tmp_path / name
    if name in contents:
        path.write_bytes(contents[name])
    match name:
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "bitmap.bmp":
            china.save(path)
        case "cmyk.jpg":
            china.convert("CMYK").save(path)
        case "deep.png":
            Image.fromarray(np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)).save(path)
        case "narrow.png":
            change_manifest(broken, preprocess=SQUARE | COLORS | {"crop_mode": "border"})
            china.resize((640, 1)).save(path)
    result = program(broken, image_files["small.png"] if name != "narrow.png" else path, path)
    result.refused(2, str(path), *hints)


def test_damaged_files_are_read_or_refused(probe, bundles, tmp_path):
    """Under AddressSanitizer and UndefinedBehaviorSanitizer, which end the program when they find something."""
    counts = {"inputs": (2, 3, 4, 4), "logits": (2, 5), "reference": (2, 5), "expected": (2, 5)}
    counts |= {"expected_free": (2, 5), "swapped": (2, 5), "margin_1": (2, 17), "kept_1": (2, 9)}
    arrays = {name: np.ones(shape, np.float32 if name == "inputs" else np.float64) for name, shape in counts.items()}
    np.savez(tmp_path / "small.npz", precision=np.asarray("fp32"), **arrays)  # type: ignore[arg-type]
    china, _ = sample_photographs()
    china.resize((90, 60)).save(tmp_path / "small.jpg")
    china.resize((90, 60)).save(tmp_path / "progressive.jpg", progressive=True)
    china.resize((90, 60)).quantize(64).save(tmp_path / "small.png")
    (tmp_path / "folder").mkdir()
    bundle = bundles("plain").path
    runs = [
        ("npz", tmp_path / "small.npz", 1),
        ("npz", bundle / GOLDEN, 20_011),
        ("image", tmp_path / "small.jpg", 7),
        ("image", tmp_path / "progressive.jpg", 7),
        ("image", tmp_path / "small.png", 7),
        ("manifest", bundle / "manifest.json", 7, tmp_path / "folder"),
    ]
    for run in runs:
        cut, changed = probe(*run).decode().splitlines()
        # A PNG whose pixels are there and whose end mark, 12 bytes, is not: Pillow reads it too.
        assert int(cut.split()[2]) <= (2 if run[1].suffix == ".png" else 0), (run, cut)
        assert " 0 refused" not in changed, (run, changed)
