"""What a search found: its rows, the Pareto front among them, and the files that say so."""

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from evit_deploy.charts.kinds import Axes, Point, points
from evit_deploy.charts.svg import standalone
from evit_deploy.report.report import ComparedRow, ProfileRow
from evit_deploy.tokens.plan import TokenSpec
from evit_deploy.tuning.answers import Nearness
from evit_deploy.tuning.schedules import Schedule
from evit_deploy.tuning.staircase import Staircase


class TunedRow(msgspec.Struct, frozen=True):
    """A schedule, and what is known of it.

    Args:
        name: What tables call it.
        schedule: Its token counts; none of the dense model.
        tokens: The spec that makes it.
        gmacs: Multiply-adds for one image, in 10⁹.
        expected: Milliseconds a call by the staircase.
        cosine: Centered cosine to the dense model's answers on the images of the search.
        agreement: Share of these images with the dense model's class; ``None`` of a model without classes.
        measured: How fast its exported form is, whole; of finalists alone.
        confirmed: How near its answers are on all calibration images; of finalists alone.
        answers: Of its exported form to the labeled images, if there were any; of finalists alone.
    """

    name: str
    schedule: Schedule
    tokens: TokenSpec
    gmacs: float
    expected: float
    cosine: float
    agreement: float | None = None
    measured: ProfileRow | None = None
    confirmed: Nearness | None = None
    answers: ComparedRow | None = None

    @property
    def milliseconds(self) -> float:
        """Of a call: measured, where it was."""
        return self.expected if self.measured is None else self.measured.p50

    @property
    def nearness(self) -> float:
        """The centered cosine on most images."""
        return self.cosine if self.confirmed is None else self.confirmed.cosine

    @property
    def agreeing(self) -> float | None:
        """The agreement on most images."""
        return self.agreement if self.confirmed is None else self.confirmed.agreement


class Tuning(msgspec.Struct, frozen=True):
    """What :func:`evit_deploy.tuning.tune.tune` found.

    Args:
        met: Whether the budget is met.
        budget: The budget in words.
        verdict: What came of it, in a sentence.
        winner: Name of the row that was chosen.
        finalists: The dense model, the default schedule and the best ones, measured whole, the fastest last.
        front: Of all schedules that were looked at those to which none is both faster and nearer, by the staircase.
        staircase: What parts of the model cost.
        looked_at: How many schedules were tried on images.
        images: Calibration images on which the finalists were compared with the dense model.
        notes: Sentences for the reader.
        versions: Packages.
        device: Where it was measured.
        bundle: The winner's bundle, if one was made.
    """

    met: bool
    budget: str
    verdict: str
    winner: str
    finalists: tuple[TunedRow, ...]
    front: tuple[TunedRow, ...]
    staircase: Staircase
    looked_at: int
    images: int
    notes: tuple[str, ...] = ()
    versions: dict[str, str] = {}
    device: dict[str, Any] = {}
    bundle: str | None = None


def pareto(rows: Iterable[TunedRow]) -> tuple[TunedRow, ...]:
    """The rows to which no other is at least as fast and nearer to the dense model, the slowest first."""
    found: list[TunedRow] = []
    for row in sorted(rows, key=lambda row: (row.expected, -row.cosine)):
        if not found or row.cosine > found[-1].cosine:
            found.append(row)
    return tuple(reversed(found))


_HEADER = (
    "name", "locations", "keep_rate", "tokens", "gmacs", "expected_ms", "measured_ms", "speedup", "speedup_low",
    "speedup_high", "cosine", "cosine_error", "agreement", "images", "top1", "recall", "to_dense", "to_dense_low",
    "to_dense_high", "finalist", "winner",
)  # fmt: skip
"""Shares and differences are called as in :class:`ComparedRow`: recall is of models without classes."""


