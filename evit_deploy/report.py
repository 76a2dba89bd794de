"""What was checked and what was measured: one structure for JSON and for the terminal."""

import os
import platform
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
import numpy as np


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
        variant: ``model``, ``dense`` or ``slice``.
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
    """

    name: str
    top1: float
    top5: float
    count: int
    low: float
    high: float
    gmacs: float | None = None


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
        rows: What was measured.
        accuracy: What was right.
        agreement: Which runtimes agree.
        notes: Sentences for the reader.
        clock: What ratios are made of: ``cpu`` (one thread's own time) or ``wall``.
        versions: Packages.
        device: Where it ran.
    """

    checks: tuple[Check, ...] = ()
    rows: tuple[ProfileRow, ...] = ()
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


def accuracy_row(
    name: str, answers: Iterable[tuple[np.ndarray, np.ndarray]], gmacs: float | None = None
) -> AccuracyRow:
    """Counts how often answers were right.

    Args:
        name: Which model.
        answers: Logits ``[B, classes]`` and labels ``[B]`` of each batch.
        gmacs: Multiply-adds for one image, in 10⁹.
    """
    right1 = right5 = count = 0
    for logits, labels in answers:
        hits = np.argsort(-logits, axis=1, kind="stable")[:, :5] == labels[:, None]
        right1, right5, count = right1 + int(hits[:, 0].sum()), right5 + int(hits.any(1).sum()), count + len(labels)
    low, high = wilson(right1, count)
    return AccuracyRow(name, right1 / count, right5 / count, count, low, high, gmacs)


def render(report: Report, console: Any) -> None:
    """Prints a report on a rich console, as tables.

    Args:
        report: What to print.
        console: A ``rich.console.Console``.
    """
    if report.checks:
        _table(
            console,
            ("check", "value", "limit", ""),
            [(c.name, _number(c.value), _number(c.limit), "ok" if c.passed else "FAILED") for c in report.checks],
        )
        for check in report.failed:
            console.print(f"FAILED {check.name}: {check.reason}", markup=False, highlight=False)
    if report.accuracy:
        _table(
            console,
            ("accuracy", "top-1 %", "95 % interval", "top-5 %", "images", "GMACs"),
            [
                (
                    row.name,
                    f"{100 * row.top1:.2f}",
                    f"{100 * row.low:.1f} - {100 * row.high:.1f}",
                    f"{100 * row.top5:.2f}",
                    str(row.count),
                    "" if row.gmacs is None else f"{row.gmacs:.4g}",
                )
                for row in report.accuracy
            ],
            dispensable=("top-5 %", "95 % interval", "GMACs"),
        )
    if report.agreement:
        _table(
            console,
            ("agreement of", "with", "images", "top-1 %", "kept patches %", "largest logit difference"),
            [
                (
                    row.first,
                    row.second,
                    str(row.images),
                    f"{100 * row.top1:.2f}",
                    " / ".join(f"{100 * share:.1f}" for share in row.kept.values()) or "not told",
                    f"{row.logits:.2e}",
                )
                for row in report.agreement
            ],
        )
    if report.rows:
        header = ("runtime", "variant", "batch", "images/s", "p50 ms", "p95 ms", "p99 ms", "variation",
                  "speed-up", "MAC ratio", "MAC eff.", "overhead")  # fmt: skip
        dispensable = ("variation", "p99 ms", "MAC ratio", "p95 ms")
        _table(console, header, [_profile_cells(row) for row in report.rows], dispensable)
    for note in report.notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)


def _profile_cells(row: ProfileRow) -> tuple[str, ...]:
    def shown(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    return (
        row.runtime,
        row.variant,
        str(row.batch),
        f"{row.images_per_second:.1f}",
        f"{row.p50:.2f}",
        f"{row.p95:.2f}",
        f"{row.p99:.2f}",
        f"{row.variation:.1%}",
        shown(row.speedup, ".2f") and f"{row.speedup:.2f}x",
        shown(row.mac_ratio, ".2f") and f"{row.mac_ratio:.2f}x",
        shown(row.mac_efficiency, ".2f"),
        shown(row.overhead, "+.1%"),
    )


def _number(value: float | int | str | None) -> str:
    return f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)


def _table(console: Any, header: Sequence[str], rows: Sequence[Sequence[str]], dispensable: Sequence[str] = ()) -> None:
    """Prints a table; where the terminal is narrow, rather without dispensable columns than with cut cells."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table, hidden = Table(), set[str]()
    for name in (None, *dispensable):
        hidden |= {name} if name else set()
        table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 0, 0, 1))
        shown = [i for i, title in enumerate(header) if title not in hidden]
        for i in shown:
            numeric = all(_is_number(row[i]) for row in rows)
            table.add_column(header[i], justify="right" if numeric else "left", no_wrap=True)
        for row in rows:
            table.add_row(*(row[i] for i in shown))
        wide = console.options.update(width=10_000)  # a measure is cut to the options' width
        if console.measure(table, options=wide).maximum <= console.width:
            break
    console.print(table)


def _is_number(text: str) -> bool:
    return not text or text.lstrip("+-")[:1].isdigit()
