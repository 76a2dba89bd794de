"""``convert`` for an engine, as a user runs it: what comes out, what is refused, and what a failure leaves: nothing."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import onnx
import pytest
import torch

from evit_deploy.bundle.bundle import changed_files, read_bundle
from evit_deploy.bundle.manifest import DENSE, ENGINE, GOLDEN, MODEL, PAGE, REPORT
from evit_deploy.data.images import sample_photographs
from evit_deploy.engines.plan_file import read_header
from evit_deploy.engines.rtx_listing import plan_layers
from evit_deploy.export.card import load_onnx, read_card
from evit_deploy.files import sha256
from evit_deploy.recipe.options import BatchProfile
from evit_deploy.report.report import Report
from evit_deploy.targets.target import usable_targets
from tests.support.command_line import CLI, QUICK, Result, interrupted
from tests.support.machines import environment_without
from tests.support.models import tree, write_checkpoint

needs_rtx = pytest.mark.tensorrt_rtx
RTX = ("--target", "tensorrt-rtx", "--gpu", "sm80")
DENSE_ENGINE = f"dense/{ENGINE}"
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")


@pytest.fixture(scope="session")
def photographs(tmp_path_factory) -> Path:
    """A folder of 36 images in two folders. Read only."""
    folder = tmp_path_factory.mktemp("photographs")
    for number, photograph in enumerate(sample_photographs()):
        (folder / str(number)).mkdir()
        for step in range(18):
            left, top = 20 * step, 8 * step
            photograph.crop((left, top, left + 240, top + 240)).save(folder / str(number) / f"{step}.jpg")
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A checkpoint. Read only."""
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny.safetensors")


@pytest.fixture
def convert(cli, tiny, tmp_path):
    """Converts the tiny model into ``out``."""

    def call(*arguments: object) -> Result:
        return cli("convert", tiny, "--keep-rate", "0.6", "--out", tmp_path / "out", *arguments, *QUICK)

    return call


def checks_of(result: Result) -> list[str]:
    assert result.code == 0, result.err
    report = msgspec.convert(result.document, Report, strict=False)
    assert report.passed
    return [check.name for check in report.checks]


# ---- engines


