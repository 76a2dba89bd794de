"""The budget, and which finalist is chosen."""

import msgspec
import numpy as np
import pytest

from evit_deploy.profiling.clocks.turns import Times
from evit_deploy.profiling.speedup import row_of
from evit_deploy.report.report import ComparedRow, Difference
from evit_deploy.tokens.plan import TokenSpec
from evit_deploy.tuning.answers import Nearness
from evit_deploy.tuning.results.choice import Budget, chosen, goals_for, verdict
from evit_deploy.tuning.results.front import TunedRow
from evit_deploy.tuning.schedules import Schedule
from evit_deploy.tuning.search import Fitter
from tests.support.tuning import device, planner

DEFAULT = "default-0.7"


def row(name, ms, cosine, agreement=0.9, drop=None):
    speed = row_of("onnxruntime", name, 1, Times("cpu", np.full((9, 1), ms / 1e3)), on_gpu=False)
    if name != "dense":
        speed = msgspec.structs.replace(speed, speedup=100 / ms, speedup_low=99 / ms, speedup_high=101 / ms)
    answers = None
    if drop is not None:
        cost = Difference("dense", -drop / 100, 0.01, -drop / 100 - 0.02, -drop / 100 + 0.02)
        answers = ComparedRow(name, "evit", "", "fp32", 1.0, 1.0, 9, top1=0.5, to_dense=cost)
    schedule = Schedule((), ()) if name == "dense" else Schedule((3,), (100,))
    near = Nearness(cosine, 0.01, agreement, 64)
    return TunedRow(name, schedule, TokenSpec(keep_rate=0.5), 1.0, ms, cosine, agreement, speed, near, answers)


DENSE = row("dense", 100, 1.0, 1.0, 0.0)


def test_the_nearest_answers_that_meet_a_budget_of_time_win():
    rows = [DENSE, row(DEFAULT, 70, 0.9), row("a", 66, 0.95), row("b", 60, 0.93), row("c", 80, 0.99)]
    assert chosen(rows, Budget("speedup", 1.5, 0.1), DEFAULT) == (True, rows[2])
    assert chosen(rows, Budget("latency", 0.0605, 0.1), DEFAULT) == (True, rows[3])


def test_none_that_agrees_less_than_the_default_schedule_wins():
    rows = [DENSE, row(DEFAULT, 66, 0.9, 0.95), row("a", 66, 0.97, 0.94), row("b", 66, 0.92, 0.95)]
    assert chosen(rows, Budget("speedup", 1.5, 0.1), DEFAULT) == (True, rows[3])
    assert chosen(rows[:3], Budget("speedup", 1.5, 0.1), DEFAULT) == (True, rows[1])
    slow = [DENSE, row(DEFAULT, 80, 0.9, 0.95), rows[2]]  # it does not meet the budget, and decides nothing
    assert chosen(slow, Budget("speedup", 1.5, 0.1), DEFAULT) == (True, rows[2])


def test_without_classes_the_cosine_decides_alone():
    rows = [DENSE, row(DEFAULT, 66, 0.9, None), row("a", 66, 0.97, None)]
    assert chosen(rows, Budget("speedup", 1.5, 0.1), DEFAULT) == (True, rows[2])


def test_the_fastest_that_drops_no_further_wins():
    rows = [DENSE, row(DEFAULT, 70, 0.9, drop=0.4), row("a", 50, 0.8, drop=0.5), row("b", 40, 0.7, drop=0.6)]
    assert chosen(rows, Budget("drop", 0.5, 0.1), DEFAULT) == (True, rows[2])
    assert chosen(rows, Budget("drop", 0.3, 0.1), DEFAULT) == (False, rows[1])


def test_a_budget_that_none_meets_gives_the_nearest_and_says_so():
    rows = [DENSE, row(DEFAULT, 70, 0.9), row("a", 50, 0.8)]
    budget = Budget("speedup", 3.0, 0.1)
    met, nearest = chosen(rows, budget, DEFAULT)
    assert (met, nearest) == (False, rows[2])
    said = verdict(rows, nearest, budget, met=met)
    assert said.startswith("No schedule that was measured is at least 3x as fast as the dense model; the nearest is a.")
    assert "2.00x [1.98, 2.02]" in said
    assert "default-0.7: 70.00 ms" in said


@pytest.mark.parametrize("budget", [("speedup", 1.7), ("latency", 12.0), ("drop", 1.0), ("speedup", 1e6)])
def test_goals_share_the_trials_and_can_all_be_met(budget):
    fitter = Fitter(planner(), device())
    goals = goals_for(Budget(*budget, fitter.dense), fitter, 48)
    assert sum(goal.trials for goal in goals) == 48
    assert all(goal.trials > 0 and goal.seconds >= fitter.floor for goal in goals)
    assert len({goal.name for goal in goals}) == len(goals)
    default = fitter.seconds(fitter.planner.schedule_of(fitter.planner.spec))
    assert default in [goal.seconds for goal in goals]


def test_a_drop_is_of_recall_where_there_are_no_classes():
    own = row("a", 66, 0.95, drop=1.0)
    recalled = msgspec.structs.replace(own, answers=msgspec.structs.replace(own.answers, top1=None, recall=0.5))
    budget = Budget("drop", 2.0, 0.1, "recall@1")
    assert str(budget) == "at most 2 points of recall@1 below the dense model"
    assert "recall@1 -1.0 points [-3.0, 1.0]" in verdict([DENSE, recalled], recalled, budget, met=True)
    assert "top-1 -1.0 points" in verdict([DENSE, own], own, Budget("drop", 2.0, 0.1), met=True)
