"""Devices of the parts: a CUDA device with events and graphs, or the CPU in a dry run."""

import gc
import math
import random
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

WARM_UP_CALLS = 3
FEWEST = 11
"""Number of rounds for a median and its interval."""
Run = Callable[[], Any]


class Cuda:
    """The GPU: graphs are CUDA graphs, times are between CUDA events."""

    name = "cuda"

    def capture(self, calls: list[Run]) -> Run:
        """Captures all calls in one CUDA graph; returns a function that replays it and keeps the outputs alive."""
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_CALLS):
                calls[0]()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            kept = [call() for call in calls]
        replay = Replay(graph.replay, kept)
        replay()
        torch.cuda.synchronize()
        return replay

    def milliseconds(self, run: Run, calls: int = 1) -> float:
        """Time of one call: starts all calls, then waits for the last."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / calls

    def synchronize(self) -> None:
        """Waits for all work."""
        torch.cuda.synchronize()

    def release(self) -> None:
        """Releases unused memory to the device."""
        gc.collect()
        torch.cuda.empty_cache()

    def start_peak(self) -> int:
        """Starts tracking memory; returns the bytes in use."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def peak(self) -> int:
        """Peak bytes in use since then."""
        return torch.cuda.max_memory_allocated()

    @property
    def cache(self) -> int:
        """Bytes of the last-level cache."""
        return torch.cuda.get_device_properties(0).L2_cache_size

    def empty_node(self) -> Run:
        """Something that takes no time."""
        return lambda: torch.cuda._sleep(0)

    def stream(self) -> AbstractContextManager[Any]:
        """Runs the block on a separate stream, which must be synchronized."""
        return torch.cuda.stream(torch.cuda.Stream())


class Cpu:
    """Replaces the GPU in a dry run: the same calls in the same order, by wall time."""

    name = "cpu"

    def capture(self, calls: list[Run]) -> Run:
        """Calls them again at every replay."""
        kept = [call() for call in calls]
        return Replay(lambda: [call() for call in calls], kept)

    def milliseconds(self, run: Run, calls: int = 1) -> float:
        """Time of one call."""
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return 1e3 * max(time.perf_counter() - start, 1e-9) / calls

    def synchronize(self) -> None:
        """Nothing runs on."""

    def release(self) -> None:
        """Gives memory back."""
        gc.collect()

    def start_peak(self) -> int:
        """Memory is not counted here."""
        return 0

    def peak(self) -> int:
        """Memory is not counted here."""
        return 0

    @property
    def cache(self) -> int:
        """Bytes; small, so that a dry run has few buffers."""
        return 1 << 16

    def empty_node(self) -> Run:
        """Something that takes no time."""
        return lambda: None

    def stream(self) -> AbstractContextManager[Any]:
        """There are no streams."""
        return nullcontext()


Device = Cuda | Cpu
DEVICES: dict[str, Callable[[], Device]] = {"cuda": Cuda, "cpu": Cpu}


class Replay:
    """Replays a graph, and keeps its outputs alive."""

    def __init__(self, run: Run, kept: list[Any]) -> None:
        self.run, self.kept = run, kept

    def __call__(self) -> Any:
        return self.run()


def in_turns(
    device: Device, runs: Mapping[str, Run], rounds: int, calls: int = 1, until: float = math.inf
) -> dict[str, list[float]]:
    """Milliseconds of each run in every round, in a new random order per round, so that drift affects all equally.

    No round starts after ``until`` (of ``time.monotonic``), except for the first :data:`FEWEST`.

    The first rounds warm up until 0.3 seconds have passed and the times of two rounds in a row differ by less than
    2 % (at most twice as long), because clocks rise under load.
    """
    shuffled = random.Random(0)
    started, last = time.monotonic(), 0.0
    warm = 0.3 if device.name == "cuda" else 0.0
    while time.monotonic() - started < 2 * warm:
        total = sum(device.milliseconds(run, calls) for run in runs.values())
        if time.monotonic() - started >= warm and abs(total - last) <= 0.02 * last:
            break
        last = total
    times: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(rounds):
        if index >= FEWEST and time.monotonic() > until:
            break
        for name in shuffled.sample(list(runs), len(runs)):
            times[name].append(device.milliseconds(runs[name], calls))
    return times
