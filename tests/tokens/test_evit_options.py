"""EViT's options against their oracles: the fused token as a mean, squeezing, and heads that pool."""

import copy
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evit_deploy.errors import InputError, UnsupportedModelError
from evit_deploy.tokens.choices import original_patches, patch_rows
from evit_deploy.tokens.joining import nearest_kept
from evit_deploy.tokens.methods.evit import EViT
from evit_deploy.tokens.operators.token_merge import merge
from evit_deploy.tokens.plan import BlockPlan, TokenSpec
from evit_deploy.tokens.reduce import capture, reduce_tokens_, set_keep_rate_, token_label, token_plan
from tests.support.method_oracles import evit, squeeze, synthetic, vit

SIZE = {"img_size": 96, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 10}  # 36 patches
POOLS: dict[Any, dict[str, Any]] = {
    "token": {},
    "mean": {"global_pool": "avg"},
    "norm-mean": {"global_pool": "avg", "fc_norm": False},
}
RATES = {1: 0.7, 2: 0.6, 3: 0.5}  # the fused token is made anew twice
SQUEEZE, MEAN, SIZED = {"squeeze": True}, {"normalize": True}, {"normalize": True, "sized": True}
IMAGES = synthetic.images(3, 96, 1)
each_pool = pytest.mark.parametrize("pool", POOLS)
each_option = pytest.mark.parametrize("options", [SQUEEZE, MEAN, SIZED], ids=["squeeze", "mean", "sized"])


def spec(options: dict[str, Any], fuse: bool = True) -> TokenSpec:
    return TokenSpec(tuple(RATES.values()), tuple(RATES), fuse, options=options)


def made(options: dict[str, Any] | None = None, fuse: bool = True, **model_args: Any) -> tuple[Any, dict[str, Any]]:
    """A small model, reduced if options are given, and its weights."""
    model: Any = timm.create_model("vit_tiny_patch16_224", **SIZE, **model_args).eval()
    weights = synthetic.draw({key: value.shape for key, value in model.state_dict().items()}, 0)
    model.load_state_dict({key: torch.from_numpy(value) for key, value in weights.items()})
    return model if options is None else reduce_tokens_(model, spec(options, fuse)), weights


def run(model: Any) -> tuple[np.ndarray, list[np.ndarray]]:
    with capture(model) as seen:
        logits = model(torch.from_numpy(IMAGES).to(next(model.parameters()).dtype))
    return logits.float().numpy(), [choice.numpy() for choice in seen.kept]


def close(logits: np.ndarray, wanted: np.ndarray, tolerance: float = 2e-5) -> None:
    assert np.abs(logits - wanted).max() <= tolerance * np.abs(wanted).max()


# ---- the oracles


@each_pool
def test_squeeze_is_the_oracle(pool):
    model, weights = made(SQUEEZE, **POOLS[pool])
    wanted = squeeze.forward(vit.Model(weights, 3, pool), IMAGES, RATES)
    logits, choices = run(model)
    close(logits, wanted.logits)
    for rows, holders in zip(patch_rows(choices, token_plan(model)), wanted.chosen, strict=True):
        np.testing.assert_array_equal(rows, np.stack(holders))


def test_squeeze_carries_sizes():
    model, weights = made(SQUEEZE)
    wanted = squeeze.forward(vit.Model(weights, 3), IMAGES, RATES)
    with torch.no_grad():
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(torch.from_numpy(IMAGES)))))
        _, state = model.blocks.carry(x)
    np.testing.assert_array_equal(state.sizes.numpy(), np.stack(wanted.sizes[-1]))
    np.testing.assert_array_equal(state.sizes.sum(dim=1).numpy(), 36)


def test_a_mean_is_the_oracle():
    model, weights = made(MEAN)
    wanted = evit.forward(vit.Model(weights, 3), IMAGES, RATES, "mean")
    logits, choices = run(model)
    close(logits, wanted.logits)
    for patches, kept in zip(original_patches(choices, token_plan(model)), wanted.chosen, strict=True):
        np.testing.assert_array_equal(patches[:, :-1], np.stack(kept))
    assert np.abs(logits - run(made({})[0])[0]).max() > 1e-2  # it is not the sum


@each_pool
def test_a_sized_token_is_the_oracle(pool):
    model, weights = made(SIZED, **POOLS[pool])
    close(run(model)[0], evit.forward(vit.Model(weights, 3, pool), IMAGES, RATES, "mean").logits)


def test_none_and_sum_are_the_oracle():
    cases: list[tuple[bool, evit.Fusion]] = [(False, "none"), (True, "sum")]
    for fuse, fusion in cases:
        model, weights = made({}, fuse)
        close(run(model)[0], evit.forward(vit.Model(weights, 3), IMAGES, RATES, fusion).logits)


