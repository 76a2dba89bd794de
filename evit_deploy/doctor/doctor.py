"""Checks what is installed, whether it loads, and which targets can be built and run, with a fix for each problem."""

import logging
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import msgspec
from packaging.requirements import Requirement

from evit_deploy.doctor.probe import Answer, ask
from evit_deploy.engines.plugin.library import choose_plugin
from evit_deploy.environment.availability import Availability
from evit_deploy.environment.nvidia import Nvidia, nvidia
from evit_deploy.environment.requirements import (
    DISTRIBUTION,
    EXTRAS,
    bounds,
    fault,
    install_line,
    lacking,
    needed,
    version_of,
)
from evit_deploy.errors import InputError, MissingRequirement
from evit_deploy.progress import doing
from evit_deploy.registry import RUNTIMES
from evit_deploy.targets.target import available

_LOG = logging.getLogger(__name__)

PYTHON = (3, 11)

PACKAGES, EXTRA, GPU, PLUGIN, RUNTIME = "Python and packages", "Extras", "GPU", "Plugin", "Runtimes"

# Required runtimes; the others are optional.
_NEEDED_RUNTIMES = ("eager", "onnxruntime")

# Package -> the module that loads its shared library. PyTorch and torchvision have their own probes.
_LIBRARIES = {
    "numpy": "numpy",
    "onnx": "onnx",
    "onnxruntime": "onnxruntime",
    "safetensors": "safetensors",
    "pillow": "PIL.Image",
    "pyyaml": "yaml",
}
_EXTRA_LIBRARIES = {
    "openvino": "openvino",
    "tensorrt": "tensorrt",
    "tensorrt-rtx": "tensorrt_rtx",
    "torch-tensorrt": "torch_tensorrt",
}


class Finding(msgspec.Struct, frozen=True):
    """Result of one check.

    Args:
        group: Heading of the check.
        name: Package, extra, device, tool or runtime.
        found: Its version or description; ``None`` if it is missing.
        usable: Whether evit-deploy can use it.
        needed: Whether evit-deploy requires it.
        fix: The command or instruction that makes it usable.
        note: Why it is not usable, or what it is for.
    """

    group: str
    name: str
    found: str | None
    usable: bool
    needed: bool = False
    fix: str | None = None
    note: str | None = None


class Diagnosis(msgspec.Struct, frozen=True):
    """Result of :func:`doctor`.

    Args:
        findings: The checks, group by group.
        targets: Which targets can be built and run.
    """

    findings: tuple[Finding, ...]
    targets: tuple[Availability, ...]

    @property
    def broken(self) -> list[Finding]:
        """Required findings that are not usable."""
        return [finding for finding in self.findings if finding.needed and not finding.usable]


def doctor() -> Diagnosis:
    """Checks Python, packages, extras, GPU, the plugin's tools, runtimes and targets."""
    doing(_LOG, "loading what is installed")
    driver = nvidia()
    with ThreadPoolExecutor() as pool:  # in parallel: one process imports PyTorch, the other the rest
        slow = pool.submit(ask, _jobs_with_torch())
        answers = ask(_jobs_without_torch())
        answers |= slow.result()
    findings = [_python(), *_required(answers), *_twice()]
    findings += [_extra(name, answers) for name in EXTRAS]
    findings += _gpu(driver, answers.get("torch"))
    findings += _plugin()
    findings += [_runtime(name, answers[f"runtime:{name}"]) for name in RUNTIMES.names()]
    return Diagnosis(tuple(findings), available(driver, _broken(answers)))


def _jobs_without_torch() -> list[str]:
    jobs = [f"module:{module}" for package, module in _LIBRARIES.items() if version_of(package)]
    libraries = _EXTRA_LIBRARIES.items()
    return jobs + [f"module:{m}" for package, m in libraries if m != "torch_tensorrt" and version_of(package)]


def _jobs_with_torch() -> list[str]:
    jobs = [package for package in ("torch", "torchvision") if version_of(package)]
    jobs += ["module:torch_tensorrt"] if version_of("torch-tensorrt") else []
    return jobs + [f"runtime:{name}" for name in RUNTIMES.names()]


