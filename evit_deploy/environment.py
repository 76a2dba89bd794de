"""What is installed here, told without importing it: versions, extras, the GPU, and which targets that makes usable.

Everything here is cheap (package metadata and NVML), so that ``convert`` can ask before it loads anything. What is
installed may still be broken; :mod:`evit_deploy.doctor` loads it all, in processes of its own, and says.
"""

import importlib.metadata
import os
from collections.abc import Mapping

import msgspec

from evit_deploy.engine import RTX_GPUS
from evit_deploy.errors import InputError, MissingRequirement

# Package -> the least version that works; the same bounds stand in pyproject.toml.
REQUIRED = {
    "torch": "2.11",
    "torchvision": "0.26",
    "timm": "1.0.28",
    "onnx": "1.20",
    "onnxscript": "0.5.6",
    "onnx-ir": "0.1.12",
    "onnxruntime": "1.23",
    "numpy": "1.26",
    "safetensors": "0.4.5",
    "scikit-learn": "1.4",
    "pillow": "10",
    "ml-dtypes": "0.5",
    "msgspec": "0.19",
    "pyyaml": "6",
    "huggingface-hub": "0.23",
    "rich": "13",
    "click": "8.1",
}


class Extra(msgspec.Struct, frozen=True):
    """Packages that one more ability needs.

    Args:
        purpose: The ability.
        packages: Package -> the least version that works; the same bounds stand in pyproject.toml.
        below: Package -> the first version that does not work any more.
    """

    purpose: str
    packages: dict[str, str]
    below: dict[str, str] = {}


EXTRAS = {
    "openvino": Extra("OpenVINO models and their runtime", {"openvino": "2025.4"}),
    "tensorrt": Extra("TensorRT engines", {"tensorrt": "10.15", "polygraphy": "0.53", "nvidia-ml-py": "12"}),
    "tensorrt-rtx": Extra("TensorRT-RTX engines", {"tensorrt-rtx": "1.5", "polygraphy": "0.53", "nvidia-ml-py": "12"}),
    "triton": Extra("packages for Triton Inference Server, and clients of it", {"tritonclient": "2.51"}),
    "torch-tensorrt": Extra(
        "TensorRT engines by way of PyTorch; pins PyTorch, so give it an environment of its own",
        {"torch-tensorrt": "2.14", "torch": "2.14", "nvidia-ml-py": "12"},
        {"torch-tensorrt": "2.15", "torch": "2.15"},
    ),
}

# Wheels for one CUDA version can be installed without the metapackage that picks one.
_ALSO_KNOWN_AS = {
    "tensorrt": ("tensorrt-cu13", "tensorrt-cu12"),
    "tensorrt-rtx": ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12"),
    "onnxruntime": ("onnxruntime-gpu", "onnxruntime-openvino"),
}

# The first driver branch of a CUDA major version; an older driver runs nothing that was built with it.
_FIRST_DRIVER = {12: 525, 13: 580}

_TENSORRT_SINCE = (7, 5)  # the first compute capability that TensorRT 10.15 and newer has kernels for

_NO_GPU = "no NVIDIA GPU is visible"
_GPU_FIX = "Run it on a machine with an NVIDIA GPU and its driver; CUDA_VISIBLE_DEVICES may hide one."


def version_of(package: str) -> str | None:
    """Installed version of a distribution (or of one that stands in for it), or ``None``."""
    for name in (package, *_ALSO_KNOWN_AS.get(package, ())):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if version:  # a damaged installation has metadata without a version
            return version
    return None


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, for comparing.

    >>> numbers("2.15.0+cu132"), numbers("10.14.1.48.post1")
    ((2, 15, 0), (10, 14, 1, 48))
    """
    found = []
    for part in version.split("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        found.append(int(digits))
    return tuple(found)


def fits(version: str | None, least: str, below: str | None = None) -> bool:
    """Whether a version is there and within its bounds."""
    if version is None or numbers(version) < numbers(least):
        return False
    return below is None or numbers(version) < numbers(below)


def install_line(name: str) -> str:
    """The line that installs an extra or a required package."""
    if name in EXTRAS:
        return f'pip install "evit-deploy[{name}]"'
    return f'pip install "{name}>={REQUIRED[name]}"'


def require(package: str) -> None:
    """Makes sure that a required package is there.

    Raises:
        MissingRequirement: It is missing or too old; the message has the exact pip line.
    """
    found, least = version_of(package), REQUIRED[package]
    if not fits(found, least):
        raise MissingRequirement(
            f"{package} is needed",
            seen=found or "not installed",
            wanted=f"{least} or newer" if found else None,
            fix=f"Run: {install_line(package)}",
        )


def lacking(extra: str) -> list[str]:
    """What an extra's packages lack, one clause each; empty when all are there."""
    bounds, found = EXTRAS[extra], []
    for package, least in bounds.packages.items():
        version, below = version_of(package), bounds.below.get(package)
        if version is None:
            found.append(f"{package} is not installed")
        elif not fits(version, least, below):
            found.append(
                f"{package} is {version}, needed {f'{least} or newer' if below is None else f'>={least},<{below}'}"
            )
    return found


