"""The curriculum: when it moves on, and that it can be repeated and resumed."""

import pytest

from evit_deploy.data.training.curriculum import Curriculum
from evit_deploy.errors import InputError
from evit_deploy.training.loop import Stage, fit
from tests.support.logs import notices
from tests.support.training import FixedBatch, section, tiny


def test_level_rises_with_the_running_mean_and_never_falls():
    curriculum = Curriculum(threshold=0.6, rate=0.25, memory=2)
    assert [curriculum.update(share) for share in (1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0)] == [
        0.0,  # mean 0.5
        0.25,  # 0.75
        0.25,  # 0.375
        0.5,  # 0.6875
        0.75,
        1.0,
        1.0,  # no further
    ]


def test_a_step_knows_its_level_so_many_steps_ahead_and_no_further():
    curriculum = Curriculum(threshold=0, rate=0.1, delay=3)
    assert [curriculum.at(step) for step in range(4)] == [0.0] * 4
    with pytest.raises(InputError, match="step 4 after 0 updates"):
        curriculum.at(4)
    curriculum.update(0.0)
    assert curriculum.at(4) == pytest.approx(0.1)
    for _ in range(5):
        curriculum.update(0.0)
    assert [curriculum.at(step) for step in (6, 7, 8, 9)] == pytest.approx([0.3, 0.4, 0.5, 0.6])
    with pytest.raises(InputError, match="expected a step from 6 to 9"):
        curriculum.at(5)


def test_state_goes_on_where_it_was():
    shares = [0.9, 0.2, 0.8, 1.0, 0.7, 0.9, 0.1, 1.0]
    whole, first, second = (Curriculum(threshold=0.3, rate=0.1, memory=3, delay=2) for _ in range(3))
    for share in shares:
        whole.update(share)
    for share in shares[:5]:
        first.update(share)
    second.load_state_dict(first.state_dict())
    for share in shares[5:]:
        second.update(share)
    assert second.state_dict() == whole.state_dict()
    assert second.at(9) == whole.at(9) > 0


@pytest.mark.parametrize("bad", [{"threshold": 1.5}, {"rate": 0.0}, {"memory": 0}, {"delay": -1}])
def test_what_makes_no_curriculum_is_refused(bad):
    with pytest.raises(InputError, match="not a valid curriculum"):
        Curriculum(**bad)


class Rising(FixedBatch):
    """The fixed batch, whose level the run asks for."""

    def training(self, batch_size, seed, *, curriculum, **place):
        for batch in super().training(batch_size, seed, **place):
            curriculum.at(curriculum.steps)
            yield batch


@pytest.mark.parametrize(("steps", "level"), [(3, 0.6), (5, 1.0)])
def test_a_run_that_ends_below_full_difficulty_says_so(steps, level):
    curriculum, told = Curriculum(threshold=0, rate=0.2), notices()
    fit(tiny(), Rising(), section(steps=steps), stage=Stage("dense"), curriculum=curriculum)
    assert curriculum.level == pytest.approx(level)
    assert len(told) == (1 if level == 1 else 2)
    if level < 1:
        assert "dense: the run ended at level 0.60 of the curriculum" in told[-1]
        assert all(key in told[-1] for key in ("dense.steps", "data.curriculum_rate", "data.curriculum_threshold"))
