"""The search: schedules meet their time and waste none of it, and what is found is gone on with."""

import random

import pytest

from evit_deploy.tokens.plan import TokenSpec
from evit_deploy.tuning.findings import Findings, Shape
from evit_deploy.tuning.search import Fitter, Goal, changed, search, usual_shapes
from tests.support.tuning import device, like_tokens, planner


@pytest.fixture(scope="module")
def fitter() -> Fitter:
    return Fitter(planner(), device())


@pytest.mark.parametrize("ratio", [1.1, 1.5, 2.0, 3.0])
def test_a_schedule_meets_its_time_and_no_count_could_be_raised(fitter, ratio):
    target = fitter.dense / ratio
    for shape in usual_shapes(12):
        schedule = fitter.fitted(shape, target)
        if schedule is None:
            continue
        assert fitter.seconds(schedule) <= target
        assert set(schedule.counts) <= set(fitter.staircase.efficient)
        assert all(fitter.seconds(more) > target for more in fitter._raised(schedule))
        assert set(schedule.locations) <= set(shape.locations)


def test_a_time_below_the_floor_has_no_schedule_and_the_floor_has_one(fitter):
    shape = Shape((0,), (1.0,))
    assert fitter.fitted(shape, 0.99 * fitter.floor) is None
    found = fitter.fitted(shape, fitter.floor)
    assert found is not None
    assert fitter.seconds(found) == fitter.floor


def test_weights_say_where_more_is_removed(fitter):
    early = fitter.fitted(Shape((3, 6, 9), (5.0, 1.0, 1.0)), fitter.dense / 1.5)
    late = fitter.fitted(Shape((3, 6, 9), (1.0, 1.0, 5.0)), fitter.dense / 1.5)
    assert early.counts[0] < late.counts[0]
    assert early.counts[-1] > late.counts[-1]


def test_shapes_that_are_changed_stay_shapes():
    draw, shape, seen = random.Random(0), Shape((3, 6, 9), (1.0, 1.0, 1.0)), set()
    for _ in range(500):
        shape = changed(shape, 12, draw)
        assert list(shape.locations) == sorted(set(shape.locations))
        assert shape.locations
        assert 0 <= shape.locations[0] <= shape.locations[-1] < 11
        assert all(weight > 0 for weight in shape.weights)
        assert len(shape.weights) == len(shape.locations)
        seen.add(len(shape.locations))
    assert len(seen) > 2


def test_the_search_finds_better_than_it_begins_with(fitter, tmp_path):
    target = fitter.seconds(fitter.planner.schedule_of(TokenSpec(keep_rate=0.6)))
    found = search(fitter, Goal("budget", target, 40), Findings(tmp_path / "f"), like_tokens, 0)
    assert len(found) == 40
    assert len({one.schedule for one in found}) == 40
    assert all(fitter.seconds(one.schedule) <= target for one in found)
    usual = [fitter.fitted(shape, target) for shape in usual_shapes(12)]
    assert found[0].nearness.cosine > max(like_tokens(one).cosine for one in usual if one is not None)
    assert [one.nearness.cosine for one in found] == sorted((one.nearness.cosine for one in found), reverse=True)


def test_an_interrupted_search_goes_on_where_it_was_and_ends_as_it_would_have(fitter, tmp_path):
    goal, calls = Goal("budget", fitter.dense / 1.5, 20), []

    def look(schedule):
        if len(calls) == 7:
            raise KeyboardInterrupt
        calls.append(schedule)
        return like_tokens(schedule)

    with pytest.raises(KeyboardInterrupt):
        search(fitter, goal, Findings(tmp_path / "stopped"), look, 0)
    assert len(Findings(tmp_path / "stopped").all()) == 7
    calls.append(None)
    resumed = search(fitter, goal, Findings(tmp_path / "stopped"), look, 0)
    assert len(calls) == 7 + 1 + 13
    assert resumed == search(fitter, goal, Findings(tmp_path / "whole"), like_tokens, 0)


def test_what_was_looked_at_for_another_time_is_not_looked_at_again(fitter, tmp_path):
    findings, calls = Findings(tmp_path / "f"), []

    def look(schedule):
        calls.append(schedule)
        return like_tokens(schedule)

    search(fitter, Goal("one", fitter.dense / 1.5, 8), findings, look, 0)
    search(fitter, Goal("other", fitter.dense / 1.5, 8), findings, look, 0)
    assert len(calls) == len(set(calls)) == 8
    assert len(findings.all()) == 16


def test_a_search_without_anything_left_to_find_ends(fitter, tmp_path):
    found = search(fitter, Goal("floor", fitter.floor, 30), Findings(tmp_path / "f"), like_tokens, 0)
    assert [fitter.seconds(one.schedule) for one in found] == [fitter.floor]
