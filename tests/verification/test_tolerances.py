"""How far right answers may lie apart: limits and margins from hand-made numbers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evit_deploy.tokens.choices import FLOOR, share_margin
from evit_deploy.verification.tolerances import error_limit, noise, tie_limits

EPS = float(np.finfo(np.float32).eps)


def test_a_limit_is_twice_the_precision_s_own_error_and_never_below_the_floor():
    reference = np.array([[1.0, -2.0], [0.5, 8.0]])
    assert error_limit(reference + 0.25, reference, np.ones(2)) == 0.5
    assert error_limit(reference, reference, np.array([3.0, 2.0])) == FLOOR * EPS * 3
    assert error_limit(np.full((2, 2), np.inf), reference, np.ones(2)) == np.inf


def test_only_images_in_which_two_patches_may_change_places_have_more_room():
    reference, one, two = np.zeros((3, 2)), np.array([5.0, 0.5, 5.0]), np.array([5.0, 0.5, 0.5])
    swapped = np.array([[1.0, 0.0], [2.0, -3.0], [0.0, 4.0]])
    margins = [np.stack([one, two, two]), np.stack([one, one, two])]
    assert tie_limits(0.25, reference + 0.5, swapped, reference, margins).tolist() == [0.25, 4.0, 5.0]
    assert tie_limits(2.0, reference + 0.5, swapped, reference, margins).tolist() == [2.0, 5.0, 6.0]
    assert tie_limits(0.25, reference, swapped, reference, []).tolist() == [0.25] * 3  # nothing is reduced
    # a token may join another one without a second token's doing anything
    assert tie_limits(0.25, reference + 0.5, swapped, reference, [], [np.stack([two, one, two])]).tolist() == [2, 4, 5]


@given(st.integers(0, 2**32 - 1), st.integers(1, 11), st.floats(1e-6, 1.0))
def test_a_patch_that_rounding_moves_over_the_boundary_has_a_margin_below_1(seed, keep, size):
    rng = np.random.default_rng(seed)
    exact = np.exp(rng.normal(size=(4, 12)))
    scores = exact * np.exp(rng.uniform(-size, size, exact.shape))
    ours, theirs = (np.argsort(np.argsort(-values, axis=1), axis=1) < keep for values in (exact, scores))
    assert (share_margin(scores, exact, keep)[ours != theirs] < 1).all()


def test_margins_tell_clear_choices_from_close_ones():
    exact = np.array([[0.4, 0.3, 0.2999, 0.0001]])
    found = share_margin(exact * np.array([1.001, 1.0, 1.0, 1.0]), exact, keep=2)
    assert found[0, 1] < 1
    assert found[0, 2] < 1
    assert found[0, 0] > 100
    assert found[0, 3] > 1000


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
def test_noise_is_relative_to_what_tells_classes_apart(scale):
    reference = scale * np.array([[1.0, -1.0], [5.0, 3.0]])  # the mean of an image's logits tells nothing
    assert noise(reference, reference) == 0
    assert noise(reference + scale * np.array([[0.5, -0.5], [0.5, -0.5]]), reference) == pytest.approx(0.5)


def test_noise_of_embeddings_is_relative_to_what_tells_images_apart():
    common = np.array([100.0, -50.0, 25.0])  # of all images: large, and no help
    reference = common + np.array([[1.0, 0, 0], [-1.0, 0, 0]])
    expected = reference + np.array([[0, 0.5, 0], [0, 0.5, 0]])
    assert noise(expected, reference, embedding=True) == pytest.approx(0.5)
    assert noise(expected, reference) < 0.01