def as_csv(found: Tuning) -> str:
    """Finalists and front, one row each."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(_HEADER)
    names = {row.name for row in found.finalists}
    for row in (*found.finalists, *(row for row in found.front if row.name not in names)):
        lines.writerow(["" if value is None else value for value in _values(row, found.winner, row.name in names)])
    return text.getvalue()


def _values(row: TunedRow, winner: str, finalist: bool) -> list[Any]:
    speed, near, answers = row.measured, row.confirmed, row.answers
    cost = answers.to_dense if answers is not None else None
    return [
        row.name, *(_joined(numbers) for numbers in (row.schedule.locations, row.tokens.rates, row.schedule.counts)),
        f"{row.gmacs:.4g}", f"{row.expected:.5g}",
        *(_short(getattr(speed, name, None)) for name in ("p50", "speedup", "speedup_low", "speedup_high")),
        _short(row.nearness), _short(near.error if near else None), _short(row.agreeing),
        near.images if near else None, *(_short(getattr(answers, name, None)) for name in ("top1", "recall")),
        *(_short(getattr(cost, name, None)) for name in ("value", "low", "high")),
        int(finalist), int(row.name == winner),
    ]  # fmt: skip


def _joined(numbers: Sequence[float]) -> str:
    return " ".join(f"{number:g}" for number in numbers)


def _short(value: float | None) -> str | None:
    return None if value is None else f"{value:.5g}"


def table(found: Tuning) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Titles and cells of the finalists."""
    labeled = next((row.answers for row in found.finalists if row.answers is not None), None)
    classes = any(row.agreeing is not None for row in found.finalists)
    header = ("", "blocks", "tokens behind them", "GMACs", "ms", "speed-up", "95 % interval", "cosine")
    header += ("agreement %",) * classes
    header += (f"{labeled.share_name} to dense, points",) if labeled is not None else ()
    cells = []
    for row in found.finalists:
        speed = row.measured
        known = speed is not None and speed.speedup is not None
        own = [
            f"{row.name} *" if row.name == found.winner else row.name,
            _joined(row.schedule.locations),
            _joined(row.schedule.counts),
            f"{row.gmacs:.2f}",
            f"{row.milliseconds:.2f}",
            f"{speed.speedup:.2f}" if known and speed else "",
            f"{speed.speedup_low:.2f} - {speed.speedup_high:.2f}" if known and speed else "",
            f"{row.nearness:.3f}",
        ]
        own += [_percent(row.agreeing)] if classes else []
        own += [_cost(row.answers)] if labeled is not None else []
        cells.append(tuple(own))
    return header, cells


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def _cost(answers: ComparedRow | None) -> str:
    cost = answers.to_dense if answers is not None else None
    if cost is None or cost.low is None or cost.high is None:
        return ""
    return f"{100 * cost.value:+.1f} [{100 * cost.low:.1f}, {100 * cost.high:.1f}]"


def as_markdown(found: Tuning) -> str:
    """The finalists as a table, with the verdict above it."""
    header, rows = table(found)
    lines = [f"# {found.budget}", "", found.verdict, "", "| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([*lines, "", *found.notes]) + "\n"


def as_svg(found: Tuning) -> str:
    """:func:`front_chart` as a file."""
    return standalone(front_chart(found)) + "\n"


def front_chart(found: Tuning) -> str:
    """The front and the finalists, for a page: milliseconds a call against nearness to the dense model."""
    finalists = {row.name for row in found.finalists}
    shown = [
        *(("front of the search", row) for row in found.front if row.name not in finalists),
        *((row.name + ", chosen" * (row.name == found.winner), row) for row in found.finalists),
    ]
    values = [
        Point(row.milliseconds, row.nearness, f"{series}: {row.schedule}, {row.milliseconds:.3g} ms", series)
        for series, row in shown
    ]
    axes = Axes(
        f"milliseconds a call, batch {found.staircase.batch}, {found.staircase.runtime}",
        "centered cosine to the dense model",
    )
    return points(values, axes, found.budget, lower_x=True)
