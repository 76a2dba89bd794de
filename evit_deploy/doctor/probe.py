"""Loads what may be broken, in its own process: ``doctor`` asks here.

A shared library that fails to load raises anything, and one that was built for another version may take the whole
process along. Each job is answered on a separate line, so that the first one without an answer is the culprit.

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
    """What one job met.

    Args:
        job: ``torch``, ``torchvision``, ``module:<name>`` or ``runtime:<name>``.
        error: What is wrong, in a line; ``None`` when nothing is.
        fix: The line that mends it, where the job knows one.
        found: What was there.
        missing: Whether something is absent rather than broken.
        facts: More, for whoever asked.
    """

    job: str
    error: str | None = None
    fix: str | None = None
    found: str | None = None
    missing: bool = False
    facts: dict[str, Any] = {}


def ask(jobs: Sequence[str], patience: float = PATIENCE) -> dict[str, Answer]:
    """Runs jobs in order in another process; after a crash, the rest in a new one.

    Args:
        jobs: See :class:`Answer`.
        patience: Seconds for one process.
    """
    answers: dict[str, Answer] = {}
    # The same modules as here are to be found there, whatever this process was told about where they are.
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
            except BaseException:  # interrupted: it would be waited for
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
        warnings.simplefilter("always")  # why CUDA is not available is told in a warning only
        available = torch.cuda.is_available()
    count = torch.cuda.device_count() if available else 0
    gpus = [[torch.cuda.get_device_name(i), list(torch.cuda.get_device_capability(i))] for i in range(count)]
    why = next((line for warning in said for line in str(warning.message).splitlines() if line.strip()), None)
    facts = {"cuda": torch.version.cuda, "gpus": gpus, "why": None if available else why}
    return Answer("torch", found=f"CPU {torch.backends.cpu.get_cpu_capability()}", facts=facts)


def _torchvision() -> Answer:
    """A torchvision built for another torch fails when its operators are loaded, and takes timm with it.

    Only the library is loaded: importing torchvision takes as long as importing torch, and says the same.
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
    """Does one job; whatever it raises is the answer."""
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
    """Answers on stdout, a line each; whatever the libraries print goes to stderr."""
    with os.fdopen(os.dup(1), "wb", buffering=0) as answers:
        os.dup2(2, 1)
        for job in jobs:
            answers.write(msgspec.json.encode(answer(job)) + b"\n")


if __name__ == "__main__":
    main(sys.argv[1:])
