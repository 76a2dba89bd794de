"""Profiling engines: which files are taken for one, and what belongs to it.

Plans are built by TensorRT-RTX, which needs no GPU for that; what is measured where a GPU runs them comes last.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import pytest
import torch

from evit_deploy.bundle.bundle import Bundle, read_bundle, write_manifest
from evit_deploy.bundle.manifest import DENSE, ENGINE, MANIFEST, MODEL, TWIN
from evit_deploy.cli import invoke as run
from evit_deploy.engines.build import build_engine
from evit_deploy.engines.plan_file import read_header
from evit_deploy.engines.rebuild import options_of, slice_engine
from evit_deploy.engines.rtx_listing import plan_layers
from evit_deploy.environment.availability import RTX_GPUS
from evit_deploy.environment.nvidia import compute_capability
from evit_deploy.errors import InputError, MissingRequirement
from evit_deploy.profiling.candidates import Candidate, candidates_of, is_plan
from evit_deploy.profiling.profile import profile
from evit_deploy.recipe.options import BatchProfile, BuildOptions, ProfileOptions
from evit_deploy.registry import RUNTIMES
from evit_deploy.report.report import Report
from evit_deploy.runtimes.tensorrt import TensorRTRTXRunner
from evit_deploy.tokens.reduce import reduce_tokens_, token_plan
from tests.support.logs import progress_lines
from tests.support.models import KEEP, of_kind

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
PLAN = token_plan(reduce_tokens_(of_kind("plain"), KEEP))
SIZES = (1, 2, 4)
SHORT = ProfileOptions(duration=0.2)
PROFILE = BatchProfile(*SIZES)


@pytest.fixture(scope="session")
def engines(converted, tmp_path_factory) -> Bundle:
    """A bundle with engines, which TensorRT-RTX built for the GPU here, or for an A100. Read only."""
    pytest.importorskip("tensorrt_rtx")
    folder = tmp_path_factory.mktemp("engines") / "bundle"
    shutil.copytree(converted.path, folder)
    options = BuildOptions(batches=(SIZES,), gpus=() if compute_capability() in RTX_GPUS else ("sm80",))
    built = build_engine(folder / MODEL, folder / ENGINE, "tensorrt-rtx", "fp32", options)
    build_engine(folder / DENSE, folder / TWIN / ENGINE, "tensorrt-rtx", "fp32", options)
    parent = msgspec.structs.replace(converted.manifest.parents[0], source=str(checkpoint_of(converted)))
    write_manifest(folder, msgspec.structs.replace(converted.manifest, engine=built.engine, parents=[parent]))
    return read_bundle(folder)


def checkpoint_of(bundle: Bundle) -> Path:
    return (bundle.path / bundle.manifest.parents[0].source).resolve()


@pytest.fixture
def present(monkeypatch):
    """TensorRT-RTX's runner, as if a GPU were here: who takes part is decided without opening anything."""
    monkeypatch.setattr(TensorRTRTXRunner, "missing", classmethod(lambda cls: None))


@pytest.fixture
def cli(capfd) -> Callable[..., tuple[int, str]]:
    def call(*arguments: object) -> tuple[int, str]:
        code = run([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        assert captured.out == ""
        return code, captured.err.strip().splitlines()[-1]

    return call


def variants(candidates: Sequence[Candidate]) -> list[tuple[str, str]]:
    return [(c.runtime, c.variant) for c in candidates]


# ---- which files are engines


def header(tag: bytes = b"ftrt", size: int = 1000) -> bytes:
    return (tag + bytes(20) + bytes([11, 4, 0, 106]) + bytes(1000))[:size]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("engine.plan", header(), True),
        ("model.onnx", header(b"vtrt"), True),  # whatever it is called
        ("engine", header(), True),
        ("engine.plan", b"text", True),  # and is then told what it is
        ("engine.trt", b"", True),
        ("model.onnx", b"\x08\x0a\x12\x07pytorch", False),
        ("weights.pth", b"PK\x03\x04", False),
    ],
)
def test_an_engine_is_told_from_its_first_bytes_or_its_name(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    assert is_plan(tmp_path / name) is expected


def test_a_name_without_a_file_is_an_engine_s_only_by_its_suffix():
    assert is_plan(Path("none.plan"))
    assert not is_plan(Path("vit_tiny_patch16_224"))


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        (b"no plan at all", "a text file, not a plan"),
        (header(size=20), "the plan is cut short"),
        (b"", "the file is empty"),
        (b"\x08\x0a\x12\x07pytorch\x1a\x05", "an ONNX model, not a plan"),
    ],
)
def test_wrong_files_are_exit_2_with_what_they_are(cli, tmp_path, content, hint):
    path = tmp_path / "engine.plan"
    path.write_bytes(content)
    code, message = cli("profile", path)
    assert (code, hint in message) == (2, True), message


