"""Fills Inductor's cache for the parts that compile, in processes that run during parts without timing.

Each process compiles one program by calling it once. Ending one early loses only its own program.
"""

import torch

from .bandwidth import Shape, buffers, eager
from .compiling import compiled
from .inference import COMPILED, SMALL, compiled_call, images_for, variants_of
from .job import Job
from .training import COMPILED as TRAINED
from .training import compiled_step, data
from .variants import seeded


def compile_ahead(job: Job, program: str) -> None:
    """Compiles one of :mod:`gpu.programs`."""
    what, *numbers = program.split()
    if what == "inference":
        index, batch = map(int, numbers)
        variant = COMPILED[index]
        model = variants_of(SMALL, (variant,), "fp16", job)[variant.name]
        compiled_call(job, model, images_for(model, batch, torch.float16, job.device.name))()
    elif what == "training":
        dense = seeded(SMALL, job.device.name, toy=job.toy).train()
        compiled_step(job, dense, TRAINED[int(numbers[0])], *data(job, dense))()
    else:
        shapes: list[Shape] = [("fp16", 196, 384, 1), ("fp16", 196, 384, 128)]
        for shape in [("bf16", 16, 24, 2)] if job.toy else shapes:
            xs, scores, keep, _ = buffers(job, shape)
            compiled(eager, toy=job.toy)(xs[0], scores[0], keep)
    job.device.synchronize()
