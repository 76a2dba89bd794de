"""The CUDA kernel against PyTorch's reorganisation (eager and compiled) and a device copy of the same bytes.

Every candidate runs inside a CUDA graph over as many sets of buffers as exceed the L2 cache, and they take turns; a
time is the median of the rounds over the calls in a graph. Bytes are what the operator has to move: every row of x and
the scores once, y and idx once; a copy of half of that moves as much. An empty node is a graph of kernels that do
nothing.

python tests/benchmarks/token_reorg_kernel.py --library libevit_token_reorg.so --out docs/results/kernel.json
"""

import argparse
import itertools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import save

from evit_deploy.tokens.kernel import TokenReorgKernel
from evit_deploy.tokens.op import token_reorg

KEEP_RATE = 0.7
CANDIDATES, CHANNELS, BATCHES = (196, 576, 1024), (192, 384, 768, 1024), (1, 8, 64, 256)
WARM_UP = 3
LARGE = 64 << 20
"""Bytes from which bandwidth, not latency, is what is measured."""


class Candidate:
    """One graph: a call for each set of buffers."""

    def __init__(self, calls: list[Callable[[], Any]]) -> None:
        self.calls, self.graph = len(calls), torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                calls[0]()
        torch.cuda.synchronize()
        with torch.cuda.graph(self.graph, stream=stream):
            self.kept = [call() for call in calls]  # outputs of PyTorch's, which the graph writes to

    def milliseconds(self) -> float:
        """One replay, for each call in it."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / self.calls


def measure(kernel: TokenReorgKernel, batch: int, candidates: int, channels: int, dtype: torch.dtype, rounds: int):
    """Medians in microseconds of one shape, and what follows from them."""
    keep = -(-candidates * 7 // 10)
    generator = torch.Generator("cuda").manual_seed(0)
    size = torch.finfo(dtype).bits // 8
    moved = batch * ((candidates + 1 + keep + 2) * channels * size + 4 * (candidates + keep))
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    sets = max(2, min(-(-3 * l2 // moved), 512))
    xs = [
        torch.randn(batch, candidates + 1, channels, device="cuda", generator=generator).to(dtype) for _ in range(sets)
    ]
    scores = [torch.rand(batch, candidates, device="cuda", generator=generator) / candidates for _ in range(sets)]
    outs = [kernel(x, s, keep) for x, s in zip(xs, scores, strict=True)]
    halves = [torch.randint(256, (moved // 2,), dtype=torch.uint8, device="cuda") for _ in range(2 * sets)]
    compiled = torch.compile(token_reorg, fullgraph=True, dynamic=False)
    for x, s, (y, idx) in zip(xs, scores, outs, strict=True):
        wanted, wanted_idx = token_reorg(x, s, keep, True, 1)
        assert torch.equal(idx, wanted_idx)
        assert torch.equal(y[:, :-1], wanted[:, :-1])

    def bound(function: Callable[..., Any], *arguments: Any, **named: Any) -> Callable[[], Any]:
        return lambda: function(*arguments, **named)

    pairs = list(zip(xs, scores, outs, strict=True))
    candidates = {
        "kernel": Candidate([bound(kernel, x, s, keep, out=out) for x, s, out in pairs]),
        "eager": Candidate([bound(token_reorg, x, s, keep, True, 1) for x, s, _ in pairs]),
        "torch.compile": Candidate([bound(compiled, x, s, keep, True, 1) for x, s, _ in pairs]),
        "copy": Candidate([bound(b.copy_, a) for a, b in zip(halves[::2], halves[1::2], strict=True)]),
        "empty node": Candidate([bound(torch.cuda._sleep, 0) for _ in range(sets)]),
    }
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(rounds + WARM_UP):
        for name, candidate in candidates.items():
            time = candidate.milliseconds()
            if turn >= WARM_UP:
                times[name].append(time)
    median = {name: 1e3 * statistics.median(values) for name, values in times.items()}
    ratio = {
        name: statistics.median(o / k for o, k in zip(times[name], times["kernel"], strict=True)) for name in times
    }
    return {
        "batch": batch, "candidates": candidates, "channels": channels, "dtype": str(dtype).removeprefix("torch."),
        "keep": keep, "megabytes": moved / 1e6, "sets": sets, "microseconds": median,
        "gigabytes a second": moved / median["kernel"] / 1e3, "of the copy": ratio["copy"],
        "eager over kernel": ratio["eager"], "torch.compile over kernel": ratio["torch.compile"],
        "kernel over empty node": 1 / ratio["empty node"],
    }  # fmt: skip


def line_of(row: dict[str, Any]) -> str:
    """One shape in words."""
    shape = f"{row['dtype']:8} N {row['candidates']:4} C {row['channels']:4} batch {row['batch']:3}"
    speed = f"{row['microseconds']['kernel']:8.2f} us, {row['gigabytes a second']:6.0f} GB/s"
    others = f"{row['eager over kernel']:5.1f}x eager, {row['torch.compile over kernel']:4.1f}x torch.compile"
    empty = f"{row['kernel over empty node']:4.1f}x an empty node"
    return f"{shape}: {speed}, {row['of the copy']:4.0%} of the copy, {others}, {empty}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--library", type=Path, required=True, help="made by evit-deploy plugin build")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--quick", action="store_true", help="DeiT-S's shapes in FP16 alone")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(3, "token_reorg_kernel: needs a CUDA device\n")
    kernel = TokenReorgKernel(options.library)
    shapes = itertools.product((torch.float16, torch.bfloat16), CANDIDATES, CHANNELS, BATCHES)
    figures = []
    for dtype, candidates, channels, batch in shapes:
        if options.quick and (dtype, candidates, channels) != (torch.float16, 196, 384):
            continue
        torch.compiler.reset()
        row = measure(kernel, batch, candidates, channels, dtype, options.rounds)
        figures.append(row)
        print(line_of(row), flush=True)
    large = [row["of the copy"] for row in figures if row["megabytes"] * 1e6 >= LARGE]
    if large:
        print(f"where at least 64 MB move: {min(large):.0%} to {max(large):.0%} of the copy's bandwidth")
    save(options.out, {"gpu": torch.cuda.get_device_name(), "shapes": figures})


if __name__ == "__main__":
    main()
