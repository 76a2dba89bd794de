"""Which targets can be made and run on this machine, by what is installed and what its GPU is."""

from collections.abc import Mapping

import msgspec

from evit_deploy.environment.nvidia import Nvidia, nvidia
from evit_deploy.environment.requirements import (
    EXTRAS,
    fault,
    install_line,
    lacking,
    needed,
    pip_install,
    version_of,
)
from evit_deploy.errors import MissingRequirement

RTX_GPUS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
"""What TensorRT-RTX builds for and runs on, in the order of the bits in a plan's header."""

# The first driver branch of a CUDA major version; an older driver runs nothing that was built with it.
_FIRST_DRIVER = {12: 525, 13: 580}

_TENSORRT_SINCE = (7, 5)  # the first compute capability that TensorRT 10.15 and newer has kernels for

_NO_GPU = "no NVIDIA GPU is visible"
_GPU_FIX = "Run it on a machine with an NVIDIA GPU and its driver; CUDA_VISIBLE_DEVICES may hide one."

TARGETS = ("onnx", "openvino", "tensorrt", "tensorrt-rtx", "torch-tensorrt")

_FOR_ONNX = ("torch", "torchvision", "timm", "onnx", "onnxscript", "onnx-ir", "numpy", "onnxruntime")

TENSORRT = "tensorrt"


class Target(msgspec.Struct, frozen=True):
    """What can be done for one target here.

    Args:
        name: As in ``--target``.
        builds: Whether it can be made here.
        runs: Whether what was made runs here.
        reasons: Why not.
        fix: The line that mends the first of them.
    """

    name: str
    builds: bool
    runs: bool
    reasons: tuple[str, ...] = ()
    fix: str | None = None


def targets(driver: Nvidia | None = None, broken: Mapping[str, str] | None = None) -> tuple[Target, ...]:
    """What can be built and what can be run here.

    Args:
        driver: What :func:`nvidia` said, if it was asked already.
        broken: Package -> why it does not load, if that was tried.
    """
    driver, broken = driver or nvidia(), broken or {}
    try:
        needed()
    except MissingRequirement as error:
        return tuple(Target(name, False, False, (error.what,), install_line(name)) for name in TARGETS)
    return tuple(_target(name, driver, broken) for name in TARGETS)


def usable_targets() -> tuple[str, ...]:
    """Targets that can be both built and run here, by what is installed; ``"tensorrt" in usable_targets()``."""
    return tuple(target.name for target in targets() if target.builds and target.runs)


def _target(name: str, driver: Nvidia, broken: Mapping[str, str]) -> Target:
    packages = list(needed(name)) if name in EXTRAS else []
    problems = [(package, broken[package]) for package in [*_FOR_ONNX, *packages] if package in broken]
    if problems:
        reasons = tuple(f"{package} does not load: {why}" for package, why in problems)
        return Target(name, False, False, reasons, f"pip install --force-reinstall {problems[0][0]}")
    # Every target starts from the portable file.
    required = needed()
    faults = {package: clause for package in _FOR_ONNX if (clause := fault(required[package]))}
    if faults:
        return Target(name, False, False, tuple(faults.values()), pip_install(required[p] for p in faults))
    if name == "onnx":
        return Target(name, True, True)
    if reasons := lacking(name):
        return Target(name, False, False, tuple(reasons), install_line(name))
    if name == "openvino":
        return Target(name, True, True)
    reason, fix = _device(name, driver)
    builds = reason is None or name == "tensorrt-rtx"  # it builds for the GPUs it is told to, without one
    return Target(name, builds, reason is None, (reason,) if reason else (), fix)


def _device(name: str, driver: Nvidia) -> tuple[str | None, str | None]:
    """Why the GPU here does not do for a target, and what would."""
    if not driver.gpus:
        return (f"{_NO_GPU}: {driver.error}" if driver.error else _NO_GPU), _GPU_FIX
    needed = cuda_of(name)
    if needed is not None and driver.cuda is not None and driver.cuda[0] < needed:
        runs = "{}.{}".format(*driver.cuda)
        reason = f"it is built with CUDA {needed}, and the driver {driver.driver} runs CUDA {runs}"
        return reason, _old_driver_fix(name, needed, driver.cuda[0])
    gpu = driver.gpus[0]
    if name == "tensorrt-rtx" and gpu.architecture not in RTX_GPUS:
        names = ", ".join(RTX_GPUS)
        return f"{gpu.name} is {gpu.architecture}, TensorRT-RTX runs on {names}", "Use --target tensorrt on this GPU."
    if gpu.capability < _TENSORRT_SINCE:
        return f"{gpu.name} is {gpu.architecture}, TensorRT needs sm75 or newer", "Use --target onnx on this GPU."
    return None, None


def cuda_of(target: str) -> int | None:
    """CUDA major version that a target's library is built with, read off the name of its wheel."""
    package = "tensorrt" if target == "torch-tensorrt" else target
    majors = [major for major in _FIRST_DRIVER if version_of(f"{package}-cu{major}") is not None]
    return max(majors, default=None)


def _old_driver_fix(name: str, needed: int, driver: int) -> str:
    update = f"Update the NVIDIA driver to {_FIRST_DRIVER[needed]} or newer"
    if name == "torch-tensorrt" or driver not in _FIRST_DRIVER:
        return update
    old = " ".join([name, *(f"{name}-cu{needed}{part}" for part in ("", "-bindings", "-libs"))])
    return f"{update}, or: pip uninstall -y {old} && pip install {name}-cu{driver}"
