"""What a search found: its rows, the Pareto front among them, and its chart."""

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
