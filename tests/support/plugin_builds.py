"""CMake builds of ``plugins/``, once each for all tests."""

import hashlib
import lzma
import os
import shutil
import subprocess
import tarfile
from functools import cache
from pathlib import Path

import pytest

from evit_deploy.environment.requirements import version_of
from tests.support.paths import DATA, PLUGINS
from tests.support.shared import made_once

HEADERS = {10: "tensorrt-10.15-headers.tar.xz", 11: "tensorrt-11.1-headers.tar.xz"}
"""TensorRT's headers by major version, in the tests' data."""


def need(*tools: str) -> None:
    """Skips the test, with the reason, where a tool is missing."""
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"needs {' and '.join(missing)}")


def tensorrt_headers() -> Path:
    """The folder with TensorRT's headers: of ``TENSORRT_ROOT``, of the system, else those of the tests' data."""
    for root in (os.environ.get("TENSORRT_ROOT"), "/usr", "/usr/local/tensorrt", "/usr/local"):
        if root and (Path(root) / "include" / "NvInferRuntime.h").is_file():
            return Path(root)
    installed = version_of("tensorrt")
    return headers(int(installed.split(".")[0]) if installed else max(HEADERS))


def headers(major: int) -> Path:
    """The folder with the ``include/`` of a release of this major version, from the tests' data."""

    def make(folder: Path) -> None:
        with lzma.open(DATA / HEADERS[major]) as content, tarfile.open(fileobj=content) as archive:
            archive.extractall(folder, filter="data")

    return made_once(f"tensorrt-headers-{major}", make)


def run(*command: str) -> str:
    """Runs a tool; gives what it said, and ends the test with that if it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@cache
def build(*arguments: str, targets: tuple[str, ...] = ()) -> Path:
    """Configures and compiles; gives the folder with what was built."""

    def make(place: Path) -> None:
        run("cmake", "-S", str(PLUGINS), "-B", str(place), *arguments)
        run("cmake", "--build", str(place), "--parallel", "2", *(["--target", *targets] if targets else []))

    name = hashlib.sha256(repr((arguments, targets)).encode()).hexdigest()[:16]
    return made_once(f"plugins-{name}", make) / "token_reorg"


def prebuilt(name: str) -> Path | None:
    """A file beside the library that ``EVIT_DEPLOY_KERNEL`` names, for machines that take minutes to compile."""
    told = os.environ.get("EVIT_DEPLOY_KERNEL", "none")
    path = Path(told).with_name(name)
    return path if told != "none" and path.is_file() else None


def host_library() -> Path:
    """The kernel for the CPU: the one beside ``EVIT_DEPLOY_KERNEL``, or built here."""
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
    """The program of cases for the GPU of this machine: the one beside ``EVIT_DEPLOY_KERNEL``, or built here."""
    if (found := prebuilt("token_reorg_cases_gpu")) is not None:
        return found
    need("cmake", "g++", "nvcc")
    return build("-DEVIT_TENSORRT=OFF", targets=("token_reorg_cases_gpu",)) / "token_reorg_cases_gpu"
