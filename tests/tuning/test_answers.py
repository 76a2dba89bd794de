"""How near answers are: what is computed once gives the same answers as computing it anew."""

import numpy as np
import pytest
import torch

from evit_deploy.tokens.backbone import copy_sharing_weights
from evit_deploy.tokens.plan import TokenSpec
from evit_deploy.tokens.reduce import dense_twin, reduce_tokens_
from evit_deploy.tuning.answers import Answers, nearness
from tests.support.models import images, of_kind, seeded

SPECS = {
    "first block": TokenSpec(keep_rate=0.5, locations=(0,)),
    "later blocks": TokenSpec(keep_rate=(0.8, 0.5), locations=(1, 2)),
    "a method with state": TokenSpec(keep_rate=0.5, locations=(2,), options={"squeeze": True}),
    "last block": TokenSpec(keep_rate=0.5, locations=(3,), fuse=False),
    "merging": TokenSpec(keep_rate=0.5, locations=(2,), method="merge"),
}


CASES = [(kind, name) for kind in ("plain", "registers, no classes") for name in SPECS]
CASES += [("LV-ViT", "later blocks"), ("LV-ViT", "first block")]  # it has no squeeze


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_answers_are_those_of_the_whole_model(kind, name):
    spec = SPECS[name]
    model = of_kind(kind)
    inputs = images(model, 20)
    answers = Answers(dense_twin(model), inputs, classes=True)
    with torch.inference_mode():
        wanted = reduce_tokens_(copy_sharing_weights(model), spec)(torch.from_numpy(inputs)).numpy()
        dense = model(torch.from_numpy(inputs)).numpy()
    np.testing.assert_allclose(answers.of(spec), wanted, atol=2e-5 * np.abs(wanted).max())
    np.testing.assert_allclose(answers.dense, dense, atol=2e-5 * np.abs(dense).max())


def test_what_does_not_fit_is_computed_anew(monkeypatch):
    model, spec = seeded(), SPECS["later blocks"]
    inputs = images(model, 20)
    kept = Answers(model, inputs, classes=True).of(spec)
    monkeypatch.setattr("evit_deploy.tuning.answers._KEPT", 1000)
    np.testing.assert_allclose(Answers(model, inputs, classes=True).of(spec), kept, atol=1e-5)


def test_the_dense_model_is_its_own_measure_and_dropping_more_is_further():
    model = seeded()
    answers = Answers(model, images(model, 24), classes=True)
    same = answers.nearness(TokenSpec(keep_rate=1.0))
    assert (round(same.cosine, 6), same.agreement, same.images) == (1.0, 1.0, 24)
    some, most = (answers.nearness(TokenSpec(keep_rate=rate, locations=(0,))) for rate in (0.9, 0.1))
    assert 1 > some.cosine > most.cosine
    assert some.error > 0


def test_a_model_without_classes_agrees_with_nothing():
    dense = np.random.default_rng(0).standard_normal((9, 4))
    assert nearness(dense, dense, classes=False).agreement is None
    other = dense + 10  # centring takes the dense mean from both: a shift of all answers is far away
    assert nearness(other, dense, classes=True).cosine < 0.9
