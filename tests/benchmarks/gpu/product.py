"""evit_deploy itself: its tests marked ``gpu``, and its command line as used by a user."""

import os
import shlex
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from .inference import SMALL
from .job import Job
from .variants import seeded

ROOT = Path(__file__).parents[3]
ELSEWHERE = ("tests/tokens/operators/test_kernel.py::test_compute_sanitizer_finds_nothing",)
"""Tests covered faster by other parts of the suite."""
TAIL = 1200


def marked() -> list[str]:
    """Files with tests for GPUs, because collecting all tests takes longer than running these."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in files if "mark.gpu" in path.read_text(encoding="utf-8")]


def run_tests(job: Job) -> None:
    """``pytest -m gpu`` in one process; a row for each test that did not pass, and one for all."""
    told = job.scratch / "tests.xml"
    # In a dry run, all CPU tests run elsewhere anyway, so one small file is enough.
    chosen = ["tests/report/test_report.py"] if job.toy else ["-m", "gpu", *marked()]
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:xdist", "-p", "no:cacheprovider", "-q"]
    command += ["--import-mode=importlib", "--show-capture=no", "--tb=short", "--durations=8", f"--junit-xml={told}"]
    # A file that needs a missing package is reported, and the others run.
    command += ["--continue-on-collection-errors", *(f"--deselect={name}" for name in ELSEWHERE)]
    exit_, said, seconds = _run(job, [*command, *chosen], reserve=3)
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
    # not a pipe, which children of a killed command would keep open
    with tempfile.TemporaryFile(dir=job.scratch) as said:
        try:
            code = subprocess.run(
                command, cwd=ROOT, env=environment, timeout=max(job.rows.left - reserve, 1),
                stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            code = None
        said.seek(0)
        return code, said.read().decode(errors="replace"), round(time.monotonic() - started, 1)


def commands(job: Job) -> list[dict[str, list[str]]]:
    """Arguments of each command by name, in rounds: commands of a round run in parallel and use earlier results."""
    checkpoint, bundle, run = (job.scratch / name for name in ("deit_s.pth", "bundle", "run"))
    model = ["--model", "deit_tiny_patch16_224", "--image-size", "64"] if job.toy else []
    threads = ["--threads", "1"] if job.toy else []
    both = ["--runtime", "eager", *([] if job.toy else ["--runtime", "torch.compile"]), *threads]
    convert = [str(checkpoint), *model, "--keep-rate", "0.7", "--target", "onnx", *threads, "--out", str(bundle)]
    steps = 2 if job.toy else 20
    settings = [f"dense.steps={steps}", f"finetune.steps={steps}", "expect={}", "compare.baselines=[]"]
    settings += ["compare.keep_rates=[]", "profile.duration=0.2", "profile.batch_sizes=[1,8]"]
    recipe = [str(ROOT / "recipes" / "digits.yaml"), "--out", str(run)]
    recipe += [part for setting in settings for part in ("--set", setting)]
    profile = [*both, "--batch-sizes", "1" if job.toy else "128", "--duration", "0.2" if job.toy else "1"]
    return [
        {"doctor": ["doctor"], "convert": ["convert", *convert]},
        {"verify": ["verify", str(bundle), *both, "--batch-sizes", "2"], "run": ["run", *recipe]},
        {"profile": ["profile", str(bundle), *profile]},
    ]


def run_commands(job: Job) -> None:
    """One row per command: exit code, seconds, and the end of its output."""
    model = "deit_tiny_patch16_224" if job.toy else SMALL
    torch.save({"model": seeded(model, "cpu").state_dict()}, job.scratch / "deit_s.pth")

    def one(name: str, arguments: list[str]) -> None:
        code, said, seconds = _run(job, [sys.executable, "-m", "evit_deploy", *arguments], reserve=3)
        print(f"== evit-deploy {shlex.join(arguments)}\n{said[-6000:]}", flush=True)
        line = shlex.join(arguments).replace(str(job.scratch), ".").replace(f"{ROOT}/", "")
        job.rows.add(command=f"evit-deploy {line}", name=name, exit=code, seconds=seconds, tail=said[-TAIL:])

    for together in job.rows.in_time(commands(job), reserve=2):
        with ThreadPoolExecutor(len(together)) as pool:
            for done in [pool.submit(one, *each) for each in together.items()]:
                done.result()
