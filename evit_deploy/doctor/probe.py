"""Loads possibly broken libraries in a separate process, for ``doctor``.

A shared library that fails to load can raise any exception, and one built for another version can crash the process.
Each job writes its answer as one line; after a crash, the first job without an answer is the cause.

python -m evit_deploy.doctor.probe torch module:openvino runtime:eager
"""

import importlib.util
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from evit_deploy.errors import MissingRequirement

PATIENCE = 120.0
"""Seconds to wait for one process: PyTorch from a cold network disk takes half a minute."""


class Answer(msgspec.Struct, frozen=True):
    """Result of one job.

    Args:
        job: ``torch``, ``torchvision``, ``module:<name>`` or ``runtime:<name>``.
        error: The problem, in one line; ``None`` if there is no problem.
        fix: The instruction that fixes it, if known.
        found: Details of what was found.
        missing: Whether something is absent rather than broken.
        facts: Further details for the caller.
    """

    job: str
    error: str | None = None
    fix: str | None = None
    found: str | None = None
    missing: bool = False
    facts: dict[str, Any] = {}


def ask(jobs: Sequence[str], patience: float = PATIENCE) -> dict[str, Answer]:
    """Runs jobs in order in a subprocess; after a crash, runs the remaining jobs in a new one.

    Args:
        jobs: See :class:`Answer`.
        patience: Timeout of one process in seconds.

    Returns:
        Job -> answer.
    """
    answers: dict[str, Answer] = {}
    # The subprocess must find the same modules, so it gets this process's sys.path.
    paths = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    environment = os.environ | {"PYTHONPATH": paths, "PYTHONFAULTHANDLER": ""}
    while waiting := [job for job in jobs if job not in answers]:
        command = [sys.executable, "-P", "-m", "evit_deploy.doctor.probe", *waiting]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
            try:
                said, complaints = process.communicate(timeout=patience)
                end = _end(process.returncode, complaints)
            except subprocess.TimeoutExpired:
                process.kill()
                said, _ = process.communicate()
                end = f"no answer within {patience:.0f} s"
            except BaseException:  # on an interrupt, Popen's context manager would wait for the process
                process.kill()
                raise
        for line in said.splitlines():
            answer = msgspec.json.decode(line, type=Answer)
            answers[answer.job] = answer
        silent = next((job for job in waiting if job not in answers), None)
        if silent is not None:
            answers[silent] = Answer(silent, end)
    return answers


def _end(code: int, complaints: bytes) -> str:
    lines = complaints.decode(errors="replace").strip().splitlines() or [""]
    if code < 0:
        return f"it ends the process ({signal.Signals(-code).name})"
    return f"it ends the process with exit code {code}" + (f": {lines[-1]}" if lines[-1] else "")


def _torch() -> Answer:
    import torch

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")  # PyTorch reports why CUDA is unavailable only as a warning
        available = torch.cuda.is_available()
    count = torch.cuda.device_count() if available else 0
    gpus = [[torch.cuda.get_device_name(i), list(torch.cuda.get_device_capability(i))] for i in range(count)]
    why = next((line for warning in said for line in str(warning.message).splitlines() if line.strip()), None)
    facts = {"cuda": torch.version.cuda, "gpus": gpus, "why": None if available else why}
    return Answer("torch", found=f"CPU {torch.backends.cpu.get_cpu_capability()}", facts=facts)


def _torchvision() -> Answer:
    """Loads torchvision's operators, which fails if it was built for another PyTorch; timm then fails too.

    Loads only the library: importing all of torchvision takes as long as importing PyTorch and shows nothing more.
    """
    import torch

    spec = importlib.util.find_spec("torchvision")
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or ():
        for library in sorted(Path(folder).glob("_C*.*")):
            torch.ops.load_library(library)
    if not hasattr(torch.ops.torchvision, "nms"):
        raise ImportError("its operators are missing")
    built, ours = int(torch.ops.torchvision._cuda_version()), torch.version.cuda
    if built > 0 and ours is not None and built // 1000 != int(ours.split(".")[0]):
        raise ImportError(f"it was built with CUDA {built // 1000}, PyTorch with CUDA {ours}")
    return Answer("torchvision")


def _module(name: str) -> Answer:
    module = importlib.import_module(name)
    providers = getattr(module, "get_available_providers", None)
    if not callable(providers):
        return Answer(f"module:{name}")
    names: Any = providers()
    return Answer(f"module:{name}", found=", ".join(one.removesuffix("ExecutionProvider") for one in names))


def _runtime(name: str) -> Answer:
    from evit_deploy.registry import RUNTIMES

    missing: MissingRequirement | None = RUNTIMES.get(name).missing()
    if missing is None:
        return Answer(f"runtime:{name}")
    why = missing.what if missing.seen is None else f"{missing.what}: {missing.seen}"
    return Answer(f"runtime:{name}", why, missing.fix, missing=True)


_JOBS: dict[str, Callable[..., Answer]] = {
    "torch": _torch,
    "torchvision": _torchvision,
    "module": _module,
    "runtime": _runtime,
}


def answer(job: str) -> Answer:
    """Runs one job; an exception becomes its answer."""
    kind, _, name = job.partition(":")
    try:
        return _JOBS[kind](*([name] if name else []))
    except MissingRequirement as error:
        return Answer(job, error.what, error.fix, missing=True)
    except (Exception, SystemExit) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), "")
        absent = isinstance(error, ModuleNotFoundError)
        return Answer(job, f"{type(error).__name__}: {first}".rstrip(": "), missing=absent)


def main(jobs: Sequence[str]) -> None:
    """Writes each answer as a line on stdout; output of the libraries goes to stderr."""
    with os.fdopen(os.dup(1), "wb", buffering=0) as answers:
        os.dup2(2, 1)
        for job in jobs:
            answers.write(msgspec.json.encode(answer(job)) + b"\n")


if __name__ == "__main__":
    main(sys.argv[1:])
