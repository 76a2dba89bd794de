"""Token counts, costs and schedules: against published figures, integer arithmetic and slow compositions."""

import doctest
import itertools
import math

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evit_deploy.errors import InputError
from evit_deploy.tokens import plan as plan_module
from evit_deploy.tokens.choices import original_patches
from evit_deploy.tokens.plan import (
    BlockCost,
    BlockPlan,
    ModelCost,
    TokenPlan,
    TokenSpec,
    default_locations,
    keep_count,
    make_plan,
    scheduled_rate,
)


def vit_cost(width: int, *, patches: int = 196, patch: int = 16, classes: int = 1000, mlp_ratio: int = 4) -> ModelCost:
    """A ViT's multiply-adds from its dimensions: every matmul counted once, as the official EViT README does."""
    return ModelCost(
        stem=patches * width * 3 * patch**2,
        token_attention=4 * width**2,
        token_mlp=2 * mlp_ratio * width**2,
        width=width,
        head=width * classes,
    )


TINY, SMALL, BASE = (vit_cost(width) for width in (192, 384, 768))


def vit_plan(keep_rate, *, fuse=True, cost=SMALL, locations=None, progress=1.0) -> TokenPlan:
    """DeiT at 224: one class token, 14 × 14 patches, 12 blocks."""
    spec = TokenSpec(keep_rate=keep_rate, locations=locations, fuse=fuse)
    return make_plan(spec, prefix=1, patches=196, depth=12, cost=cost, progress=progress)


def test_doctests():
    results = doctest.testmod(plan_module)
    assert results.attempted > 0
    assert results.failed == 0


# ---- counts


# Computed from the official implementation's arithmetic: tokens with CLS after blocks 3, 6, 9 of DeiT at 224.
COUNTS = [
    (0.9, True, (179, 163, 148)),
    (0.8, True, (159, 129, 105)),
    (0.7, True, (140, 100, 72)),
    (0.6, True, (120, 74, 46)),
    (0.5, True, (100, 52, 28)),
    (0.9, False, (178, 161, 145)),
    (0.8, False, (158, 127, 102)),
    (0.7, False, (139, 98, 69)),
    (0.6, False, (119, 72, 44)),
    (0.5, False, (99, 50, 26)),
]


@pytest.mark.parametrize(("keep_rate", "fuse", "counts"), COUNTS)
def test_counts_are_those_of_the_official_implementation(keep_rate, fuse, counts):
    plan = vit_plan(keep_rate, fuse=fuse)
    assert [row.block for row in plan.locations] == [3, 6, 9]
    assert tuple(row.tokens_out for row in plan.locations) == counts
    assert tuple(row.tokens_in for row in plan.locations) == (197, *counts[:2])  # attention runs at the old count
    assert [row.tokens_out - row.keep for row in plan.locations] == [1 + fuse] * 3
    assert [row.fused for row in plan.locations] == [fuse] * 3


@pytest.mark.parametrize(("keep_rate", "fuse", "counts"), COUNTS)
def test_a_block_hands_its_count_to_the_next(keep_rate, fuse, counts):
    plan = vit_plan(keep_rate, fuse=fuse)
    assert [row.block for row in plan.blocks] == list(range(12))
    assert all(before.tokens_out == after.tokens_in for before, after in itertools.pairwise(plan.blocks))
    assert plan.blocks[-1].tokens_out == counts[-1]
    for row in plan.blocks:
        assert row.keep is not None or (row.tokens_in == row.tokens_out and not row.fused)


