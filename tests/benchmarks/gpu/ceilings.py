"""References for all ratios: versions and clocks, the bandwidth of a copy, a GEMM, an empty node, the bus."""

import os
import platform
import subprocess
from typing import Any

import torch

from evit_deploy.environment.machine import device, versions
from evit_deploy.environment.nvidia import nvidia

from .job import Job, median

COPY, GEMM, IMAGES = 4_000_000_000, 8192, 128


def measure(job: Job) -> None:
    """One row each."""
    cuda = job.device.name == "cuda"
    for what, look in (("machine", _machine), ("copy", _copy), ("gemm", _gemm), ("empty node", _empty), ("bus", _bus)):
        with job.rows.attempt(what=what):
            job.rows.add(what=what, **look(job, cuda))
        job.device.release()


def _machine(job: Job, cuda: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"versions": versions(), "python": platform.python_version(), "host": device()}
    row["driver"] = nvidia().driver if cuda else None
    row["kernel library"] = os.environ.get("EVIT_DEPLOY_KERNEL")
    if cuda:
        properties = torch.cuda.get_device_properties(0)
        row |= {
            "gpu": properties.name, "multiprocessors": properties.multi_processor_count, "cuda": torch.version.cuda,
            "megabytes": properties.total_memory >> 20, "l2 megabytes": job.device.cache / 2**20,
            "capability": f"{properties.major}.{properties.minor}", "cudnn": torch.backends.cudnn.version(),
        }  # fmt: skip
        query = "clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem,power.draw,power.limit,temperature.gpu"
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=5)
            row["clocks"] = done.stdout.strip().splitlines()
        except (OSError, subprocess.TimeoutExpired) as error:
            row["clocks"] = str(error)
    return row


def _median_of(job: Job, run: Any, rounds: int, calls: int = 1) -> float:
    for _ in range(3):
        run()
    return median([job.device.milliseconds(run, calls) for _ in range(rounds)])


def _copy(job: Job, cuda: bool) -> dict[str, Any]:
    source = torch.empty(COPY if cuda else 100_000, dtype=torch.uint8, device=job.device.name).random_()
    target = torch.empty_like(source)
    milliseconds = _median_of(job, lambda: target.copy_(source), 11)
    return {"milliseconds": milliseconds, "terabytes a second": round(2 * len(source) / milliseconds / 1e9, 3)}


def _gemm(job: Job, cuda: bool) -> dict[str, Any]:
    size = GEMM if cuda else 64
    row = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        one, other = (torch.randn(size, size, device=job.device.name, dtype=dtype) for _ in range(2))
        milliseconds = _median_of(job, lambda one=one, other=other: one @ other, 15)
        row[f"{name} teraflops"] = round(2 * size**3 / milliseconds / 1e9, 3)
    return row


def _empty(job: Job, cuda: bool) -> dict[str, Any]:
    replay = job.device.capture([job.device.empty_node()] * 1000)
    # a thousand nodes, so milliseconds are microseconds per node
    return {"microseconds": round(_median_of(job, replay, 15), 3)}


def _bus(job: Job, cuda: bool) -> dict[str, Any]:
    shape = (IMAGES if cuda else 1, 3, 224, 224)
    row = {}
    for name, dtype in (("fp32", torch.float32), ("uint8", torch.uint8)):
        pageable = torch.zeros(shape, dtype=dtype)
        target = torch.empty(shape, dtype=dtype, device=job.device.name)
        pinned = pageable.pin_memory() if cuda else pageable
        row |= {
            f"{name} pinned, ms": round(
                _median_of(job, lambda a=pinned, b=target: b.copy_(a, non_blocking=True), 9), 3
            ),
            f"{name} pageable, ms": round(_median_of(job, lambda a=pageable, b=target: b.copy_(a), 9), 3),
        }
    return row | {"batch": shape[0]}
