"""A training step of DeiT-S: BF16 autocast, resident images as bytes that are normalized on the device, AdamW."""

import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .compiling import compiled
from .device import Run, in_turns
from .inference import SMALL
from .job import Job, median, ratio
from .variants import Variant, compiled_calls, kernel_calls, made, seeded

DENSE, REDUCED = Variant(1), Variant(0.7)
OTHERS = (Variant(0.7, "body"), Variant(0.7, "official"), Variant(1, "official"))
COMPILED = (DENSE, REDUCED, Variant(0.7, "official"))
BATCH = 256


class Step:
    """Forward, cross-entropy, backward and optimizer.

    Args:
        model: In training mode, with separate weights.
        images: Bytes ``[B, 3, H, W]`` on the device.
        labels: ``[B]``.
        forward: Called instead of the model, such as the compiled model.
    """

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, forward: Any = None) -> None:
        self.images, self.labels, self.device = images, labels, images.device.type
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=True)
        self.forward = model if forward is None else forward
        self.mean = torch.tensor([123.675, 116.28, 103.53], device=images.device).view(3, 1, 1)
        self.scale = 1 / torch.tensor([58.395, 57.12, 57.375], device=images.device).view(3, 1, 1)
        self.loss: Tensor | None = None

    def __call__(self) -> None:
        images = (self.images.float() - self.mean) * self.scale
        with torch.autocast(self.device, torch.bfloat16):
            loss = F.cross_entropy(self.forward(images), self.labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss = loss.detach()


def compiled_step(job: Job, dense: Any, variant: Variant, images: Tensor, labels: Tensor) -> Step:
    """A step of a variant with separate weights, with ``torch.compile``."""
    model = made(dense, variant, share=False)
    return Step(model, images, labels, compiled(model, toy=job.toy))


def data(job: Job, model: Any) -> tuple[Tensor, Tensor]:
    """A batch on the device."""
    batch, size = 2 if job.toy else BATCH, model.patch_embed.img_size
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(256, (batch, 3, *size), dtype=torch.uint8, generator=generator)
    labels = torch.randint(model.num_classes, (batch,), generator=generator)
    return images.to(job.device.name), labels.to(job.device.name)


def measure(job: Job) -> None:
    """Dense and 0.7: eager, then compiled; then the others against dense, and the official structure compiled."""
    dense = seeded(SMALL, job.device.name, toy=job.toy).train()
    images, labels = data(job, dense)
    _eager(job, dense, (DENSE, REDUCED), images, labels)
    steps = _compile(job, dense, COMPILED[:2], images, labels)
    if "dense" in steps:
        with job.rows.attempt(how="compiled", batch=len(images)):
            job.rows.add(how="compiled", batch=len(images), **_row(job, steps))
    for others in job.rows.in_time((OTHERS,), reserve=0 if job.toy else 8):
        _eager(job, dense, (DENSE, *others), images, labels, what="others")
    if "dense" in steps and (more := _compile(job, dense, COMPILED[2:], images, labels)):
        with job.rows.attempt(how="compiled", what="others", batch=len(images)):
            row = _row(job, {"dense": steps["dense"], **more})
            job.rows.add(how="compiled", what="others", batch=len(images), **row)


def _eager(job: Job, dense: Any, variants: tuple[Variant, ...], images: Tensor, labels: Tensor, **key: str) -> None:
    with job.rows.attempt(how="eager", **key, batch=len(images)):
        steps = {v.name: Step(made(dense, v, share=False), images, labels) for v in variants}
        half = (images[:2].float() - 128) / 64
        calls = {name: kernel_calls(step.forward, half) for name, step in steps.items()}
        job.rows.add(how="eager", **key, batch=len(images), **_row(job, steps), **{"kernel calls": calls})
    steps = {}
    job.device.release()


def _compile(job: Job, dense: Any, variants: tuple[Variant, ...], images: Tensor, labels: Tensor) -> dict[str, Run]:
    steps: dict[str, Run] = {}
    for variant in job.rows.in_time(variants, reserve=0 if job.toy else 8):
        started = time.monotonic()
        with job.rows.attempt(how="compiled", model=variant.name):
            step = compiled_step(job, dense, variant, images, labels)
            step()
            counted = compiled_calls(step)
            job.device.synchronize()
            steps[variant.name] = step
            print(f"compiled {variant.name}, which calls {counted}, in {time.monotonic() - started:.1f} s", flush=True)
    return steps


def _row(job: Job, steps: dict[str, Any]) -> dict[str, Any]:
    batch = len(next(iter(steps.values())).images)
    memory, host = {}, {}
    for name, step in steps.items():
        for _ in range(2):
            step()
        before = job.device.start_peak()
        step()
        job.device.synchronize()
        memory[name] = round((job.device.peak() - before) / 2**20)
        started = time.perf_counter()
        step()  # only enqueues the work; host time is hidden if the device takes longer
        host[name] = round(1e3 * (time.perf_counter() - started), 2)
        job.device.synchronize()
    times = in_turns(job.device, steps, 3 if job.toy else 7, calls=2)
    row: dict[str, Any] = {"ms": {name: round(median(v), 3) for name, v in times.items()}}
    row["convolutions tried out"] = torch.backends.cudnn.benchmark
    row["images a second"] = {name: round(1e3 * batch / median(v), 1) for name, v in times.items()}
    row["speed-up"] = {name: ratio(times["dense"], v) for name, v in times.items() if name != "dense"}
    row["megabytes of a step"], row["ms the host takes to start one"] = memory, host
    row["loss"] = {name: round(float(step.loss), 4) for name, step in steps.items()}
    return row
