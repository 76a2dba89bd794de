"""Summaries of latencies, and warnings when the measurement was limited by something other than the engine.

The figures and warnings are those of NVIDIA's trtexec (for enqueue, H2D, compute and D2H time), so that results can be
compared, with an additional warning when kernel launches dominate arithmetic.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from evit_deploy.errors import InputError
from evit_deploy.report.report import Summary
from evit_deploy.runtimes.runner import Timings

ENQUEUE_BOUND = 0.8
"""Warn if the median enqueue time exceeds this share of the median compute time, as trtexec does."""
UNSTABLE = 0.025
"""Warn if the coefficient of variation of the compute time exceeds this, as trtexec does."""
LAUNCH_BOUND = 0.25
"""Warn if doubling the batch increases the time by less than this share: launches dominate."""


def joined(parts: Sequence[Timings]) -> Timings:
    """Joins timings of one engine from several rounds."""
    names = Timings.__struct_fields__
    return Timings(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


def summarize(values: np.ndarray) -> Summary:
    """Summarizes latencies.

    >>> summarize(np.array([1.0, 2.0, 3.0])).median
    2.0

    Raises:
        InputError: There are none, or some are negative or not finite.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not values.size or not np.isfinite(values).all() or (values < 0).any():
        raise InputError("no latencies", seen=f"an array of shape {values.shape}", wanted="some, none below 0")
    median, p90, p95, p99 = (float(value) for value in np.percentile(values, (50, 90, 95, 99)))
    mean = float(values.mean())
    variation = float(values.std()) / mean if mean else 0.0
    return Summary(values.size, float(values.min()), float(values.max()), mean, median, p90, p95, p99, variation)


def summaries(timings: Timings) -> dict[str, Summary]:
    """Returns summaries of ``enqueue``, ``h2d``, ``compute``, ``d2h`` and ``latency``.

    Raises:
        InputError: See :func:`summarize`.
    """
    return {name: summarize(getattr(timings, name)) for name in ("enqueue", "h2d", "compute", "d2h", "latency")}


def warnings_of(timings: Timings, label: str) -> list[str]:
    """Returns warnings if the measurement was limited by the host or by copies, or is unstable.

    Args:
        timings: Timings of one engine at one batch size.
        label: Start of each sentence, such as ``batch 8``.

    Raises:
        InputError: See :func:`summarize`.
    """
    found = summaries(timings)
    compute, enqueue = found["compute"], found["enqueue"]
    sentences = []
    if enqueue.median > ENQUEUE_BOUND * compute.median:
        sentences.append(
            f"{label}: bound by the host, whose enqueue takes {enqueue.median:.3f} ms of {compute.median:.3f} ms "
            "compute: use CUDA graphs, or a larger batch."
        )
    transfer = max(found["h2d"].median, found["d2h"].median)
    if transfer > compute.median:
        sentences.append(
            f"{label}: bound by copies ({transfer:.3f} ms one way, {compute.median:.3f} ms compute): keep the data on "
            "the device, or overlap copies with compute."
        )
    if compute.variation > UNSTABLE:
        sentences.append(
            f"{label}: the compute time is not stable (coefficient of variance {compute.variation:.1%}, above "
            f"{UNSTABLE:.1%}): lock the GPU's clocks, and look for neighbors on it."
        )
    return sentences


def launch_bound(compute: Mapping[int, float]) -> list[str]:
    """Returns a note if the smallest batch takes nearly as long as the next one.

    Then launches dominate arithmetic, and fewer tokens save little.

    Args:
        compute: Batch size -> median compute time, milliseconds.
    """
    sizes = sorted(compute)[:2]
    if len(sizes) < 2 or not compute[sizes[0]]:
        return []
    small, large = sizes
    growth = compute[large] / compute[small] - 1
    if growth >= LAUNCH_BOUND * min(1.0, large / small - 1):
        return []
    return [
        f"From batch {small} to {large} the compute time grows by {max(growth, 0):.0%} only: at batch {small} the GPU "
        "waits for launches rather than for arithmetic, and fewer tokens cannot save much."
    ]