@pytest.mark.slow
@needs_rtx
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_an_engine_and_its_twin(convert, tmp_path, photographs, precision):
    pytest.importorskip("tensorrt_rtx")
    if precision == "bf16":
        pytest.importorskip("openvino")  # what else runs bf16 on a CPU
    arguments = ["--calibration", photographs] if precision == "int8" else []
    result = convert(*RTX, "--precision", precision, "--batch", "1:4:8", "--json", *arguments)
    names = checks_of(result)
    for name in (f"dense engine: matmuls in {precision}", f"engine: matmuls in {precision}"):
        assert name in names
    assert ("engine: fused attentions" in names) == (precision != "fp32")
    assert ("dense engine: fused attentions" in names) == (precision != "fp32")
    runtime = "openvino" if precision == "bf16" else "onnxruntime"
    assert f"{runtime}, batch 8: logits" in names
    assert any("built ahead of time and not run: verify it on sm80" in note for note in result.document["notes"])

    bundle = read_bundle(tmp_path / "out")
    manifest, engine = bundle.manifest, bundle.manifest.engine
    assert engine is not None
    assert (engine.target, engine.precision, engine.gpus) == ("tensorrt-rtx", precision, ("sm80",))
    assert (engine.profiles, engine.plugin, engine.driver) == ((BatchProfile(1, 4, 8),), None, None)
    assert manifest.precision == precision
    assert set(manifest.files) == {MODEL, DENSE, ENGINE, DENSE_ENGINE, GOLDEN, REPORT, PAGE}
    for name in (ENGINE, DENSE_ENGINE):
        assert sha256(bundle.file(name)) == manifest.files[name]
        assert read_header(bundle.file(name)).version == engine.version
    reduced, dense = (plan_layers(bundle.file(name)) for name in (ENGINE, DENSE_ENGINE))
    assert any("token_reorg" in layer.metadata for layer in reduced)
    assert not any("token_reorg" in layer.metadata for layer in dense)
    for name in (MODEL, DENSE):
        card = read_card(load_onnx(bundle.file(name)))
        assert card is not None
        assert card.precision == precision
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
@needs_rtx
def test_everything_at_once(convert, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    result = convert("--target", "onnx", *RTX, "--gpu", "SM89, sm120", "--with-indices", "--batch", "1:4:8", "--batch",
                     "16", "--optimization-level", "2", "--workspace", "512")  # fmt: skip
    assert result.code == 0, result.err
    assert "dense engine: fused attentions" in result.out
    bundle = read_bundle(tmp_path / "out")
    engine, outputs = bundle.manifest.engine, [spec.name for spec in bundle.manifest.outputs]
    assert engine is not None
    assert engine.gpus == ("sm80", "sm89", "sm120") == read_header(bundle.file(ENGINE)).gpus
    assert engine.profiles == (BatchProfile(1, 4, 8), BatchProfile(16, 16, 16))
    assert (engine.options["optimization_level"], engine.options["workspace"]) == (2, 512)
    assert outputs == ["logits", "kept_1", "kept_2", "kept_3"]
    assert [output.name for output in onnx.load(bundle.file(MODEL)).graph.output] == outputs
    content = bundle.file(ENGINE).read_bytes()
    assert all(name.encode() in content for name in outputs)
    assert b"kept_1" not in bundle.file(DENSE_ENGINE).read_bytes()


def test_int8_in_onnx_only(convert, tmp_path, photographs):
    names = checks_of(convert("--precision", "int8", "--calibration", photographs, "--json"))
    assert "onnxruntime, batch 8: logits" in names
    manifest = read_bundle(tmp_path / "out").manifest
    assert (manifest.precision, manifest.engine) == ("int8", None)
    assert not any("Few images" in note for note in manifest.notes)
    nodes = [node.op_type for node in onnx.load(tmp_path / "out" / MODEL).graph.node]
    assert "QuantizeLinear" in nodes


def test_few_images_to_learn_from_are_told(convert, tmp_path, photographs):
    (tmp_path / "few").mkdir()
    shutil.copy(photographs / "0" / "0.jpg", tmp_path / "few")
    result = convert("--precision", "int8", "--calibration", tmp_path / "few")
    assert result.code == 0
    assert "Few images to learn ranges from (1)" in result.err
    assert any("Few images" in note for note in read_bundle(tmp_path / "out").manifest.notes)


# ---- plans that are damaged afterwards


@pytest.fixture(scope="module")
def engine_bundle(tmp_path_factory) -> Path:
    """A bundle with an engine for sm80. Read only."""
    pytest.importorskip("tensorrt_rtx")
    folder = tmp_path_factory.mktemp("engine")
    checkpoint = write_checkpoint(folder / "smallest.safetensors", "smallest")
    arguments = ["convert", checkpoint, "--keep-rate", "0.6", "--out", folder / "bundle", *RTX, *QUICK]
    subprocess.run([*CLI, *map(str, arguments)], check=True, capture_output=True)
    return folder / "bundle"


@needs_rtx
@pytest.mark.parametrize("damage", ["text", "truncated", "one bit", "gone"])
def test_a_damaged_plan_is_not_verified(cli, engine_bundle, tmp_path, damage):
    bundle = shutil.copytree(engine_bundle, tmp_path / "bundle")
    content = bytearray((bundle / ENGINE).read_bytes())
    content[len(content) // 2] ^= 1
    contents = {"text": b"not a plan\n", "truncated": content[:1000], "one bit": content}
    (bundle / ENGINE).unlink()
    if damage in contents:
        (bundle / ENGINE).write_bytes(contents[damage])
    before = tree(bundle)
    assert changed_files(read_bundle(bundle)) == [ENGINE]
    result = cli("verify", bundle, *QUICK)
    assert result.code == 1
    assert "Traceback" not in result.err
    assert f"changed or gone: {ENGINE}" in result.err
    assert tree(bundle) == before


@needs_rtx
@without_gpu
def test_an_engine_for_elsewhere_is_verified_by_what_is_here(cli, engine_bundle):
    result = cli("verify", engine_bundle, "--runtime", "onnxruntime", *QUICK)
    assert result.code == 0, result.err
    for name in ("verify", "profile"):
        cli(name, engine_bundle, "--runtime", "tensorrt-rtx").refused(3, "CUDA")


# ---- refusals


@pytest.mark.parametrize(
    ("arguments", "hints"),
    [
        ([*RTX, "--target", "tensorrt"], ["--target", "one engine"]),
        (["--target", "tensorrt-rtx", "--gpu", "sm99"], ["--gpu", "'sm99'", "sm80"]),
        (["--target", "tensorrt-rtx", "--gpu", "a100"], ["--gpu", "'a100'", "An A100 is sm80"]),
        (["--target", "tensorrt-rtx", "--gpu", "sm80,"], ["--gpu", "''"]),
        (["--gpu", "sm80"], ["--gpu", "no engine to build", "tensorrt-rtx"]),
        ([*RTX, "--batch", "0"], ["--batch", "'0'", "MIN:OPT:MAX"]),
        ([*RTX, "--batch", "8:1:4"], ["--batch", "'8:1:4'", "MIN <= OPT <= MAX"]),
        ([*RTX, "--batch", "a:b:c"], ["--batch", "'a:b:c'"]),
        ([*RTX, "--batch", ""], ["--batch", "''"]),
        ([*RTX, "--batch", "1:2"], ["--batch", "'1:2'"]),
        ([*RTX, "--workspace", "0"], ["--workspace", "0"]),
        ([*RTX, "--optimization-level", "9"], ["--optimization-level", "got 9", "0 to 5"]),
        ([*RTX, "--precision", "fp64"], ["--precision", "'fp64'"]),
        ([*RTX, "--precision", "fp8", "--calibration", "{folder}"], ["--precision", "sm80 cannot compute in fp8"]),
        ([*RTX, "--plugin", "no.so"], ["--plugin", "takes no plugins"]),
        ([*RTX, "--precision", "int8"], ["int8 needs real images", "--calibration"]),
        (
            ["--target", "torch-tensorrt", "--precision", "int8", "--calibration", "{folder}"],
            ["torch-tensorrt has no int8", "or --target tensorrt"],
        ),
        (["--precision", "int8", "--calibration", "{folder}/absent"], ["absent", "no such folder"]),
        (["--precision", "int8", "--calibration", "{folder}/text.txt"], ["text.txt", "this is a file"]),
        (["--precision", "int8", "--calibration", "{folder}/empty"], ["empty", "no images here"]),
        (["--precision", "int8", "--calibration", "{folder}/broken"], ["0.png", "cannot be read"]),
    ],
    ids=lambda value: " ".join(value)[-60:] if value and value[0].startswith("--") else "",
)
def test_what_cannot_be_made_is_refused_and_nothing_is_written(convert, tmp_path, arguments, hints):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "text.txt").write_text("not an image")
    for number in range(40):
        (tmp_path / "broken" / f"{number}.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(20))
    before = tree(tmp_path)
    convert(*(argument.replace("{folder}", str(tmp_path)) for argument in arguments)).refused(2, *hints)
    assert tree(tmp_path) == before


def test_one_cut_image_among_good_ones_is_named(convert, tmp_path, photographs):
    images = shutil.copytree(photographs, tmp_path / "images")
    cut = images / "1" / "5.jpg"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    before = tree(tmp_path)
    result = convert("--precision", "int8", "--calibration", images)
    result.refused(2, "1/5.jpg", "cannot be read", "truncated", "expected a whole image", "Copy it here again")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("target", ["tensorrt", "torch-tensorrt"])
def test_what_this_machine_cannot_build(convert, tmp_path, target):
    if target in usable_targets():
        pytest.skip(f"{target} can be used here")
    convert("--target", target).refused(3, target)
    assert tree(tmp_path) == {}


@needs_rtx
def test_a_failing_build_leaves_nothing(convert, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    (tmp_path / "mine.txt").write_text("stays")
    result = convert(*RTX, "--workspace", "1", "-q")
    result.refused(4, "tensorrt-rtx: no engine of model.onnx could be built", "Give a larger --workspace")
    assert tree(tmp_path) == {"mine.txt": b"stays"}


@pytest.mark.slow
@needs_rtx
def test_an_interrupted_build_leaves_nothing(tiny, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    checkpoint = Path(shutil.copy(tiny, tmp_path / tiny.name))
    result = interrupted(checkpoint, "building the engines", signal.SIGTERM, [*RTX, "--json"])
    assert result.code == 143, result.err
    assert result.document["error"]["exit_code"] == 143
    assert list(tmp_path.iterdir()) == [checkpoint]


# ---- environments that lack a package


@pytest.mark.parametrize(
    ("distribution", "arguments", "hints"),
    [
        ("tensorrt_rtx", RTX, ["tensorrt-rtx is not installed", 'pip install "tensorrt-rtx>=']),
        ("polygraphy", RTX, ["polygraphy is not installed", 'pip install "polygraphy>=']),
        ("openvino", ["--precision", "bf16"], ["openvino is needed", "no bf16", 'pip install "openvino>=']),
        ("openvino", ["--target", "openvino"], ["openvino is needed", 'pip install "openvino>=']),
    ],
)
@needs_rtx
@pytest.mark.openvino
def test_a_missing_package_is_named_with_its_line(tiny, tmp_path, distribution, arguments, hints):
    pytest.importorskip(distribution)
    (tmp_path / "packages").mkdir()
    environment = environment_without(tmp_path / "packages", distribution)
    command = [sys.executable, "-S", "-m", "evit_deploy", "convert", tiny, "--keep-rate", "0.6", *arguments,
               "--out", tmp_path / "out"]  # fmt: skip
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    Result(done.returncode, done.stdout, done.stderr).refused(3, *hints)
    assert [path.name for path in tmp_path.iterdir()] == ["packages"]
