"""DynamicViT against the oracle and the official code: what is kept, the logits, the masked pass, what is attached."""

import logging
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

from evit_deploy.errors import InputError, UnsupportedModelError
from evit_deploy.models.timm_vit import attend, attend_masked, masked_softmax, run_blocks
from evit_deploy.tokens.choices import original_patches
from evit_deploy.tokens.methods import dynamicvit
from evit_deploy.tokens.methods.dynamicvit import Predictor
from evit_deploy.tokens.plan import TokenSpec
from evit_deploy.tokens.reduce import capture, dense_twin, reduce_tokens_, set_keep_rate_, token_plan, token_spec
from tests.support.dynamicvit_models import HEADS, OFFICIAL, SPEC, as_oracle, reduced, released, with_noise
from tests.support.families import create, images, logits
from tests.support.method_oracles import dynamicvit as oracle
from tests.support.official import read_official


@pytest.mark.parametrize("name", HEADS)
def test_it_is_the_oracle(name):
    model = reduced(name)
    plan = token_plan(model)
    assert [row.keep for row in plan.locations] == oracle.counts(16, 0.6) == [9, 5, 3]
    wanted = oracle.forward(as_oracle(model, name), images(model).numpy(), [1, 2, 3], [9, 5, 3])
    with capture(model) as seen:
        result = model(images(model))
    assert np.abs(result.numpy() - wanted.logits).max() <= 2e-5 * np.abs(wanted.logits).max()
    found = original_patches([kept.numpy() for kept in seen.kept], plan)
    for kept, expected in zip(found, wanted.chosen, strict=True):
        np.testing.assert_array_equal(kept, np.stack(expected))
    assert not np.array_equal(found[0][0], found[0][1])  # predictors of which the choice does not hang show nothing


def test_scores_are_the_log_odds_of_the_oracle():
    model = reduced("deit")
    x = torch.randn(1, 16, 192, generator=torch.Generator().manual_seed(1))
    wanted = oracle.predict(as_oracle(model, "deit"), 1, x[0].double().numpy(), np.ones(16))
    with torch.no_grad():
        score = model.score_predictor[1](x)[0].numpy()
    np.testing.assert_allclose(score, wanted[:, 0] - wanted[:, 1], atol=1e-5)


def test_scores_do_not_saturate():
    """The log probability of patches that are surely kept is 0 for all of them in float32; the score still ranks."""
    model = reduced("deit")
    predictor = model.score_predictor[0]
    x = torch.randn(1, 16, 192, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = predictor(x)
        predictor.out_conv[-1].bias += torch.tensor([40.0, 0.0])
        after = predictor(x)
        assert (after > 30).all()
        assert torch.equal(after.argsort(), before.argsort())
        assert len(torch.stack([after, torch.zeros_like(after)], -1).log_softmax(-1)[..., 0].unique()) < 16


@pytest.mark.parametrize("name", OFFICIAL)
def test_it_is_the_official_code(name):
    file = read_official(name)
    model = released(file, file.weights, OFFICIAL[name])
    assert [row.block for row in token_plan(model).locations] == file.recipe["locations"]
    with capture(model) as seen:
        result = model(torch.from_numpy(file.images))
    assert np.abs(result.numpy() - file.arrays["logits"]).max() < 1e-4
    for stage, kept in enumerate(original_patches([kept.numpy() for kept in seen.kept], token_plan(model))):
        np.testing.assert_array_equal(kept, file.arrays[f"chosen:{stage}"])


# ---- counts


# What the authors' README says, in G, cut off after one decimal.
@pytest.mark.parametrize(
    ("name", "rate", "gmacs", "published"),
    [
        ("deit_small_patch16_224", 0.7, 2.981, 2.9),
        ("deit_base_patch16_224", 0.7, 11.476, 11.4),
        ("lvvit_s", 0.7, 4.650, 4.6),
        ("lvvit_s", 0.5, 3.790, 3.7),
        ("lvvit_m", 0.7, 8.593, 8.5),
    ],
)
def test_multiply_adds_are_the_published_ones(name, rate, gmacs, published):
    with torch.device("meta"):
        model = timm.create_model(name)
        found = token_plan(reduce_tokens_(model, TokenSpec(keep_rate=rate, method="dynamicvit"))).macs() / 1e9
    assert found == pytest.approx(gmacs, abs=5e-4)
    assert int(found * 10) / 10 == published


def plan_of(spec: TokenSpec, size: int = 64) -> Any:
    with torch.device("meta"):
        model = timm.create_model("deit_tiny_patch16_224", img_size=size, depth=4)
        return token_plan(reduce_tokens_(model, spec))


def test_counts_are_exact_on_the_rate_as_it_is_written():
    spec = TokenSpec(keep_rate=0.7, method="dynamicvit")
    assert [row.keep for row in plan_of(spec, 160).locations] == [70, 49, 34]  # floats make 48 of 100 · 0.7²


def test_each_of_several_rates_is_a_share_of_what_is_there():
    spec = TokenSpec(keep_rate=(0.75, 0.5), locations=(0, 3), method="dynamicvit")
    plan = plan_of(spec)
    assert [(row.block, row.keep) for row in plan.locations] == [(0, 12), (3, 6)]
    assert [row.tokens_in for row in plan.blocks] == [row.tokens_out for row in plan.blocks] == [13, 13, 13, 7]


@pytest.mark.parametrize("fuse", [True, False])
def test_there_is_no_fused_token(fuse):
    plan = plan_of(TokenSpec(keep_rate=0.6, fuse=fuse, method="dynamicvit"))
    assert [(row.keep, row.fused) for row in plan.locations] == [(9, False), (5, False), (3, False)]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (TokenSpec(method="dynamicvit"), "needs a keep rate"),
        (TokenSpec(keep_rate=0.2, method="dynamicvit"), "no patch is left at block 2"),
        (TokenSpec(keep_rate=(1.0, 0.7, 0.7), method="dynamicvit"), "Leave that location out"),
        (TokenSpec(keep_rate=(0.9, 0.7), method="dynamicvit"), "2 rates for 3 locations"),
        (TokenSpec(keep_rate=0.7, locations=(4,), method="dynamicvit"), "outside the model"),
    ],
)
def test_what_cannot_be_done_is_refused(spec, message):
    with pytest.raises(InputError, match=message):
        reduce_tokens_(create("deit"), spec)


