"""The C++ example: building it, calling it, and bundles for it to be refused."""

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from evit_deploy.bundle import sha256

SOURCE = Path(__file__).parent.parent / "plugins" / "example"
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


def run_cmake(*arguments: object) -> str:
    done = subprocess.run(["cmake", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(folder: Path, *options: str) -> str:
    """Configures and builds; what CMake said while configuring."""
    said = run_cmake("-S", SOURCE, "-B", folder, "-DEVIT_WERROR=ON", *options)
    run_cmake("--build", folder, "-j2")
    return said


@dataclass
class Result:
    """What one call of the program did."""

    code: int
    out: str
    err: str

    def refused(self, code: int, *hints: str) -> None:
        """One line on stderr with these hints in it, and this exit code."""
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
    """Puts fields into the manifest; ``files`` adds to those there."""
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"].update(fields.pop("files", {}))
    path.write_text(json.dumps(manifest | fields))


def replace_file(bundle: Path, name: str, content: bytes) -> None:
    """Puts another content into a bundle, hash and all."""
    (bundle / name).write_bytes(content)
    change_manifest(bundle, files={name: sha256(bundle / name)})
