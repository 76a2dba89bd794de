"""What is installed and usable, told without loading it: here as it is, and in made-up places with real files."""

import json
import re
import tomllib
from pathlib import Path

import pytest

from evit_deploy.environment.nvidia import nvidia
from evit_deploy.environment.requirements import (
    EXTRAS,
    REQUIRED,
    fits,
    lacking,
    numbers,
    require,
    require_extra,
    version_of,
)
from evit_deploy.environment.targets import TARGETS, targets, usable_targets
from evit_deploy.errors import InputError, MissingRequirement
from tests.support.machines import on_gpu, pretend, python
from tests.support.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

TARGETS_AS_JSON = """
import msgspec
from evit_deploy.environment.targets import targets
print(msgspec.json.encode({target.name: target for target in targets()}).decode())
"""


# ---- versions and extras


def test_bounds_are_those_of_the_project_file():
    stated = dict(re.fullmatch(r"([\w-]+)>=([\d.]+)", line).groups() for line in PROJECT["dependencies"])
    assert stated == REQUIRED
    for name, extra in EXTRAS.items():
        bounds = {}
        for line in PROJECT["optional-dependencies"][name]:
            package, least, below = re.fullmatch(r"([\w-]+)(?:\[[\w,]+\])?>=([\d.]+)(?:,<([\d.]+))?", line).groups()
            bounds[package] = (least, below)
        assert bounds == {package: (least, extra.below.get(package)) for package, least in extra.packages.items()}


@pytest.mark.parametrize(
    ("version", "least", "below", "fitting"),
    [
        ("2.15.0+cu132", "2.11", None, True),
        ("2.9.1", "2.11", None, False),
        ("10.14.1.48.post1", "10.15", None, False),
        ("10.15.1.29", "10.15", None, True),
        ("10.15", "10.15", None, True),
        ("2.14.3", "2.14", "2.15", True),
        ("2.15.0", "2.14", "2.15", False),
        ("2026.4.1", "2025.4", None, True),
        (None, "1", None, False),
    ],
)
def test_versions_are_compared_as_numbers(version, least, below, fitting):
    assert fits(version, least, below) is fitting


def test_a_version_that_is_no_number_has_none():
    assert numbers("unknown") == ()


def test_what_is_required_here_is_here():
    for package in REQUIRED:
        require(package)


def test_a_required_package_that_is_too_old(place):
    pretend(place, "timm", "0.9.2")
    with pytest.raises(MissingRequirement) as caught:
        require("timm")
    assert str(caught.value) == (
        'timm is needed (got 0.9.2, expected 1.0.28 or newer). Run: pip install "timm>=1.0.28"'
    )
    assert caught.value.exit_code == 3


def test_metadata_without_a_version_is_no_installation(place):
    pretend(place, "timm", None)
    assert version_of("timm") is None


def test_an_extra_that_is_missing():
    if version_of("tensorrt"):
        pytest.skip("TensorRT is installed")
    with pytest.raises(MissingRequirement) as caught:
        require_extra("tensorrt")
    assert str(caught.value) == 'tensorrt: tensorrt is not installed. Run: pip install "evit-deploy[tensorrt]"'


def test_an_extra_with_the_wrong_versions(place):
    pretend(place, "tensorrt", "10.14.1.48.post1")
    pretend(place, "polygraphy", "0.49.9")
    pretend(place, "torch-tensorrt", "2.15.0")
    assert lacking("tensorrt")[:2] == [
        "tensorrt is 10.14.1.48.post1, needed 10.15 or newer",
        "polygraphy is 0.49.9, needed 0.53 or newer",
    ]
    assert lacking("torch-tensorrt")[0] == "torch-tensorrt is 2.15.0, needed >=2.14,<2.15"


def test_a_wheel_for_one_cuda_version_counts(place):
    pretend(place, "tensorrt-cu12", "11.4.0.106")
    assert version_of("tensorrt") == "11.4.0.106"


def test_there_is_no_such_extra():
    with pytest.raises(InputError, match=r"unknown extra \(got 'tensorflow', expected one of openvino, tensorrt"):
        require_extra("tensorflow")


# ---- targets


def test_targets_are_told_quickly_and_without_loading_anything():
    code = """
import sys, time
started = time.perf_counter()
from evit_deploy.environment.targets import usable_targets
usable_targets()
assert time.perf_counter() - started < 2, time.perf_counter() - started
print([name for name in ("torch", "numpy", "onnx", "onnxruntime", "openvino", "tensorrt_rtx") if name in sys.modules])
"""
    assert python(code).strip() == "[]"