def require_extra(name: str) -> None:
    """Makes sure that all packages of an extra are there; whether they load is for whoever imports them.

    Args:
        name: As in ``pip install "evit-deploy[<name>]"``.

    Raises:
        MissingRequirement: One is missing or has the wrong version; the message has the exact pip line.
        InputError: There is no such extra.
    """
    if name not in EXTRAS:
        raise InputError("unknown extra", seen=repr(name), wanted="one of " + ", ".join(EXTRAS))
    if reasons := lacking(name):
        raise MissingRequirement("; ".join(reasons), where=name, fix=f"Run: {install_line(name)}")


class Gpu(msgspec.Struct, frozen=True):
    """One GPU.

    Args:
        name: As the driver calls it.
        capability: Compute capability.
        memory: Bytes.
    """

    name: str
    capability: tuple[int, int]
    memory: int

    @property
    def architecture(self) -> str:
        """``sm90``."""
        return "sm{}{}".format(*self.capability)


class Nvidia(msgspec.Struct, frozen=True):
    """What the NVIDIA driver says.

    Args:
        driver: Its version; ``None`` without one.
        cuda: The newest CUDA version it runs.
        gpus: Those that this process may use.
        error: Why nothing more could be learnt.
    """

    driver: str | None = None
    cuda: tuple[int, int] | None = None
    gpus: tuple[Gpu, ...] = ()
    error: str | None = None


def nvidia() -> Nvidia:
    """Asks NVML, which neither loads CUDA nor takes memory on the GPU."""
    try:
        import pynvml
    except Exception as error:  # not installed, or damaged
        return Nvidia(error=f"nvidia-ml-py cannot be used: {type(error).__name__}: {error}")
    try:
        pynvml.nvmlInit()
    except Exception as error:  # pynvml makes its classes at run time
        return Nvidia(error=str(error))
    try:
        driver = str(pynvml.nvmlSystemGetDriverVersion())
        version = int(pynvml.nvmlSystemGetCudaDriverVersion_v2())
        gpus = _visible([_gpu(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount())])
        return Nvidia(driver, (version // 1000, version % 1000 // 10), tuple(gpus))
    except Exception as error:  # a driver that was updated under a running machine, a GPU that fell off its bus
        return Nvidia(error=str(error))
    finally:
        pynvml.nvmlShutdown()


def _gpu(pynvml, index: int) -> tuple[str, Gpu]:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    memory = int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
    return str(pynvml.nvmlDeviceGetUUID(handle)), Gpu(str(pynvml.nvmlDeviceGetName(handle)), (major, minor), memory)


def _visible(gpus: list[tuple[str, Gpu]]) -> list[Gpu]:
    """NVML knows all GPUs; CUDA only those that CUDA_VISIBLE_DEVICES names, up to the first name it does not know."""
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return [gpu for _, gpu in gpus]
    visible = []
    for name in (part.strip() for part in wanted.split(",")):
        if name.isdecimal() and int(name) < len(gpus):
            visible.append(gpus[int(name)][1])
        elif name.startswith("MIG-") and gpus:  # a slice of some GPU here; all that is asked of it is the same
            visible.append(gpus[0][1])
        elif name and (match := [gpu for identity, gpu in gpus if identity.startswith(name)]):
            visible.append(match[0])
        else:
            break
    return visible


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


TARGETS = ("onnx", "openvino", "tensorrt", "tensorrt-rtx", "torch-tensorrt")

_FOR_ONNX = ("torch", "torchvision", "timm", "onnx", "onnxscript", "onnx-ir", "numpy", "onnxruntime")


def targets(driver: Nvidia | None = None, broken: Mapping[str, str] | None = None) -> tuple[Target, ...]:
    """What can be built and what can be run here.

    Args:
        driver: What :func:`nvidia` said, if it was asked already.
        broken: Package -> why it does not load, if that was tried.
    """
    driver, broken = driver or nvidia(), broken or {}
    return tuple(_target(name, driver, broken) for name in TARGETS)


def usable_targets() -> tuple[str, ...]:
    """Targets that can be both built and run here, by what is installed; ``"tensorrt" in usable_targets()``."""
    return tuple(target.name for target in targets() if target.builds and target.runs)


def _target(name: str, driver: Nvidia, broken: Mapping[str, str]) -> Target:
    packages = list(EXTRAS[name].packages) if name in EXTRAS else []
    problems = [(package, broken[package]) for package in [*_FOR_ONNX, *packages] if package in broken]
    if problems:
        reasons = tuple(f"{package} does not load: {why}" for package, why in problems)
        return Target(name, False, False, reasons, f"pip install --force-reinstall {problems[0][0]}")
    # Every target starts from the portable file.
    absent = [p for p in _FOR_ONNX if not fits(version_of(p), REQUIRED[p])]
    if absent:
        fix = "pip install " + " ".join(f'"{p}>={REQUIRED[p]}"' for p in absent)
        return Target(name, False, False, tuple(f"{p} is {version_of(p) or 'not installed'}" for p in absent), fix)
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
