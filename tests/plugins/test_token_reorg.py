"""The TensorRT plugin: compiled against TensorRT's headers, driven by its C++ tests, and said what it is."""

import re
import subprocess

import pytest

from evit_deploy.tokens.operators.library import read_identity
from tests.support import plugin_builds
from tests.support.paths import PLUGINS


@pytest.mark.slow
def test_the_plugin_compiles_and_passes_its_own_tests():
    root = plugin_builds.tensorrt_headers()
    plugin_builds.need("cmake", "g++", "nvcc", "ctest")
    folder = plugin_builds.build(f"-DTENSORRT_ROOT={root}", "-DCMAKE_CUDA_ARCHITECTURES=80")
    done = subprocess.run(
        ["ctest", "--test-dir", str(folder.parent), "--output-on-failure"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "100% tests passed" in done.stdout
    assert {"plugin", "registers", "creators", "another_tensorrt"} <= set(re.findall(r"#\d+: (\w+) ", done.stdout))
    for name, kind in (("evit_plugin", "registers"), ("evit_plugin_creators", "creators")):
        identity = read_identity(folder / f"lib{name}.so")
        assert (identity.kind, identity.architectures) == (kind, ("80",))
        assert identity.tensorrt is not None


@pytest.mark.slow
@pytest.mark.cpp
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("-DTENSORRT_ROOT=/nowhere",), "no include/NvInferRuntime.h in TENSORRT_ROOT"),
        (("-DCMAKE_CUDA_COMPILER=/nowhere/nvcc",), "/nowhere/nvcc"),
    ],
)
def test_what_cannot_be_configured_is_told(arguments, words, tmp_path):
    plugin_builds.need("cmake", "g++", "nvcc")
    command = ["cmake", "-S", str(PLUGINS), "-B", str(tmp_path / "build"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert words in done.stderr.replace("\n  ", " ")


@pytest.mark.slow
@pytest.mark.cpp
def test_headers_that_are_too_old_are_refused(tmp_path):
    plugin_builds.need("cmake", "g++", "nvcc")
    include = tmp_path / "include"
    include.mkdir()
    (include / "NvInferRuntime.h").write_text("")
    (include / "NvInferVersion.h").write_text(
        "#define NV_TENSORRT_MAJOR 10\n#define NV_TENSORRT_MINOR 3\n#define NV_TENSORRT_PATCH 0\n"
        "#define NV_TENSORRT_BUILD 26\n"
    )
    arguments = ["-B", str(tmp_path / "build"), f"-DTENSORRT_ROOT={tmp_path}"]
    done = subprocess.run(["cmake", "-S", str(PLUGINS), *arguments], capture_output=True, text=True)
    assert done.returncode != 0
    assert "are of TensorRT 10.3.0, expected 10.15 or newer" in " ".join(done.stderr.split())
