"""The C++ example: building and running it, and bundles that it must refuse."""

import functools
import importlib.util
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
from PIL import Image

from evit_deploy.bundle.bundle import Bundle
from evit_deploy.bundle.manifest import GOLDEN
from evit_deploy.data.images import sample_photographs
from evit_deploy.files import sha256
from evit_deploy.pipeline.convert import convert
from evit_deploy.recipe.options import ConvertOptions, ProfileOptions
from tests.support import tensorrt_lean
from tests.support.models import quantized_bundle, write_checkpoint
from tests.support.paths import PLUGINS
from tests.support.shared import made_once

PILLOW = int(PIL.__version__.split(".")[0])

SOURCE = PLUGINS / "example"
HEADERS = ("nlohmann/json.hpp", "openssl/evp.h", "png.h", "turbojpeg.h")
PACKAGES = "cmake g++ libpng-dev libssl-dev libturbojpeg0-dev nlohmann-json3-dev"


def compiles(*headers: str, include: Path | None = None) -> bool:
    source = "".join(f"#include <{header}>\n" for header in ("cstdio", *headers))
    command = ["c++", "-std=c++20", "-fsyntax-only", "-x", "c++", "-", *(["-isystem", str(include)] if include else [])]
    return subprocess.run(command, input=source, capture_output=True, text=True).returncode == 0


def need_toolchain() -> None:
    lacking = [tool for tool in ("cmake", "c++") if shutil.which(tool) is None]
    lacking = lacking or [header for header in HEADERS if not compiles(header)]
    if lacking:
        pytest.skip(f"building C++ needs {', '.join(lacking)}: apt-get install {PACKAGES}")


def tensorrt_options(runtime: str) -> tuple[str, str, str]:
    """CMake's options for the example with ``tensorrt`` or ``tensorrt-rtx``; skips where headers are missing."""
    root = os.environ.get("TENSORRT_ROOT") or tensorrt_lean.root(runtime)
    toolkit = Path(os.environ.get("CUDATOOLKIT_ROOT", "/usr/local/cuda"))
    if not compiles("cuda_runtime_api.h", include=toolkit / "include"):
        pytest.skip(f"CUDA's headers are not in {toolkit} (CUDATOOLKIT_ROOT)")
    return f"-DEVIT_RUNTIME={runtime}", f"-DTENSORRT_ROOT={root}", f"-DCUDAToolkit_ROOT={toolkit}"


