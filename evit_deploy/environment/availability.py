"""Whether a target can be made and run on this machine, by what is installed and what its GPU is."""

from collections.abc import Mapping

import msgspec

from evit_deploy.environment.nvidia import Nvidia, nvidia
from evit_deploy.environment.requirements import (
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

_FOR_ONNX = ("torch", "torchvision", "timm", "onnx", "onnxscript", "onnx-ir", "numpy", "onnxruntime")

TENSORRT = "tensorrt"
"""Name of the runtime that takes plugins, of its extra and of its package."""


class Needs(msgspec.Struct, frozen=True):
    """What a target needs of a machine, beyond what every target does.

    Args:
        extra: The extra with its packages.
        wheel: Package whose wheels are built for one CUDA version each, where there is one.
        gpu: Whether what was made runs on an NVIDIA GPU only.
        ahead: Whether it is built for GPUs that are named, on any machine.
        gpus: Compute capabilities it runs on; all from :data:`_TENSORRT_SINCE` on when empty.
        label: The library's own name.
    """

    extra: str | None = None
    wheel: str | None = None
    gpu: bool = False
    ahead: bool = False
    gpus: tuple[str, ...] = ()
    label: str = "TensorRT"


class Availability(msgspec.Struct, frozen=True):
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


def availability(
    name: str, needs: Needs, driver: Nvidia | None = None, broken: Mapping[str, str] | None = None
) -> Availability:
    """Whether a target can be made and run here, by what is installed and what the GPU is.

    Args:
        name: Of the target.
        needs: What it needs.
        driver: What :func:`nvidia` said, if it was asked already.
        broken: Package -> why it does not load, if that was tried.
    """
    driver, broken = driver or nvidia(), broken or {}
    try:
        required = needed()
    except MissingRequirement as error:
        return Availability(name, False, False, (error.what,), install_line(name))
    packages = list(needed(needs.extra)) if needs.extra is not None else []
    problems = [(package, broken[package]) for package in [*_FOR_ONNX, *packages] if package in broken]
    if problems:
        reasons = tuple(f"{package} does not load: {why}" for package, why in problems)
        return Availability(name, False, False, reasons, f"pip install --force-reinstall {problems[0][0]}")
    # Every target starts from the portable file.
    faults = {package: clause for package in _FOR_ONNX if (clause := fault(required[package]))}
    if faults:
        return Availability(name, False, False, tuple(faults.values()), pip_install(required[p] for p in faults))
    if needs.extra is not None and (reasons := lacking(needs.extra)):
        return Availability(name, False, False, tuple(reasons), install_line(needs.extra))
    if not needs.gpu:
        return Availability(name, True, True)
    reason, fix = _device(name, needs, driver)
    return Availability(name, reason is None or needs.ahead, reason is None, (reason,) if reason else (), fix)


def _device(name: str, needs: Needs, driver: Nvidia) -> tuple[str | None, str | None]:
    """Why the GPU here does not do for a target, and what would."""
    if not driver.gpus:
        return (f"{_NO_GPU}: {driver.error}" if driver.error else _NO_GPU), _GPU_FIX
    cuda = cuda_of(needs.wheel) if needs.wheel is not None else None
    if cuda is not None and driver.cuda is not None and driver.cuda[0] < cuda:
        runs = "{}.{}".format(*driver.cuda)
        reason = f"it is built with CUDA {cuda}, and the driver {driver.driver} runs CUDA {runs}"
        return reason, _old_driver_fix(name, cuda, driver.cuda[0], whole=needs.wheel == name)
    gpu = driver.gpus[0]
    if needs.gpus and gpu.architecture not in needs.gpus:
        names = ", ".join(needs.gpus)
        return f"{gpu.name} is {gpu.architecture}, {needs.label} runs on {names}", "Use --target tensorrt on this GPU."
    if gpu.capability < _TENSORRT_SINCE:
        return f"{gpu.name} is {gpu.architecture}, TensorRT needs sm75 or newer", "Use --target onnx on this GPU."
    return None, None


def cuda_of(package: str) -> int | None:
    """CUDA major version that a library is built with, read off the name of its wheel."""
    majors = [major for major in _FIRST_DRIVER if version_of(f"{package}-cu{major}") is not None]
    return max(majors, default=None)


def _old_driver_fix(name: str, needed: int, driver: int, *, whole: bool) -> str:
    update = f"Update the NVIDIA driver to {_FIRST_DRIVER[needed]} or newer"
    if not whole or driver not in _FIRST_DRIVER:
        return update
    old = " ".join([name, *(f"{name}-cu{needed}{part}" for part in ("", "-bindings", "-libs"))])
    return f"{update}, or: pip uninstall -y {old} && pip install {name}-cu{driver}"
