"""The kernel against a device copy of the same bytes, PyTorch's reorganization (eager and compiled) and an empty node.

Every candidate is one CUDA graph over enough sets of buffers to exceed the cache, and candidates take turns; a time is
the median over rounds, divided by the calls in a graph. Bytes are the minimum that the operator must move: every row of
x and the scores once, y and idx once; a copy of half as many bytes moves the same amount. An empty node is a graph of
kernels that do nothing.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch

from evit_deploy.tokens.operators.kernel import TokenReorgKernel
from evit_deploy.tokens.operators.token_reorg import reorganize, select

from .compiling import compiled
from .device import Run, in_turns
from .job import Job, median, ratio

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
BATCHES = (128, 1, 256, 8, 64)
MOST_SETS = 400
Shape = tuple[str, int, int, int]
"""dtype, N, C and batch."""


def shapes(toy: bool) -> list[Shape]:
    """DeiT-S first, then larger shapes, then BF16, then three again for the spread."""
    if toy:
        return [("fp16", 16, 24, 1), ("bf16", 16, 24, 2)]
    first = list(itertools.product(("fp16",), (196,), (384, 768), BATCHES))
    larger = list(itertools.product(("fp16",), (576, 1024), (384, 768), BATCHES))
    return [*first, *larger, *itertools.product(("bf16",), (196,), (384, 768), BATCHES), *first[:3]]


def eager(x: torch.Tensor, scores: torch.Tensor, keep: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The operator's reference implementation in PyTorch, never the kernel."""
    kept = select(scores, keep)
    return reorganize(x, scores, kept, True, 1), kept.to(torch.int32)


def buffers(job: Job, shape: Shape) -> tuple[list[torch.Tensor], list[torch.Tensor], int, int]:
    """Sets of x and scores, K, and the bytes moved by one call."""
    dtype, candidates, channels, batch = shape
    keep = -(-candidates * 7 // 10)
    moved = batch * ((candidates + 1 + keep + 2) * channels * 2 + 4 * (candidates + keep))
    sets = max(2, min(-(-3 * job.device.cache // moved), MOST_SETS))
    device = job.device.name
    generator = torch.Generator(device).manual_seed(0)
    x = [
        torch.randn(batch, candidates + 1, channels, device=device, generator=generator).to(DTYPES[dtype])
        for _ in range(sets)
    ]
    scores = [torch.rand(batch, candidates, device=device, generator=generator) / candidates for _ in range(sets)]
    return x, scores, keep, moved


def measure(job: Job) -> None:
    """A row for every shape; two shapes through ``torch.compile`` as well."""
    if not job.libraries:
        job.rows.add(failed="no kernel library runs here")
        return
    kernels = {name: TokenReorgKernel(path) for name, path in job.libraries.items()}
    seen: set[Shape] = set()
    for shape in job.rows.in_time(shapes(job.toy), reserve=2):
        key = dict(zip(("dtype", "candidates", "channels", "batch"), shape, strict=True))
        again = shape in seen
        seen.add(shape)
        with job.rows.attempt(**key, again=again):
            with_compile = not again and shape in (("fp16", 196, 384, 1), ("fp16", 196, 384, 128), ("bf16", 16, 24, 2))
            job.rows.add(**key, again=again, **_row(job, kernels, shape, with_compile))
        job.device.release()


def _row(job: Job, kernels: dict[str, TokenReorgKernel], shape: Shape, with_compile: bool) -> dict[str, Any]:
    xs, scores, keep, moved = buffers(job, shape)
    outs = [eager(x, s, keep) for x, s in zip(xs, scores, strict=True)]
    sources = [torch.randint(256, (moved // 2,), dtype=torch.uint8, device=job.device.name) for _ in xs]
    targets = [torch.empty_like(source) for source in sources]
    wanted, wanted_idx = eager(xs[-1], scores[-1], keep)
    for kernel in kernels.values():
        y, idx = kernel(xs[-1], scores[-1], keep, out=outs[-1])
        assert torch.equal(idx, wanted_idx), "idx is not PyTorch's"
        assert torch.equal(y[:, :-1], wanted[:, :-1]), "kept rows are not PyTorch's"

    def bound(function: Callable[..., Any], *arguments: Any, **named: Any) -> Run:
        return lambda: function(*arguments, **named)

    pairs = list(zip(xs, scores, outs, strict=True))
    calls = {name: [bound(k, x, s, keep, out=out) for x, s, out in pairs] for name, k in kernels.items()}
    calls["copy"] = [bound(b.copy_, a) for a, b in zip(sources, targets, strict=True)]
    calls["eager"] = [bound(eager, x, s, keep) for x, s, _ in pairs]
    calls["empty node"] = [job.device.empty_node() for _ in pairs]
    if with_compile:
        function = compiled(eager, toy=job.toy)  # captured in our own graph
        calls["torch.compile"] = [bound(function, x, s, keep) for x, s, _ in pairs]
    runs = {name: job.device.capture(each) for name, each in calls.items()}
    times = in_turns(job.device, runs, 3 if job.toy else 15)
    microseconds = {name: round(1e3 * median(values) / len(pairs), 3) for name, values in times.items()}
    first = next(iter(kernels))
    return {
        "keep": keep, "megabytes": round(moved / 1e6, 3), "sets": len(pairs), "microseconds": microseconds,
        "of copy": {name: ratio(times["copy"], times[name]) for name in kernels},
        "eager over kernel": ratio(times["eager"], times[first]),
        **({"torch.compile over kernel": ratio(times["torch.compile"], times[first])} if with_compile else {}),
    }  # fmt: skip
