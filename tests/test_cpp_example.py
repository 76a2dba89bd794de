"""The C++ example, built with OpenVINO behind it: the same answers as Python, and a kind refusal of everything else."""

import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import PIL
import pytest
from cpp_example import SOURCE, Result, build, call, change_manifest, need_toolchain, replace_file
from models import write_checkpoint
from PIL import Image

from evit_deploy.bundle import GOLDEN, OPENVINO, Bundle, read_bundle, sha256
from evit_deploy.checkpoint import Tokens
from evit_deploy.convert import convert
from evit_deploy.data import Preprocess, preprocess_image, sample_photographs
from evit_deploy.golden import Golden, load_golden
from evit_deploy.runtimes.openvino import OpenVINORunner

pytestmark = [pytest.mark.cpp, pytest.mark.timeout(600)]  # building takes a minute or two

PILLOW = int(PIL.__version__.split(".")[0])


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> Path:
    """The folder with the program and what tests need besides."""
    need_toolchain()
    found = importlib.util.find_spec("openvino")
    if found is None or found.origin is None:
        pytest.skip("openvino is not installed")
    folder = tmp_path_factory.mktemp("example")
    build(folder, "-DEVIT_RUNTIME=openvino", "-DEVIT_TESTS=ON", f"-DOpenVINO_DIR={Path(found.origin).parent / 'cmake'}")
    return folder


Program = Callable[..., Result]


@pytest.fixture
def program(built) -> Program:
    return functools.partial(call, built / "evit_example")


