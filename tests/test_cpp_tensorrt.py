"""The C++ example with TensorRT behind it: it compiles, and as far as it gets where there is no GPU.

``TENSORRT_ROOT`` says where TensorRT or TensorRT-RTX is. Its headers will do to compile; what is refused before a GPU
is needed is tried where the library is there too. An engine itself is run by nothing here.
"""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from cpp_example import Result, build, call, change_manifest, compiles, need_toolchain, replace_file

from evit_deploy.bundle import ENGINE

RUNTIMES = ("tensorrt", "tensorrt-rtx")
RECORD = {"version": "9.9.9.9", "gpus": ["sm80"], "driver": None, "precision": "fp32", "plugin": None, "options": {},
          "profiles": [{"minimum": 1, "optimum": 4, "maximum": 8}], "seconds": 1.0}  # fmt: skip
PLUGIN = """
#include <cstdint>
extern "C" const char* evit_plugin_refusal() { return REFUSAL; }
extern "C" std::int32_t evit_plugin_tensorrt_version() { return VERSION; }
extern "C" std::int32_t evit_token_reorg_abi() { return ABI; }
"""


@pytest.fixture(scope="module", params=RUNTIMES)
def runtime(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def built(runtime, tmp_path_factory) -> tuple[Path, str]:
    """The folder it was built in, and what CMake said."""
    need_toolchain()
    root = os.environ.get("TENSORRT_ROOT")
    if not root:
        pytest.skip("TENSORRT_ROOT does not say where TensorRT is")
    toolkit = Path(os.environ.get("CUDATOOLKIT_ROOT", "/usr/local/cuda"))
    if not compiles("cuda_runtime_api.h", include=toolkit / "include"):
        pytest.skip(f"CUDA's headers are not in {toolkit} (CUDATOOLKIT_ROOT)")
    folder = tmp_path_factory.mktemp(runtime)
    said = build(folder, f"-DEVIT_RUNTIME={runtime}", f"-DTENSORRT_ROOT={root}", f"-DCUDAToolkit_ROOT={toolkit}")
    return folder, said


@pytest.fixture
def program(built) -> Path:
    program = built[0] / "evit_example"
    if not program.exists():
        pytest.skip("TENSORRT_ROOT has headers only: the program was not linked")
    return program


@pytest.fixture
def engine_bundle(converted, runtime, tmp_path) -> Path:
    """A bundle with a plan that is none."""
    bundle = Path(shutil.copytree(converted.path, tmp_path / "bundle"))
    replace_file(bundle, ENGINE, b"not a plan")
    change_manifest(bundle, engine=RECORD | {"target": runtime})
    return bundle


def engine(bundle: Path, runtime: str, **fields: Any) -> None:
    change_manifest(bundle, engine=RECORD | {"target": runtime} | fields)


def test_it_compiles(built):
    folder, said = built
    assert (folder / "evit_example").exists() != ("compiled and NOT linked" in said)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_no_gpu(program, engine_bundle):
    call(program, engine_bundle).refused(3, "no CUDA device can be used", "NVIDIA GPU")


def test_no_engine(program, converted):
    call(program, converted.path).refused(2, "this bundle has no engine.plan", "--target")


def test_an_engine_of_the_other_library(program, engine_bundle, runtime):
    other = next(name for name in RUNTIMES if name != runtime)
    engine(engine_bundle, other)
    call(program, engine_bundle).refused(2, f"is for {other}", f"built for {runtime}", f"--target {runtime}")


def test_an_engine_that_nobody_described(program, engine_bundle):
    change_manifest(engine_bundle, engine=None)
    call(program, engine_bundle).refused(2, "does not say what the plan was built with")


def test_a_damaged_plan(program, engine_bundle):
    (engine_bundle / ENGINE).write_bytes(b"another content")
    call(program, engine_bundle).refused(2, ENGINE, "damaged", "SHA-256")


def test_a_plugin_that_is_not_given_is_not_looked_for(program, engine_bundle, runtime):
    (engine_bundle / "plugin.so").write_bytes(b"beside the plan")
    engine(engine_bundle, runtime, plugin="ab" * 32)
    call(program, engine_bundle).refused(2, "needs the plugin", "--plugin LIBRARY", "ab" * 32)


def plugin(folder: Path, version: str = "getInferLibVersion()", abi: int = 1, refusal: str = "nullptr") -> Path:
    library = folder / "plugin.so"
    source = 'extern "C" int getInferLibVersion();\n' + PLUGIN
    defined = [f"-DVERSION={version}", f"-DABI={abi}", f"-DREFUSAL={refusal}"]
    command = ["c++", "-shared", "-fPIC", "-x", "c++", "-", "-o", str(library), *defined]
    subprocess.run(command, input=source, text=True, check=True)
    return library


def with_plugin(program: Path, bundle: Path, library: Path) -> Result:
    return call(program, bundle, "--plugin", library)


def test_plugins_that_do_not_fit(program, engine_bundle, tmp_path):
    library = plugin(tmp_path, abi=2)
    with_plugin(program, engine_bundle, library).refused(2, str(library), "got 2, expected 1")
    library = plugin(tmp_path, version="80000")
    with_plugin(program, engine_bundle, library).refused(3, "another TensorRT (got 80000")
    library = plugin(tmp_path, refusal='"its name is taken"')
    with_plugin(program, engine_bundle, library).refused(4, "refuses the plugin: its name is taken")
    (tmp_path / "text.so").write_text("text")
    with_plugin(program, engine_bundle, tmp_path / "text.so").refused(2, "text.so", "cannot be loaded")
    with_plugin(program, engine_bundle, tmp_path / "absent.so").refused(2, "absent.so", "no such file")
    library = tmp_path / "empty.so"
    subprocess.run(["c++", "-shared", "-x", "c++", "/dev/null", "-o", str(library)], check=True)
    with_plugin(program, engine_bundle, library).refused(2, "not a plugin of evit-deploy", "evit_token_reorg_abi")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_a_plugin_that_fits(program, engine_bundle, tmp_path, runtime):
    library = plugin(tmp_path)
    with_plugin(program, engine_bundle, library).refused(3, "no CUDA device")  # what comes next
    engine(engine_bundle, runtime, plugin="ab" * 32)
    result = with_plugin(program, engine_bundle, library)
    assert result.code == 3
    assert "not the plugin that the plan was built with" in result.err