def test_a_width_that_cannot_be_divided_is_refused():
    model = timm.create_model("deit_tiny_patch16_224", embed_dim=54, num_heads=3, img_size=64, depth=4)
    with pytest.raises(UnsupportedModelError, match="its width, 54"):
        reduce_tokens_(model, SPEC)


# ---- the predictors


def test_dense_and_back_keeps_what_was_learned(caplog):
    model = reduced("deit")
    before, weights = logits(model), {k: v.clone() for k, v in model.score_predictor.state_dict().items()}
    caplog.clear()
    reduce_tokens_(model, TokenSpec(keep_rate=1.0))
    assert not hasattr(model, "score_predictor")
    assert torch.equal(logits(model), logits(create("deit")))
    reduce_tokens_(model, TokenSpec(keep_rate=0.5))  # another method in between
    reduce_tokens_(model, SPEC)
    assert all(torch.equal(value, weights[key]) for key, value in model.score_predictor.state_dict().items())
    assert torch.equal(logits(model), before)
    assert "choose at random" not in caplog.text


def test_a_dense_twin_leaves_the_predictors_alone():
    model = reduced("deit")
    before = logits(model)
    assert torch.equal(logits(dense_twin(model)), logits(create("deit")))
    assert torch.equal(logits(model), before)


def test_untrained_predictors_are_told(caplog):
    with caplog.at_level(logging.WARNING):
        reduce_tokens_(create("deit"), SPEC)
    assert "choose at random until they are trained" in caplog.text


def test_predictors_of_other_locations_or_another_model_are_refused():
    model = reduced("deit")
    reduce_tokens_(model, TokenSpec(keep_rate=1.0))
    with pytest.raises(InputError, match="the number of locations is not"):
        reduce_tokens_(model, TokenSpec(keep_rate=0.6, locations=(1, 2), method="dynamicvit"))
    other: Any = timm.create_model("deit_tiny_patch16_224", embed_dim=96, img_size=64, depth=4)
    other.method_weights = model.method_weights
    with pytest.raises(InputError, match="do not fit the model"):
        reduce_tokens_(other, SPEC)


def test_a_schedule_moves_the_counts_of_evaluation():
    model = reduced("deit")
    dense = logits(create("deit"))
    set_keep_rate_(model, 0.0)
    assert torch.equal(logits(model), dense)
    counts = [tuple(row.keep for row in set_keep_rate_(model, progress).locations) for progress in (0.0, 0.3, 0.6, 1.0)]
    assert counts == [(), (14, 13, 12), (11, 8, 6), (9, 5, 3)]
    assert not torch.equal(logits(model), dense)
    assert token_spec(model) == SPEC


def test_half_precision_ranks_in_full_precision():
    model = reduced("deit").bfloat16()
    with capture(model) as seen:
        model(images(model).bfloat16())
    assert [scores.dtype for scores in seen.scores] == 3 * [torch.float32]


@pytest.mark.slow
def test_it_compiles_into_one_graph():
    model = reduced("deit")
    with torch.inference_mode():
        found = torch.compile(model, fullgraph=True)(images(model))
    torch.testing.assert_close(found, logits(model), atol=1e-4, rtol=1e-4)


