"""Which targets are usable: here as it is, and on made-up machines."""

import json
from pathlib import Path

from evit_deploy.registry import TARGETS
from evit_deploy.targets.target import available, usable_targets
from tests.support.machines import on_gpu, pretend, python

TARGETS_AS_JSON = """
import msgspec
from evit_deploy.targets.target import available
print(msgspec.json.encode({target.name: target for target in available()}).decode())
"""


def test_targets_are_listed_without_loading_anything():
    code = """
import sys
from evit_deploy.targets.target import usable_targets
usable_targets()
print([name for name in ("torch", "numpy", "onnx", "onnxruntime", "openvino", "tensorrt_rtx") if name in sys.modules])
"""
    assert python(code).strip() == "[]"


def test_targets_here():
    here = {target.name: target for target in available()}
    assert tuple(here) == tuple(TARGETS.names())
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