def test_a_missing_engine_and_a_wrong_twin_are_exit_2(cli, tmp_path):
    path = tmp_path / "engine.plan"
    assert cli("profile", path)[0] == 2
    path.write_bytes(header())
    (tmp_path / "text.plan").write_text("text")
    (tmp_path / "rtx.plan").write_bytes(header(b"vtrt"))
    assert "a text file" in cli("profile", path, "--against", tmp_path / "text.plan")[1]
    code, message = cli("profile", path, "--against", tmp_path / "rtx.plan")
    assert code == 2
    assert "engine for a different library (got tensorrt-rtx, expected tensorrt)" in message
    code, message = cli("profile", path, "--runtime", "onnxruntime")
    assert (code, "none of these runtimes can run this" in message) == (2, True)
    assert cli("profile", path, "--runtime", "tensorrt-rtx")[0] == 2  # TensorRT's


@without_gpu
@pytest.mark.parametrize("tag", [b"ftrt", b"vtrt"])
def test_without_a_gpu_an_engine_is_exit_3_with_what_is_missing(cli, tmp_path, tag):
    path = tmp_path / "engine.plan"
    path.write_bytes(header(tag))
    code, message = cli("profile", path)
    runtime = RUNTIMES.get(read_header(path).family)
    assert code == 3
    assert str(runtime.missing()) in message


# ---- what belongs to an engine


@pytest.mark.tensorrt_rtx
@pytest.mark.usefixtures("present")
def test_an_engine_with_its_manifest_brings_what_its_bundle_brings(engines):
    found = candidates_of(engines.file(ENGINE), None, None, ())
    whole = candidates_of(engines.path, None, None, ())
    assert variants(found.candidates) == variants(whole.candidates)
    assert {("tensorrt-rtx", "model"), ("tensorrt-rtx", "dense"), ("onnxruntime", "slice"), ("eager", "dense")} <= set(
        variants(found.candidates)
    )
    dense = next(c for c in found.candidates if (c.runtime, c.variant) == ("tensorrt-rtx", "dense"))
    assert dense.artifact == engines.file(TWIN + ENGINE)
    assert (found.plan, found.notes) == (engines.manifest.plan, [])
    assert (found.required, whole.required) == ({"tensorrt-rtx"}, set())
    assert candidates_of(engines.file(ENGINE), None, None, ["onnxruntime"]).required == {"onnxruntime"}


@pytest.mark.tensorrt_rtx
@pytest.mark.usefixtures("present")
def test_a_bare_engine_is_alone_unless_it_is_given_a_twin(engines, tmp_path):
    path, dense = tmp_path / "mine.engine", tmp_path / "dense.engine"
    shutil.copy(engines.file(ENGINE), path)
    shutil.copy(engines.file(TWIN + ENGINE), dense)
    found = candidates_of(path, None, None, ())
    assert variants(found.candidates) == [("tensorrt-rtx", "model")]
    assert found.plan is None
    assert "There is no manifest.json next to mine.engine." in found.notes
    assert any("Speed-up not available: --against DENSE.plan" in note for note in found.notes)
    assert any("token plan is unknown" in note for note in found.notes)
    found = candidates_of(path, dense, None, ())
    assert variants(found.candidates) == [("tensorrt-rtx", "model"), ("tensorrt-rtx", "dense")]
    assert not any("Speed-up" in note for note in found.notes)


def changed(folder: Path) -> None:
    with (folder / ENGINE).open("ab") as file:
        file.write(b"\0")


