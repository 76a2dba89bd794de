"""Predictions: softmax in FP32, the best classes in order, and how they look."""

import numpy as np
import pytest
import torch

from evit_deploy.errors import InputError
from evit_deploy.inference.prediction import Prediction, predictions_of, softmax


def test_softmax_is_pytorchs_also_far_out():
    logits = np.array([[1000.0, 999.0, -1000.0], [0.0, 0.0, 0.0], [-1e38, 1e38, 0.0]], np.float32)
    expected = torch.softmax(torch.from_numpy(logits), dim=1).numpy()
    np.testing.assert_allclose(softmax(logits), expected, rtol=1e-6)
    assert softmax(logits[:2].astype(np.float16)).dtype == np.float32


def test_the_best_classes_come_first_and_equal_ones_in_their_order():
    logits = np.array([[0.0, 2.0, 1.0, 2.0]], np.float32)
    (found,) = predictions_of(logits, ["a", "b", "c", "d"], 3, ["x.png"])
    assert (found.labels, found.classes, found.image) == (("b", "d", "c"), (1, 3, 2), "x.png")
    assert (found.label, found.index, found.probability) == ("b", 1, found.probabilities[0])
    assert found.top[2] == ("c", found.probabilities[2])
    np.testing.assert_allclose(found.probabilities, torch.tensor(logits[0]).softmax(0)[[1, 3, 2]], rtol=1e-6)


def test_without_labels_classes_have_numbers_and_few_classes_are_all_named():
    (found,) = predictions_of(np.array([[0.0, 1.0]], np.float32), None, 5, [None])
    assert (found.labels, found.image) == (("1", "0"), None)
    assert sum(found.probabilities) == pytest.approx(1)


def test_no_class_is_no_answer():
    with pytest.raises(InputError, match=r"top: no classes to name \(got 0"):
        predictions_of(np.zeros((1, 2), np.float32), None, 0, [None])


def test_it_prints_as_a_line_and_in_a_notebook_as_a_table():
    found = Prediction(("<b>cat</b>", "dog"), (0.75, 0.25), (7, 2), "a&b.png")
    assert repr(found) == "Prediction(<b>cat</b> 75.00 %, dog 25.00 %)"
    page = found._repr_html_()
    assert "&lt;b&gt;cat&lt;/b&gt;" in page
    assert "a&amp;b.png" in page
    assert "<b>" not in page
