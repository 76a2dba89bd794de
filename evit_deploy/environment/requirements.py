"""The requirements of evit-deploy according to its metadata, and the installed versions, without importing packages.

The bounds are defined only in ``pyproject.toml``; pip copies them to the metadata that is read here. An installed
package may still be broken; :mod:`evit_deploy.doctor.doctor` finds out by loading each one in a separate process.
"""

import functools
import importlib.metadata
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from evit_deploy.errors import InputError, MissingRequirement

DISTRIBUTION = "evit-deploy"

EXTRAS = {
    "openvino": "OpenVINO models and their runtime",
    "tensorrt": "TensorRT engines",
    "tensorrt-rtx": "TensorRT-RTX engines",
    "triton": "packages for Triton Inference Server, and clients of it",
    "torch-tensorrt": "TensorRT engines by way of PyTorch; pins PyTorch, so give it an environment of its own",
    "sign": "signatures of bundles",
    "data": "Hugging Face datasets as training data",
    "digits": "handwritten digits as training data, for trying things out",
    "wild": "the photographs behind the digits of digits-in-the-wild",
}
"""Extra -> purpose. ``dev`` and ``docs`` are left out because they serve only development."""

# Wheels for a specific CUDA version can be installed without the metapackage that selects one.
_ALSO_KNOWN_AS = {
    "tensorrt": ("tensorrt-cu13", "tensorrt-cu12"),
    "tensorrt-rtx": ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12"),
    "onnxruntime": ("onnxruntime-gpu", "onnxruntime-openvino"),
}


def needed(extra: str = "") -> dict[str, Requirement]:
    """Required packages on this machine by name; with an extra, those that it adds.

    Raises:
        MissingRequirement: evit-deploy has no metadata, because it runs from files that were not installed.
    """
    try:
        lines = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        raise MissingRequirement(
            f"{DISTRIBUTION} is not installed, so which versions it needs is unknown", fix=f"Run: {_install_self()}"
        ) from None
    found = {}
    for requirement in map(_parsed, lines):
        if requirement.marker is None:
            wanted = not extra
        else:
            always = requirement.marker.evaluate({"extra": ""})
            wanted = always if not extra else not always and requirement.marker.evaluate({"extra": extra})
        if wanted:
            found[canonicalize_name(requirement.name)] = requirement
    return found


@functools.cache
def _parsed(line: str) -> Requirement:
    return Requirement(line)


def version_of(package: str) -> str | None:
    """Installed version of a distribution or of its substitute; ``None`` if neither is installed."""
    for name in (package, *_ALSO_KNOWN_AS.get(package, ())):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if version:  # a damaged installation has metadata without a version
            return version
    return None


def bounds(requirement: Requirement) -> str:
    """The accepted versions, lower bound first.

    >>> bounds(Requirement("torch<2.15,>=2.14"))
    '>=2.14,<2.15'
    """
    return ",".join(sorted(map(str, requirement.specifier), reverse=True))


def fault(requirement: Requirement) -> str | None:
    """What is wrong with a package, as a clause; ``None`` if an accepted version is installed."""
    name = canonicalize_name(requirement.name)
    version = version_of(name)
    if version is None:
        return f"{name} is not installed"
    try:
        # pip selects no pre-release by default, so an installed one was chosen by the user.
        fits = requirement.specifier.contains(Version(version), prereleases=True)
    except InvalidVersion:
        fits = False
    return None if fits else f"{name} is {version}, needed {bounds(requirement)}"


def lacking(extra: str) -> list[str]:
    """Missing packages of an extra, one clause each; empty if all are installed."""
    try:
        requirements = needed(extra)
    except MissingRequirement as error:
        return [error.what]
    return [clause for requirement in requirements.values() if (clause := fault(requirement))]


def install_line(name: str) -> str:
    """The command that installs an extra or a package in accepted versions.

    It lists packages instead of ``evit-deploy[extra]``, which requires a package index. For an extra it lists the
    missing packages, or all of them if none is missing, because wheels for two CUDA versions must not be installed
    together.

    Args:
        name: An extra, or a package that evit-deploy or an extra needs.
    """
    try:
        if name in EXTRAS:
            found = list(needed(name).values())
            return pip_install([requirement for requirement in found if fault(requirement)] or found)
        return pip_install([next(found[name] for found in map(needed, ("", *EXTRAS)) if name in found)])
    except MissingRequirement:
        return _install_self(name)


def pip_install(requirements: Iterable[Requirement]) -> str:
    """The command that installs these packages in accepted versions."""
    names = []
    for requirement in requirements:
        extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
        names.append(f'"{canonicalize_name(requirement.name)}{extras}{bounds(requirement)}"')
    return "pip install " + " ".join(names)


def _install_self(name: str = "") -> str:
    """The command that installs evit-deploy from its folder, optionally with an extra."""
    root, extra = Path(__file__).parents[2], f"[{name}]" if name in EXTRAS else ""
    if (root / "pyproject.toml").is_file():
        return f'pip install -e "{root}{extra}"'
    return f'pip install "PATH{extra}", where PATH is the wheel or the source tree of evit-deploy'


def require_extra(name: str) -> None:
    """Checks that all packages of an extra are installed, without importing them.

    Args:
        name: One of ``EXTRAS``.

    Raises:
        MissingRequirement: One is missing or has the wrong version; the message contains the exact pip command.
        InputError: There is no such extra.
    """
    if name not in EXTRAS:
        raise InputError("unknown extra", seen=repr(name), wanted="one of " + ", ".join(EXTRAS))
    if reasons := lacking(name):
        raise MissingRequirement("; ".join(reasons), where=name, fix=f"Run: {install_line(name)}")
