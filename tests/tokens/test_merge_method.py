"""The method merge: against the NumPy oracle, its worth by hand and as properties, its margins, and what it refuses."""

import math
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evit_deploy.errors import InputError
from evit_deploy.tokens.choices import patch_rows
from evit_deploy.tokens.joining import nearest_kept
from evit_deploy.tokens.methods.merge import Merge, merge_locations, worth
from evit_deploy.tokens.plan import BlockPlan, TokenSpec
from evit_deploy.tokens.reduce import capture, reduce_tokens_, set_keep_rate_, token_label, token_plan
from tests.support.method_oracles import merge, synthetic, vit

SIZE = {"img_size": 96, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 10}  # 36 patches
HEADS: dict[Any, dict[str, Any]] = {
    "token": {},
    "mean": {"global_pool": "avg"},
    "norm-mean": {"global_pool": "avg", "fc_norm": False},
}
RATES = {0: 0.8, 1: 0.7, 3: 0.5}
IMAGES = synthetic.images(3, 96, 1)


def spec(**options: Any) -> TokenSpec:
    return TokenSpec(tuple(RATES.values()), tuple(RATES), fuse=False, method="merge", options=options)


def made(name: str = "vit_tiny_patch16_224", **model_args: Any) -> tuple[Any, dict[str, Any]]:
    model: Any = timm.create_model(name, **SIZE, **model_args).eval()
    weights = synthetic.draw({key: value.shape for key, value in model.state_dict().items()}, 0)
    model.load_state_dict({key: torch.from_numpy(value) for key, value in weights.items()})
    return model, weights


def run(model: Any) -> tuple[np.ndarray, list[np.ndarray]]:
    with capture(model) as seen:
        logits = model(torch.from_numpy(IMAGES).to(next(model.parameters()).dtype))
    return logits.float().numpy(), [choice.numpy() for choice in seen.kept]


# ---- the answers


@pytest.mark.parametrize("proportional", [True, False])
@pytest.mark.parametrize("head", [*HEADS, "distilled"])
def test_it_answers_like_the_oracle(head, proportional):
    model, weights = made("deit_tiny_distilled_patch16_224") if head == "distilled" else made(**HEADS[head])
    pool = "token" if head == "distilled" else head
    wanted = merge.forward(vit.Model(weights, 3, pool), IMAGES, RATES, proportional)
    logits, choices = run(reduce_tokens_(model, spec(proportional_attention=proportional)))
    assert np.abs(logits - wanted.logits).max() <= 2e-5 * np.abs(wanted.logits).max()
    for rows, holders in zip(patch_rows(choices, token_plan(model)), wanted.chosen, strict=True):
        np.testing.assert_array_equal(rows, np.stack(holders))


def test_proportional_attention_changes_the_answers():
    one, other = (run(reduce_tokens_(made()[0], spec(proportional_attention=on)))[0] for on in (True, False))
    assert np.abs(one - other).max() > 1e-2


def test_it_can_be_trained():
    model, _ = made()
    reduce_tokens_(model, spec()).train()
    model(torch.from_numpy(IMAGES)).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    assert all(block.attn.qkv.weight.grad.abs().max() > 0 for block in model.blocks)
    assert set_keep_rate_(model, 0.0).locations == ()
    halfway = set_keep_rate_(model, 0.5)
    assert all(row.tokens_out < row.tokens_in for row in halfway.locations)


# ---- what a token is worth


def test_of_tokens_that_are_alike_the_one_that_is_attended_to_most_stays():
    keys = torch.tensor([[[1.0, 0], [1, 0], [1, 0], [0, 1]]])
    found = worth(torch.tensor([[0.2, 0.3, 0.1, 0.01]]), keys)[0]
    torch.testing.assert_close(found, torch.tensor([0.0, 2 * math.sqrt(0.3), 0.0, math.sqrt(0.01)]))
    choice = nearest_kept(keys, found[None], 2, 0)[0].tolist()
    assert choice == [1, 3, 0, 2, 0, 0]  # 1 and 3 stay; 0 and 2 join the first of these


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_worth_is_what_the_oracle_says(data):
    candidates, width = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    weights = torch.rand(2, candidates, generator=generator, dtype=torch.float64)
    if data.draw(st.booleans()):
        weights = (weights * 3).round()  # ties, and nothing at all
    keys = torch.randn(2, candidates, width, generator=generator, dtype=torch.float64)
    found = worth(weights, keys)
    for image in range(2):
        wanted = merge.worth(weights[image].numpy(), keys[image].numpy())
        np.testing.assert_allclose(found[image], wanted, atol=1e-12)
    most = int(weights[0].argmax())
    assert found[0, most] == found[0].max()  # what is attended to most is worth most


