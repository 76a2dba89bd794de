"""Cutting images into calls: every image once, in sizes that the runner covers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evit_deploy.inference.batches import MOST, calls_for
from evit_deploy.recipe.options import BatchProfile

sizes = st.integers(1, 40)
profiles = st.lists(st.tuples(sizes, sizes, sizes).map(lambda ends: BatchProfile(*sorted(ends))), max_size=3)


@given(count=st.integers(0, 200), profiles=profiles, most=st.none() | sizes)
def test_every_image_is_in_one_call_of_a_size_that_is_covered(count, profiles, most):
    calls = list(calls_for(count, profiles, most))
    assert [n for start, taken, _ in calls for n in range(start, start + taken)] == list(range(count))
    for _, taken, size in calls:
        assert 1 <= taken <= size
        if profiles:
            assert any(profile.minimum <= size <= profile.maximum for profile in profiles)
        else:
            assert taken == size <= (most or MOST)
        if most is not None and any(profile.minimum <= most for profile in profiles):
            assert taken <= most


@pytest.mark.parametrize(
    ("count", "ends", "most", "calls"),
    [
        (70, [], None, [(0, 32, 32), (32, 32, 32), (64, 6, 6)]),
        (5, [], 2, [(0, 2, 2), (2, 2, 2), (4, 1, 1)]),
        (40, [(1, 16, 128)], None, [(0, 16, 16), (16, 16, 16), (32, 8, 8)]),  # what it was tuned for
        (40, [(1, 16, 128)], 64, [(0, 40, 40)]),
        (5, [(1, 1, 1), (8, 8, 8)], None, [(0, 5, 8)]),  # between two profiles
        (3, [(8, 16, 32)], 1, [(0, 3, 8)]),  # it takes no fewer
    ],
)
def test_calls(count, ends, most, calls):
    assert list(calls_for(count, [BatchProfile(*sizes) for sizes in ends], most)) == calls
