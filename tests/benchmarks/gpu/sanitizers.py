"""The program of cases under compute-sanitizer: all cases under memcheck, some under the tools that take longer.

Every buffer of ``token_reorg_cases_gpu`` has its exact size. The Python process is not used, because PyTorch's memory
pools would hide accesses out of bounds. The tools run in parallel.
"""

import os
import re
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.support.case_program import CUTS, ProgramCall, answered, sent
from tests.support.cases import CASES
from tests.support.op_checks import TORCH, check_answer

from .job import Job

ALL = [
    ProgramCall(case, dtype, i % 2, CUTS[i % len(CUTS)])
    for i, (case, dtype) in enumerate((c, d) for c in CASES for d in TORCH)
]
SIZES = (7, 196, 512, 513, 1025, 4096)
SOME = [call for size in SIZES for call in [one for one in ALL if one.case.candidates == size][:9]]
TOOLS = {"memcheck": ALL, "racecheck": SOME, "synccheck": SOME, "initcheck": SOME}


def program(job: Job) -> Path | None:
    """``EVIT_DEPLOY_CASES_GPU``, or the program next to the library; in a dry run the host's program."""
    if told := os.environ.get("EVIT_DEPLOY_CASES_GPU"):
        return Path(told)
    name = "token_reorg_cases" if job.toy else "token_reorg_cases_gpu"
    return next((p.with_name(name) for p in job.libraries.values() if p.with_name(name).is_file()), None)


def check(job: Job) -> None:
    """First without a tool, to distinguish wrong answers from findings."""
    path = program(job)
    if path is None:
        job.rows.add(failed="no token_reorg_cases_gpu: set EVIT_DEPLOY_CASES_GPU, or put it beside the library")
        return
    tool = shutil.which("compute-sanitizer") or next(
        map(str, Path("/usr/local").glob("cuda*/bin/compute-sanitizer")), ""
    )
    if not tool and not job.toy:
        job.rows.add(failed="compute-sanitizer is not on the PATH")
    runs: dict[str, list[ProgramCall]] = {"none": ALL} | (TOOLS if tool or job.toy else {})
    with ThreadPoolExecutor(len(runs)) as pool:
        for name, calls in runs.items():
            runner = [] if name == "none" or not tool else [tool, "--tool", name, "--error-exitcode", "9"]
            pool.submit(_attempt, job, name, calls, [*runner, str(path)])


def _attempt(job: Job, name: str, calls: list[ProgramCall], command: list[str]) -> None:
    with job.rows.attempt(tool=name, calls=len(calls)):
        job.rows.add(tool=name, calls=len(calls), **_run(job, name, calls, command))


def _run(job: Job, name: str, calls: list[ProgramCall], command: list[str]) -> dict:
    log, started = job.scratch / f"{name}.log", time.monotonic()
    if len(command) > 1:
        command = [*command[:-1], "--log-file", str(log), command[-1]]
    try:
        done = subprocess.run(command, input=sent(calls), capture_output=True, timeout=max(job.rows.left - 1, 1))
    except subprocess.TimeoutExpired:
        return {"failed": "not finished in time"}
    told = log.read_text(errors="replace") if log.is_file() else ""
    print(
        f"== {name}: exit {done.returncode}\n{told[-3000:]}{done.stderr.decode(errors='replace')[-2000:]}", flush=True
    )
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", told)
    wrong = []
    try:
        for call, (y, idx) in zip(calls, answered(calls, done.stdout), strict=True):
            try:
                check_answer(call.case, call.dtype, *call.case.inputs(call.dtype), y, idx)
            except AssertionError:
                wrong.append(f"{call.case.id} in {call.dtype}")
    except ValueError as error:
        wrong.append(str(error))
    seconds = round(time.monotonic() - started, 1)
    return {"exit": done.returncode, "summary": summary[-1:], "wrong": wrong[:5], "seconds": seconds}
