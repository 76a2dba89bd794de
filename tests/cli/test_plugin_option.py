"""``--plugin`` of convert, verify and profile: what is loaded, what is compared, what is said where it is missing."""

import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

from evit_deploy.bundle.bundle import Bundle, read_bundle, write_manifest
from evit_deploy.bundle.manifest import ENGINE, Engine
from evit_deploy.engines import build
from evit_deploy.engines.options import check_options
from evit_deploy.engines.plugin import library as plugin
from evit_deploy.engines.plugin.library import LIBRARY
from evit_deploy.errors import InputError, MissingRequirement
from evit_deploy.files import sha256
from evit_deploy.profiling.candidates import candidates_of
from evit_deploy.recipe.options import BatchProfile, BuildOptions
from evit_deploy.runtimes.tensorrt import TensorRTRunner
from evit_deploy.verification.verify import verify
from tests.support.plugin_files import library

PLAN = b"ftrt" + bytes(20) + bytes([11, 1, 0, 106]) + bytes(1000)
RECORD = Engine("tensorrt", "11.1.0.106", ("sm80",), "595.1", "fp32", (BatchProfile(1, 4, 8),), None, {}, 1.0)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return plugin.cache()


@pytest.fixture
def with_engine(tmp_path, converted):
    """Makes a bundle that says that it has an engine of TensorRT's, with a plugin or not."""

    def make(hash_of_plugin: str | None) -> Bundle:
        shutil.copytree(converted.path.parent, tmp_path / "work")
        folder = tmp_path / "work" / converted.path.name
        (folder / ENGINE).write_bytes(PLAN)
        record = msgspec.structs.replace(RECORD, plugin=hash_of_plugin)
        write_manifest(folder, msgspec.structs.replace(converted.manifest, engine=record))
        return read_bundle(folder)

    return make


@pytest.fixture
def present(monkeypatch) -> list[Path]:
    """As if TensorRT and a GPU were here; what would be loaded into the process."""
    monkeypatch.setattr(TensorRTRunner, "missing", classmethod(lambda cls: None))
    loaded: list[Path] = []
    monkeypatch.setattr(plugin, "load_plugin", loaded.append)
    return loaded


@pytest.fixture
def builds(monkeypatch) -> list[tuple[Path, BuildOptions]]:
    """Engines that would be built: the model, and what the builder is told."""
    asked: list[tuple[Path, BuildOptions]] = []

    def build_engine(model: Path, plan: Path, target: str, precision: str, options: BuildOptions) -> Any:
        assert (target, precision) == ("tensorrt", "fp32")
        asked.append((model, options))
        plan.write_bytes(PLAN)

    monkeypatch.setattr("evit_deploy.engines.rebuild.usable", lambda target: True)
    monkeypatch.setattr(build, "build_engine", build_engine)
    return asked


# ---- verify


def test_verify_says_that_the_engine_s_plugin_is_missing(with_engine, cache):
    bundle = with_engine("5" * 64)
    report = verify(bundle.path, batch_sizes=(1,), threads=1)
    assert report.passed
    (note,) = [note for note in report.notes if "engine.plan" in note]
    assert "engine.plan was not verified here" in note
    assert "tensorrt: the plan needs the plugin library with SHA-256 555555555555, which is not in" in note
    with pytest.raises(MissingRequirement, match="--plugin auto: the plan needs the plugin library"):
        verify(bundle.path, runtimes=["tensorrt"])


def test_verify_loads_the_library_that_the_manifest_names(with_engine, cache, present, tmp_path):
    library(cache / "newer" / LIBRARY, more=b"another")
    right = library(cache / "right" / LIBRARY)
    bundle = with_engine(sha256(right))
    for choice in (None, "auto", right, str(right)):
        with pytest.raises((InputError, MissingRequirement, ImportError)):  # as far as the stand-in goes
            verify(bundle.path, runtimes=["tensorrt"], plugin=choice, batch_sizes=(1,), threads=1)
    assert present == [right] * 4
    with pytest.raises(InputError, match="--plugin none: the engine was built with a plugin"):
        verify(bundle.path, plugin="none")
    with pytest.raises(InputError, match="the plan was built with a different library"):
        verify(bundle.path, plugin=library(tmp_path / "other.so", more=b"another"))
    assert present == [right] * 4


