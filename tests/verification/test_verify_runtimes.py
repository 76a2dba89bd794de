"""Which runtimes ``verify`` takes when none is asked for, and what it says of the files that none of them can run."""

import shutil
from pathlib import Path
from typing import Any, Self

import msgspec
import pytest
import torch

from evit_deploy.bundle.bundle import Bundle, read_bundle, write_manifest
from evit_deploy.bundle.manifest import ENGINE, GOLDEN, Engine
from evit_deploy.engines.plan_file import read_header
from evit_deploy.errors import InputError, MissingRequirement
from evit_deploy.models.parent import parent_model
from evit_deploy.registry import RUNTIMES
from evit_deploy.report.report import Report
from evit_deploy.runtimes.onnxruntime import OnnxRuntimeRunner
from evit_deploy.runtimes.runner import Runner
from evit_deploy.verification.golden import load_golden
from evit_deploy.verification.verify import Trial, prove, verify
from tests.support.command_line import QUICK
from tests.support.exports import calibration_of
from tests.support.models import quantized_bundle
from tests.support.plans import rtx_plan, tiny_blocks

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
ABSENT = "it was left at home"

FROM_CHECKPOINT = "The reference was computed again, in FP64, from the checkpoint."


class Late(OnnxRuntimeRunner):
    """Looks as if it could, and finds out when it opens the file that the processor cannot."""

    name = "late"

    @classmethod
    def missing(cls) -> MissingRequirement | None:
        return None

    def __enter__(self) -> Self:
        raise MissingRequirement("this processor is too old")


class LateEngine(Late):
    """The same for engines."""

    files = (ENGINE,)

    @classmethod
    def accepts(cls, artifact: Any) -> list[str]:
        return []


@pytest.fixture
def bundle(tmp_path: Path, converted: Bundle) -> Bundle:
    """A bundle beside its checkpoint, to be changed."""
    shutil.copytree(converted.path.parent, tmp_path / "work")
    return read_bundle(tmp_path / "work" / converted.path.name)


@pytest.fixture(scope="module")
def fp8(tmp_path_factory, checkpoint_file: Path) -> Bundle:
    """The tiny model as an FP8 bundle beside its checkpoint. Read only."""
    checkpoint = Path(shutil.copy(checkpoint_file, tmp_path_factory.mktemp("fp8")))
    images = calibration_of("plain")
    return quantized_bundle(checkpoint, images, targets=("onnx",), precision="fp8")


def with_file(bundle: Bundle, name: str, content: bytes) -> Bundle:
    """The same bundle with one file more, listed like the others."""
    (bundle.path / name).write_bytes(content)
    header = read_header(bundle.path / name)
    engine = Engine(header.family, header.version, header.gpus, None, "fp32", (), None, {}, 0)
    write_manifest(bundle.path, msgspec.structs.replace(bundle.manifest, engine=engine))
    return read_bundle(bundle.path)


def add(monkeypatch: pytest.MonkeyPatch, runtime: type[Late]) -> None:
    monkeypatch.setitem(RUNTIMES._targets, "late", f"{__name__}:{runtime.__name__}")


def of_files() -> list[type[Runner]]:
    """All runtimes that run a bundle's files; the others run PyTorch's model."""
    return [runtime for runtime in map(RUNTIMES.get, RUNTIMES.names()) if runtime.files]


@pytest.fixture
def nobody_is_here(monkeypatch):
    """Takes away every runtime that runs files."""
    for runtime in of_files():
        monkeypatch.setattr(runtime, "missing", classmethod(lambda cls: MissingRequirement(ABSENT)))


def used(report: Report) -> set[str]:
    assert report.passed
    return {check.name.split(",")[0] for check in report.checks if "batch 1: logits" in check.name}


# ---- a runtime that has not the precision is not asked


@pytest.mark.openvino
def test_an_fp8_bundle_is_verified_where_openvino_is_installed(fp8):
    pytest.importorskip("openvino")
    assert fp8.manifest.precision == "fp8"
    report = verify(fp8.path, batch_sizes=(1,), threads=1)
    assert used(report) >= {"eager", "onnxruntime"}
    assert "openvino" not in used(report)
    assert report.notes == (FROM_CHECKPOINT,)
    with pytest.raises(InputError, match=r"'openvino' cannot run this: it has no fp8"):
        verify(fp8.path, runtimes=["openvino"], threads=1)


@pytest.mark.usefixtures("nobody_is_here")
def test_what_has_not_the_precision_is_not_blamed_for_being_absent(fp8):
    with pytest.raises(MissingRequirement, match=rf"[(]onnxruntime: {ABSENT}") as caught:
        verify(fp8.path, batch_sizes=(1,), threads=1)
    assert "openvino" not in str(caught.value)


