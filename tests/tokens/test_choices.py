"""What choices mean for the patches of an image, followed by hand and against plain bookkeeping."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evit_deploy.tokens.choices import (
    linear_margin,
    original_patches,
    patch_groups,
    patch_margins,
    patch_rows,
    share_margin,
    swap_last,
)
from evit_deploy.tokens.plan import BlockPlan, TokenPlan


def kept_plan(patches: int, *keeps: int, fused: bool) -> TokenPlan:
    blocks, tokens = [], 1 + patches
    for block, keep in enumerate(keeps):
        after = 1 + keep + fused
        blocks.append(BlockPlan(block, tokens, keep, fused, after))
        tokens = after
    return TokenPlan(1, patches, tuple(blocks))


def merging_plan(patches: int, *keeps: int) -> TokenPlan:
    blocks, tokens = [], patches
    for block, keep in enumerate(keeps):
        blocks.append(
            BlockPlan(block, 1 + tokens, keep, False, 1 + keep, choice="merge", choice_indices=2 * tokens - keep)
        )
        tokens = keep
    return TokenPlan(1, patches, tuple(blocks))


def test_kept_patches_and_those_in_the_fused_token():
    plan = kept_plan(4, 2, 1, fused=True)
    choices = [np.array([[3, 1]]), np.array([[2]])]  # then the fused token of 0 and 2 is kept, 3 and 1 are fused
    assert [rows.tolist() for rows in patch_rows(choices, plan)] == [[[2, 1, 2, 0]], [[0, 1, 0, 1]]]
    assert [groups.tolist() for groups in patch_groups(choices, plan)] == [[[0, 1, 0, 3]], [[0, 1, 0, 1]]]
    assert [numbers.tolist() for numbers in original_patches(choices, plan)] == [[[3, 1, -1]], [[-1, -1]]]


def test_without_fusion_a_dropped_patch_is_nowhere_from_then_on():
    plan = kept_plan(4, 3, 2, fused=False)
    choices = [np.array([[3, 1, 0]]), np.array([[2, 0]])]
    assert [rows.tolist() for rows in patch_rows(choices, plan)] == [[[2, 1, -1, 0]], [[0, -1, -1, 1]]]
    assert [groups.tolist() for groups in patch_groups(choices, plan)] == [[[0, 1, -1, 3]], [[0, -1, -1, 3]]]


def test_tokens_that_wait_come_back_and_are_chosen_from_again():
    row = BlockPlan(0, 3, 2, False, 3, aside=2, choice_indices=4)
    plan = TokenPlan(1, 4, (row, BlockPlan(1, 3, 2, False, 3, aside=2, choice_indices=4)))
    choices = [np.array([[3, 1, 0, 2]]), np.array([[2, 0, 1, 3]])]
    assert [numbers.tolist() for numbers in original_patches(choices, plan)] == [[[3, 1]], [[0, 3]]]
    assert [rows.tolist() for rows in patch_rows(choices, plan)] == [[[2, 1, 3, 0]], [[0, 2, 3, 1]]]


def test_a_merge_names_the_token_that_a_patch_joined():
    plan = merging_plan(4, 3, 2)
    # 3 joins 1 (row 1 of 0, 1, 2); then row 1, which is 1 and 3, joins row 0
    choices = [np.array([[0, 1, 2, 3, 1]]), np.array([[0, 2, 1, 0]])]
    assert [rows.tolist() for rows in patch_rows(choices, plan)] == [[[0, 1, 2, 1]], [[0, 0, 1, 0]]]
    assert [numbers.tolist() for numbers in original_patches(choices, plan)] == [[[0, 1, 2, 1]], [[0, 0, 2, 0]]]


@given(st.integers(0, 2**32 - 1), st.data())
def test_merges_partition_the_patches(seed, data):
    rng = np.random.default_rng(seed)
    patches = data.draw(st.integers(2, 12))
    keeps = sorted((data.draw(st.integers(1, patches)) for _ in range(3)), reverse=True)
    plan = merging_plan(patches, *keeps)
    groups, choices, before = [{i} for i in range(patches)], [], patches
    histories = []
    for keep in keeps:
        order, targets = rng.permutation(before), rng.integers(0, keep, before - keep)
        choices.append(np.concatenate([order, targets])[None])
        joined = [set(groups[i]) for i in order[:keep]]
        for mover, target in zip(order[keep:], targets, strict=True):
            joined[target] |= groups[mover]
        groups, before = joined, keep
        histories.append(groups)
    for rows, wanted in zip(patch_rows(choices, plan), histories, strict=True):
        assert [set(np.flatnonzero(rows[0] == i).tolist()) for i in range(len(wanted))] == wanted


def test_two_models_differ_only_in_the_patches_that_they_decide_differently():
    plan = merging_plan(5, 3)
    one, other = np.array([[0, 2, 4, 1, 3, 0, 1]]), np.array([[0, 2, 4, 1, 3, 0, 2]])  # 3 joins 2, or 4
    differ = original_patches([one], plan)[0] != original_patches([other], plan)[0]
    assert differ.tolist() == [[False, False, False, True, False]]


def test_margins_go_to_the_patches_of_a_token():
    plan = merging_plan(4, 3, 2)
    choices = [np.array([[0, 1, 2, 3, 1]]), np.array([[0, 2, 1, 0]])]
    margins = [np.array([[np.inf, 2.0, np.inf, 0.5]]), np.array([[1.0, 3.0, 9.0]])]
    first, second = patch_margins(margins, choices, plan)
    assert first.tolist() == [[np.inf, 2.0, np.inf, 0.5, np.inf]]
    assert second.tolist() == [[1.0, 3.0, 9.0, 3.0, np.inf]]


def test_margins_of_kept_patches_have_one_place_for_fused_tokens():
    plan = kept_plan(4, 2, 1, fused=True)
    choices = [np.array([[3, 1]]), np.array([[2]])]
    margins = [np.array([[1.0, 2.0, 3.0, 4.0]]), np.array([[5.0, 6.0, 7.0]])]
    first, second = patch_margins(margins, choices, plan)
    assert first.tolist() == [[1.0, 2.0, 3.0, 4.0, np.inf]]
    assert second.tolist() == [[np.inf, 6.0, np.inf, 5.0, 7.0]]


@pytest.mark.parametrize("length", [2, 4])
def test_the_next_best_choice_exchanges_the_last_kept_and_the_first_that_is_not(length):
    scores = np.array([[0.1, 0.4, 0.2, 0.3]])
    choice = np.argsort(-scores, axis=1)[:, :length].astype(np.int32)
    assert swap_last(choice, scores, 2).tolist() == [[1, 2, 3, 0][:length]]
    assert choice.tolist() == [[1, 3, 2, 0][:length]]  # a copy


def test_margins_of_shares_are_relative_and_those_of_logits_are_not():
    exact = np.array([[0.4, 0.2, 0.1, 0.05]])
    scores = exact * 1.01
    assert share_margin(scores, exact, 2)[0, 1] == pytest.approx(share_margin(scores / 1e3, exact / 1e3, 2)[0, 1])
    shifted = linear_margin(scores + 7, exact + 7, 2)
    np.testing.assert_allclose(shifted, linear_margin(scores, exact, 2), rtol=1e-6)
    assert linear_margin(scores, exact, 2)[0].argmin() in (1, 2)
