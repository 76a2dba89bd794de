"""Checks, in a separate process, for a GPU and for kernel libraries that run on it."""

import sys
from datetime import UTC, datetime

import torch

from evit_deploy.environment.nvidia import compute_capability, missing_gpu
from evit_deploy.errors import EvitDeployError
from evit_deploy.tokens.operators.kernel import TokenReorgKernel

from .job import Job

NO_GPU = 3
"""Exit code, the same as the command line's for a missing requirement."""


def look(job: Job) -> None:
    """Records the GPU and, for each library, why it cannot run; exits if there is no GPU."""
    lacking = missing_gpu() if job.device.name == "cuda" else None
    if lacking is not None:
        print(f"gpu_suite: {lacking}", file=sys.stderr)
        sys.exit(NO_GPU)
    refused = {}
    for name, path in job.libraries.items():
        try:
            x, scores = torch.rand(2, 8, 16, device=job.device.name), torch.rand(2, 7, device=job.device.name)
            TokenReorgKernel(path)(x, scores, 3)
            job.device.synchronize()
        except (EvitDeployError, RuntimeError) as error:
            refused[name] = str(error)
    begun = datetime.now(UTC).isoformat(timespec="seconds")
    job.rows.add(gpu=compute_capability(), refused=refused, begun=begun)