def test_counts_are_exact_for_every_two_decimal_rate():
    for percent in range(1, 101):
        rate = float(f"0.{percent:02d}") if percent < 100 else 1.0
        for candidates in range(1, 600):
            assert keep_count(rate, candidates) == -(-percent * candidates // 100), (rate, candidates)


@pytest.mark.parametrize(("rate", "candidates", "keep"), [(0.56, 25, 14), (0.28, 50, 14), (0.07, 100, 7)])
def test_float_arithmetic_would_keep_one_too_many(rate, candidates, keep):
    assert math.ceil(rate * candidates) == keep + 1  # the hazard is real
    assert keep_count(rate, candidates) == keep


def test_scheduled_rates_are_exact_in_six_decimals():
    for millionths in (1, 333_333, 560_000, 700_001, 999_999):
        for candidates in (1, 25, 196, 576):
            assert keep_count(millionths / 1e6, candidates) == -(-millionths * candidates // 1_000_000)


def test_very_small_rates_keep_one():
    assert keep_count(1e-7, 196) == 1
    assert vit_plan(1e-7).blocks[3] == BlockPlan(block=3, tokens_in=197, keep=1, fused=True, tokens_out=3)


def test_keeping_everything_is_no_location():
    assert vit_plan(1.0) == vit_plan(0.5).dense()
    assert vit_plan(1.0).locations == ()


def test_a_rate_whose_count_reaches_everything_is_no_location():
    spec = TokenSpec(keep_rate=(0.99, 0.7), locations=(0, 1))
    plan = make_plan(spec, prefix=1, patches=64, depth=2)  # ceil(63.36) = 64
    assert plan.blocks[0] == BlockPlan(block=0, tokens_in=65, keep=None, fused=False, tokens_out=65)
    assert plan.blocks[1] == BlockPlan(block=1, tokens_in=65, keep=45, fused=True, tokens_out=47)
    assert [row.block for row in plan.locations] == [1]


def test_rates_may_differ_by_location():
    # The paper's table 4, with its blocks counted from 1; the counts by hand: ceil, then one fused token.
    plan = vit_plan((0.64, 0.70, 0.70), locations=(4, 6, 9))
    assert [(row.block, row.keep) for row in plan.locations] == [(4, 126), (6, 89), (9, 63)]
    plan = vit_plan((0.70, 0.75, 0.70), locations=(3, 5, 9))
    assert [(row.block, row.keep) for row in plan.locations] == [(3, 138), (5, 105), (9, 75)]


def test_table_4_has_equal_costs():
    costs = [
        vit_plan(rates, locations=tuple(block - 1 for block in blocks)).macs()
        for blocks, rates in (
            ((4, 7, 10), (0.70, 0.70, 0.70)),
            ((5, 7, 10), (0.64, 0.70, 0.70)),
            ((3, 7, 10), (0.74, 0.70, 0.70)),
            ((4, 8, 10), (0.70, 0.64, 0.70)),
            ((4, 6, 10), (0.70, 0.75, 0.70)),
        )
    ]
    assert max(costs) / min(costs) < 1.01  # the paper prints 3.23 to 3.25


def test_prefix_tokens_are_never_candidates():
    for prefix in (1, 2, 5):
        plan = make_plan(TokenSpec(keep_rate=0.7), prefix=prefix, patches=196, depth=12)
        assert [row.keep for row in plan.locations] == [138, 98, 70]
        assert [row.tokens_out for row in plan.locations] == [138 + 1 + prefix, 98 + 1 + prefix, 70 + 1 + prefix]


@pytest.mark.parametrize(
    ("depth", "locations"),
    [(12, (3, 6, 9)), (16, (4, 8, 12)), (24, (6, 12, 18)), (4, (1, 2, 3)), (2, (0, 1)), (1, (0,))],
)
def test_default_locations(depth, locations):
    assert default_locations(depth) == locations
    assert [block for block, _ in TokenSpec(keep_rate=0.5).resolve(depth)] == list(locations)


def test_one_rate_in_a_list_counts_for_all_locations():
    assert TokenSpec(keep_rate=[0.7]).resolve(12) == TokenSpec(keep_rate=0.7).resolve(12)


# ---- costs


def gigas(plan: TokenPlan) -> str:
    return f"{plan.macs() / 1e9:.2f}"


@pytest.mark.parametrize(
    ("cost", "keep_rate", "fuse", "published"),
    [
        # DeiT-S fused: the official README's 4.6 / 4.0 / 3.5 / 3.0 / 2.6 / 2.3 G, to one decimal more
        (SMALL, 1.0, True, "4.60"),
        (SMALL, 0.9, True, "4.02"),
        (SMALL, 0.8, True, "3.48"),
        (SMALL, 0.7, True, "3.03"),
        (SMALL, 0.6, True, "2.64"),
        (SMALL, 0.5, True, "2.31"),
        (SMALL, 0.9, False, "3.99"),
        (SMALL, 0.8, False, "3.44"),
        (SMALL, 0.7, False, "3.00"),
        (SMALL, 0.6, False, "2.61"),
        (SMALL, 0.5, False, "2.28"),
        (TINY, 1.0, True, "1.25"),
        (TINY, 0.7, True, "0.82"),
        (TINY, 0.7, False, "0.81"),
        (BASE, 1.0, True, "17.56"),
        (BASE, 0.7, True, "11.61"),
        (BASE, 0.7, False, "11.49"),
        (BASE, 0.5, True, "8.82"),
        (BASE, 0.5, False, "8.72"),
    ],
)
def test_costs_are_the_published_ones(cost, keep_rate, fuse, published):
    assert gigas(vit_plan(keep_rate, fuse=fuse, cost=cost)) == published


@pytest.mark.parametrize(("keep_rate", "published"), [(1.0, "6.55"), (0.7, "4.71"), (0.5, "3.88")])
def test_costs_of_lv_vit_s_are_the_published_ones(keep_rate, published):
    # 16 blocks of width 384, MLP ratio 3; a stem of four convolutions; a classifier on every token that is left.
    stem = 112**2 * 64 * (3 * 7**2 + 2 * 64 * 3**2) + 14**2 * 384 * 64 * 8**2
    cost = ModelCost(stem=stem, token_attention=4 * 384**2, token_mlp=6 * 384**2, width=384, head=0)
    plan = make_plan(TokenSpec(keep_rate=keep_rate), prefix=1, patches=196, depth=16, cost=cost)
    classifiers = plan.blocks[-1].tokens_out * 384 * 1000
    assert f"{(plan.macs() + classifiers) / 1e9:.2f}" == published


def test_the_ratio_is_dense_over_reduced():
    plan = vit_plan(0.7)
    assert plan.mac_ratio() == vit_plan(1.0).macs() / plan.macs()
    assert plan.mac_ratio() == pytest.approx(4.60 / 3.03, abs=0.005)


def test_attention_costs_at_the_incoming_and_mlp_at_the_outgoing_count():
    cost = ModelCost(stem=0, token_attention=10, token_mlp=1000, width=3, head=0)
    plan = make_plan(TokenSpec(keep_rate=0.5, locations=(0,)), prefix=1, patches=8, depth=1, cost=cost)
    assert plan.block_macs(0) == 9 * 10 + 2 * 9 * 9 * 3 + (1 + 4 + 1) * 1000


def test_layers_of_the_method_cost_too():
    cost = ModelCost(stem=0, token_attention=10, token_mlp=1000, width=3, head=0)
    plain, scored = (TokenPlan(1, 8, (BlockPlan(0, 9, 4, True, 6, method_macs=macs),), cost) for macs in (0, 77))
    assert scored.block_macs(0) == plain.block_macs(0) + 77


def test_a_block_of_its_own_costs_what_it_says():
    own = (BlockCost(9, 9, token_attention=10, token_mlp=1000, pair=3, fixed=7), BlockCost(9, 4, token_mlp=100))
    cost = ModelCost(stem=50_000, token_attention=0, token_mlp=0, width=0, head=2, token_head=20, blocks=own)
    blocks = BlockPlan(0, 9, 4, True, 6, method_macs=5), BlockPlan(1, 6, None, False, 3)
    plan = TokenPlan(1, 8, blocks, cost)
    assert plan.block_macs(0) == 7 + 9 * 10 + 9 * 9 * 3 + 6 * 1000 + 5
    assert plan.macs() == plan.block_macs(0) + 3 * 100 + 50_000 + 2 + (3 - 1) * 20
    assert [(row.tokens_in, row.tokens_out) for row in plan.dense().blocks] == [(9, 9), (9, 4)]
    assert (plan.attentions, TokenPlan(1, 8, blocks).attentions) == (0, 2)


def test_patches_that_wait_at_the_end_are_classified_too():
    cost = ModelCost(stem=0, token_attention=0, token_mlp=0, width=0, head=0, token_head=20)
    for aside, patches in ((0, 5), (3, 8)):
        assert TokenPlan(1, 8, (BlockPlan(0, 9, None, False, 6, aside=aside),), cost).macs() == patches * 20


COST = ModelCost(stem=9, token_attention=40, token_mlp=1000, width=3, head=5, head_tokens=2, key_value=15)


def test_the_last_block_is_computed_for_what_the_head_sees():
    plan = TokenPlan(1, 8, (BlockPlan(0, 9, None, False, 9),), COST)
    assert plan.ends_early
    assert plan.macs() == 9 * 40 + 2 * 9 * 9 * 3 + 9 * 1000 + 9 + 5
    # Keys and values of nine tokens, all else of two.
    assert plan.computed_macs() == 9 * 15 + 2 * (25 + 2 * 9 * 3 + 1000) + 9 + 5
    assert plan.computed_mac_ratio() == 1


@pytest.mark.parametrize(
    ("row", "cost"),
    [
        (BlockPlan(0, 9, 4, True, 6), COST),
        (BlockPlan(0, 9, None, False, 9, aside=1), COST),
        (BlockPlan(0, 9, None, False, 9, ranks=True), COST),
        (BlockPlan(0, 9, None, False, 9), msgspec.structs.replace(COST, head_tokens=9)),
        (BlockPlan(0, 9, None, False, 9), msgspec.structs.replace(COST, head_tokens=0)),
        (BlockPlan(0, 9, None, False, 9), None),
    ],
)
def test_a_last_block_that_is_needed_whole_does_not_end_early(row, cost):
    plan = TokenPlan(1, 8, (row,), cost)
    assert not plan.ends_early
    assert cost is None or plan.computed_macs() == plan.macs()


def test_the_total_tells_what_is_computed_where_that_is_less():
    assert vit_plan(0.7).total == "total 3.03 GMACs, dense 4.60 GMACs"
    cost = msgspec.structs.replace(TINY, head_tokens=1, key_value=2 * 192**2)
    for locations in ((3, 6, 9), (3, 6, 11)):
        plan = vit_plan(0.7, cost=cost, locations=locations)
        millions = [n / 1e6 for n in (plan.macs(), 1_253_683_200, plan.computed_macs(), plan.dense().computed_macs())]
        assert (plan.computed_macs() == plan.macs()) is (locations[-1] == 11)  # there the last block reduces
        assert plan.total == "total {:.2f} MMACs, dense {:.2f} MMACs; computed {:.2f}, dense {:.2f}".format(*millions)


def test_a_thousand_million_is_a_giga():
    for stem, text in (
        (10**9, "total 1.00 GMACs"), (12_345 * 10**8, "total 1234.50 GMACs"), (10**9 - 10**6, "total 999.00 MMACs"),
    ):  # fmt: skip
        cost = ModelCost(stem=stem, token_attention=0, token_mlp=0, width=0, head=0)
        assert TokenPlan(1, 8, (BlockPlan(0, 9, None, False, 9),), cost).total.startswith(text)


def test_a_plan_without_costs_says_so():
    plan = vit_plan(0.7, cost=None)
    for ask in (plan.macs, plan.mac_ratio, lambda: plan.block_macs(0)):
        with pytest.raises(InputError, match=r"this plan has no costs\. Make it from a model"):
            ask()


# ---- printing and storing


def test_a_plan_prints_as_a_table():
    text = str(vit_plan(0.7))
    lines = text.splitlines()
    assert lines[0].split() == ["block", "tokens", "in", "kept", "fused", "tokens", "out", "MMACs"]
    assert lines[1].split()[:3] == ["0", "197", "197"]
    assert lines[4].split()[:5] == ["3", "197", "138", "+1", "140"]
    assert lines[13] == "total 3.03 GMACs, dense 4.60 GMACs"
    assert len(lines) == 14
    assert len({len(line) for line in lines[:13]}) == 1  # columns line up
    millions = sum(float(line.split()[-1]) for line in lines[1:13])
    assert millions * 1e6 == pytest.approx(vit_plan(0.7).macs() - SMALL.stem - SMALL.head, abs=12 * 0.05e6)


def test_a_plan_without_costs_prints_without_them():
    text = str(vit_plan(0.7, cost=None))
    assert "MACs" not in text
    assert len(text.splitlines()) == 13


@pytest.mark.parametrize("keep_rate", [0.7, 1, 0.560001, (0.7, 0.6, 0.5)])
@pytest.mark.parametrize("locations", [None, (2, 5, 8)])
def test_specs_and_plans_survive_json(keep_rate, locations):
    spec = TokenSpec(keep_rate=keep_rate, locations=locations, fuse=False, method="random", options={"seed": 3})
    assert msgspec.json.decode(msgspec.json.encode(spec), type=TokenSpec) == spec
    plan = vit_plan(keep_rate, locations=locations)
    assert msgspec.json.decode(msgspec.json.encode(plan), type=TokenPlan) == plan


@pytest.mark.parametrize("text", ['{"keep_rate": 1.5}', '{"keep_rate": 0.5, "locations": [3, 2]}', '{"keep_rate": []}'])
def test_json_is_checked_like_arguments(text):
    with pytest.raises(msgspec.ValidationError, match=r"expected|wanted|got"):
        msgspec.json.decode(text, type=TokenSpec)


def test_unknown_fields_are_refused():
    with pytest.raises(msgspec.ValidationError, match="keep_ratio"):
        msgspec.json.decode('{"keep_rate": 0.7, "keep_ratio": 0.7}', type=TokenSpec)


# ---- bad input


@pytest.mark.parametrize(
    "keep_rate",
    [0, 0.0, -0.0, 1.5, -1, -0.5, math.nan, math.inf, True, False, "abc", "0.7", (0.7, 0), [0.7, 1.1], (), []],
    ids=repr,
)
def test_bad_keep_rates_are_refused(keep_rate):
    with pytest.raises(InputError, match="keep rate"):
        TokenSpec(keep_rate=keep_rate)


def test_a_method_that_needs_a_keep_rate_says_so():
    with pytest.raises(InputError, match="the method 'evit' needs a keep rate"):
        TokenSpec().resolve(12)


@pytest.mark.parametrize(
    ("locations", "message"),
    [
        ((6, 3, 9), r"not strictly increasing \(got 6,3,9, expected 3,6,9\)"),
        ((3, 3, 9), r"not strictly increasing \(got 3,3,9, expected 3,9\)"),
        ((-1, 3), r"not a block index \(got -1"),
        ((3, 6.0), r"not a block index \(got 6\.0"),
        ((False, 3), r"not a block index \(got False"),
        (("3",), r"not a block index \(got '3'"),
    ],
)
def test_bad_locations_are_refused(locations, message):
    with pytest.raises(InputError, match=message):
        TokenSpec(keep_rate=0.7, locations=locations)


def test_locations_outside_the_model_are_refused():
    with pytest.raises(InputError, match=r"outside the model \(got 12, expected blocks 0 to 11"):
        vit_plan(0.7, locations=(3, 12))
    assert [row.block for row in vit_plan(0.7, locations=(3, 11)).locations] == [3, 11]


def test_no_model_has_ten_thousand_blocks():
    assert TokenSpec(keep_rate=0.7, locations=(9_999,)).locations == (9_999,)
    with pytest.raises(InputError, match=r"got 10000, expected a whole number from 0 to 9999"):
        TokenSpec(keep_rate=0.7, locations=(10_000,))


MOST = 1 << 20


@pytest.mark.parametrize(
    ("prefix", "patches", "blocks", "cost", "message"),
    [
        (-1, 8, [BlockPlan(0, 9, None, False, 9)], None, "out of range"),
        (1, 0, [BlockPlan(0, 1, None, False, 1)], None, "tokens that it does not have"),
        (1, MOST + 1, [BlockPlan(0, 9, None, False, 9)], None, "out of range"),
        (1, 8, [BlockPlan(0, 9, None, False, MOST + 1)], None, "out of range"),
        (1, 8, [BlockPlan(0, 9, -1, False, 9)], None, "out of range"),
        (1, 8, [BlockPlan(0, 9, 4, True, 6, aside=-1)], None, "out of range"),
        (1, 8, [BlockPlan(0, 9, 4, True, 6, choice_indices=MOST + 1)], None, "out of range"),
        (1, 8, [BlockPlan(0, 9, 4, True, 6, places=(-1,))], None, "out of range"),
        (1, 8, [], None, "not numbered from 0"),
        (1, 8, [BlockPlan(1, 9, None, False, 9)], None, "not numbered from 0"),
        (1, 8, [BlockPlan(0, 9, 10, False, 9)], None, "tokens that it does not have"),
        (1, 8, [BlockPlan(0, 9, 4, True, 6, places=(7, 8))], None, "tokens that it does not have"),
        (1, 8, [BlockPlan(0, 9, None, False, 9)], ModelCost(0, 0, 0, 0, 0, blocks=(BlockCost(9, 9),) * 2),
         r"a different number of blocks \(got 2"),
    ],
)  # fmt: skip
def test_a_plan_of_no_model_is_refused(prefix, patches, blocks, cost, message):
    with pytest.raises(InputError, match=message):
        TokenPlan(prefix, patches, tuple(blocks), cost)


def test_a_plan_at_its_limits_is_taken():
    TokenPlan(0, MOST, (BlockPlan(0, MOST, MOST, False, MOST, choice_indices=MOST, places=(MOST - 1,)),))


@pytest.mark.parametrize("rates", [(0.7, 0.6), (0.7, 0.6, 0.5, 0.4)])
def test_another_number_of_rates_than_locations_is_refused(rates):
    with pytest.raises(InputError, match=rf"{len(rates)} rates for 3 locations \(3,6,9\)"):
        TokenSpec(keep_rate=rates, locations=(3, 6, 9))
    with pytest.raises(InputError, match=rf"{len(rates)} rates for 3 locations \(3,6,9\)"):
        TokenSpec(keep_rate=rates).resolve(12)  # the default locations are known only with the depth


# ---- the schedule


two_decimals = st.integers(1, 100).map(lambda percent: percent / 100)


@given(two_decimals)
def test_the_schedule_starts_at_one_and_ends_at_the_target(target):
    assert scheduled_rate(target, 0.0) == scheduled_rate(target, -1.0) == 1.0
    assert scheduled_rate(target, 1.0) == scheduled_rate(target, 2.0) == target
    assert scheduled_rate(target, 0.5) == pytest.approx((1 + target) / 2, abs=1e-6)  # a cosine's middle


@given(two_decimals, st.floats(0, 1), st.floats(0, 1))
def test_the_schedule_never_rises_and_has_six_decimals(target, a, b):
    earlier, later = scheduled_rate(target, min(a, b)), scheduled_rate(target, max(a, b))
    assert target <= later <= earlier <= 1
    assert float(f"{earlier:.6f}") == earlier


def test_the_schedule_reaches_the_plan():
    assert vit_plan(0.5, progress=0.0) == vit_plan(1.0)
    assert vit_plan(0.5, progress=1.0) == vit_plan(0.5)
    assert vit_plan(0.5, progress=0.5) == vit_plan(0.75)
    costs = [vit_plan(0.5, progress=step / 20).macs() for step in range(21)]
    assert costs == sorted(costs, reverse=True)
    assert len(set(costs)) > 10


def test_a_location_that_drops_nothing_at_the_end_drops_nothing_on_the_way():
    """Of the 5 candidates that are left in the end 0.9 keeps all; of the 35 halfway it would drop one."""
    spec = TokenSpec(keep_rate=(0.05, 0.9), locations=(0, 1))
    for progress in (0.25, 0.5, 1.0):
        plan = make_plan(spec, prefix=1, patches=64, depth=2, progress=progress)
        assert [row.block for row in plan.locations] == [0]


# ---- original patch numbers


@st.composite
def journeys(draw):
    """A plan and, for every image and location, indices that the plan allows."""
    patches, depth = draw(st.integers(2, 30)), draw(st.integers(1, 6))
    rate = draw(two_decimals)
    spec = TokenSpec(keep_rate=rate, locations=tuple(range(depth)), fuse=draw(st.booleans()))
    plan = make_plan(spec, prefix=draw(st.integers(1, 3)), patches=patches, depth=depth)
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    batch = draw(st.integers(1, 3))
    kept = [
        np.stack([random.permutation(row.tokens_in - plan.prefix)[: row.keep] for _ in range(batch)]).astype(np.int32)
        for row in plan.locations
    ]
    return plan, kept


@given(journeys())
def test_original_patches_follow_every_image_through_all_locations(journey):
    plan, kept = journey
    numbers = original_patches(kept, plan)
    assert len(numbers) == len(plan.locations)
    for image in range(len(kept[0]) if kept else 0):
        tokens = [f"patch {i}" for i in range(plan.patches)]  # carried along by name, one image and one list at a time
        for row, indices, result in zip(plan.locations, kept, numbers, strict=True):
            tokens = [tokens[i] for i in indices[image]] + ["fused"] * row.fused
            named = ["fused" if number == -1 else f"patch {number}" for number in result[image].tolist()]
            assert named == tokens
            assert result.dtype == np.int32


def test_original_patches_want_one_array_for_each_location():
    plan = vit_plan(0.7)
    with pytest.raises(ValueError, match="argument"):
        original_patches([np.zeros((1, 138), np.int32)], plan)
