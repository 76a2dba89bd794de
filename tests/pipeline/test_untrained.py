"""What convert says of merging where weights were never trained with fewer tokens."""

import re

import numpy as np
import pytest
from PIL import Image

from evit_deploy.data.preprocess import Preprocess
from evit_deploy.errors import InputError
from evit_deploy.pipeline.untrained import merging_note, merging_spec
from evit_deploy.tokens.backbone import copy_sharing_weights
from evit_deploy.tokens.plan import TokenSpec
from evit_deploy.tokens.reduce import reduce_tokens_, token_plan
from tests.support.models import TINY, preprocess_for, seeded


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(5):
        small = random.integers(0, 256, (6, 6, 3), np.uint8)
        Image.fromarray(small).resize((80, 80)).save(folder / f"{number}.png")
    return folder


def model(**more):
    return reduce_tokens_(seeded(**(TINY | more)), TokenSpec(0.5, (1, 2)))


def preprocessing(made) -> Preprocess:
    return preprocess_for(made)


def test_it_counts_answers_that_stay_the_same(pictures):
    made = model()
    note = merging_note(made, preprocessing(made), pictures)
    assert note is not None
    found = re.fullmatch(
        r"Without training it answers (\d) of 5 of these pictures as the dense model does, and (\d) of them with "
        r"--method merge --keep-rate (0\.\d+), at the same multiply-adds\.",
        note,
    )
    assert found
    assert int(found[2]) <= 5
    assert token_plan(made).locations  # the model is as it was
    assert token_plan(made).merging == frozenset()


def test_of_embeddings_it_gives_the_cosine(pictures):
    made = model(num_classes=0)
    note = merging_note(made, preprocessing(made), pictures)
    assert note is not None
    assert re.match(r"Without training it has a centered cosine of \S+ to the dense model on 5 of these", note)


def test_the_rate_has_nearly_the_same_multiply_adds():
    made = model()
    other = copy_sharing_weights(made)
    rate = merging_spec(other).keep_rate
    away = abs(token_plan(other).macs() - token_plan(made).macs())
    for near in (rate - 0.01, rate + 0.01):
        neighbor = reduce_tokens_(copy_sharing_weights(made), TokenSpec(round(near, 2), method="merge", fuse=False))
        assert away <= abs(token_plan(neighbor).macs() - token_plan(made).macs())


def test_without_pictures(tmp_path):
    made = model()
    with pytest.raises(InputError, match="no images here"):
        merging_note(made, preprocessing(made), tmp_path)