def test_a_plugin_for_an_engine_that_needs_none_is_refused(with_engine, cache, tmp_path):
    bundle = with_engine(None)
    with pytest.raises(InputError, match="needs no plugin: the operator's body is built in"):
        verify(bundle.path, plugin=library(tmp_path / "a.so"))


# ---- profile


def variants(path: Path, scratch: Path, choice: str | Path | None) -> tuple[list[str], list[str]]:
    found = candidates_of(path, None, None, ["tensorrt"], scratch=scratch, plugin=choice)
    return [row.variant for row in found.candidates], found.notes


def test_an_engine_with_the_plugin_is_compared_with_the_body(with_engine, cache, present, builds, tmp_path):
    right = library(cache / "right" / LIBRARY)
    bundle = with_engine(sha256(right))
    assert variants(bundle.path, tmp_path, None) == (["model", "slice", "body"], [])
    assert present == [right]
    (slice_model, slice_options), (body_model, body_options) = builds
    assert slice_model.name == "slice.onnx"
    assert body_model == bundle.file("model.onnx")
    assert slice_options.plugin is body_options.plugin is None


def test_an_engine_with_the_body_is_compared_with_a_plugin_that_is_given(with_engine, cache, present, builds, tmp_path):
    right = library(cache / "right" / LIBRARY)
    bundle = with_engine(None)
    assert variants(bundle.path, tmp_path, None) == (["model", "slice"], [])
    assert variants(bundle.path, tmp_path, "none") == (["model", "slice"], [])
    assert present == []
    for choice in ("auto", right):
        builds.clear()
        assert variants(bundle.path, tmp_path, choice) == (["model", "slice", "plugin"], [])
        assert builds[1] == (bundle.file("model.onnx"), BuildOptions(batches=((1, 4, 8),), plugin=str(right)))
    assert present == [right] * 2  # a plan built with it needs it here too


def test_profile_without_the_plugin_leaves_the_engine_out_and_says_so(with_engine, cache, present, builds, tmp_path):
    bundle = with_engine("5" * 64)
    with pytest.raises(MissingRequirement, match="needs the plugin library"):
        variants(bundle.path, tmp_path, None)
    found = candidates_of(bundle.path, None, None, [], scratch=tmp_path)
    assert "tensorrt" not in {row.runtime for row in found.candidates}
    assert any(note.startswith("tensorrt was not timed: --plugin auto: the plan needs") for note in found.notes)


def test_a_bare_plan_takes_what_is_given_and_nothing_by_itself(cache, present, tmp_path):
    right = library(cache / "right" / LIBRARY)
    (tmp_path / "bare").mkdir()
    plan = tmp_path / "bare" / "engine.plan"
    plan.write_bytes(PLAN)
    for choice, loaded in ((None, []), ("auto", []), ("none", []), (right, [right])):
        present.clear()
        candidates_of(plan, None, None, [], plugin=choice)
        assert present == loaded


def test_only_engines_take_a_plugin(converted, tmp_path):
    with pytest.raises(InputError, match="only an engine takes a plugin"):
        candidates_of(converted.file("model.onnx"), None, None, [], plugin=library(tmp_path / "a.so"))


# ---- convert


def test_convert_looks_at_the_library_before_any_work(tmp_path):
    with pytest.raises(InputError, match="not a library that evit-deploy built"):
        check_options("tensorrt", "fp16", BuildOptions(plugin=Path(__file__)))


def test_auto_without_a_build_is_told(cli, cache, tmp_path, checkpoint_file):
    out = tmp_path / "out"
    done = cli("convert", str(checkpoint_file), "--keep-rate", "0.7", "--plugin", "auto", "--out", str(out))
    done.refused(3, "no plugin for TensorRT", "Run: evit-deploy plugin build")
    assert not out.exists()
