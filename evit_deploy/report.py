"""What was checked and what was measured: one structure for JSON and for the terminal."""

import os
import platform
from collections.abc import Iterable
from typing import Any

import msgspec
import numpy as np

from evit_deploy.gpu import GpuSummary
from evit_deploy.latency import Summary
from evit_deploy.tables import render as render  # what a report is printed with is asked for here


class Check(msgspec.Struct, frozen=True):
    """One yes-or-no question and its answer.

    Args:
        name: What was checked.
        value: What was found.
        limit: What would still have passed.
        passed: Whether it held.
        reason: How the value came about, or why the check failed.
    """

    name: str
    value: float | int | str | None
    limit: float | int | str | None
    passed: bool
    reason: str = ""


class ProfileRow(msgspec.Struct, frozen=True):
    """How fast one contestant ran at one batch size.

    Args:
        runtime: Name in the registry of runtimes.
        variant: ``model``, ``dense``, ``slice``, ``body`` or ``plugin``: see
            :class:`evit_deploy.contestants.Contestant`.
        batch: Images a call.
        rounds: Calls measured.
        images_per_second: Batch over the median latency.
        p50: Median latency of a call, milliseconds of wall time; p95 and p99 likewise.
        p95: See p50.
        p99: See p50.
        variation: Standard deviation over mean of the latencies.
        speedup: Dense twin's time over this one's, median of the paired rounds.
        speedup_low: Lower end of the median's 95 % interval.
        speedup_high: Upper end.
        mac_ratio: Dense multiply-adds over this one's.
        mac_efficiency: Speed-up over MAC ratio: 1 when time follows arithmetic.
        overhead: This one's time over the slice twin's, less 1: what the reorganisation itself costs.
        device: Where it ran, ``cpu`` or ``gpu``; what ran on different ones did not take turns.
    """

    runtime: str
    variant: str
    batch: int
    rounds: int
    images_per_second: float
    p50: float
    p95: float
    p99: float
    variation: float
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    mac_ratio: float | None = None
    mac_efficiency: float | None = None
    overhead: float | None = None
    device: str = "cpu"


class LatencyRow(msgspec.Struct, frozen=True):
    """Where the time of one engine's calls went, as trtexec reports it: CUDA events, milliseconds.

    Args:
        runtime: Name in the registry of runtimes.
        variant: ``model``, ``dense``, ``slice``, ``body`` or ``plugin``: see
            :class:`evit_deploy.contestants.Contestant`.
        batch: Images a call.
        images_per_second: Batch over the median compute time: what the engine could do if data lay on the GPU.
        latency: Copies and compute.
        enqueue: Host time that putting the work on the stream took.
        h2d: Copies to the device.
        compute: The engine itself.
        d2h: Copies back.
        speedup: Dense twin's compute time over this one's, median of the rounds, in which all engines took turns.
        overhead: This one's compute time over the slice twin's, less 1.
    """

    runtime: str
    variant: str
    batch: int
    images_per_second: float
    latency: Summary
    enqueue: Summary
    h2d: Summary
    compute: Summary
    d2h: Summary
    speedup: float | None = None
    overhead: float | None = None


class BlockRow(msgspec.Struct, frozen=True):
    """Time of one transformer block of an engine, beside its token counts.

    Args:
        runtime: Name in the registry of runtimes.
        variant: ``model`` or ``dense``.
        batch: Images a call.
        blocks: ``3``; ``3-4`` for layers that hold parts of both; ``rest`` for the stem, the head and what names none.
        tokens_in: Tokens its attention sees; of a span's first block.
        tokens_out: Tokens it hands on; of a span's last block.
        layers: Layers of the engine in it.
        milliseconds: Their time together, under the library's own profiler, which slows the whole down a little.
        share: Of the whole engine's time, 0 to 1.
    """

    runtime: str
    variant: str
    batch: int
    blocks: str
    tokens_in: int | None
    tokens_out: int | None
    layers: int
    milliseconds: float
    share: float


class LoadRow(msgspec.Struct, frozen=True):
    """A served model with several clients at a time.

    Args:
        model: Its name on the server.
        batch: Images a request.
        clients: Requests under way at a time.
        requests: Requests measured.
        images_per_second: All images over the time that all took.
        p50: Median time from sending a request to its answer, milliseconds; p99 likewise.
        p99: See p50.
        images_a_run: Images that the server computed together, on average: above ``batch`` it put requests together.
    """

    model: str
    batch: int
    clients: int
    requests: int
    images_per_second: float
    p50: float
    p99: float
    images_a_run: float


class Difference(msgspec.Struct, frozen=True):
    """How much more often one model was right than another, on the same images.

    Args:
        other: Name of the other's row.
        value: This one's top-1 less the other's, as a share.
        error: Standard error of the value, from the images on which only one of the two was right. It says what other
            images would change, not what another training run would.
    """

    other: str
    value: float
    error: float


