"""CMake builds of ``plugins/``, once each for all tests."""

import hashlib
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

from evit_deploy.engines.plugin.build import HEADERS as COMMITS
from evit_deploy.environment.requirements import version_of
from tests.support.environments import cached_environment
from tests.support.paths import PLUGINS
from tests.support.shared import made_once

HEADERS = {10: "10.15", 11: "11.1"}
"""Releases of TensorRT whose headers are used, by major version."""


def need(*tools: str) -> None:
    """Skips the test, with the reason, if a tool is missing."""
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"needs {' and '.join(missing)}")


def tensorrt_headers() -> Path:
    """The folder with TensorRT's headers: from ``TENSORRT_ROOT``, the system, or :func:`headers`."""
    for root in (os.environ.get("TENSORRT_ROOT"), "/usr", "/usr/local/tensorrt", "/usr/local"):
        if root and (Path(root) / "include" / "NvInferRuntime.h").is_file():
            return Path(root)
    installed = version_of("tensorrt")
    return headers(int(installed.split(".")[0]) if installed else max(HEADERS))


def headers(major: int) -> Path:
    """The folder with the ``include/`` of a release of this major version; skips if it is not available.

    Both are fetched from NVIDIA/TensorRT into the user's cache, or into ``EVIT_TENSORRT_HEADERS``.
    """
    folder = cached_environment("tensorrt-headers", "EVIT_TENSORRT_HEADERS", _fetch_headers) / HEADERS[major]
    if not (folder / "include" / "NvInferRuntime.h").is_file():
        pytest.skip(f"needs TensorRT's headers: {folder}/include/NvInferRuntime.h")
    return folder


def _fetch_headers(making: Path) -> list[list[str]]:
    """Commands that fetch them by commit, as ``plugin build`` does."""
    commands = []
    for major, release in HEADERS.items():
        git = ["git", "-C", str(making / release)]
        commands += [
            ["git", "init", "--quiet", str(making / release)],
            [*git, "fetch", "--quiet", "--depth", "1", "https://github.com/NVIDIA/TensorRT.git", COMMITS[major]],
            [*git, "checkout", "--quiet", "FETCH_HEAD", "--", "include"],
        ]
    return commands


def run(*command: str) -> str:
    """Runs a tool and returns its output; fails the test with the output on error."""
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@cache
def build(*arguments: str, targets: tuple[str, ...] = ()) -> Path:
    """Configures and compiles; returns the build folder."""

    def make(place: Path) -> None:
        run("cmake", "-S", str(PLUGINS), "-B", str(place), *arguments)
        run("cmake", "--build", str(place), "--parallel", "2", *(["--target", *targets] if targets else []))

    name = hashlib.sha256(repr((arguments, targets)).encode()).hexdigest()[:16]
    return made_once(f"plugins-{name}", make) / "token_reorg"


def prebuilt(name: str) -> Path | None:
    """A file next to the library in ``EVIT_DEPLOY_KERNEL``, for machines on which compiling takes minutes."""
    told = os.environ.get("EVIT_DEPLOY_KERNEL", "none")
    path = Path(told).with_name(name)
    return path if told != "none" and path.is_file() else None


def host_library() -> Path:
    """The kernel for the CPU: the one next to ``EVIT_DEPLOY_KERNEL``, or built here."""
    if (found := prebuilt("libevit_token_reorg_host.so")) is not None:
        return found
    need("cmake", "g++")
    return build("-DEVIT_CUDA=OFF", targets=("evit_token_reorg_host",)) / "libevit_token_reorg_host.so"


def gpu_library() -> Path:
    """The kernel for the GPU of this machine: ``EVIT_DEPLOY_KERNEL``, or built here."""
    if (found := prebuilt("libevit_token_reorg.so")) is not None:
        return found
    need("cmake", "g++", "nvcc")
    return build("-DEVIT_TENSORRT=OFF", targets=("evit_token_reorg",)) / "libevit_token_reorg.so"


def gpu_program() -> Path:
    """The program of cases for the GPU of this machine: the one next to ``EVIT_DEPLOY_KERNEL``, or built here."""
    if (found := prebuilt("token_reorg_cases_gpu")) is not None:
        return found
    need("cmake", "g++", "nvcc")
    return build("-DEVIT_TENSORRT=OFF", targets=("token_reorg_cases_gpu",)) / "token_reorg_cases_gpu"