# ---- an engine that is not run here is told


@pytest.mark.tensorrt_rtx
@without_gpu
def test_an_engine_that_is_not_run_here_is_told(cli, bundle):
    engine = with_file(bundle, ENGINE, rtx_plan(tiny_blocks(1)))
    assert RUNTIMES.get("tensorrt-rtx").accepts(engine.file(ENGINE)) == []
    result = cli("verify", bundle.path, "--batch-sizes", "1", "--json", *QUICK)
    assert result.code == 0, result.err
    first, note = result.document["notes"]
    assert first == FROM_CHECKPOINT
    assert note.startswith(f"{ENGINE} was not verified here (tensorrt-rtx: ")
    assert "CUDA" in note
    names = [check["name"] for check in result.document["checks"]]
    assert "onnxruntime, batch 1: logits" in names
    assert not any("tensorrt-rtx" in name for name in names)
    cli("verify", bundle.path, "--runtime", "tensorrt-rtx", *QUICK).refused(3, "CUDA")


def test_an_engine_that_fails_to_open_for_want_of_a_machine_is_told(bundle, monkeypatch):
    engine = with_file(bundle, ENGINE, rtx_plan(tiny_blocks(1)))
    add(monkeypatch, LateEngine)
    report = verify(engine.path, batch_sizes=(1,), threads=1)
    assert used(report) >= {"eager", "onnxruntime"}
    first, note = report.notes
    assert first == FROM_CHECKPOINT
    assert note.startswith(f"{ENGINE} was not verified here (")
    assert "late: this processor is too old" in note


def test_a_file_that_another_runtime_ran_is_not_told(bundle, monkeypatch):
    add(monkeypatch, Late)
    report = verify(bundle.path, batch_sizes=(1,), threads=1)
    assert used(report) >= {"eager", "onnxruntime"}
    assert "late" not in used(report)
    assert report.notes == (FROM_CHECKPOINT,)


def test_those_after_one_that_does_not_run_are_asked_too(bundle, monkeypatch):
    add(monkeypatch, Late)
    golden, unable = load_golden(bundle.file(GOLDEN), bundle.manifest), {}
    report = prove(bundle, golden, ["late", "onnxruntime"], Trial(batch_sizes=(1,), threads=1), unable=unable)
    assert used(report) == {"onnxruntime"}
    assert list(unable) == ["late"]


def test_who_was_asked_for_has_to_run(bundle, monkeypatch):
    add(monkeypatch, Late)
    golden = load_golden(bundle.file(GOLDEN), bundle.manifest)
    with pytest.raises(MissingRequirement, match="this processor is too old"):
        prove(bundle, golden, ["onnxruntime", "late"], Trial((1,), threads=1))
    with pytest.raises(MissingRequirement, match="this processor is too old"):
        verify(bundle.path, runtimes=["onnxruntime", "late"], threads=1, batch_sizes=(1,))
    unable: dict[str, MissingRequirement] = {}
    report = prove(bundle, golden, ["onnxruntime", "late"], Trial((1,), threads=1), unable=unable)
    assert used(report) == {"onnxruntime"}
    assert list(unable) == ["late"]


# ---- no file could be run: that is no proof, whatever PyTorch itself says


@pytest.mark.usefixtures("nobody_is_here")
def test_a_bundle_that_nothing_here_runs_is_not_verified(cli, bundle):
    assert parent_model(bundle)[0] is not None  # PyTorch runs, and that proves nothing of the files
    hints = (bundle.path.name, "nothing here runs any file", f"onnxruntime: {ABSENT}", f"openvino: {ABSENT}", "doctor")
    cli("verify", bundle.path, "--batch-sizes", "1", *QUICK).refused(3, *hints)


@pytest.mark.usefixtures("nobody_is_here")
def test_nor_is_one_whose_only_runtime_finds_out_late(cli, bundle, monkeypatch):
    add(monkeypatch, Late)
    cli("verify", bundle.path, "--batch-sizes", "1", *QUICK).refused(3, "late: this processor is too old", ABSENT)


def test_nor_is_one_in_a_precision_that_nothing_here_has(cli, bundle, monkeypatch):
    for runtime in of_files():
        monkeypatch.setattr(runtime, "accepts", classmethod(lambda cls, artifact: ["it has no fp64"]))
    cli("verify", bundle.path, "--batch-sizes", "1", *QUICK).refused(3, "no runtime is for its precision", "doctor")
