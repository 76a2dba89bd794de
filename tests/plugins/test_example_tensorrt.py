"""The C++ example with TensorRT behind it: it compiles, and as far as it gets where there is no GPU.

``TENSORRT_ROOT`` says where TensorRT or TensorRT-RTX is; without it, they are TensorRT's lean runtime and the package
of TensorRT-RTX. Headers will do to compile; what is refused before a GPU is needed is tried where the library is there
too. An engine itself is run by nothing here.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from evit_deploy.bundle.manifest import ENGINE
from evit_deploy.files import sha256
from evit_deploy.tokens.operators.library import ABI
from tests.support.cpp_example import (
    Result,
    build,
    call,
    change_manifest,
    need_toolchain,
    replace_file,
    tensorrt_options,
)

pytestmark = pytest.mark.slow  # each runtime is compiled
RTX = "tensorrt-rtx"
RUNTIMES = ("tensorrt", RTX)
RECORD = {"version": "9.9.9.9", "gpus": ["sm80"], "driver": None, "precision": "fp32", "plugin": None, "options": {},
          "profiles": [{"minimum": 1, "optimum": 4, "maximum": 8}], "seconds": 1.0}  # fmt: skip
PLUGIN = """
extern "C" const char identity[] = "evit-deploy library: " IDENTITY ";";
extern "C" const char* evit_plugin_refusal() { return REFUSAL; }
"""


@pytest.fixture(scope="module", params=RUNTIMES)
def runtime(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def built(runtime, tmp_path_factory) -> tuple[Path, str]:
    """The folder it was built in, and what CMake said."""
    need_toolchain()
    options = tensorrt_options(runtime)
    folder = tmp_path_factory.mktemp(runtime)
    return folder, build(folder, *options)


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


def plugin(folder: Path, major: int, abi: int = ABI, kind: str = "registers", refusal: str = "nullptr") -> Path:
    library = folder / "plugin.so"
    identity = f"kind={kind} version=0.1.0 abi={abi} architectures=80-real,120 tensorrt={major}.1.0"
    defined = [f'-DIDENTITY="{identity}"', f"-DREFUSAL={refusal}"]
    command = ["c++", "-shared", "-fPIC", "-x", "c++", "-", "-o", str(library), *defined]
    subprocess.run(command, input=PLUGIN, text=True, check=True)
    return library


@pytest.fixture
def major(program) -> int:
    """Of the library that the program is linked to, as the program says when it meets a plugin for none."""
    source = '#include <cstdio>\nextern "C" int getInferLibMajorVersion();\n'
    source += 'int main() { std::printf("%d", getInferLibMajorVersion()); }\n'
    linked = subprocess.run(["ldd", str(program)], capture_output=True, text=True, check=True).stdout
    library = re.search(r"(?:nvinfer|tensorrt_rtx)\S* => (\S+)", linked)
    assert library is not None
    asks = program.with_name("asks")
    compile_ = ["c++", "-x", "c++", "-", "-x", "none", library[1], "-o", str(asks)]
    subprocess.run(compile_, input=source, text=True, check=True)
    environment = os.environ | {"LD_LIBRARY_PATH": str(Path(library[1]).parent)}
    return int(subprocess.run([asks], env=environment, capture_output=True, check=True).stdout)


def with_plugin(program: Path, bundle: Path, library: Path) -> Result:
    return call(program, bundle, "--plugin", library)


def test_plugins_that_do_not_fit(program, engine_bundle, tmp_path, runtime, major):
    library = plugin(tmp_path, major, abi=ABI + 1)
    if runtime == RTX:
        with_plugin(program, engine_bundle, library).refused(2, str(library), "TensorRT-RTX takes no plugins")
        return
    with_plugin(program, engine_bundle, library).refused(2, str(library), f"got {ABI + 1}, expected {ABI}")
    library = plugin(tmp_path, 8)
    with_plugin(program, engine_bundle, library).refused(3, f"another TensorRT (got 8, expected {major})")
    library = plugin(tmp_path, major, kind="creators")
    with_plugin(program, engine_bundle, library).refused(2, "not a plugin of evit-deploy that registers itself")
    library = plugin(tmp_path, major, refusal='"its name is taken"')
    with_plugin(program, engine_bundle, library).refused(4, "has not taken the plugin: its name is taken")
    engine(engine_bundle, runtime, plugin="ab" * 32)
    with_plugin(program, engine_bundle, library).refused(2, "built with another plugin (got SHA-256", "ab" * 32)
    (tmp_path / "text.so").write_text("text")
    with_plugin(program, engine_bundle, tmp_path / "text.so").refused(2, "text.so", "not a plugin of evit-deploy")
    with_plugin(program, engine_bundle, tmp_path / "absent.so").refused(2, "absent.so", "no such file")
    engine(engine_bundle, runtime)
    (tmp_path / "text.so").write_bytes(library.read_bytes().replace(b"\x7fELF", b"none", 1))
    with_plugin(program, engine_bundle, tmp_path / "text.so").refused(2, "text.so", "cannot be loaded")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_a_plugin_that_fits(program, engine_bundle, tmp_path, runtime, major):
    library = plugin(tmp_path, major)
    if runtime == RTX:
        with_plugin(program, engine_bundle, library).refused(2, "TensorRT-RTX takes no plugins")
        return
    with_plugin(program, engine_bundle, library).refused(3, "no CUDA device")  # what comes next
    engine(engine_bundle, runtime, plugin=sha256(library))
    with_plugin(program, engine_bundle, library).refused(3, "no CUDA device")
