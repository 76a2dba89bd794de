"""Whole models: reduced, compared with dense, slice, PyTorch's own reorganization and the official structure."""

import functools
import random
import time
from typing import Any

import torch

from .compiling import compiled
from .device import Run, in_turns
from .job import Job, median, ratio
from .programs import BATCHES
from .variants import Variant, compiled_calls, kernel_calls, made, seeded

SMALL, BASE, LARGE = "deit_small_patch16_224", "deit_base_patch16_224", "vit_large_patch16_384"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
DENSE = Variant(1)
RATES = (DENSE, Variant(0.9), Variant(0.7), Variant(0.5))
ALL = (*RATES, Variant(0.7, "body"), Variant(0.5, "body"), Variant(0.7, "slice"), Variant(0.5, "slice"))
COMPILED = (DENSE, Variant(0.7), Variant(0.5))
PAPER = tuple(Variant(rate, how) for how in ("evit", "official") for rate in (1, 0.7, 0.5))
CALLS = 100
SECONDS, FEW = 4.0, 1.5
"""Time limits of a row from batch 128 on, and below; :data:`gpu.device.FEWEST` rounds run in any case."""


def images_for(model: Any, batch: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Random images of the model's size, on its device."""
    generator = torch.Generator(device).manual_seed(1)
    size = model.patch_embed.img_size
    return torch.randn(batch, 3, *size, generator=generator, device=device).to(dtype)


def variants_of(architecture: str, variants: tuple[Variant, ...], dtype: str, job: Job) -> dict[str, Any]:
    """The models by name, with shared weights."""
    dense = seeded(architecture, job.device.name, toy=job.toy).to(DTYPES[dtype])
    return {variant.name: made(dense, variant) for variant in variants}


def call(model: Any, images: torch.Tensor) -> Run:
    """A forward pass without gradients."""
    return torch.inference_mode()(functools.partial(model, images))


def compiled_call(job: Job, model: Any, images: torch.Tensor) -> Run:
    """The same through ``torch.compile`` with CUDA graphs, as the compiled runtime does."""
    run = call(compiled(model, toy=job.toy, graphs=True), images)

    def step() -> Any:
        torch.compiler.cudagraph_mark_step_begin()  # outputs of the last call are no longer used
        return run()

    return step


# ---- CUDA graphs


def measure_graphs(job: Job) -> None:
    """DeiT-S in FP16, with ``torch.compile`` and in BF16; most important first."""
    models = {"fp16": variants_of(SMALL, ALL, "fp16", job)}
    keys: list[tuple[str, int]] = [("fp16", 2), ("compiled", 1), ("bf16", 1)]
    if not job.toy:
        keys = [("fp16", 128), ("fp16", 256), *(("compiled", batch) for batch in BATCHES)]
        keys += [*(("fp16", batch) for batch in (1, 8, 64)), *(("bf16", batch) for batch in (128, 256, 1, 8, 64))]
    for dtype, batch in job.rows.in_time(keys, reserve=3):
        with job.rows.attempt(model=SMALL, dtype=dtype, batch=batch):
            if dtype == "compiled":
                _compiled_row(job, models["fp16"], batch)
                continue
            if dtype not in models:
                models[dtype] = variants_of(SMALL, ALL, dtype, job)
            job.rows.add(model=SMALL, dtype=dtype, batch=batch, **graph_row(job, models[dtype], batch))
        job.device.release()


def graph_row(job: Job, models: dict[str, Any], batch: int) -> dict[str, Any]:
    """All models in CUDA graphs on the same resident images, in turns."""
    started, parameter = time.monotonic(), next(models["dense"].parameters())
    images = images_for(models["dense"], batch, parameter.dtype, job.device.name)
    runs, logits = {}, {}
    for name, model in models.items():
        runs[name] = job.device.capture([call(model, images)])
        logits[name] = runs[name].kept[0].float().clone()
    captured = time.monotonic() - started
    row = times_row(job, runs, batch, started)
    row["seconds"] = [round(captured, 1), round(time.monotonic() - started - captured, 1)]  # captures, times
    row["kernel calls"] = {name: kernel_calls(model, images) for name, model in models.items()}
    row["logit difference from body"] = {
        name: float((logits[name] - logits[f"{name} body"]).abs().max()) for name in logits if f"{name} body" in logits
    }
    return row


def times_row(job: Job, runs: dict[str, Run], batch: int, started: float) -> dict[str, Any]:
    """Times in turns, and derived figures: speed-up over dense, overhead over slice and over PyTorch's
    implementation."""
    until = started + (SECONDS if batch >= 128 else FEW)
    times = in_turns(job.device, runs, 3 if job.toy else 101, until=until)
    dense = times["dense"]
    row: dict[str, Any] = {"rounds": len(dense), "ms": {name: round(median(v), 4) for name, v in times.items()}}
    row["convolutions tried out"] = torch.backends.cudnn.benchmark
    row["images a second"] = {name: round(1e3 * batch / median(v), 1) for name, v in times.items()}
    row["speed-up"] = {name: ratio(dense, v) for name, v in times.items() if name != "dense"}
    for other in ("slice", "body", "official"):
        pairs = [name for name in times if f"{name} {other}" in times]
        if pairs:
            row[f"over {other}"] = {name: ratio(times[name], times[f"{name} {other}"]) for name in pairs}
    return row


def _compiled_row(job: Job, models: dict[str, Any], batch: int) -> None:
    images = images_for(models["dense"], batch, torch.float16, job.device.name)
    runs: dict[str, Run] = {}
    calls: dict[str, dict[str, int]] = {}
    for variant in job.rows.in_time(COMPILED, reserve=0 if job.toy else 8):
        started = time.monotonic()
        with job.rows.attempt(model=SMALL, dtype="fp16", batch=batch, compiled=variant.name):
            run = compiled_call(job, models[variant.name], images)
            run()  # compiles
            counted = compiled_calls(run)  # records
            for _ in range(2):  # replays
                run()
            job.device.synchronize()
            runs[variant.name], calls[variant.name] = run, counted
            print(f"compiled {variant.name} at {batch} in {time.monotonic() - started:.1f} s", flush=True)
    if "dense" in runs:
        row = times_row(job, runs, batch, time.monotonic())
        job.rows.add(model=SMALL, dtype="fp16", batch=batch, how="torch.compile", **row, **{"kernel calls": calls})


# ---- the paper's protocol


def measure_paper(job: Job) -> None:
    """TF32, eager, images on the device, a hundred calls and then one synchronization; by wall time."""
    torch.set_float32_matmul_precision("high")
    batch, calls, rounds = (2, 2, 2) if job.toy else (128, CALLS, 3)
    models = variants_of(SMALL, PAPER, "fp32", job)
    with job.rows.attempt(model=SMALL, dtype="tf32", batch=batch):
        job.rows.add(model=SMALL, dtype="tf32", batch=batch, **_eager_row(job, models, batch, calls, rounds))
    torch.set_float32_matmul_precision("highest")
    halves = variants_of(SMALL, PAPER, "fp16", job)
    for size in job.rows.in_time((batch, 1), reserve=6):
        with job.rows.attempt(model=SMALL, dtype="fp16", batch=size):
            job.rows.add(model=SMALL, dtype="fp16", batch=size, **_eager_row(job, halves, size, calls, rounds))


def _eager_row(job: Job, models: dict[str, Any], batch: int, calls: int, rounds: int) -> dict[str, Any]:
    images = images_for(models["dense"], batch, next(models["dense"].parameters()).dtype, job.device.name)
    runs = {name: call(model, images) for name, model in models.items()}
    for run in runs.values():
        for _ in range(3):
            run()
    job.device.synchronize()
    shuffled, times = random.Random(0), {name: [] for name in runs}
    for _ in range(rounds):
        for name in shuffled.sample(list(runs), len(runs)):
            started = time.perf_counter()
            for _ in range(calls):
                runs[name]()
            job.device.synchronize()
            times[name].append(1e3 * (time.perf_counter() - started) / calls)
    dense = times["dense"]
    return {
        "calls": calls, "rounds": rounds, "convolutions tried out": torch.backends.cudnn.benchmark,
        "ms": {name: round(median(v), 4) for name, v in times.items()},
        "images a second": {name: round(1e3 * batch / median(v), 1) for name, v in times.items()},
        "speed-up": {name: ratio(dense, v) for name, v in times.items() if name != "dense"},
        "over its own dense": {
            name: ratio(times["dense official"], times[name])
            for name in times if name.endswith("official") and name != "dense official"
        },
        "official over ours": {
            name: ratio(times[f"{name} official"], times[name]) for name in times if f"{name} official" in times
        },
        "kernel calls": {name: kernel_calls(model, images) for name, model in models.items()},
    }  # fmt: skip


# ---- larger models


def measure_larger(job: Job) -> None:
    """DeiT-B at the paper's batch; ViT-L at 384 pixels, where there are 576 patches; FP16 in CUDA graphs."""
    variants = (DENSE, Variant(0.7), Variant(0.5), Variant(0.7, "body"), Variant(0.7, "slice"))
    keys = ((BASE, 1 if job.toy else 128), (LARGE, 1 if job.toy else 32))
    for architecture, batch in job.rows.in_time(keys, reserve=5):
        with job.rows.attempt(model=architecture, dtype="fp16", batch=batch):
            models = variants_of(architecture, variants, "fp16", job)
            job.rows.add(model=architecture, dtype="fp16", batch=batch, **graph_row(job, models, batch))
        models = {}
        job.device.release()