def run_cmake(*arguments: object) -> str:
    done = subprocess.run(["cmake", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(folder: Path, *options: str) -> str:
    """Configures and builds; returns CMake's output of configuring."""
    said = run_cmake("-S", SOURCE, "-B", folder, "-DEVIT_WERROR=ON", *options)
    run_cmake("--build", folder, "-j2")
    return said


@dataclass
class Result:
    """Result of one call of the program."""

    code: int
    out: str
    err: str

    def refused(self, code: int, *hints: str) -> None:
        """Asserts one line on stderr that contains the hints, and the exit code."""
        assert self.code == code, self.err
        (line,) = self.err.splitlines()
        assert line.startswith("evit_example: ")
        assert len(line) < 600
        for hint in hints:
            assert hint in line


def call(program: Path, *arguments: object) -> Result:
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True)
    return Result(done.returncode, done.stdout, done.stderr)


def change_manifest(bundle: Path, **fields: Any) -> None:
    """Replaces fields of the manifest; ``files`` is merged with the existing ones."""
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"].update(fields.pop("files", {}))
    path.write_text(json.dumps(manifest | fields))


def replace_file(bundle: Path, name: str, content: bytes) -> None:
    """Replaces a file's content in a bundle, and its hash."""
    (bundle / name).write_bytes(content)
    change_manifest(bundle, files={name: sha256(bundle / name)})


@pytest.fixture(scope="session")
def built() -> Path:
    """The folder with the program and other files for tests."""
    need_toolchain()
    found = importlib.util.find_spec("openvino")
    if found is None or found.origin is None:
        pytest.skip("openvino is not installed")
    options = "-DEVIT_RUNTIME=openvino", "-DEVIT_TESTS=ON", f"-DOpenVINO_DIR={Path(found.origin).parent / 'cmake'}"
    return made_once("example", lambda path: build(path, *options))


Program = Callable[..., Result]


@pytest.fixture
def program(built) -> Program:
    return functools.partial(call, built / "evit_example")


@pytest.fixture
def probe(built) -> Callable[..., bytes]:
    def run(*arguments: object) -> bytes:
        done = subprocess.run([built / "probe", *map(str, arguments)], capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout

    return run


# ---- bundles and images


def bundle_of(folder: Path, kind: str, **options: Any) -> Bundle:
    checkpoint = write_checkpoint(folder / "checkpoint.safetensors", kind)
    bundle, _ = convert(
        checkpoint,
        keep_rate=0.6,
        options=ConvertOptions(targets=("onnx", "openvino"), **options),
        measure=ProfileOptions(batch_sizes=(1,), duration=0.01, threads=1),
        out=folder / "bundle",
    )
    return bundle


KINDS = ("plain", "distilled", "registers, no classes", "qk-norm, one channel", "int8")


@pytest.fixture(scope="session")
def bundles(built, tmp_path_factory) -> Callable[[str], Bundle]:
    """Small bundles, made once, and only if the program was built. Read only."""
    made: dict[str, Bundle] = {}

    def get(kind: str) -> Bundle:
        if kind not in made:
            folder = tmp_path_factory.mktemp("bundles")
            if kind == "int8":
                inputs = np.load(get("plain").file(GOLDEN))["inputs"]
                checkpoint = write_checkpoint(folder / "checkpoint.safetensors", "plain")
                targets = ("onnx", "openvino")
                made[kind] = quantized_bundle(checkpoint, inputs, folder / "bundle", targets=targets, precision="int8")
            else:
                made[kind] = bundle_of(folder, kind)
        return made[kind]

    return get


@pytest.fixture
def broken(bundles, tmp_path) -> Path:
    """A copy of the plain bundle that a test may modify."""
    return Path(shutil.copytree(bundles("plain").path, tmp_path / "bundle"))


def pictures() -> dict[str, tuple[Image.Image, dict[str, Any]]]:
    """Image files by name: picture, and how it is saved."""
    china, flower = sample_photographs()
    wide, tall = china.crop((0, 100, 640, 140)), flower.crop((300, 0, 333, 427))
    alpha = flower.resize((150, 100)).convert("RGBA")
    alpha.putalpha(flower.resize((150, 100)).convert("L"))
    return {
        "china.jpg": (china, {"quality": 95}),
        "flower 4:4:4.jpg": (flower, {"quality": 90, "subsampling": 0}),
        "progressive.jpg": (china, {"quality": 60, "progressive": True}),
        "gray.jpg": (flower.convert("L"), {}),
        "odd.jpg": (china.resize((233, 311)), {"quality": 85}),
        "china.png": (china, {}),
        "small.png": (flower.resize((50, 71)), {}),
        "wide.png": (wide, {}),
        "tall.png": (tall, {}),
        "as large as the input.png": (china.resize((96, 96)), {}),
        "one pixel.png": (china.resize((1, 1)), {}),
        "alpha.png": (alpha, {}),
        "gray and alpha.png": (alpha.convert("LA"), {}),
        "palette.png": (flower.quantize(64), {}),
        "transparent palette.png": (flower.quantize(64), {"transparency": 3}),
        "gray.png": (china.convert("L"), {}),
        "two colors.png": (china.convert("1"), {}),
    }


@pytest.fixture(scope="session")
def image_files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("images")
    files = {name: folder / name for name in pictures()}
    for name, (picture, options) in pictures().items():
        picture.save(files[name], **options)
    return files


def may_differ(name: str) -> bool:
    """Pillow bundles its own JPEG decoder, and before version 13 swapped the sides of tall images."""
    return name.endswith(".jpg") or (name == "tall.png" and PILLOW < 13)
