"""Cosines and nearest neighbors of embeddings, against the definition written out pair by pair."""

import numpy as np
import pytest

from evit_deploy.verification.answers import retrieval
from evit_deploy.verification.answers.retrieval import centered_cosines, cosines, nearest, recalled


def embeddings(count: int, width: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, width), dtype=np.float32)


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    one, other = one.astype(np.float64), other.astype(np.float64)
    return float(one @ other / (one @ one * (other @ other)) ** 0.5)


def test_cosines_are_those_of_the_pairs():
    one, other = embeddings(9), embeddings(9, seed=1)
    np.testing.assert_allclose(cosines(one, other), [cosine(*pair) for pair in zip(one, other, strict=True)], atol=1e-6)
    np.testing.assert_allclose(cosines(one, 3 * one), 1, atol=1e-6)  # whatever the lengths
    np.testing.assert_allclose(cosines(one, -one), -1, atol=1e-6)
    assert cosines(np.zeros((1, 4)), np.ones((1, 4))).tolist() == [0]


def test_centring_shows_what_a_common_part_hides():
    common = 50 * np.ones(16, np.float32)
    dense, other = embeddings(200) + common, embeddings(200, seed=1) + common  # they have nothing else in common
    assert cosines(other, dense).min() > 0.99
    assert abs(centered_cosines(other, dense).mean()) < 0.1
    middle = dense.astype(np.float64).mean(0)
    wanted = [cosine(a - middle, b - middle) for a, b in zip(other, dense, strict=True)]
    np.testing.assert_allclose(centered_cosines(other, dense), wanted, atol=1e-5)
    # a shift of every embedding is seen: the mean is the dense model's, not each one's own
    assert centered_cosines(dense + 3, dense).mean() < 0.95


@pytest.mark.parametrize("block", [1, 37 * 4, 2**23])
def test_the_nearest_other_image(block, monkeypatch):
    monkeypatch.setattr(retrieval, "_BLOCK", block)  # so that blocks of one row, of four and of all are seen
    found = embeddings(37)
    wanted = [max((cosine(found[i], found[j]), j) for j in range(len(found)) if j != i)[1] for i in range(len(found))]
    assert nearest(found).tolist() == wanted


def test_recall_counts_images_that_have_another_of_their_class():
    neighbors, labels = np.array([1, 0, 1, 0, 2]), np.array([0, 0, 2, 2, 5])
    assert recalled(neighbors, labels).tolist() == [True, True, False, False]  # the only one of class 5 is left out
    assert recalled(np.array([1, 0]), np.array([3, 4])).tolist() == []
