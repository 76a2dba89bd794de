"""The product itself: its tests that are marked ``gpu``, and its command line as a user meets it."""

import os
import shlex
import subprocess
import sys
import time
import xml.etree.ElementTree
from collections import Counter
from pathlib import Path

import torch

from .inference import SMALL
from .job import Job
from .variants import seeded

ROOT = Path(__file__).parents[3]
ELSEWHERE = ("tests/engines/plugin/test_kernel.py::test_compute_sanitizer_finds_nothing",)
"""Tests that other parts of the suite do more quickly."""
TAIL = 1200


def run_tests(job: Job) -> None:
    """``pytest -m gpu`` in one process; a row for each test that did not pass, and one for all."""
    told = job.scratch / "tests.xml"
    # In a dry run there is no test to run on a CPU that the others do not run anyway: those of one small file.
    chosen = ["tests/report/test_report.py"] if job.toy else ["-m", "gpu", "tests"]
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:xdist", "-p", "no:cacheprovider", "-q"]
    command += ["--import-mode=importlib", "--show-capture=no", "--tb=short", "--durations=8", f"--junit-xml={told}"]
    command += [f"--deselect={name}" for name in ELSEWHERE]
    exit_, said, seconds = _run(job, [*command, *chosen], reserve=1)
    print(said[-12_000:], flush=True)
    if not told.is_file():
        job.rows.add(failed=f"pytest ended with {exit_}: {said[-TAIL:]}")
        return
    counts: Counter[str] = Counter()
    for test in xml.etree.ElementTree.parse(told).iter("testcase"):
        outcome = next((child for child in test if child.tag in ("failure", "error", "skipped")), None)
        counts["passed" if outcome is None else outcome.tag] += 1
        if outcome is not None:
            reason = " ".join((outcome.get("message") or "").split())[:200]
            name = f"{test.get('classname')}::{test.get('name')}"
            job.rows.add(test=name, outcome=outcome.tag, reason=reason)
    job.rows.add(exit=exit_, seconds=seconds, **counts)


def _run(job: Job, command: list[str], reserve: float) -> tuple[int | None, str, float]:
    """Exit code (``None``: it did not end in time), both outputs together, seconds."""
    started = time.monotonic()
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, timeout=max(job.rows.left - reserve, 1),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        code, said = done.returncode, done.stdout
    except subprocess.TimeoutExpired as error:
        code, said = None, error.stdout or b""
    return code, said.decode(errors="replace"), round(time.monotonic() - started, 1)


def commands(job: Job) -> list[tuple[str, list[str]]]:
    """Name and arguments of each, in order: later ones use what earlier ones made."""
    checkpoint, bundle, run = (job.scratch / name for name in ("deit_s.pth", "bundle", "run"))
    model = ["--model", "deit_tiny_patch16_224", "--image-size", "64"] if job.toy else []
    threads = ["--threads", "1"] if job.toy else []
    both = ["--runtime", "eager", "--runtime", "torch.compile"]
    few = ["1"] if job.toy else ["1,128"]
    recipe = ["dense.steps=20", "finetune.steps=20", "expect={}", "compare={}", "profile.duration=0.2"]
    recipe += ["profile.batch_sizes=[1,8]", *(["dense.steps=2", "finetune.steps=2"] if job.toy else [])]
    return [
        ("doctor", ["doctor"]),
        ("convert", ["convert", str(checkpoint), *model, "--keep-rate", "0.7", "--target", "onnx", *threads,
                     "--out", str(bundle)]),
        ("verify", ["verify", str(bundle), *(both[:2] if job.toy else both), *threads]),
        ("profile", ["profile", str(bundle), *(both[:2] if job.toy else both), "--batch-sizes", *few,
                     "--duration", "0.2" if job.toy else "1", *threads]),
        ("run", ["run", str(ROOT / "recipes" / "digits.yaml"), "--out", str(run),
                 *(part for setting in recipe for part in ("--set", setting))]),
    ]  # fmt: skip


def run_commands(job: Job) -> None:
    """A row each: exit code, seconds, and the end of what it said."""
    model = "deit_tiny_patch16_224" if job.toy else SMALL
    weights = seeded(model, "cpu").state_dict()
    torch.save({"model": weights}, job.scratch / "deit_s.pth")
    for name, arguments in job.rows.in_time(commands(job), reserve=2):
        code, said, seconds = _run(job, [sys.executable, "-m", "evit_deploy", *arguments], reserve=1)
        print(f"== evit-deploy {shlex.join(arguments)}\n{said[-6000:]}", flush=True)
        line = shlex.join(arguments).replace(str(job.scratch), ".").replace(f"{ROOT}/", "")
        job.rows.add(command=f"evit-deploy {line}", name=name, exit=code, seconds=seconds, tail=said[-TAIL:])