# ---- training


@pytest.mark.parametrize("name", HEADS)
def test_the_masked_pass_is_the_oracle(name, monkeypatch):
    model = reduced(name)
    weights, noise = as_oracle(model, name), np.random.default_rng(5).gumbel(size=(3, 3, 16, 2))
    wanted = oracle.train(
        weights, images(model).numpy(), [1, 2, 3], lambda s, i, scores: oracle.soft(scores, noise[s, i]) >= 0.5
    )
    for module in model.modules():  # but batch norms: the oracle knows them in evaluation
        module.training = not isinstance(module, nn.BatchNorm2d)
    with_noise(monkeypatch, noise)
    with torch.no_grad():
        x, state = run_blocks(model, images(model))
    assert x.shape[1] == 17
    np.testing.assert_array_equal(torch.stack(state.decisions).numpy(), wanted.masks)
    assert 0 < wanted.masks[-1].mean() < wanted.masks[0].mean() < 1
    result = model.head(model.norm(x)[:, 0]).detach().numpy()
    assert np.abs(result - wanted.logits).max() <= 2e-5 * np.abs(wanted.logits).max()


def test_what_is_dropped_stays_dropped_and_is_not_looked_at():
    model = reduced("deit").train()
    x = 0.2 * torch.randn(2, 17, 192, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 17)
    mask[:, [3, 8]] = 0
    attn = model.blocks[0].attn
    other = x.clone()
    other[:, 8] = 0.5
    with torch.no_grad():
        one, two = attend_masked(attn, x, mask)[0], attend_masked(attn, other, mask)[0]
        dense = attend(attn, x)[0]
    rest = [row for row in range(17) if row != 8]
    torch.testing.assert_close(one[:, rest], two[:, rest], atol=1e-4, rtol=0)
    assert (one[:, 8] - two[:, 8]).abs().max() > 0.1  # it sees itself
    torch.testing.assert_close(attend_masked(attn, x, torch.ones(2, 17))[0], dense, atol=1e-4, rtol=0)
    assert (one - dense).abs().max() > 0.01


def test_the_masked_softmax_by_hand():
    logits, mask = torch.tensor([[[[0.0, 1.0], [2.0, -1.0]]]]), torch.tensor([[1.0, 0.0]])
    e = np.exp
    first = np.array([e(-1), 0.0])  # the second column is masked
    second = np.array([1.0, e(-3)])  # but not to its own row
    wanted = np.stack([(row + 0.5e-6) / (row.sum() + 1e-6) for row in (first, second)])
    np.testing.assert_allclose(masked_softmax(logits, mask)[0, 0].numpy(), wanted, rtol=1e-6)


def test_a_draw_is_hard_and_has_the_soft_gradient(monkeypatch):
    scores = torch.tensor([[-2.0, 0.5, 3.0, -0.1]], requires_grad=True)
    noise = torch.tensor([[0.5, -1.0, 0.0, 0.2]])
    monkeypatch.setattr(dynamicvit, "logistic_noise", lambda like: noise)
    drawn = dynamicvit.draw(scores)
    assert drawn.tolist() == [[0.0, 0.0, 1.0, 1.0]]
    drawn.sum().backward()
    soft = (scores + noise).sigmoid().detach()
    torch.testing.assert_close(scores.grad, soft * (1 - soft))


def test_draws_follow_the_probabilities():
    torch.manual_seed(0)
    scores = torch.tensor([-2.0, 0.0, 1.0]).repeat(20000, 1)
    torch.testing.assert_close(dynamicvit.draw(scores).mean(0), scores[0].sigmoid(), atol=0.015, rtol=0)


def test_an_image_of_which_nothing_is_left_stays_finite():
    predictor = Predictor(8)
    x = torch.randn(2, 5, 8, requires_grad=True)
    predictor(x, torch.tensor([[1.0, 0, 1, 0, 0], [0.0, 0, 0, 0, 0]])).sum().backward()
    assert x.grad.isfinite().all()


def test_without_a_location_on_the_way_training_masks_nothing():
    model = reduced("deit").train()
    set_keep_rate_(model, 0.0)
    _, state = run_blocks(model, images(model))
    assert state.decisions == ()
    assert state.mask.min() == 1


def test_activations_computed_again_see_the_same_draws():
    model = reduced("deit").train()
    grads = []
    for again in (False, True):
        model.blocks.checkpointing = again
        model.zero_grad()
        torch.manual_seed(3)
        model(images(model)).sum().backward()
        grads.append(model.score_predictor[0].in_conv[1].weight.grad.clone())
    assert grads[0].abs().sum() > 0
    torch.testing.assert_close(*grads)
