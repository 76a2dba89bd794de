"""What takes how long on a GPU: the work itself, and beside it a whole call.

*Compute* is the model alone: images lie on the GPU in the type that it computes in, and CUDA events stand around each
call. *End to end* is a whole call by the host's clock: float32 images in pinned memory, the copy to the GPU, the
conversion there, the work, and the copy of the answers into pinned memory. Both mean the same for every runtime. One
that cannot tell them apart is timed by whole calls from its caller's arrays to its caller's arrays, and its times say
that they are wall time.

A turn is a few calls one behind the other, whose events are read after one wait: so the GPU has the next call already
when it ends one, if the host is fast enough. Where it is not, as with PyTorch eager at small batches, the GPU waits
for launches, and that is part of the time: it is what eager costs.
"""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from evit_deploy.profiling.clocks.turns import Times, in_turns
from evit_deploy.runtimes.runner import Resident, Runner

CALLS = 4
"""Timed calls a turn, behind one that is not: it alone finds the GPU idle."""
WINDOW, STILL = 3, 0.98
"""Warm-up: calls that are compared with as many before them, and how still their medians have to be."""
LEAST, CEILING = 0.1, 5.0
"""Seconds of warm-up after the first call: at least, so that the clocks are up, and at most."""


def measure_on_gpu(
    runners: Sequence[Runner], feeds: Sequence[Mapping[str, np.ndarray]], duration: float, minimum_rounds: int
) -> list[Times]:
    """Times runners in turn, warmed up.

    Args:
        runners: Opened runners.
        feeds: For each of them its images, float32.
        duration: Seconds.
        minimum_rounds: Rounds to run even if that takes longer.

    Returns:
        For each runner its times: ``compute`` with end to end beside it, or ``wall``.
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
    in_turns(turn, len(runners), 0.0, minimum_rounds=1)  # each has followed another once
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
    """Seconds of each of some calls that follow one another on the device, read after one wait."""
    resident.run()
    marks = [resident.mark()]
    for _ in range(calls):
        resident.run()
        marks.append(resident.mark())
    runner.synchronize()
    return [later.seconds_since(earlier) for earlier, later in itertools.pairwise(marks)]


def whole_call(runner: Runner, call: Callable[[], object]) -> float:
    """Seconds of wall time from a call to the end of all its work."""
    started = time.perf_counter()
    call()
    runner.synchronize()
    return time.perf_counter() - started


def warm_up(runner: Runner, call: Callable[[], object]) -> int:
    """Calls until the times stand still: nothing is compiled, recorded or allocated any more, and the clocks are up.

    The first calls of a compiled model are the slowest, and not only the very first: CUDA graphs warm up at one call,
    record at the next and replay from then on.

    Args:
        runner: Whom to wait for.
        call: What to call; two windows of calls and the first are made even if they take longer than the ceiling.

    Returns:
        How many calls it took.
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