def _answer(package: str, answers: dict[str, Answer]) -> Answer | None:
    module = (_LIBRARIES | _EXTRA_LIBRARIES).get(package)
    return answers.get(f"module:{module}" if module else package)


def _broken(answers: dict[str, Answer]) -> dict[str, str]:
    found = {}
    for package in ("torch", "torchvision", *_LIBRARIES, *_EXTRA_LIBRARIES):
        answer = _answer(package, answers)
        if answer is not None and answer.error is not None:
            found[package] = answer.error
    return found


def _python() -> Finding:
    wanted = "{}.{}".format(*PYTHON)
    usable = sys.version_info >= PYTHON
    fix = None if usable else f"Use Python {wanted} or newer."
    return Finding(PACKAGES, "python", platform.python_version(), usable, True, fix)


def _required(answers: dict[str, Answer]) -> list[Finding]:
    try:
        requirements = needed()
    except MissingRequirement as error:
        return [Finding(PACKAGES, DISTRIBUTION, None, False, True, install_line(DISTRIBUTION), error.what)]
    ourselves = Finding(PACKAGES, DISTRIBUTION, version_of(DISTRIBUTION), True, True)
    return [ourselves, *(_package(name, requirement, answers) for name, requirement in requirements.items())]


def _package(name: str, requirement: Requirement, answers: dict[str, Answer]) -> Finding:
    found, answer = version_of(name), _answer(name, answers)
    if fault(requirement):
        note = f"{bounds(requirement)} is needed" if found else None
        return Finding(PACKAGES, name, found, False, True, install_line(name), note)
    if answer is None or answer.error is None:
        return Finding(PACKAGES, name, found, True, True, note=answer.found if answer else None)
    together = name in ("torch", "torchvision")  # each only loads with the other's matching version
    fix = "pip install --force-reinstall " + ("torch torchvision" if together else name)
    return Finding(PACKAGES, name, found, False, True, fix, f"broken: {answer.error}")


def _twice() -> list[Finding]:
    """Finds several distributions of ONNX Runtime, which install into one folder and overwrite each other's files."""
    import importlib.metadata

    names = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml")
    there = [name for name in names if any(importlib.metadata.distributions(name=name))]
    if len(there) < 2:
        return []
    fix = f"pip uninstall -y {' '.join(there)} && pip install {there[-1]}"
    return [Finding(PACKAGES, " and ".join(there), "both", False, False, fix, "they overwrite each other's files")]


def _extra(name: str, answers: dict[str, Answer]) -> Finding:
    try:
        packages = list(needed(name))
    except MissingRequirement:  # already reported among the packages
        return Finding(EXTRA, name, None, False, fix=install_line(name), note=EXTRAS[name])
    reasons, versions = lacking(name), {package: version_of(package) for package in packages}
    found = ", ".join(f"{package} {version}" for package, version in versions.items() if version)
    if reasons:
        absent = name in versions and versions[name] is None and len(reasons) == 1
        note = EXTRAS[name] if absent or not found else "; ".join(reasons)
        return Finding(EXTRA, name, None if absent else found or None, False, fix=install_line(name), note=note)
    for package in packages:
        answer = _answer(package, answers) if package in _EXTRA_LIBRARIES else None
        if answer is not None and answer.error is not None:
            fix = f"pip install --force-reinstall {package}"
            return Finding(EXTRA, name, found, False, fix=fix, note=f"broken: {answer.error}")
    return Finding(EXTRA, name, found, True)


