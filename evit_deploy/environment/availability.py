"""Whether a target can be built and run on this machine, by installed packages and GPU."""

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
"""GPUs supported by TensorRT-RTX, in the order of the bits in an engine's header."""

# First driver branch of each CUDA major version; older drivers cannot run code built with it.
_FIRST_DRIVER = {12: 525, 13: 580}

_TENSORRT_SINCE = (7, 5)  # lowest compute capability supported by TensorRT 10.15 and later

_NO_GPU = "no NVIDIA GPU is visible"
_GPU_FIX = "Run it on a machine with an NVIDIA GPU and its driver; CUDA_VISIBLE_DEVICES may hide one."

_FOR_ONNX = ("torch", "torchvision", "timm", "onnx", "onnxscript", "onnx-ir", "numpy", "onnxruntime")

TENSORRT = "tensorrt"
"""Name of the runtime that supports plugins, of its extra and of its package."""


class Needs(msgspec.Struct, frozen=True):
    """Requirements of a target, in addition to those of every target.

    Args:
        extra: Extra with its packages.
        wheel: Package whose wheels are specific to a CUDA version, if any.
        gpu: Whether the result runs only on an NVIDIA GPU.
        ahead: Whether it can be built on any machine for given GPUs.
        gpus: Supported compute capabilities; if empty, all from :data:`_TENSORRT_SINCE` on.
        label: Name of the library.
    """

    extra: str | None = None
    wheel: str | None = None
    gpu: bool = False
    ahead: bool = False
    gpus: tuple[str, ...] = ()
    label: str = "TensorRT"


class Availability(msgspec.Struct, frozen=True):
    """Availability of a target on this machine.

    Args:
        name: Name of the target, as in ``--target``.
        builds: Whether it can be built here.
        runs: Whether the result runs here.
        reasons: Why not, if either is false.
        fix: The command that fixes the first of them.
    """

    name: str
    builds: bool
    runs: bool
    reasons: tuple[str, ...] = ()
    fix: str | None = None


def availability(
    name: str, needs: Needs, driver: Nvidia | None = None, broken: Mapping[str, str] | None = None
) -> Availability:
    """Checks whether a target can be built and run here, by installed packages and GPU.

    Args:
        name: Name of the target.
        needs: Its requirements.
        driver: Result of :func:`nvidia`, if known.
        broken: Package -> why it does not load, if tested.
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
    # Every target is built from the portable file.
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
    """Why the GPU here does not suit a target, and the fix."""
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
    """CUDA major version that a library is built with, from the name of its wheel."""
    majors = [major for major in _FIRST_DRIVER if version_of(f"{package}-cu{major}") is not None]
    return max(majors, default=None)


def _old_driver_fix(name: str, needed: int, driver: int, *, whole: bool) -> str:
    update = f"Update the NVIDIA driver to {_FIRST_DRIVER[needed]} or newer"
    if not whole or driver not in _FIRST_DRIVER:
        return update
    old = " ".join([name, *(f"{name}-cu{needed}{part}" for part in ("", "-bindings", "-libs"))])
    return f"{update}, or: pip uninstall -y {old} && pip install {name}-cu{driver}"
