"""Bundles for packaging, some with a simulated TensorRT plan; also their pytest fixtures.

TensorRT is only installed on machines with a GPU. ``package`` reads only the header of a plan, so these plans consist
of a header.
"""

import shutil
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from evit_deploy.bundle.bundle import Bundle, read_bundle, write_manifest
from evit_deploy.bundle.manifest import DENSE, ENGINE, REPORT, Engine
from evit_deploy.recipe.options import BatchProfile
from evit_deploy.report.report import Report
from evit_deploy.serving.options import PackageOptions
from evit_deploy.serving.package import package

VERSION = "11.1.0.106"
RECORD = Engine("tensorrt", VERSION, ("sm80",), "595.1", "fp32", (BatchProfile(1, 4, 8),), None, {}, 1.0)


def plan(version: str = VERSION, tag: bytes = b"ftrt", content: bytes = b"") -> bytes:
    """The header of a TensorRT plan."""
    return tag + bytes(20) + bytes(int(number) for number in version.split(".")) + content.ljust(100, b"\0")


@pytest.fixture
def own(converted, tmp_path) -> Bundle:
    """A bundle next to its checkpoint, which a test may modify."""
    shutil.copytree(converted.path.parent, tmp_path / "work")
    return read_bundle(tmp_path / "work" / converted.path.name)


def change(bundle: Bundle, **fields: Any) -> Bundle:
    """The same bundle with changed manifest fields and updated hashes."""
    write_manifest(bundle.path, msgspec.structs.replace(bundle.manifest, **fields))
    return read_bundle(bundle.path)


def change_report(bundle: Bundle, alter: Callable[[Report], Report]) -> Bundle:
    path = bundle.path / REPORT
    report = alter(msgspec.json.decode(path.read_bytes(), type=Report))
    path.write_bytes(msgspec.json.encode(report))
    return change(bundle)


def verified_on(platform: str) -> Callable[[Report], Report]:
    """Renames the checks of ONNX Runtime in a report to those of another platform."""

    def alter(report: Report) -> Report:
        checks = [
            msgspec.structs.replace(check, name=check.name.replace("onnxruntime", platform)) for check in report.checks
        ]
        return msgspec.structs.replace(report, checks=tuple(checks))

    return alter


PlanMaker = Callable[..., Bundle]


@pytest.fixture
def planned(converted, tmp_path) -> PlanMaker:
    """Creates a bundle of the tiny model that claims a verified plan."""

    def make(gpu: str = "sm80", version: str = VERSION, tag: bytes = b"ftrt", **record: Any) -> Bundle:
        place = tmp_path / f"{gpu}-{len(list(tmp_path.iterdir()))}" / "bundle"
        shutil.copytree(converted.path, place)
        (place / ENGINE).write_bytes(plan(version, tag, gpu.encode()))
        engine = msgspec.structs.replace(RECORD, **({"version": version, "gpus": (gpu,)} | record))
        bundle = change(msgspec.structs.replace(converted, path=place), engine=engine)
        return change_report(bundle, verified_on(engine.target))

    return make


def without_onnx(bundle: Bundle) -> Bundle:
    for name in ("model.onnx", DENSE):
        (bundle.path / name).unlink()
    return change(bundle)


def make_package(paths: Any, purpose: str, **given: Any) -> Any:
    """Calls ``package`` with the options as keyword arguments."""
    fields = {name: given.pop(name) for name in PackageOptions.__struct_fields__ if name in given}
    return package(paths, purpose, options=PackageOptions(**fields), **given)
