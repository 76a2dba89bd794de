"""Packages for C++: a folder that configures, compiles and answers wherever it is copied to."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from evit_deploy.bundle.bundle import changed_files, read_bundle
from evit_deploy.bundle.manifest import ENGINE, GOLDEN, MANIFEST, PACKAGE
from evit_deploy.data.images import sample_photographs
from evit_deploy.engines.plugin.build import sources
from evit_deploy.engines.plugin.library import LIBRARY
from evit_deploy.files import sha256
from tests.support.cpp_example import bundle_of, call, need_toolchain, run_cmake, tensorrt_options
from tests.support.models import tree
from tests.support.packages import make_package
from tests.support.plugin_files import library

EXAMPLE = {path.name for path in (sources() / "example").iterdir() if path.is_file()} - {"README.md"}


def test_what_is_in_a_folder_for_a_plan(planned, tmp_path):
    built = library(tmp_path / "built" / "plugin.so")
    bundle = planned(plugin=sha256(built))
    place, made = make_package([bundle.path], "cpp", name="tiny", plugin=built, gpus=["sm80"])
    assert {name for name, content in tree(place).items() if content is not None} == EXAMPLE | {
        "README.md", "EXAMPLE.md", PACKAGE, "sbom.json", f"plugins/{LIBRARY}",
        f"bundle/{MANIFEST}", f"bundle/{ENGINE}", f"bundle/{GOLDEN}", "bundle/report.json",
    }  # fmt: skip
    assert (made.target, made.platform, made.plugin, made.server) == ("cpp", "tensorrt", sha256(built), None)
    assert f"evit_example bundle --plugin plugins/{LIBRARY}" in (place / "README.md").read_text()
    part = read_bundle(place / "bundle")
    assert changed_files(part) == []
    assert part.manifest.engine == bundle.manifest.engine
    assert (place / "bundle" / part.manifest.parents[0].source).resolve() == (
        bundle.path / bundle.manifest.parents[0].source
    ).resolve()


def test_a_plan_of_tensorrt_rtx(planned):
    place, made = make_package([planned(tag=b"vtrt", target="tensorrt-rtx").path], "cpp", name="tiny")
    assert made.platform == "tensorrt-rtx"
    assert "-DEVIT_RUNTIME=tensorrt-rtx" in (place / "README.md").read_text()
    assert not (place / "plugins").exists()


@pytest.mark.cpp
@pytest.mark.openvino
@pytest.mark.slow
def test_the_folder_builds_and_answers_where_it_is_copied_to(tmp_path):
    need_toolchain()
    found = importlib.util.find_spec("openvino")
    if found is None or found.origin is None:
        pytest.skip("openvino is not installed")
    bundle = bundle_of(tmp_path, "plain")
    place, _ = make_package([bundle.path], "cpp", name="tiny", out=tmp_path / "package")
    copied = Path(shutil.copytree(place, tmp_path / "elsewhere" / "copy"))
    shutil.rmtree(place)
    shutil.rmtree(bundle.path)
    commands = [line for line in (copied / "README.md").read_text().splitlines() if line.startswith("cmake ")]
    assert [line.split()[1] for line in commands] == ["-S", "--build"]
    openvino = Path(found.origin).parent / "cmake"
    run_cmake("-S", copied, "-B", copied / "build", "-DEVIT_RUNTIME=openvino", f"-DOpenVINO_DIR={openvino}")
    run_cmake("--build", copied / "build", "-j2")
    sample_photographs()[0].save(tmp_path / "china.jpg")
    done = call(copied / "build" / "evit_example", copied / "bundle", tmp_path / "china.jpg", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["golden"]["passed"] is True
    (copied / "bundle" / "openvino" / "model.bin").write_bytes(b"another content")
    call(copied / "build" / "evit_example", copied / "bundle", tmp_path / "china.jpg").refused(
        2, "model.bin", "SHA-256"
    )


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["tensorrt", "tensorrt-rtx"])
def test_the_folder_compiles_wherever_headers_are_given(platform, planned, tmp_path):
    need_toolchain()
    options = tensorrt_options(platform)
    tag = b"ftrt" if platform == "tensorrt" else b"vtrt"
    place, _ = make_package([planned(tag=tag, target=platform).path], "cpp", name="tiny")
    run_cmake("-S", place, "-B", tmp_path / "build", *options)
    run_cmake("--build", tmp_path / "build", "-j2")
