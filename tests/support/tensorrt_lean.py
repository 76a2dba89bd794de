"""The parts of TensorRT available without a GPU: NVIDIA's lean runtime and Python package, in two versions.

The lean runtime has TensorRT's plugin registry and runtime, but no builder. It is installed under the name
``libnvinfer.so.N``, where the Python package and our plugin libraries find it. The two other libraries that the package
links to only come with the builder, so empty ones are created here: building and parsing are not available.

The two versions conflict, so they are kept in folders of the user's cache; the first use downloads 90 MB in a few
seconds.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from functools import cache
from importlib.metadata import files
from pathlib import Path
from typing import Any

import pytest

from tests.support import plugin_builds
from tests.support.environments import cached_environment, hashed
from tests.support.paths import PLUGINS, ROOT
from tests.support.shared import made_once

RELEASES = {10: "10.15.1.29", 11: "11.4.0.106"}
"""Downloaded packages by major version: the oldest supported TensorRT, and the newest."""
LOCKS = ROOT / "tests" / "environments"
MISSING = (
    *("createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createNvOnnxParser_INTERNAL"),
    *("createNvOnnxParserRefitter_INTERNAL", "getBuilderPluginRegistry", "getNvOnnxParserVersion"),
    "initLibNvInferPlugins",
)
"""Functions that the Python package needs to load and that only a full TensorRT has."""
KERNEL = """
#include "token_reorg.h"
extern "C" int32_t evit_token_reorg(const EvitTokenReorgCall*, void*, char*, size_t) { return EVIT_INVALID_CALL; }
"""
"""Replaces the kernel if there is no CUDA compiler; nothing here runs on a GPU."""


def root(runtime: str) -> Path:
    """A folder with headers and library, as C++ programs are linked to: of ``tensorrt`` (lean) or ``tensorrt-rtx``."""

    def make(folder: Path) -> None:
        if runtime == "tensorrt":
            library = packages(11) / "tensorrt_lean_libs" / "libnvinfer_lean.so.11"
        else:
            found = importlib.util.find_spec("tensorrt_rtx_libs")
            if found is None or found.origin is None:
                pytest.skip("needs TensorRT-RTX: pip install tensorrt-rtx")
            library = next(Path(found.origin).parent.glob("libtensorrt_rtx.so.*"))
        (folder / "lib").mkdir(parents=True)
        (folder / "include").symlink_to(plugin_builds.headers(11) / "include")
        name = "libnvinfer.so" if runtime == "tensorrt" else "libtensorrt_rtx.so"
        for link in (name, library.name):  # for linking, and for loading at start
            (folder / "lib" / link).symlink_to(library)

    return made_once(f"{runtime}-root", make)


@cache
def packages(major: int) -> Path:
    """The folder with one version's packages; skips if they cannot be downloaded."""
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--retries", "1", "--no-deps")
    folder = cached_environment(
        "tensorrt",
        "EVIT_TENSORRT_ENVIRONMENT",
        lambda making: [
            [*pip, "--target", str(making / release), *hashed(LOCKS / f"tensorrt-{release}.lock")]
            for release in RELEASES.values()
        ],
    )
    found = folder / RELEASES[major]
    if not (found / "tensorrt_lean_libs" / f"libnvinfer_lean.so.{major}").is_file():
        pytest.skip(f"{found} has no lean runtime; delete {folder} to have it made again")
    return found


def libraries(major: int) -> Path:
    """A folder with the lean runtime as ``libnvinfer.so.N``, and the other libraries that the Python package links
    to."""

    def make(folder: Path) -> None:
        plugin_builds.need("g++")
        folder.mkdir()
        lean = packages(major) / "tensorrt_lean_libs" / f"libnvinfer_lean.so.{major}"
        (folder / f"libnvinfer.so.{major}").symlink_to(lean)
        source = folder / "missing.cpp"
        source.write_text("#include <cstdlib>\n" + "".join(f'extern "C" void {f}() {{ abort(); }}\n' for f in MISSING))
        parser = folder / f"libnvonnxparser.so.{major}"
        plugin_builds.run("g++", "-shared", "-fPIC", str(source), "-o", str(parser))
        shutil.copy(parser, folder / f"libnvinfer_plugin.so.{major}")

    return made_once(f"tensorrt-libraries-{major}", make)


def plugin(major: int) -> Path:
    """The folder with both plugin libraries, built for this major version; without a CUDA compiler, without kernel."""
    if shutil.which("nvcc") and shutil.which("cmake"):
        targets = ("evit_plugin", "evit_plugin_creators")
        arguments = (f"-DTENSORRT_ROOT={plugin_builds.headers(major)}", "-DCMAKE_CUDA_ARCHITECTURES=80")
        return plugin_builds.build(*arguments, targets=targets)
    return made_once(f"plugin-without-kernel-{major}", lambda folder: _build_without_kernel(folder, major))


def _build_without_kernel(folder: Path, major: int) -> None:
    plugin_builds.need("g++")
    folder.mkdir()
    (folder / "kernel.cpp").write_text(KERNEL)
    sources, include = PLUGINS / "token_reorg", plugin_builds.headers(major) / "include"
    release = plugin_builds.HEADERS[major].split(".")
    numbers = dict(zip(("MAJOR", "MINOR", "PATCH"), (*release, "0"), strict=True))
    defined = [f"-DEVIT_TENSORRT_{part}={number}" for part, number in numbers.items()]
    texts = {"VERSION": "0.1.0", "ARCHITECTURES": "none", "TENSORRT_VERSION": ".".join((*release, "0"))}
    for kind, name in (("registers", "libevit_plugin.so"), ("creators", "libevit_plugin_creators.so")):
        plugin_builds.run(
            *("g++", "-std=c++20", "-shared", "-fPIC", "-fvisibility=hidden", f"-I{PLUGINS}", f"-I{sources}"),
            *("-isystem", str(include), "-isystem", str(_cuda_headers())),
            *(f'-DEVIT_{name}="{text}"' for name, text in {**texts, "KIND": kind}.items()),
            *defined,
            *(str(sources / f"{source}.cpp") for source in (kind, "plugin", "identity")),
            *(str(folder / "kernel.cpp"), "-Wl,-z,nodelete", "-Wl,-z,defs", "-ldl", "-o", str(folder / name)),
        )  # fmt: skip


def _cuda_headers() -> Path:
    """CUDA's headers, from PyTorch's dependencies."""
    for file in files("triton") or ():
        if file.name == "cuda_runtime_api.h":
            return Path(str(file.locate())).parent
    pytest.skip("needs CUDA's headers, which come with PyTorch for CUDA (triton)")


def ask(major: int, program: str, *arguments: object) -> Any:
    """Runs a program in a process with this TensorRT and our package; returns its last line of output, parsed as JSON.

    Args:
        major: Major version of TensorRT.
        program: Python source that ends by printing JSON.
        arguments: Its ``sys.argv[1:]``.
    """
    paths = os.pathsep.join([str(ROOT), str(packages(major))])
    environment = os.environ | {"LD_LIBRARY_PATH": str(libraries(major)), "PYTHONPATH": paths}
    command = [sys.executable, "-P", "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