def foreign(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["files"][ENGINE]
    (folder / MANIFEST).write_text(json.dumps(manifest))


def damaged(folder: Path) -> None:
    (folder / MANIFEST).write_text("{")


@pytest.mark.tensorrt_rtx
@pytest.mark.usefixtures("present")
@pytest.mark.parametrize(
    ("spoil", "why"),
    [(changed, "different SHA-256"), (foreign, "does not list it"), (damaged, "not valid JSON")],
)
def test_a_manifest_that_does_not_list_this_very_file_does_not_count(engines, tmp_path, spoil, why):
    folder = tmp_path / "bundle"
    shutil.copytree(engines.path, folder)
    spoil(folder)
    found = candidates_of(folder / ENGINE, None, None, ())
    assert variants(found.candidates) == [("tensorrt-rtx", "model")]
    assert found.plan is None
    assert why in found.notes[0]
    assert "treated as an engine without a manifest" in found.notes[0]


@without_gpu
@pytest.mark.tensorrt_rtx
def test_without_a_gpu_a_bundle_is_profiled_without_its_engine_and_says_so(engines):
    report = profile(engines.path, measure=ProfileOptions(batch_sizes=(1,), threads=1, duration=1e-9))
    assert "onnxruntime" in {row.runtime for row in report.rows}
    assert "tensorrt-rtx" not in {row.runtime for row in report.rows}
    assert any(note.startswith("tensorrt-rtx was not timed: ") for note in report.notes)
    with pytest.raises(MissingRequirement):
        profile(engines.path, runtimes=["tensorrt-rtx"])
    with pytest.raises(MissingRequirement):
        profile(engines.file(ENGINE))


@pytest.mark.tensorrt_rtx
def test_a_batch_size_outside_the_profiles_is_refused_before_anything_else(engines, cli):
    code, message = cli("profile", engines.file(ENGINE), "--batch-sizes", "1,9")
    assert code == 2
    assert "got 9, expected 1 to 4" in message


# ---- the slice twin of an engine


@pytest.mark.tensorrt_rtx
def test_the_slice_twin_is_built_as_the_engine_was(engines, tmp_path, monkeypatch):
    monkeypatch.setattr("evit_deploy.engines.rebuild.usable", lambda target: True)
    told = progress_lines()
    twin, why_not = slice_engine(engines, tmp_path)
    assert why_not == ""
    assert twin is not None
    assert told == ["building the slice twin's engine with tensorrt-rtx"]
    assert read_header(twin) == read_header(engines.file(ENGINE))
    scores = [any("(TokenReorg)" in layer.metadata for layer in plan_layers(p)) for p in (twin, engines.file(ENGINE))]
    assert scores == [False, True]


@pytest.mark.tensorrt_rtx
@pytest.mark.usefixtures("present")
def test_where_no_slice_twin_can_be_built_its_overhead_is_said_to_be_missing(engines, tmp_path, monkeypatch):
    monkeypatch.setattr("evit_deploy.engines.rebuild.usable", lambda target: False)
    found = candidates_of(engines.path, None, None, ["tensorrt-rtx"], scratch=tmp_path)
    assert variants(found.candidates) == [("tensorrt-rtx", "model"), ("tensorrt-rtx", "dense")]
    (note,) = found.notes
    assert note.startswith("Overhead not available on tensorrt-rtx: tensorrt-rtx cannot build its slice twin here")
    other = msgspec.structs.replace(engines.manifest.engine, target="torch-tensorrt")
    manifest = msgspec.structs.replace(engines.manifest, engine=other)
    assert "torch-tensorrt built it" in slice_engine(Bundle(engines.path, manifest), tmp_path)[1]


@pytest.mark.tensorrt_rtx
def test_options_are_the_engine_s_own(engines):
    engine = msgspec.structs.replace(
        engines.manifest.engine, driver=None, gpus=("sm80", "sm86"), options={"optimization_level": 2, "unknown": 1}
    )
    assert options_of(engine) == BuildOptions(batches=(SIZES,), gpus=("sm80", "sm86"), optimization_level=2)
    engine = msgspec.structs.replace(engine, target="tensorrt", gpus=("sm90",), plugin="abc")
    assert options_of(engine) == BuildOptions(batches=(SIZES,), optimization_level=2)


# ---- the real thing


@pytest.mark.gpu
@needs_gpu
@pytest.mark.timeout(900)
def test_a_real_engine_against_pytorch_on_a_gpu(engines):
    if compute_capability() not in RTX_GPUS:
        pytest.skip(f"TensorRT-RTX does not build for {compute_capability()}")
    check_real_profile(profile(engines.file(ENGINE), measure=SHORT), "tensorrt-rtx")


@pytest.mark.gpu
@pytest.mark.tensorrt
@needs_gpu
@pytest.mark.timeout(900)
def test_a_real_tensorrt_engine_against_pytorch_on_a_gpu(converted, tmp_path):
    pytest.importorskip("tensorrt")
    folder = tmp_path / "bundle"
    shutil.copytree(converted.path, folder)
    options = BuildOptions(batches=(SIZES,))
    built = build_engine(folder / MODEL, folder / ENGINE, "tensorrt", "fp32", options)
    build_engine(folder / DENSE, folder / TWIN / ENGINE, "tensorrt", "fp32", options)
    write_manifest(folder, msgspec.structs.replace(converted.manifest, engine=built.engine))
    check_real_profile(profile(folder, against=checkpoint_of(converted), measure=SHORT), "tensorrt")
    bare = tmp_path / "bare.plan"
    shutil.copy(folder / ENGINE, bare)
    report = profile(bare, against=folder / TWIN / ENGINE, measure=SHORT)
    assert {r.mac_ratio for r in report.rows} == {None}
    assert all(r.speedup for r in report.rows if r.variant == "model")
    with pytest.raises(InputError, match="got 9, expected 1 to 4"):
        profile(bare, measure=ProfileOptions(batch_sizes=(1, 9), duration=0.2))


def check_real_profile(report: Report, name: str) -> None:
    rows = {(r.runtime, r.variant): r for r in report.rows if r.device == "gpu"}
    assert {(name, v) for v in ("model", "slice", "dense")} <= rows.keys()
    assert {(r, v) for r in ("eager", "torch.compile") for v in ("model", "dense")} <= rows.keys()
    assert {r.batch for r in report.rows if r.device == "gpu"} == {1}  # what 1:2:4 covers of the usual ones
    assert rows[name, "model"].overhead is not None
    for found in report.latencies:
        assert found.runtime == name
        assert 0 < found.compute.median <= found.latency.median
        assert found.compute.count >= 100
    assert {r.batch for r in report.blocks} == {2}
    assert report.gpu[0].batch == 1
    assert report.device["compute_capability"] == compute_capability()
