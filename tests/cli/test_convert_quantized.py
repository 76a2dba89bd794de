"""``convert --precision int8`` as a user runs it: layers that stay in the base precision, and what is said of them."""

from pathlib import Path

import msgspec
import onnx
import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from evit_deploy.bundle.bundle import read_bundle
from evit_deploy.bundle.manifest import DENSE, ENGINE, MANIFEST, MODEL, OPENVINO, REPORT
from evit_deploy.data.images import sample_photographs
from evit_deploy.engines.rtx_listing import plan_layers
from evit_deploy.export.card import load_onnx, read_card
from evit_deploy.report.report import Report
from evit_deploy.targets.claims import check_claims
from tests.support.command_line import QUICK, Result
from tests.support.models import tree, write_checkpoint

KEPT = ("blocks.0.attn.proj", "blocks.2.mlp.fc1", "blocks.2.mlp.fc2")
KEEP = ("--keep-precision", "blocks.2.mlp.*, blocks.0.attn.proj")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """A folder of 32 images. Read only."""
    folder = tmp_path_factory.mktemp("photographs")
    for number, photograph in enumerate(sample_photographs()):
        for step in range(16):
            left, top = 20 * step, 8 * step
            photograph.crop((left, top, left + 240, top + 240)).save(folder / f"{number}-{step}.png")
    return folder


@pytest.fixture
def convert(cli, tmp_path, photographs):
    """Converts a tiny model into ``out``, in INT8."""
    checkpoint = write_checkpoint(tmp_path / "tiny.safetensors")

    def call(*arguments: object) -> Result:
        given = ("--keep-rate", "0.6", "--precision", "int8", "--calibration", photographs, "--out", tmp_path / "out")
        return cli("convert", checkpoint, *given, *arguments, *QUICK)

    return call


def test_layers_that_stay_are_said_and_recorded_and_those_of_the_dense_twin_too(convert, tmp_path):
    result = convert(*KEEP)
    assert result.code == 0, result.err
    said = "In fp32 remain 3 of 25 linear layers, 18.7 % of their weights: blocks.0.attn.proj, blocks.2.mlp.fc1,"
    assert said in " ".join(result.out.split())
    bundle = read_bundle(tmp_path / "out")
    assert bundle.manifest.unquantized == KEPT
    for name in (MODEL, DENSE):
        card = read_card(load_onnx(bundle.file(name)))
        assert card is not None
        assert card.unquantized == KEPT
    assert check_claims(bundle).passed


def test_a_manifest_that_says_otherwise_is_found_out(convert, tmp_path):
    assert convert(*KEEP).code == 0
    bundle = read_bundle(tmp_path / "out")
    changed = msgspec.structs.replace(bundle.manifest, unquantized=())
    (bundle.path / MANIFEST).write_bytes(msgspec.json.encode(changed))
    (failed,) = check_claims(read_bundle(bundle.path)).failed
    assert failed.name == "model.onnx as the manifest says"
    assert "unquantized" in failed.reason


@pytest.mark.parametrize(
    ("arguments", "hints"),
    [
        (["--keep-precision", "head,blocks.7.*"], ["--keep-precision", "'blocks.7.*'", "Did you mean 'blocks."]),
        (["--keep-precision", "*"], ["match every layer", "nothing would be quantized"]),
    ],
)
def test_patterns_that_fit_nothing_are_refused_and_nothing_is_written(convert, tmp_path, arguments, hints):
    before = tree(tmp_path)
    convert(*arguments).refused(2, *hints)
    assert tree(tmp_path) == before


def test_of_several_precisions_the_quantized_one_keeps_them(convert, tmp_path):
    result = convert("--precision", "fp32", *KEEP)
    assert result.code == 0, result.err
    found = {path.name.rpartition("-")[2]: read_bundle(path).manifest for path in (tmp_path / "out").iterdir()}
    assert {name: manifest.unquantized for name, manifest in found.items()} == {"int8": KEPT, "fp32": ()}


