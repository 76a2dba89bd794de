"""Results of a search: rows, Pareto front and chart."""

from collections.abc import Iterable
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
    """A schedule and its results.

    Args:
        name: Name in tables.
        schedule: Its token counts; empty for the dense model.
        tokens: Token spec that results in the schedule.
        gmacs: Multiply-adds for one image, in 10⁹.
        expected: Milliseconds per call predicted by the staircase.
        cosine: Centered cosine to the dense model's answers on the images of the search.
        agreement: Share of these images with the dense model's class; ``None`` for a model without classes.
        measured: Measured times of the exported model; finalists only.
        confirmed: Similarity of its answers on all calibration images; finalists only.
        answers: Accuracy of the exported model on the labeled images, if any; finalists only.
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
        """Milliseconds per call: measured if available, else predicted."""
        return self.expected if self.measured is None else self.measured.p50

    @property
    def nearness(self) -> float:
        """Centered cosine: on all calibration images if available, else on the images of the search."""
        return self.cosine if self.confirmed is None else self.confirmed.cosine

    @property
    def agreeing(self) -> float | None:
        """Agreement: on all calibration images if available, else on the images of the search."""
        return self.agreement if self.confirmed is None else self.confirmed.agreement


class Tuning(msgspec.Struct, frozen=True):
    """Results of :func:`evit_deploy.tuning.tune.tune`.

    Args:
        met: Whether the budget is met.
        budget: The budget in words.
        verdict: Summary of the result in sentences.
        winner: Name of the chosen row.
        finalists: The dense model, the default schedule and the best ones, measured as complete models, the fastest
            last.
        front: Pareto front of all evaluated schedules, by predicted time and similarity to the dense model.
        staircase: Times of the parts of the model.
        looked_at: Number of schedules evaluated on images.
        images: Number of calibration images on which the finalists were compared with the dense model.
        notes: Notes for the user.
        versions: Versions of packages.
        device: Description of the device that was measured.
        bundle: Path of the winner's bundle, if it was converted.
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
    """Pareto front: rows for which no other row is at least as fast and closer to the dense model, slowest first."""
    found: list[TunedRow] = []
    for row in sorted(rows, key=lambda row: (row.expected, -row.cosine)):
        if not found or row.cosine > found[-1].cosine:
            found.append(row)
    return tuple(reversed(found))


def as_svg(found: Tuning) -> str:
    """Formats :func:`front_chart` as the content of an SVG file."""
    return standalone(front_chart(found)) + "\n"


def front_chart(found: Tuning) -> str:
    """Chart of the front and the finalists: milliseconds per call against nearness to the dense model."""
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