@pytest.fixture
def probe(built) -> Callable[..., bytes]:
    def run(*arguments: object) -> bytes:
        done = subprocess.run([built / "probe", *map(str, arguments)], capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout

    return run


# ---- bundles and images


def bundle_of(folder: Path, kind: str, **options: Any) -> Bundle:
    checkpoint = write_checkpoint(folder / "checkpoint.safetensors", kind)
    bundle, _ = convert(
        checkpoint,
        tokens=Tokens(keep_rate=0.6),
        targets=["onnx", "openvino"],
        threads=1,
        batch_sizes=(1,),
        duration=0.01,
        out=folder / "bundle",
        **options,
    )
    return bundle


KINDS = ("plain", "distilled", "registers, no classes", "qk-norm, one channel", "int8")


@pytest.fixture(scope="session")
def bundles(built, tmp_path_factory) -> Callable[[str], Bundle]:
    """Small bundles, each made once, after it is known that there is a program to try them with. Read only."""
    made: dict[str, Bundle] = {}

    def get(kind: str) -> Bundle:
        if kind not in made:
            folder = tmp_path_factory.mktemp("bundles")
            if kind == "int8":
                inputs = np.load(get("plain").file(GOLDEN))["inputs"]
                made[kind] = bundle_of(folder, "plain", precision="int8", calibration=inputs)
            else:
                made[kind] = bundle_of(folder, kind)
        return made[kind]

    return get


@pytest.fixture
def broken(bundles, tmp_path) -> Path:
    """A copy of the plain bundle, to be broken."""
    return Path(shutil.copytree(bundles("plain").path, tmp_path / "bundle"))


def pictures() -> dict[str, tuple[Image.Image, dict[str, Any]]]:
    """Image files by name: picture, and how it is saved."""
    china, flower = sample_photographs()
    wide, tall = china.crop((0, 100, 640, 140)), flower.crop((300, 0, 333, 427))
    alpha = flower.resize((150, 100)).convert("RGBA")
    alpha.putalpha(flower.resize((150, 100)).convert("L"))
    return {
        "china.jpg": (china, {"quality": 95}),
        "flower 4:4:4.jpg": (flower, {"quality": 90, "subsampling": 0}),
        "progressive.jpg": (china, {"quality": 60, "progressive": True}),
        "grey.jpg": (flower.convert("L"), {}),
        "odd.jpg": (china.resize((233, 311)), {"quality": 85}),
        "china.png": (china, {}),
        "small.png": (flower.resize((50, 71)), {}),
        "wide.png": (wide, {}),
        "tall.png": (tall, {}),
        "as large as the input.png": (china.resize((96, 96)), {}),
        "one pixel.png": (china.resize((1, 1)), {}),
        "alpha.png": (alpha, {}),
        "grey and alpha.png": (alpha.convert("LA"), {}),
        "palette.png": (flower.quantize(64), {}),
        "transparent palette.png": (flower.quantize(64), {"transparency": 3}),
        "grey.png": (china.convert("L"), {}),
        "two colours.png": (china.convert("1"), {}),
    }


@pytest.fixture(scope="session")
def image_files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("images")
    files = {name: folder / name for name in pictures()}
    for name, (picture, options) in pictures().items():
        picture.save(files[name], **options)
    return files


def may_differ(name: str) -> bool:
    """Pillow brings a JPEG decoder of its own, and took a tall image's sides in another order before version 13."""
    return name.endswith(".jpg") or (name == "tall.png" and PILLOW < 13)


# ---- golden answers


def python_verdict(bundle: Bundle, golden: Golden) -> tuple[float, float]:
    """Error and limit of the image that comes closest to its limit, as ``verify`` finds them without kept patches."""
    with OpenVINORunner(bundle.file(OPENVINO), threads=1) as runner:
        logits = runner.infer({"input": golden.inputs})["logits"]
    errors, limits = np.abs(logits - golden.reference).max(axis=1), golden.tie_limits()
    worst = int(np.argmax(errors / limits))
    return float(errors[worst]), float(limits[worst])


@pytest.mark.parametrize("kind", KINDS)
def test_golden_answers(program, bundles, kind):
    bundle = bundles(kind)
    result = program(bundle.path, "--json")
    assert result.code == 0, result.err
    verdict = json.loads(result.out)["golden"]
    error, limit = python_verdict(bundle, load_golden(bundle.file(GOLDEN), bundle.manifest.plan))
    assert verdict["passed"]
    assert verdict["limit"] == pytest.approx(limit, rel=1e-6)
    assert verdict["error"] == pytest.approx(error, rel=0.5)  # another batch is summed in another order
    assert "golden check: passed, largest error" in program(bundle.path).out


@pytest.mark.parametrize(("close", "code"), [(0, 1), (1, 1), (2, 0)])
def test_an_image_on_a_tie_has_more_room(program, broken, close, code):
    """One patch within rounding has nothing to change places with; two have."""
    bundle = read_bundle(broken)
    golden = load_golden(broken / GOLDEN, bundle.manifest.plan)
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
    golden = load_golden(broken / GOLDEN, read_bundle(broken).manifest.plan)
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
        wanted = runner.infer({"input": inputs})["logits"]
    for file, answer, again, logits in zip(files, answers, answers[len(files) :], wanted, strict=False):
        room = 1e-2 if may_differ(file.name) else 1e-4
        np.testing.assert_allclose(answer["logits"], logits, rtol=0, atol=room, err_msg=file.name)
        np.testing.assert_allclose(answer["logits"], again["logits"], rtol=0, atol=1e-4)
        if kind == "registers, no classes":
            assert "top" not in answer
            continue
        top = answer["top"]
        shares = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        assert top[0]["class"] == logits.argmax(), file.name
        assert [guess["label"] for guess in top] == [f"class {guess['class']}" for guess in top]
        for guess in top:
            assert guess["probability"] == pytest.approx(shares[guess["class"]], abs=5e-3)


def test_labels_and_features_in_print(program, bundles, broken, image_files):
    change_manifest(broken, labels=[f"label of {number}" for number in range(10)])
    photograph = image_files["china.jpg"]
    check, name, *lines = program(broken, photograph).out.splitlines()
    assert check.startswith("golden check: passed")
    assert name == str(photograph)
    assert len(lines) == 5
    assert all(" %  label of " in line for line in lines)
    _, _, features = program(bundles("registers, no classes").path, photograph).out.splitlines()
    assert "48 features:" in features


PREPROCESSES = [
    Preprocess((96, 96)),
    Preprocess((96, 96), 1.0, "center", "bilinear"),
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


# ---- refusals


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
COLOURS = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
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
    ("std of zero", manifest(preprocess=SQUARE | COLOURS | {"std": [0.5, 0, 0.5]}), 2, ["out of range"]),
    ("half a pixel", manifest(preprocess=SQUARE | COLOURS | {"size": [96.5, 96]}), 2, ["out of range"]),
    ("a huge size", manifest(preprocess=SQUARE | COLOURS | {"size": [10**9, 96]}), 2, ["out of range"]),
    ("no size", manifest(preprocess=COLOURS), 2, ["manifest cannot be read", "size"]),
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
        ({"preprocess": SQUARE | COLOURS | {"crop_mode": "random"}}, ["crop_mode (got 'random', expected center"]),
        ({"preprocess": SQUARE | COLOURS | {"interpolation": "lanczos"}}, ["interpolation (got 'lanczos'"]),
        ({"preprocess": SQUARE | COLOURS | {"size": [64, 64]}}, ["3 channels of 64 × 64", "takes 3 of 96 × 96"]),
        ({"labels": ["cat", "dog"]}, ["labels do not fit", "got 2, expected 10"]),
    ],
    ids=["crop_mode", "interpolation", "size", "labels"],
)
def test_manifests_that_images_cannot_be_prepared_by(program, broken, image_files, fields, hints):
    change_manifest(broken, **fields)
    assert program(broken).code == 0  # the engine itself is sound
    program(broken, image_files["china.jpg"]).refused(2, "manifest.json", *hints)


def test_a_model_of_one_channel_takes_no_images(program, bundles, image_files):
    program(bundles("qk-norm, one channel").path, image_files["grey.png"]).refused(2, "3 channels", "takes 1 of")


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
            change_manifest(broken, preprocess=SQUARE | COLOURS | {"crop_mode": "border"})
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