class AccuracyRow(msgspec.Struct, frozen=True):
    """How often one model was right.

    Args:
        name: Which model.
        top1: Share of images whose label came first.
        top5: Share of images whose label was among the first five.
        count: Images.
        low: Lower end of top-1's 95 % interval (Wilson).
        high: Upper end.
        gmacs: Multiply-adds for one image, in 10⁹.
        against: The difference to the row that this one is to be held against.
    """

    name: str
    top1: float
    top5: float
    count: int
    low: float
    high: float
    gmacs: float | None = None
    against: Difference | None = None


class AgreementRow(msgspec.Struct, frozen=True):
    """How much two runtimes agree on the same images.

    Args:
        first: One of them.
        second: The other.
        images: How many.
        top1: Share of the images with the same top-1.
        kept: By block, kept patches in common over kept patches of either (Jaccard, original patch numbers), mean over
            the images; empty where one of them does not tell.
        logits: Largest difference of a logit.
    """

    first: str
    second: str
    images: int
    top1: float
    kept: dict[str, float]
    logits: float


class Report(msgspec.Struct, frozen=True):
    """The outcome of verify, profile, convert or run.

    Args:
        checks: What had to hold.
        rows: What was measured, by the host's clock.
        latencies: Engines: where the time of a call goes.
        blocks: Engines: time by transformer block.
        load: Servers: many clients at a time.
        gpu: What the GPU's clocks did meanwhile, by batch size.
        accuracy: What was right.
        agreement: Which runtimes agree.
        notes: Sentences for the reader.
        clock: What ratios are made of: ``cpu`` (one thread's own time) or ``wall``.
        versions: Packages.
        device: Where it ran.
    """

    checks: tuple[Check, ...] = ()
    rows: tuple[ProfileRow, ...] = ()
    latencies: tuple[LatencyRow, ...] = ()
    blocks: tuple[BlockRow, ...] = ()
    load: tuple[LoadRow, ...] = ()
    gpu: tuple[GpuSummary, ...] = ()
    accuracy: tuple[AccuracyRow, ...] = ()
    agreement: tuple[AgreementRow, ...] = ()
    notes: tuple[str, ...] = ()
    clock: str | None = None
    versions: dict[str, str] = {}
    device: dict[str, Any] = {}

    @property
    def passed(self) -> bool:
        """Whether every check held."""
        return all(check.passed for check in self.checks)

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that did not hold."""
        return tuple(check for check in self.checks if not check.passed)

    def __add__(self, other: "Report") -> "Report":
        return Report(
            checks=self.checks + other.checks,
            rows=self.rows + other.rows,
            latencies=self.latencies + other.latencies,
            blocks=self.blocks + other.blocks,
            load=self.load + other.load,
            gpu=self.gpu + other.gpu,
            accuracy=self.accuracy + other.accuracy,
            agreement=self.agreement + other.agreement,
            notes=self.notes + tuple(note for note in other.notes if note not in self.notes),
            clock=other.clock or self.clock,
            versions=self.versions | other.versions,
            device=self.device | other.device,
        )


def device() -> dict[str, Any]:
    """The machine: processor, cores, operating system."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    except OSError:
        pass  # not Linux
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": model, "cores": cores, "machine": platform.machine(), "system": platform.system()}


def wilson(right: int, count: int) -> tuple[float, float]:
    """Ends of the 95 % interval of a share (Wilson 1927), which stays sound near 0 and 1.

    >>> tuple(round(x, 3) for x in wilson(354, 360))
    (0.964, 0.992)
    """
    if count == 0:
        return 0.0, 1.0
    z = 1.959963984540054
    share = right / count
    middle = share + z * z / (2 * count)
    half = z * (share * (1 - share) / count + z * z / (4 * count * count)) ** 0.5
    scale = 1 + z * z / count
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def difference(other: str, right: np.ndarray, others: np.ndarray) -> Difference:
    """Compares two models image by image.

    Args:
        other: Name of the other model's row.
        right: Whether this model was right, for every image.
        others: Whether the other was, for the same images in the same order.
    """
    each = right.astype(np.float64) - others
    return Difference(other, float(each.mean()), float(each.std() / len(each) ** 0.5))


def accuracy_row(
    name: str, answers: Iterable[tuple[np.ndarray, np.ndarray]], gmacs: float | None = None
) -> AccuracyRow:
    """Counts how often answers were right.

    Args:
        name: Which model.
        answers: Logits ``[B, classes]`` and labels ``[B]`` of each batch.
        gmacs: Multiply-adds for one image, in 10⁹.
    """
    return row_of_hits(name, np.concatenate([hits_of(logits, labels) for logits, labels in answers]), gmacs)


def hits_of(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Whether the label came first, and whether it was among the first five: bool ``[B, 2]``."""
    hits = np.argsort(-logits, axis=1, kind="stable")[:, :5] == labels[:, None]
    return np.stack([hits[:, 0], hits.any(axis=1)], axis=1)


def row_of_hits(name: str, hits: np.ndarray, gmacs: float | None = None) -> AccuracyRow:
    """The row of a model from what :func:`hits_of` said of all images."""
    right1, right5 = (int(count) for count in hits.sum(axis=0))
    low, high = wilson(right1, len(hits))
    return AccuracyRow(name, right1 / len(hits), right5 / len(hits), len(hits), low, high, gmacs)
