"""Latency statistics and the warnings about what the clock measured."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evit_deploy.errors import InputError
from evit_deploy.profiling.clocks.latency import launch_bound, summaries, summarize, warnings_of
from evit_deploy.runtimes.runner import Timings

FINITE = st.floats(0, 1e6, allow_nan=False)


def timings(enqueue=0.1, h2d=0.2, compute=1.0, d2h=0.05, calls=50) -> Timings:
    return Timings(*(np.full(calls, value) for value in (enqueue, h2d, compute, d2h)))


def test_a_summary_of_known_values():
    found = summarize(np.arange(101.0))
    assert (found.count, found.minimum, found.maximum, found.mean) == (101, 0, 100, 50)
    assert (found.median, found.p90, found.p95, found.p99) == (50, 90, 95, 99)
    assert found.variation == pytest.approx(np.arange(101.0).std() / 50)


@given(st.lists(FINITE, min_size=1, max_size=40))
def test_percentiles_rise_and_stay_between_the_extremes(values):
    s = summarize(np.array(values))
    rising = [s.minimum, s.median, s.p90, s.p95, s.p99, s.maximum]
    assert all(small <= large or large == pytest.approx(small) for small, large in itertools.pairwise(rising))
    assert s.minimum <= s.mean * (1 + 1e-9)
    assert s.mean <= s.maximum * (1 + 1e-9)
    assert s.variation >= 0


@given(st.lists(st.floats(0.01, 1e4), min_size=1, max_size=20), st.floats(0.1, 10))
def test_a_summary_scales_with_its_unit(values, factor):
    one, other = summarize(np.array(values)), summarize(factor * np.array(values))
    assert other.median == pytest.approx(factor * one.median)
    assert other.p99 == pytest.approx(factor * one.p99)
    assert other.variation == pytest.approx(one.variation, abs=1e-9)


@pytest.mark.parametrize("values", [[], [1.0, np.nan], [np.inf], [-0.1], [[1.0]]], ids=str)
def test_what_no_clock_gives_is_refused(values):
    with pytest.raises(InputError, match="no latencies"):
        summarize(np.array(values))


def test_latency_is_copies_and_compute_and_not_the_enqueue():
    found = summaries(timings(enqueue=9.0))
    assert found["latency"].median == pytest.approx(1.25)
    assert list(found) == ["enqueue", "h2d", "compute", "d2h", "latency"]


def test_a_steady_measurement_has_no_warnings():
    assert warnings_of(timings(), "batch 8") == []


@pytest.mark.parametrize(("enqueue", "warned"), [(0.8, False), (0.81, True), (2.0, True)])
def test_enqueue_bound_from_four_fifths_of_compute(enqueue, warned):
    found = warnings_of(timings(enqueue=enqueue), "batch 1")
    assert [text.split(",")[0] for text in found] == (["batch 1: bound by the host"] if warned else [])


@pytest.mark.parametrize(("part", "value", "warned"), [("h2d", 1.0, False), ("h2d", 1.1, True), ("d2h", 1.1, True)])
def test_transfer_bound_when_one_way_takes_longer_than_compute(part, value, warned):
    found = warnings_of(timings(**{part: value}), "batch 1")
    assert bool(found) is warned
    assert all("bound by copies" in text for text in found)


@pytest.mark.parametrize(("spread", "warned"), [(0.02, False), (0.03, True)])
def test_unstable_above_two_and_a_half_percent(spread, warned):
    calls = 100
    compute = 1 + spread * np.resize([1.0, -1.0], calls)  # its coefficient of variance is the spread itself
    rest = timings(calls=calls)
    found = warnings_of(Timings(rest.enqueue, rest.h2d, compute, rest.d2h), "batch 32")
    assert bool(found) is warned
    assert all("not stable" in text and "3.0%" in text for text in found)


@pytest.mark.parametrize(
    ("compute", "warned"),
    [
        ({1: 1.0, 8: 1.1, 32: 4.0}, True),
        ({8: 1.1, 1: 1.2}, True),  # even faster, and in any order
        ({1: 1.0, 8: 4.0}, False),
        ({1: 1.0, 2: 1.24}, True),
        ({1: 1.0, 2: 1.26}, False),
        ({1: 1.0, 8: 3.0, 32: 3.1}, False),  # only the smallest one is asked about
        ({32: 1.0, 33: 1.1}, False),  # a third of a tenth more images cannot take much longer
        ({1: 1.0}, False),
        ({}, False),
    ],
    ids=str,
)
def test_launch_bound_when_the_next_batch_takes_nearly_as_long(compute, warned):
    found = launch_bound(compute)
    assert bool(found) is warned
    if warned:
        sizes = sorted(compute)
        assert found[0].startswith(f"From batch {sizes[0]} to {sizes[1]} ")
