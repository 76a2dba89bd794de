"""What is installed here, told without importing it: versions, extras, the GPU, and which targets that makes usable.

Everything here is cheap (package metadata and NVML), so that ``convert`` can ask before it loads anything. What is
installed may still be broken; :mod:`evit_deploy.doctor.doctor` loads it all, in processes of its own, and says.
"""

import importlib.metadata

import msgspec

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
    "accelerate": "1.0",
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