@pytest.mark.parametrize(
    "head",
    [
        {"global_pool": "avgmax"},
        {"global_pool": "max"},
        {"global_pool": "avg", "pool_include_prefix": True},
        {"global_pool": "avg", "reg_tokens": 2},
    ],
    ids=lambda head: "-".join(map(str, head.values())),
)
@pytest.mark.parametrize("options", [SQUEEZE, SIZED], ids=["squeeze", "sized"])
def test_other_heads_that_pool_see_the_token_of_every_patch(head, options):
    model, _ = made(options, **head)
    prefix, last, seen = model.num_prefix_tokens, model.blocks[-1].reducer, []
    finish = last.finish
    last.finish = lambda x, state: (seen.append(x), finish(x, state))[1]
    logits, choices = run(model)
    (tokens,) = seen
    assert tokens.shape[1] == token_plan(model).blocks[-1].tokens_out
    rows = torch.from_numpy(patch_rows(choices, token_plan(model))[-1]).long()
    every = torch.stack([image[prefix:][places] for image, places in zip(tokens, rows, strict=True)])
    with torch.no_grad():
        wanted = model.forward_head(model.norm(torch.cat([tokens[:, :prefix], every], dim=1)))
    close(logits, wanted.numpy(), 1e-6)


# ---- what is true of every method


@each_option
@pytest.mark.parametrize("pool", ["token", "mean"])
def test_half_precision_gradients_and_the_schedule(options, pool):
    if pool == "mean" and options is MEAN:
        options = SIZED
    model, _ = made(options, **POOLS[pool])
    dense = run(made(**POOLS[pool])[0])[0]
    low = run(copy.deepcopy(model).bfloat16())[0]
    assert np.isfinite(low).all()
    close(low, run(model)[0], 0.2)
    set_keep_rate_(model, 0.0)
    np.testing.assert_array_equal(run(model)[0], dense)
    counts = []
    for progress in (0.3, 0.6, 1.0):
        plan = set_keep_rate_(model, progress)
        counts.append(plan.blocks[-1].tokens_out)
        assert np.isfinite(run(model)[0]).all()
    assert counts == sorted(counts, reverse=True)
    assert token_plan(model) == token_plan(made(options, **POOLS[pool])[0])
    model.train()
    model(torch.from_numpy(IMAGES)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("fuse", [True, False])
def test_squeezing_leaves_as_many_tokens(fuse):
    squeezed, plain = token_plan(made(SQUEEZE, fuse)[0]), token_plan(made({}, fuse)[0])
    assert [row.tokens_out for row in squeezed.blocks] == [row.tokens_out for row in plain.blocks]
    assert squeezed.macs() == plain.macs()
    assert squeezed.merging == {1, 2, 3}
    real = []
    model = made(SQUEEZE, fuse)[0]
    for block in model.blocks:
        block.mlp.register_forward_hook(lambda _, inputs, output: real.append(output.shape[1]))
    _, choices = run(model)
    assert real == [row.tokens_out for row in squeezed.blocks]
    assert [choice.shape[1] for choice in choices] == [row.choice_length for row in squeezed.locations]


def test_mixed_precision_compares_and_averages_in_full():
    model, _ = made(SQUEEZE)
    plain = run(model)[1]
    with capture(model) as seen, torch.autocast("cpu", torch.bfloat16):
        model(torch.from_numpy(IMAGES))
    x = torch.randn(2, 9, 48)
    scores = torch.rand(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = nearest_kept(x, scores, 3, 1)
    assert torch.equal(mixed, nearest_kept(x, scores, 3, 1))
    assert [choice.shape for choice in seen.kept] == [choice.shape for choice in plain]


@pytest.mark.slow
@each_option
def test_they_compile(options):
    model, _ = made(options, **POOLS["token" if options is MEAN else "mean"])
    wanted = run(model)[0]
    with torch.inference_mode():
        found = torch.compile(model, fullgraph=True)(torch.from_numpy(IMAGES))
    close(found.numpy(), wanted)


def test_labels_name_the_options():
    assert token_label(TokenSpec(0.7)) == "evit-k0.7"
    assert token_label(TokenSpec(0.7, options=SQUEEZE)) == "evit-k0.7-squeeze"
    assert token_label(TokenSpec(0.7, options=SIZED)) == "evit-k0.7-normalize-sized"


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "fuse", "message"),
    [
        ({"squeeze": True, "normalize": True}, True, "normalize changes the fused token, and squeeze has none"),
        ({"squeeze": True, "sized": True}, True, "squeeze already counts the patches in every token"),
        ({"sized": True}, True, "sized needs normalize=true"),
        ({"normalize": True}, False, "normalize changes the fused token, and fuse=False removes it"),
        (SIZED, False, "there is no place for a patch that is dropped"),
        ({"squeeze": 1}, True, "does not take these options.*bool"),
    ],
)
def test_options_that_do_not_go_together(options, fuse, message):
    model, _ = made()
    with pytest.raises(InputError, match=message):
        reduce_tokens_(model, spec(options, fuse))
    assert not hasattr(model, "token_spec")


@pytest.mark.parametrize(("options", "fuse"), [({}, True), ({}, False), (MEAN, True)])
def test_heads_that_pool_say_what_serves_them(options, fuse):
    model, _ = made(global_pool="avg")
    with pytest.raises(UnsupportedModelError, match=r"its head pools.*normalize=true and sized=true.*tome"):
        reduce_tokens_(model, spec(options, fuse))


