"""The staircase: from times of short models to those of parts, and to those of any whole model."""

import numpy as np
import pytest

from evit_deploy.data.preprocess import Preprocess
from evit_deploy.errors import GateFailed
from evit_deploy.pipeline.lowering import lowering
from evit_deploy.recipe.options import ConvertOptions
from evit_deploy.tokens.plan import TokenSpec
from evit_deploy.tokens.reduce import token_plan
from evit_deploy.tuning.bench import Bench
from evit_deploy.tuning.schedules import Schedule
from evit_deploy.tuning.staircase import (
    Anchors,
    attention_share,
    check_noise,
    corrected,
    counts_for,
    ending_share,
    measure_staircase,
    never_rising,
    shortened,
    solved,
)
from tests.support.models import seeded
from tests.support.tuning import device, planner


def cost_of(tokens: int) -> float:
    return 0.2 + 0.1 * -(-tokens // 32)


def short_model(shape, count: int | None, plain: int, outside=1.5, location=0.07) -> float:
    """What a short model takes on a device that costs :func:`cost_of` a block, added up block by block."""
    dense = shape.prefix + shape.patches
    last = count or dense
    total = outside + plain * cost_of(last) + cost_of(last) * ending_share(last, shape.cost)
    if count is None:
        return total + cost_of(dense)
    share, behind = attention_share(dense, shape.cost), 1 - attention_share(count, shape.cost)
    return total + cost_of(dense) * share + cost_of(count) * behind + location


def test_the_parts_of_a_device_are_found_from_short_models():
    shape = planner().shape
    counts = counts_for(shape.prefix, shape.patches, 24)[1:]
    times = [short_model(shape, count, blocks) for blocks in (3, 0) for count in (None, 96)]
    ratios = {count: np.full(9, short_model(shape, count, 3) / times[0]) for count in counts}
    found = solved(shape, Anchors(3, 96, *times), ratios, ("onnxruntime", 1, "cpu"))
    np.testing.assert_allclose(found.block, [cost_of(197), *map(cost_of, counts)])
    assert found.outside == pytest.approx(1.5)
    assert found.location == pytest.approx(0.07)
    assert found.counts == (197, *counts)


def test_noise_does_not_make_fewer_tokens_cost_more():
    shape = planner().shape
    counts, noise = counts_for(shape.prefix, shape.patches, 24)[1:], np.random.default_rng(0)
    times = [short_model(shape, count, blocks) for blocks in (3, 0) for count in (None, 96)]
    ratios = {n: short_model(shape, n, 3) / times[0] * noise.normal(1, 0.05, 9) for n in counts}
    found = solved(shape, Anchors(3, 96, *times), ratios, ("onnxruntime", 1, "cpu"))
    assert list(found.block) == sorted(found.block, reverse=True)


@pytest.mark.parametrize("seed", range(5))
def test_steps_that_never_rise_are_the_nearest_by_squares(seed):
    isotonic = pytest.importorskip("sklearn.isotonic")
    generator = np.random.default_rng(seed)
    values = np.linspace(3, 1, 30).round(1) + generator.normal(0, 0.2, 30)
    expected = isotonic.IsotonicRegression(increasing=False).fit_transform(np.arange(30), values)
    np.testing.assert_allclose(never_rising(values), expected)
    assert len(set(never_rising(values))) < 30


def test_what_falls_already_stays():
    assert never_rising([3, 2, 2, 1]) == (3.0, 2.0, 2.0, 1.0)
    assert never_rising([1]) == (1.0,)


def test_just_below_a_step_is_where_it_is_worth_looking():
    assert device(steps=16).efficient == tuple(range(192, 31, -16)) + (24,) * 0
    assert device(steps=64).efficient == (192, 128, 64)


def test_a_whole_model_costs_the_sum_of_its_parts():
    made, own = planner(), device()
    plan = made.plan_of(made.spec_of(Schedule((2, 6), (128, 64))))
    cost = made.shape.cost
    first = 13 * attention_share(197, cost) + 8 * (1 - attention_share(128, cost)) + 0.25
    second = 8 * attention_share(128, cost) + 4 * (1 - attention_share(64, cost)) + 0.25 * 128 / 197
    wanted = 2 + 2 * 13 + first + 3 * 8 + second + 4 * 4 + 4 * ending_share(64, cost)
    assert own.seconds(plan) == pytest.approx(wanted)


def test_whole_models_set_the_scale_right():
    made, own = planner(), device()
    plans = [made.plan_of(TokenSpec(keep_rate=rate)) for rate in (1.0, 0.7, 0.4)]
    expected = [own.seconds(plan) for plan in plans]
    right = corrected(own, expected, [0.9 * seconds + 0.3 for seconds in expected])
    assert [right.seconds(plan) for plan in plans] == pytest.approx([0.9 * seconds + 0.3 for seconds in expected])
    other = corrected(own, expected, [2 * expected[0], 3 * expected[0], 4 * expected[0]])  # slower with fewer tokens
    assert [other.seconds(plan) for plan in plans] == pytest.approx([2 * seconds for seconds in expected])


def test_the_last_block_s_share_is_what_the_plan_computes():
    plan = planner().plan_of(TokenSpec(keep_rate=1.0))
    cost = planner().shape.cost
    saved = (1 - ending_share(197, cost)) * plan.block_macs(11)
    assert plan.macs() - plan.computed_macs() == pytest.approx(saved)


@pytest.mark.parametrize(("prefix", "patches"), [(1, 196), (1, 256), (2, 36), (5, 1369), (1, 16)])
def test_counts_fall_from_the_dense_model_s_by_tiles(prefix, patches):
    counts = counts_for(prefix, patches, 24)
    assert counts[0] == prefix + patches
    assert list(counts) == sorted(set(counts), reverse=True)
    assert counts[-1] > prefix + 1
    assert 2 <= len(counts) <= 26
    assert patches < 64 or all(count % 8 == 0 for count in counts[1:])


def test_a_device_that_is_too_noisy_is_refused_with_what_to_do():
    noisy = {count: np.array([0.5, 1.0, 1.5, 0.7, 1.2, 0.9, 1.1]) for count in (96, 64)}
    with pytest.raises(GateFailed, match=r"too noisy to rank schedules.*Measure longer with --duration 40"):
        check_noise(noisy, 10.0)
    check_noise({count: 1 + values / 100 for count, values in noisy.items()}, 10.0)


def test_a_short_model_has_the_tokens_that_are_measured():
    model = seeded("vit_tiny_patch16_224")
    own = planner(model=model)
    plan = token_plan(shortened(model, own, 16, 2))
    assert [(row.tokens_in, row.tokens_out) for row in plan.blocks] == [(37, 16), (16, 16), (16, 16), (16, 16)]
    assert not token_plan(shortened(model, own, None, 0)).locations
    assert len(model.blocks) == 4


@pytest.mark.parametrize("runtime", ["onnxruntime", "eager"])
def test_a_staircase_is_measured_on_a_runtime(runtime):
    model = seeded("vit_tiny_patch16_224")
    made = lowering(ConvertOptions(targets=("onnx",)))
    bench = Bench(runtime, made, ("vit_tiny_patch16_224", Preprocess.from_model(model)), batch=2, threads=1)
    found = measure_staircase(model, planner(model=model), bench, (37, 24, 8), duration=6.0)
    assert (found.runtime, found.batch, found.clock, found.counts) == (runtime, 2, "cpu", (37, 24, 8))
    assert all(seconds > 0 for seconds in found.block)
    assert found.block[0] > found.block[-1]