def test_keys_of_nothing_are_like_nothing():
    assert worth(torch.tensor([[0.5, 0.25]]), torch.zeros(1, 2, 3)).isfinite().all()


# ---- how clear a choice is

ROW = BlockPlan(0, 6, 3, False, 4, choice="merge", choice_indices=7)  # of 5 candidates 3 stay


def margins(weights: list[float], keys: list[list[float]], error: float = 1e-6) -> np.ndarray:
    exact = np.array([weights]), np.array([keys])
    low = exact[0] * (1 + error), exact[1] + error
    choice = nearest_kept(torch.tensor([keys]), worth(*map(torch.from_numpy, exact)), 3, 0).numpy()
    return Merge.margin(low, exact, choice, ROW)[0]


APART = [[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0.9, 0.3, 0], [0, 0.8, 0.4]]


def test_a_clear_choice_has_wide_margins():
    assert margins([0.3, 0.25, 0.2, 0.02, 0.01], APART).min() > 100


def test_as_many_as_stay_of_tokens_that_are_alike_is_a_tie():
    found = margins([0.3, 0.25, 0.2, 0.02, 0.02], [*APART[:3], [0.6, 0.6, 0.5], [0.6, 0.6, 0.5]])
    assert found[:3].min() > 1  # whatever becomes of the last two


def test_two_that_are_attended_to_alike_may_change_places():
    """Alike in attention within rounding and alike in keys: either may be the one that stays."""
    found = margins([0.3, 0.2, 0.2 * (1 + 1e-9), 0.02, 0.01], [APART[0], [0, 1, 0], [0, 1, 1e-3], APART[3], APART[4]])
    assert found[1] < 1
    assert found[2] < 1
    assert found[0] > 1


def test_two_that_are_as_similar_may_be_joined_either_way():
    found = margins([0.3, 0.25, 0.2, 0.02, 0.01], [*APART[:4], [1.0, 0, 1.0]])
    assert found[4] < 1
    assert found[3] > 1


def test_the_nearest_choice_is_another():
    exact = np.array([[0.3, 0.25, 0.2, 0.02, 0.01]]), np.array([APART])
    choice = nearest_kept(torch.tensor([APART]), worth(*map(torch.from_numpy, exact)), 3, 0).numpy()
    other = Merge.nearest_choice(choice, exact, ROW)
    assert sorted(other[0, :5]) == [0, 1, 2, 3, 4]
    assert set(other[0, :3]) != set(choice[0, :3])


# ---- the plan


@pytest.mark.parametrize(("depth", "wanted"), [(12, (2, 4, 6, 8)), (24, (4, 8, 12, 16)), (4, (1, 2)), (1, ())])
def test_default_locations(depth, wanted):
    assert merge_locations(depth) == wanted


def test_the_plan_keeps_the_share_and_adds_no_token():
    model, _ = made()
    reduce_tokens_(model, TokenSpec(0.5, (1,), method="merge"))
    assert token_plan(model).blocks[1].tokens_out == 1 + 18
    assert token_plan(model).merging == {1}
    assert token_label(spec()) == "merge-k0.8-0.7-0.5"
    assert token_label(spec(proportional_attention=False)) == "merge-k0.8-0.7-0.5-no-proportional"


@pytest.mark.parametrize("options", [{"squeeze": True}, {"proportional_attention": 1}])
def test_options_that_it_does_not_take(options):
    with pytest.raises(InputError, match="does not take these options"):
        reduce_tokens_(made()[0], spec(**options))