# ---- squeezing as such


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_every_token_is_in_one_that_is_kept(data):
    prefix, candidates = data.draw(st.integers(1, 3)), data.draw(st.integers(2, 12))
    keep = data.draw(st.integers(1, candidates))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    x = torch.randn(2, prefix + candidates, 5, generator=generator)
    if data.draw(st.booleans()):  # ties, and tokens without a direction
        x = x.round() * torch.randint(0, 2, (2, prefix + candidates, 1), generator=generator)
    scores = torch.rand(2, candidates, generator=generator).mul(4).round() / 4
    sizes = torch.randint(1, 5, (2, candidates), generator=generator).float()
    choice = nearest_kept(x, scores, keep, prefix)
    assert choice.dtype == torch.int32
    assert choice.shape == (2, 2 * candidates - keep)
    y, merged = merge(x, sizes, choice, keep, prefix)
    assert torch.equal(y[:, :prefix], x[:, :prefix])
    torch.testing.assert_close(merged.sum(dim=1), sizes.sum(dim=1))
    # What is averaged by size keeps its sum.
    total = (x[:, prefix:] * sizes.unsqueeze(-1)).sum(dim=1)
    torch.testing.assert_close((y[:, prefix:] * merged.unsqueeze(-1)).sum(dim=1), total, atol=1e-4, rtol=1e-4)
    unit = torch.nn.functional.normalize(x[:, prefix:].double(), dim=-1)
    for image, numbers in enumerate(choice.tolist()):
        stay, move, targets = numbers[:keep], numbers[keep:candidates], numbers[candidates:]
        assert sorted(stay + move) == list(range(candidates))
        assert stay + move == sorted(range(candidates), key=lambda i: (-float(scores[image, i]), i))
        assert all(0 <= target < keep for target in targets)
        for dropped, target in zip(move, targets, strict=True):
            similar = unit[image, stay] @ unit[image, dropped]
            assert similar[target] >= similar.max() - 1e-6


ROW = BlockPlan(0, 6, 3, False, 4, choice="merge", choice_indices=7)  # of 5 candidates 3 stay


def evidence(scores: list[float], tokens: list[list[float]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([scores]), np.array([[[0.0, 0.0], *tokens]])


def margins(scores: list[float], tokens: list[list[float]], error: float = 1e-3) -> np.ndarray:
    exact = evidence(scores, tokens)
    low = (exact[0] * (1 + error), exact[1] + error)
    choice = nearest_kept(torch.from_numpy(exact[1]), torch.from_numpy(exact[0]), 3, 1).numpy()
    return EViT.margin(low, exact, choice, ROW)[0]


CLEAR = [[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0], [1.0, 0.1], [0.1, 1.0]]


def test_margins_of_a_clear_choice():
    assert (margins([0.4, 0.3, 0.2, 0.05, 0.04], CLEAR) > 1).all()


def test_a_patch_between_two_kept_ones_may_join_either():
    found = margins([0.4, 0.3, 0.2, 0.05, 0.04], [*CLEAR[:3], [1.0, 1.0], CLEAR[4]])
    assert found[3] < 1
    assert (found[[0, 1, 2, 4]] > 1).all()


def test_what_joins_one_that_may_be_dropped_may_join_another():
    tokens = [*CLEAR[:2], [-1.0, -1.0], [0.6, -0.8], [-1.0, -1.1]]  # the last joins 2, which 3 may replace
    found = margins([0.4, 0.3, 0.1001, 0.1, 0.04], tokens)
    assert (found[[2, 3, 4]] < 1).all()
    assert (found[:2] > 1).all()


def test_what_is_more_similar_to_one_that_may_be_kept_may_join_it():
    tokens = [*CLEAR[:2], [-1.0, -1.0], [0.8, 0.6], [0.75, 0.66]]  # the last joins 0, and would join 3 were it kept
    found = margins([0.4, 0.3, 0.1001, 0.1, 0.04], tokens)
    assert (found[[2, 3, 4]] < 1).all()
    assert (found[:2] > 1).all()
    clear = margins([0.4, 0.3, 0.2, 0.1, 0.04], tokens)
    assert (clear > 1).all()


def test_the_nearest_choice_exchanges_one_and_lets_another_join_its_second_best():
    exact = evidence([0.4, 0.3, 0.2, 0.05, 0.04], [*CLEAR[:3], [1.0, 0.2], [0.7, 0.6]])
    choice = nearest_kept(torch.from_numpy(exact[1]), torch.from_numpy(exact[0]), 3, 1).numpy()
    assert choice.tolist() == [[0, 1, 2, 3, 4, 0, 0]]
    # 3 takes the place of 2, and 4 joins it there; 2 is as far from 0 as from 1, and joins the second of the two.
    assert EViT.nearest_choice(choice, exact, ROW).tolist() == [[0, 1, 3, 2, 4, 1, 2]]