def test_targets_here():
    here = {target.name: target for target in targets()}
    assert tuple(here) == TARGETS
    assert here["onnx"].builds
    assert here["onnx"].runs
    assert usable_targets() == tuple(name for name, target in here.items() if target.builds and target.runs)
    for target in here.values():
        assert bool(target.reasons) is bool(target.fix) is not (target.builds and target.runs)


def gpu_targets(driver: Path, sm: int, **environment: str) -> dict:
    return json.loads(on_gpu(driver, TARGETS_AS_JSON, sm, **environment))


def test_a_machine_with_a_gpu(driver, place):
    pretend(place, "tensorrt", "11.4.0.106")
    pretend(place, "tensorrt-cu13", "11.4.0.106")
    pretend(place, "tensorrt-rtx", "1.7.1.116")
    pretend(place, "tensorrt-rtx-cu13", "1.7.1.116")
    pretend(place, "torch-tensorrt", "2.14.0")
    pretend(place, "torch", "2.14.1")
    pretend(place, "polygraphy", "0.53.6")
    for name, target in gpu_targets(driver, 89).items():
        assert target["builds"], name
        assert target["runs"], name
        assert target["fix"] is None
    # TensorRT-RTX builds for its own GPUs anywhere, and runs on no Hopper
    hopper = gpu_targets(driver, 90)
    assert (hopper["tensorrt"]["builds"], hopper["tensorrt"]["runs"]) == (True, True)
    assert (hopper["tensorrt-rtx"]["builds"], hopper["tensorrt-rtx"]["runs"]) == (True, False)
    assert hopper["tensorrt-rtx"]["reasons"] == [
        "NVIDIA Pretend is sm90, TensorRT-RTX runs on sm75, sm80, sm86, sm89, sm120, sm121"
    ]
    assert hopper["tensorrt-rtx"]["fix"] == "Use --target tensorrt on this GPU."
    volta = gpu_targets(driver, 70)
    assert not volta["tensorrt"]["builds"]
    assert volta["tensorrt"]["reasons"] == ["NVIDIA Pretend is sm70, TensorRT needs sm75 or newer"]
    # hidden from CUDA, it does not count; neither does a name that CUDA would not know
    for hidden in ("", "-1", "7", "GPU-ffff"):
        unseen = gpu_targets(driver, 89, CUDA_VISIBLE_DEVICES=hidden)["tensorrt"]
        assert unseen["reasons"] == ["no NVIDIA GPU is visible"]
        assert "CUDA_VISIBLE_DEVICES" in unseen["fix"]
    for shown in ("0", "GPU-0123", " 0 , 7"):
        assert gpu_targets(driver, 89, CUDA_VISIBLE_DEVICES=shown)["tensorrt"]["runs"]


def test_a_driver_that_is_too_old(driver, place):
    pretend(place, "tensorrt", "11.4.0.106")
    pretend(place, "tensorrt-cu13", "11.4.0.106")
    pretend(place, "polygraphy", "0.53.6")
    old = {"FAKE_DRIVER": "550.54.14", "FAKE_CUDA": "12040"}
    target = gpu_targets(driver, 80, **old)["tensorrt"]
    assert not target["builds"]
    assert target["reasons"] == ["it is built with CUDA 13, and the driver 550.54.14 runs CUDA 12.4"]
    assert target["fix"].startswith(
        "Update the NVIDIA driver to 580 or newer, or: pip uninstall -y tensorrt tensorrt-cu13 "
    )
    assert target["fix"].endswith(" && pip install tensorrt-cu12")


def test_a_driver_that_does_not_answer(driver):
    said = on_gpu(driver, "from evit_deploy.environment.nvidia import nvidia; print(nvidia())", 80, FAKE_RETURN="9")
    assert "driver=None" in said
    assert "Driver Not Loaded" in said


def test_without_nvidia_ml_py(place):
    (place / "pynvml.py").write_text("raise ImportError('libsomething.so: cannot open shared object file')")
    said = python("from evit_deploy.environment.nvidia import nvidia; print(nvidia().error)")
    assert "nvidia-ml-py cannot be used: ImportError: libsomething.so" in said


def test_nvidia_never_raises():
    assert nvidia() == nvidia()