def _gpu(driver: Nvidia, torch: Answer | None) -> list[Finding]:
    facts = torch.facts if torch is not None else {}
    seen = facts.get("gpus") or []
    if driver.driver is not None:
        runs = "" if driver.cuda is None else ", up to CUDA {}.{}".format(*driver.cuda)
        findings = [Finding(GPU, "driver", driver.driver + runs, True)]
        for index, gpu in enumerate(driver.gpus):
            size = f"{gpu.memory / 2**30:.0f} GiB"
            findings.append(Finding(GPU, f"GPU {index}", f"{gpu.name}, {gpu.architecture}, {size}", True))
        if not driver.gpus:
            findings.append(
                Finding(GPU, "GPU", None, False, fix="Look at CUDA_VISIBLE_DEVICES.", note="none is visible")
            )
    elif seen:  # PyTorch needs no nvidia-ml-py
        findings = [Finding(GPU, "driver", None, False, fix=install_line("nvidia-ml-py"), note=driver.error)]
        findings += [
            Finding(GPU, f"GPU {i}", "{}, sm{}{}".format(name, *sm), True) for i, (name, sm) in enumerate(seen)
        ]
    else:
        fix = "Engines are built and run on a machine with an NVIDIA GPU and its driver; TensorRT-RTX builds without."
        findings = [Finding(GPU, "driver", None, False, fix=fix, note=driver.error)]
    if torch is None or torch.error is not None:
        return findings
    return [*findings, _torch_cuda(driver, facts.get("cuda"), bool(seen), facts.get("why"))]


def _torch_cuda(driver: Nvidia, cuda: str | None, sees: bool, why: str | None) -> Finding:
    found = f"CUDA {cuda}" if cuda else "for the CPU only"
    if sees or not driver.gpus:  # without a GPU either build is fine
        return Finding(GPU, "PyTorch is built", found, True)
    if cuda is None:
        return Finding(GPU, "PyTorch is built", found, False, fix="Install a PyTorch built with CUDA.", note=why)
    fix = "Update the NVIDIA driver, or install a PyTorch built for an older CUDA."
    return Finding(GPU, "PyTorch is built", found, False, fix=fix, note=why or "it does not see the GPU")


def _plugin() -> list[Finding]:
    """Checks the plugin and its build tools. None is required, because every file contains the operator's function."""
    try:
        library = choose_plugin("auto")
        found = Finding(PLUGIN, "library", str(library), True)
    except MissingRequirement as error:
        note = f"engines use the operator's own body: {error.what}"
        found = Finding(PLUGIN, "library", None, False, fix="evit-deploy plugin build", note=note)
    return [
        found,
        *_kernel(),
        _tool("nvcc", "nvcc", "Install NVIDIA's CUDA toolkit; it compiles the plugin."),
        _tool("CMake", "cmake", "pip install cmake"),
    ]


def _kernel() -> list[Finding]:
    """Checks the compiled kernel for PyTorch; empty without a GPU."""
    import torch

    from evit_deploy.tokens.operators.torch_ops import kernel_on

    if not torch.cuda.is_available():
        return []
    fix = "evit-deploy plugin build --kernel-only"
    try:
        kernel = kernel_on(torch.device("cuda", torch.cuda.current_device()))
    except (InputError, MissingRequirement) as error:
        return [Finding(PLUGIN, "kernel", None, False, fix=fix, note=str(error))]
    if kernel is None:
        return [Finding(PLUGIN, "kernel", None, False, fix=fix, note="PyTorch uses its own operations")]
    return [Finding(PLUGIN, "kernel", f"{kernel.path}, in use by PyTorch", True)]


def _tool(name: str, command: str, fix: str) -> Finding:
    path = shutil.which(command)
    if path is None:
        return Finding(PLUGIN, name, None, False, fix=fix)
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return Finding(PLUGIN, name, path, False, fix=fix, note=f"broken: {str(error).splitlines()[0]}")
    versions = [line for line in done.stdout.splitlines() if "release" in line or "version" in line]
    return Finding(PLUGIN, name, versions[0].strip() if versions else path, True)


def _runtime(name: str, answer: Answer) -> Finding:
    needed = name in _NEEDED_RUNTIMES
    if answer.error is None:
        return Finding(RUNTIME, name, "usable", True, needed)
    fix = answer.fix
    if fix is None and name in EXTRAS:
        fix = install_line(name)
    elif fix is None and needed:
        fix = f"pip install --force-reinstall {'torch torchvision' if name == 'eager' else name}"
    if answer.missing:
        return Finding(RUNTIME, name, None, False, needed, fix, answer.error)
    return Finding(RUNTIME, name, "broken", False, needed, fix, answer.error)
