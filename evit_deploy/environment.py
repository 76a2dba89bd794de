"""What is installed here and what can be made with it; ``doctor`` prints it."""

import importlib.metadata
import importlib.util
import platform
import sys

import msgspec

from evit_deploy.errors import MissingRequirement

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
    "msgspec": "0.19",
    "pyyaml": "6",
    "huggingface-hub": "0.23",
    "rich": "13",
    "click": "8.1",
}


class Finding(msgspec.Struct, frozen=True):
    """One thing that was looked at.

    Args:
        name: Package, runtime or device.
        found: Its version or what it is; ``None`` if it is not there.
        usable: Whether evit-deploy can use it.
        needed: Whether evit-deploy cannot do without it.
        fix: The line that mends it, when it is not usable.
    """

    name: str
    found: str | None
    usable: bool
    needed: bool
    fix: str | None = None


def version_of(package: str) -> str | None:
    """Installed version of a distribution, or ``None``."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    numbers = []
    for part in version.split("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)


def require(package: str) -> None:
    """Makes sure that a package is there.

    Raises:
        MissingRequirement: It is missing or too old; the message has the exact pip line.
    """
    finding = look_at(package)
    if not finding.usable:
        raise MissingRequirement(f"{package} is needed", seen=finding.found or "not installed", fix=finding.fix)


def look_at(package: str) -> Finding:
    """Looks for one required package."""
    least, found = REQUIRED[package], version_of(package)
    usable = found is not None and _numbers(found) >= _numbers(least)
    return Finding(package, found, usable, True, None if usable else f'pip install "{package}>={least}"')


def doctor() -> list[Finding]:
    """Looks at Python, every package, and what PyTorch and ONNX Runtime can reach."""
    python = platform.python_version()
    findings = [Finding("python", python, sys.version_info >= (3, 11), True, "Use Python 3.11 or newer")]
    findings += [look_at(package) for package in REQUIRED]
    findings += [
        _runtime("eager", "torch", _torch_device),
        _runtime("onnxruntime", "onnxruntime", _onnxruntime_providers),
    ]
    if all(finding.usable for finding in findings[:5]):
        findings.append(_torchvision_pair())
    return [msgspec.structs.replace(f, fix=None) if f.usable else f for f in findings]


def _runtime(name: str, package: str, describe) -> Finding:
    if version_of(package) is None:
        return Finding(f"runtime {name}", None, False, True, look_at(package).fix)
    try:
        return Finding(f"runtime {name}", describe(), True, True)
    except Exception as error:  # a broken shared library raises anything; doctor's work is to say so
        fix = f"pip install --force-reinstall {package}"
        return Finding(f"runtime {name}", f"broken: {type(error).__name__}: {error}", False, True, fix)


def _torch_device() -> str:
    import torch

    gpu = f", GPU {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU"
    return f"CPU {torch.backends.cpu.get_cpu_capability()}{gpu}"


def _onnxruntime_providers() -> str:
    import onnxruntime

    return ", ".join(name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers())


def _torchvision_pair() -> Finding:
    """A torchvision built for another torch fails at import, and takes timm with it."""
    try:
        import torchvision.ops  # noqa: F401
    except Exception as error:
        fix = "pip install --force-reinstall torch torchvision"
        return Finding("torch with torchvision", f"broken: {error}", False, True, fix)
    return Finding("torch with torchvision", "they fit each other", True, True)
