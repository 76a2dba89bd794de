"""Schedules become specs that make just these token counts, for every method that can have them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evit_deploy.errors import InputError
from evit_deploy.tokens.backbone import backbone_of
from evit_deploy.tokens.plan import TokenSpec, keep_count
from evit_deploy.tuning.schedules import Planner, Schedule, rate_of
from tests.support.models import seeded
from tests.support.tuning import planner


@given(st.integers(2, 5000).flatmap(lambda n: st.tuples(st.integers(1, n - 1), st.just(n))))
def test_a_rate_keeps_as_many_as_it_was_made_for(numbers):
    keep, candidates = numbers
    rate = rate_of(keep, candidates)
    assert rate is not None
    assert keep_count(rate, candidates) == keep


def test_a_rate_is_as_short_as_it_can_be():
    assert [rate_of(98, 196), rate_of(138, 196), rate_of(14, 25)] == [0.5, 0.7, 0.56]


@pytest.mark.parametrize(
    "options",
    [{}, {"fuse": False}, {"options": {"squeeze": True}}, {"options": {"normalize": True}}, {"method": "merge"}],
)
def test_a_spec_makes_the_counts_of_its_schedule(options):
    made = planner(**options)
    schedule = Schedule((1, 4, 10), (160, 96, 24))
    spec = made.spec_of(schedule)
    assert made.schedule_of(spec) == schedule
    assert [row.tokens_out for row in made.plan_of(spec).blocks] == [197] + 3 * [160] + 6 * [96] + 2 * [24]
    assert {name: getattr(spec, name) for name in options} == options


def test_the_schedule_of_a_spec_says_where_tokens_go():
    assert planner().schedule_of(TokenSpec(keep_rate=0.7)) == Schedule((3, 6, 9), (140, 100, 72))
    assert planner().schedule_of(TokenSpec(keep_rate=1.0)) == Schedule((), ())


def test_counts_that_cannot_be_are_refused():
    with pytest.raises(InputError, match=r"cannot make 198 tokens of 197"):
        planner().spec_of(Schedule((3,), (198,)))


@pytest.mark.parametrize("method", ["tome", "evo-vit"])
def test_a_method_without_a_rate_for_each_location_is_refused(method):
    with pytest.raises(InputError, match=f"'{method}' has no keep rate for each location"):
        planner(method, **({"options": {"merge": 8}} if method == "tome" else {}))


def test_a_method_without_an_exported_form_is_refused():
    with pytest.raises(InputError, match="'random' has no exported form"):
        planner("random")


def test_a_family_whose_blocks_differ_is_refused():
    model = seeded("levit_128s", img_size=64)
    backbone = backbone_of(model)
    with pytest.raises(InputError, match="no keep rate for each location"):
        Planner(TokenSpec(keep_rate=0.7), backbone.shape(model), backbone.method("evit"))