@pytest.mark.openvino
def test_openvino_runs_what_is_quantized_and_what_is_not(convert, tmp_path):
    pytest.importorskip("openvino")
    result = convert(*KEEP, "--target", "openvino")
    assert result.code == 0, result.err
    bundle = read_bundle(tmp_path / "out")
    assert OPENVINO in bundle.manifest.files
    assert check_claims(bundle).passed


@pytest.mark.tensorrt_rtx
def test_an_engine_has_them_in_16_bits(convert, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    result = convert(*KEEP, "--target", "tensorrt-rtx", "--gpu", "sm80")
    assert result.code == 0, result.err
    assert "In fp16 remain 3 of 25 linear layers" in " ".join(result.out.split())
    bundle = read_bundle(tmp_path / "out")
    kinds = {
        node.op_type for node in onnx.load(bundle.file(MODEL)).graph.node if node.name == "blocks.2.mlp.inner.fc1/Gemm"
    }
    assert kinds == {"Gemm"}
    layers = [layer for layer in plan_layers(bundle.file(ENGINE)) if "blocks.2.mlp.inner.fc1/Gemm" in layer.nodes]
    assert layers
    assert all("int8" not in {tensor.dtype for tensor in layer.inputs} for layer in layers)


# ---- what each layer costs, and a limit


@pytest.fixture
def outlying(cli, tmp_path, photographs):
    """Converts a model whose head has an outlier for a feature that is always 0: rounded, it answers nonsense."""
    checkpoint = write_checkpoint(tmp_path / "outlying.safetensors")
    with safe_open(checkpoint, "pt") as file:
        weights, about = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    weights["norm.weight"][0] = weights["norm.bias"][0] = 0
    weights["head.weight"][:, 0] = 100
    save_file(weights, checkpoint, about)

    def call(*arguments: object) -> Result:
        given = ("--keep-rate", "0.6", "--precision", "int8", "--calibration", photographs, "--out", tmp_path / "out")
        return cli("convert", checkpoint, *given, *arguments, *QUICK)

    return call


def test_sensitivity_is_shown_and_in_the_report(convert, tmp_path):
    result = convert("--sensitivity", *KEEP)
    assert result.code == 0, result.err
    assert "What quantizing one linear layer alone costs" in result.out
    assert "share of it" in result.out
    report = msgspec.json.decode((tmp_path / "out" / REPORT).read_bytes(), type=Report)
    assert len(report.sensitivity) == 25
    assert {row.layer for row in report.sensitivity if row.kept} == set(KEPT)


def test_the_layer_that_cannot_be_rounded_stays_where_a_limit_is_given(outlying, tmp_path):
    result = outlying("--max-drop", "4")
    assert result.code == 0, result.err
    manifest = read_bundle(tmp_path / "out").manifest
    assert "head" in manifest.unquantized
    assert len(manifest.unquantized) < 12
    report = msgspec.json.decode((tmp_path / "out" / REPORT).read_bytes(), type=Report)
    check = next(check for check in report.checks if check.name == "int8: drop of agreement, points")
    assert check.passed
    assert check.limit == 4
    assert report.sensitivity[0].layer == "head"
    assert report.sensitivity[0].kept


def test_a_limit_that_cannot_be_held_is_a_failed_gate_and_nothing_is_written(outlying, tmp_path):
    before = tree(tmp_path)
    result = outlying("--keep-precision", "blocks.*", "--max-drop", "4")
    assert result.code == 1
    said = result.err.splitlines()[-1]  # what was assumed of the model stands before it
    hints = "evit-deploy: --max-drop", "cannot be kept within the limit", "points of 32 images", "at most 4"
    assert all(hint in said for hint in hints), result.err
    assert "Traceback" not in result.err
    assert tree(tmp_path) == before


@pytest.mark.parametrize("value", ["0", "-1", "101", "nan", "x"])
def test_a_limit_that_is_none(convert, tmp_path, value):
    before = tree(tmp_path)
    convert("--max-drop", value).refused(2, "--max-drop", value)
    assert tree(tmp_path) == before
