"""Deliberate faults in parts, for the suite's own tests."""

import os
import signal
import subprocess
import sys
import time

import torch

from .job import Job


def hang(job: Job) -> None:
    """Never ends; starts a process that never ends either."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    job.rows.add(child=child.pid)
    time.sleep(600)


def fail(job: Job) -> None:
    """Two rows that fail, between two that succeed."""
    for batch in job.rows.in_time((1, 8, 64, 128)):
        with job.rows.attempt(batch=batch):
            if batch == 8:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            if batch == 64:
                raise RuntimeError("not\nthis one")
            job.rows.add(batch=batch, milliseconds=1.0)


def crash(job: Job) -> None:
    """Killed by a signal after its first row."""
    job.rows.add(batch=1)
    os.kill(os.getpid(), signal.SIGSEGV)
