"""Timing on a GPU: the model alone, and whole calls.

*Compute* is the model alone: images are on the GPU in the type that it computes in, and CUDA events are recorded around
each call. *End to end* is a whole call by the host's clock: float32 images in pinned memory, the copy to the GPU, the
conversion there, the model, and the copy of the answers to pinned memory. Both are defined alike for every runtime. A
runtime that cannot separate them is timed by whole calls between NumPy arrays, labeled as wall time.

A turn is a few consecutive calls; their events are read after a single synchronization, so the GPU already has the next
call queued if the host is fast enough. If it is not, as for PyTorch eager at small batches, the time that the GPU waits
for launches is included, as part of that runtime's cost.
"""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from evit_deploy.profiling.clocks.turns import Times, in_turns
from evit_deploy.runtimes.runner import Resident, Runner

CALLS = 4
"""Timed calls per turn, after one untimed call, which finds the GPU idle."""
WINDOW, STILL = 3, 0.98
"""Warm-up ends when the median of the last WINDOW calls is at least STILL times that of the WINDOW calls before."""
LEAST, CEILING = 0.1, 5.0
"""Minimum (so that the GPU's clocks are up) and maximum seconds of warm-up after the first call."""


def measure_on_gpu(
    runners: Sequence[Runner], feeds: Sequence[Mapping[str, np.ndarray]], duration: float, minimum_rounds: int
) -> list[Times]:
    """Times runners in turn, warmed up.

    Args:
        runners: Opened runners.
        feeds: Float32 images for each runner.
        duration: Seconds.
        minimum_rounds: Rounds to run even if that takes longer.

    Returns:
        Times of each runner: ``compute`` with ``end_to_end``, or ``wall``.
    """
    residents = [runner.resident(images) for runner, images in zip(runners, feeds, strict=True)]

    def whole(index: int) -> Callable[[], object]:
        resident = residents[index]
        return resident.round_trip if resident is not None else lambda: runners[index].infer(feeds[index])

    def turn(index: int) -> tuple[list[float], float]:
        resident = residents[index]
        seconds = compute_times(runners[index], resident) if resident is not None else []
        return seconds, whole_call(runners[index], whole(index))

    for index, (runner, resident) in enumerate(zip(runners, residents, strict=True)):
        if resident is not None:
            warm_up(runner, resident.run)
        warm_up(runner, whole(index))
    in_turns(turn, len(runners), 0.0, minimum_rounds=1)  # a discarded round, so that each runner has run after another
    rounds = in_turns(turn, len(runners), duration, minimum_rounds)
    times = []
    for index, resident in enumerate(residents):
        ends = np.array([turns[index][1] for turns in rounds])
        if resident is None:
            times.append(Times("wall", ends[:, None]))
        else:
            times.append(Times("compute", np.array([turns[index][0] for turns in rounds]), ends))
    return times


def compute_times(runner: Runner, resident: Resident, calls: int = CALLS) -> list[float]:
    """Returns the seconds of each of several consecutive calls, read after a single synchronization."""
    resident.run()
    marks = [resident.mark()]
    for _ in range(calls):
        resident.run()
        marks.append(resident.mark())
    runner.synchronize()
    return [later.seconds_since(earlier) for earlier, later in itertools.pairwise(marks)]


def whole_call(runner: Runner, call: Callable[[], object]) -> float:
    """Returns the wall time in seconds from a call to the end of all its work."""
    started = time.perf_counter()
    call()
    runner.synchronize()
    return time.perf_counter() - started


def warm_up(runner: Runner, call: Callable[[], object]) -> int:
    """Calls a function until its times are stable: nothing is compiled or allocated any more, and the clocks are up.

    Not only the first call of a compiled model is slow: CUDA graphs warm up in one call, are recorded in the next and
    replayed from then on.

    Args:
        runner: The runner to synchronize.
        call: The function; called at least 2 · WINDOW + 1 times, even if that takes longer than the maximum.

    Returns:
        The number of calls.
    """
    whole_call(runner, call)
    seconds: list[float] = []
    begin = time.perf_counter()
    while True:
        seconds.append(whole_call(runner, call))
        spent = time.perf_counter() - begin
        if len(seconds) < 2 * WINDOW or spent < LEAST:
            continue
        before, last = np.median(seconds[-2 * WINDOW : -WINDOW]), np.median(seconds[-WINDOW:])
        if last >= STILL * before or spent >= CEILING:
            return 1 + len(seconds)
