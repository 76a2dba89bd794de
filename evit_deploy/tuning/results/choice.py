"""The budget, the goals of the search that follow from it, and the choice among the finalists."""

from collections.abc import Sequence
from typing import Literal

import msgspec

from evit_deploy.tuning.results.front import TunedRow
from evit_deploy.tuning.search import Fitter, Goal

DENSE = "dense"
LADDER = (1.15, 1.3, 1.5, 1.75, 2.0, 2.5)
"""Speed-ups to search at: for the front with a time budget, and as the only other goals with an accuracy budget."""
BUDGET, TIGHTER, AS_DEFAULT = "the budget", "a little less", "as the default"
"""Names of the goals."""
_TIGHTER = 0.96
"""Share of the budget for the goal :data:`TIGHTER`, whose schedules meet the budget even if the staircase predicts too
short times."""


class Budget(msgspec.Struct, frozen=True):
    """Requirement that a schedule must meet.

    Args:
        kind: Speed-up over the dense model, seconds per call, or a drop in points of top-1 or recall@1.
        limit: Value of the requirement.
        dense: Predicted seconds per call of the dense model.
        share: Metric of the drop; recall@1 for a model without classes.
    """

    kind: Literal["speedup", "latency", "drop"]
    limit: float
    dense: float
    share: Literal["top-1", "recall@1"] = "top-1"

    @property
    def seconds(self) -> float | None:
        """Largest number of seconds per call; ``None`` if the budget does not limit the time."""
        return {"speedup": self.dense / self.limit if self.limit else None, "latency": self.limit}.get(self.kind)

    def excess(self, row: TunedRow) -> float:
        """How far a finalist exceeds the budget; 0 or less if it meets the budget."""
        if self.kind == "drop":
            cost = row.answers.to_dense if row.answers is not None else None
            return -100 * cost.value - self.limit if cost is not None else 0.0
        assert row.measured is not None
        if self.kind == "latency":
            return row.measured.p50 / (1e3 * self.limit) - 1
        return self.limit - (row.measured.speedup or 1.0)

    def __str__(self) -> str:
        if self.kind == "drop":
            return f"at most {self.limit:g} points of {self.share} below the dense model"
        if self.kind == "latency":
            return f"at most {1e3 * self.limit:.4g} ms a call"
        return f"at least {self.limit:g}x as fast as the dense model"


def goals_for(budget: Budget, fitter: Fitter, trials: int) -> list[Goal]:
    """Returns the times to search at: the budget, the default schedule's time, and others for the front.

    With a time budget, it gets the largest share of the trials.

    Args:
        budget: The budget to meet.
        fitter: Model, method and staircase.
        trials: Total number of schedules to evaluate.
    """
    default = fitter.seconds(fitter.planner.schedule_of(fitter.planner.spec))
    rungs = [(f"{ratio:g}x", budget.dense / ratio) for ratio in LADDER if budget.dense / ratio > fitter.floor]
    if budget.seconds is None:
        each = max(1, trials // (len(rungs) + 1))
        rest = max(1, trials - each * len(rungs))
        return [Goal(AS_DEFAULT, default, rest), *(Goal(*rung, each) for rung in rungs)]
    wanted = max(budget.seconds, fitter.floor)
    others = [rung for rung in rungs if abs(rung[1] / wanted - 1) > 0.1][:3]
    few = max(1, trials // 16)
    rest = trials - few * len(others)
    tighter = max(_TIGHTER * wanted, fitter.floor)
    own = [Goal(BUDGET, wanted, rest // 2), Goal(TIGHTER, tighter, rest // 4)]
    return [*own, Goal(AS_DEFAULT, default, rest - rest // 2 - rest // 4), *(Goal(*rung, few) for rung in others)]


def chosen(rows: Sequence[TunedRow], budget: Budget, default: str) -> tuple[bool, TunedRow]:
    """Chooses one of the finalists.

    With a time budget, it is the finalist within the budget whose answers are closest to the dense model's. If the
    default schedule meets the budget too, finalists that agree less often with the dense model than it does are
    excluded. With an accuracy budget, it is the fastest finalist within the budget.

    Args:
        rows: The measured finalists, including the dense model.
        budget: The budget to meet.
        default: Name of the default schedule's row.

    Returns:
        Whether the budget is met, and the chosen row; if no finalist meets the budget, the closest one.
    """
    reduced = [row for row in rows if row.name != DENSE]
    able = [row for row in reduced if budget.excess(row) <= 0]
    if not able:
        return False, min(reduced, key=lambda row: (budget.excess(row), -row.nearness))
    if budget.kind == "drop":
        return True, min(able, key=lambda row: row.milliseconds)
    held = next((row for row in able if row.name == default), None)
    if held is not None and held.agreeing is not None:
        able = [row for row in able if row.agreeing is not None and row.agreeing >= held.agreeing]
    return True, max(able, key=lambda row: row.nearness)


def verdict(rows: Sequence[TunedRow], winner: TunedRow, budget: Budget, *, met: bool) -> str:
    """Summarizes the result of a search in sentences.

    Args:
        rows: The finalists.
        winner: The chosen row.
        budget: The budget.
        met: Whether the winner meets it.
    """
    said = [] if met else [f"No schedule that was measured is {budget}; the nearest is {winner.name}."]
    said += [f"{winner.name}: {_said(winner)}."]
    rivals = [row for row in rows if row.name.startswith("default") and row is not winner]
    said += [f"{row.name}: {_said(row)}." for row in rivals]
    return " ".join(said)


def _said(row: TunedRow) -> str:
    speed = row.measured
    parts = [f"{row.milliseconds:.2f} ms a call"]
    if speed is not None and speed.speedup is not None:
        parts.append(f"{speed.speedup:.2f}x [{speed.speedup_low:.2f}, {speed.speedup_high:.2f}]")
    parts.append(f"centered cosine {row.nearness:.3f}")
    if row.agreeing is not None:
        parts.append(f"{100 * row.agreeing:.1f} % of the images in the dense model's class")
    cost = row.answers.to_dense if row.answers is not None else None
    if row.answers is not None and cost is not None and cost.low is not None and cost.high is not None:
        parts.append(
            f"{row.answers.share_name} {100 * cost.value:+.1f} points [{100 * cost.low:.1f}, {100 * cost.high:.1f}]"
        )
    return ", ".join(parts)
