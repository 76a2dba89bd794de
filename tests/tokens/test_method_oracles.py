"""The NumPy oracles of the methods: against timm where nothing is reduced, against hand-made examples where it is."""

import numpy as np
import pytest
import timm
import torch

from tests.support.method_oracles import dynamicvit, evit, evo_vit, squeeze, synthetic, tome, vit

SIZE = {"img_size": 64, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 10}  # 16 patches
IMAGES = synthetic.images(2, 64, 1)
POOLS = {
    "token": {},
    "mean": {"global_pool": "avg"},
    "norm-mean": {"global_pool": "avg", "fc_norm": False},
}


def of_timm(name: str = "vit_tiny_patch16_224", **options) -> tuple[torch.nn.Module, dict[str, np.ndarray]]:
    model = timm.create_model(name, **SIZE, **options).eval()
    weights = synthetic.draw({key: value.shape for key, value in model.state_dict().items()}, 0)
    model.load_state_dict({key: torch.from_numpy(value) for key, value in weights.items()})
    return model.double(), weights


def small(pool: str = "token") -> vit.Model:
    """A model whose weights hold a predictor for each of two locations, and Evo-ViT's second head."""
    _, weights = of_timm(**POOLS[pool])
    width = SIZE["embed_dim"]
    more: dict[str, tuple[int, ...]] = {"head_cls.weight": (10, width), "head_cls.bias": (10,)}
    more |= {"norm_cls.weight": (width,), "norm_cls.bias": (width,)}
    layers = {"in_conv.1": (width, width), "out_conv.0": (width // 2, width)}
    layers |= {"out_conv.2": (width // 4, width // 2), "out_conv.4": (2, width // 4)}
    for stage in range(2):
        name = f"score_predictor.{stage}"
        more |= {f"{name}.in_conv.0.{part}": (width,) for part in ("weight", "bias")}
        more |= {f"{name}.{layer}.weight": shape for layer, shape in layers.items()}
        more |= {f"{name}.{layer}.bias": shape[:1] for layer, shape in layers.items()}
    return vit.Model(weights | synthetic.draw(more, 2), 3, pool)  # type: ignore[arg-type]


def close(result: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(result, wanted, rtol=0, atol=1e-9)


# ---- without a reduction, all of them are the dense model


@pytest.mark.parametrize("pool", POOLS)
def test_the_plain_pass_is_that_of_timm(pool):
    model, weights = of_timm(**POOLS[pool])
    with torch.no_grad():
        close(vit.dense(vit.Model(weights, 3, pool), IMAGES).logits, model(torch.from_numpy(IMAGES).double()).numpy())


def test_the_plain_pass_with_a_distillation_token_is_that_of_timm():
    model, weights = of_timm("deit_tiny_distilled_patch16_224")
    with torch.no_grad():
        close(vit.dense(vit.Model(weights, 3), IMAGES).logits, model(torch.from_numpy(IMAGES).double()).numpy())


def test_methods_that_keep_everything_are_the_dense_model():
    model = small("mean")
    dense = vit.dense(model, IMAGES).logits
    kept = [
        evo_vit.forward(model, IMAGES, evo_vit.stage_wise(4, (1, 3), keep=1.0)),
        evo_vit.forward(model, IMAGES, evo_vit.layer_wise(4, 1, keep=1.0, representative=False)),
        tome.forward(model, IMAGES, [0] * 4),
        squeeze.forward(model, IMAGES, {1: 0.95}),
        evit.forward(model, IMAGES, {1: 1.0}),
    ]
    for result in kept:
        close(result.logits, dense)
    token = small()
    close(dynamicvit.forward(token, IMAGES, (1, 2), (16, 16)).logits, vit.dense(token, IMAGES).logits)


def test_training_with_all_masks_at_one_is_the_dense_model_but_for_epsilon():
    model = small()
    trained = dynamicvit.train(model, IMAGES, (1, 2), np.ones((2, 2, 16)))
    logits, tokens = dynamicvit.teach(model, IMAGES)
    np.testing.assert_allclose(trained.logits, logits, rtol=0, atol=1e-4)
    np.testing.assert_allclose(trained.tokens, tokens, rtol=0, atol=1e-4)


# ---- Evo-ViT


def test_a_placeholder_without_a_representative_token_waits_unchanged():
    model = small("mean")
    split = evo_vit.forward(model, IMAGES, evo_vit.stage_wise(4, (3,), representative=False))
    for image in range(2):
        # By hand: three dense blocks, the last one on what g chose, the mean over both.
        x = vit.embed(model, IMAGES[image])
        g = np.zeros(16)
        for block in range(3):
            attended = vit.attend(model, block, x)
            g = attended.attention[:, 0, 1:].sum(0)
            x = x + attended.update
            x = x + vit.mlp(model, block, x)
        order = np.argsort(-g)
        assert split.chosen[0][image].tolist() == order.tolist()
        y = np.concatenate([x[:1], x[1:][order[:8]]])
        y = y + vit.attend(model, 3, y).update
        y = y + vit.mlp(model, 3, y)
        close(split.logits[image], vit.classify(model, np.concatenate([y, x[1:][order[8:]]])))


def test_one_placeholder_and_its_representative_are_the_same_token():
    """The representative of a single placeholder is that placeholder, so it goes through the block like any other."""
    model = small("mean")
    schedule = evo_vit.stage_wise(4, (3,), keep=15 / 16)
    close(evo_vit.forward(model, IMAGES, schedule).logits, vit.dense(model, IMAGES).logits)


def test_stage_wise_differs_from_layer_wise_and_a_placeholder_can_come_back():
    model, images = small("mean"), synthetic.images(2, 64, 2)
    stages = evo_vit.forward(model, images, evo_vit.stage_wise(4, (1, 3)))
    layers = evo_vit.forward(model, images, evo_vit.layer_wise(4, 1))
    assert (len(stages.chosen), len(layers.chosen)) == (2, 3)
    assert np.abs(stages.logits - layers.logits).max() > 1e-3
    assert all(sorted(row) == list(range(16)) for location in layers.chosen for row in location)
    returned = set(layers.chosen[2][0][:8].tolist()) - set(layers.chosen[0][0][:8].tolist())
    assert returned


def test_both_heads_count_half_in_the_loss():
    logits, second = np.log([[0.25, 0.75]]), np.log([[0.5, 0.5]])
    result = vit.Result(logits, [], [], second)
    assert evo_vit.loss(result, np.array([[1.0, 0.0]])) == pytest.approx(0.5 * np.log(4) + 0.5 * np.log(2))


# ---- DynamicViT


def test_counts_are_truncated_powers_of_the_rate():
    assert dynamicvit.counts(196, 0.7) == [137, 96, 67]
    assert dynamicvit.counts(100, 0.7) == [70, 49, 34]  # 100 * 0.7 ** 2 is 48.99999999999999 in floats


def test_a_dropped_patch_does_not_reach_the_others_in_training():
    model = small()
    decisions = np.ones((2, 2, 16))
    decisions[0, :, 5] = 0
    one = dynamicvit.train(model, IMAGES, (0, 2), decisions)
    changed = IMAGES.copy()
    changed[:, :, 16:32, 16:32] += 1.0  # patch 5
    other = dynamicvit.train(model, changed, (0, 2), decisions)
    assert one.masks[:, 0, 5].tolist() == [0, 0]  # dropped once, dropped for good
    rest = [patch for patch in range(16) if patch != 5]
    np.testing.assert_allclose(other.tokens[:, rest], one.tokens[:, rest], rtol=0, atol=1e-3)  # ε lets a little in
    assert np.abs(other.tokens[:, 5] - one.tokens[:, 5]).max() > 0.1


def test_inference_and_training_agree_on_the_same_patches():
    model = small()
    inference = dynamicvit.forward(model, IMAGES, (1, 2), (9, 5))
    decisions = np.zeros((2, 2, 16))
    for stage in range(2):
        for image in range(2):
            decisions[stage, image, inference.chosen[stage][image]] = 1
    trained = dynamicvit.train(model, IMAGES, (1, 2), decisions)
    np.testing.assert_allclose(trained.logits, inference.logits, rtol=0, atol=1e-4)
    # and the scores of what is still there order it as inference did
    for image in range(2):
        scores = trained.scores[1, image, :, 0]
        kept = sorted(inference.chosen[0][image], key=lambda patch: -scores[patch])
        assert kept[:5] == inference.chosen[1][image].tolist()


def test_the_losses_by_hand():
    masks = np.array([[[1, 1, 0, 0], [1, 1, 1, 1]], [[1, 0, 0, 0], [1, 1, 0, 0]]])
    wanted = ((0.0 + 0.25) / 2 + (0.0 + 0.0625) / 2) / 2
    assert dynamicvit.ratio_loss(masks, (0.5, 0.25)) == pytest.approx(wanted)
    student, teacher = np.log([[0.5, 0.5]]), np.log([[0.25, 0.75]])
    wanted = 0.25 * np.log(0.25 / 0.5) + 0.75 * np.log(0.75 / 0.5)
    assert dynamicvit.divergence(student, teacher) == pytest.approx(wanted)
    assert dynamicvit.divergence(teacher, student) != pytest.approx(wanted)
    tokens = np.array([[[1.0, 2.0], [5.0, 5.0]]])
    assert dynamicvit.token_loss(tokens, np.zeros((1, 2, 2)), np.array([[1, 0]])) == pytest.approx(2.5)
    assert dynamicvit.token_loss(tokens, tokens + 1, np.zeros((1, 2))) == 0


# ---- merging


def test_four_tokens_merge_by_hand():
    """[class, patch 0..3]: A is the class, patch 1, patch 3; B is patch 0, patch 2."""
    metric = np.array([[9, 9], [1, 0], [1, 0.1], [0, 1], [0.5, 1]], np.float64)
    matching = tome.match(metric, 1, 1)
    assert matching.pairs == [(2, 1)]  # patch 1 lies within 6° of patch 0; patch 3 within 27° of patch 2
    assert matching.stay == [0, 4, 1, 3]
    x, sizes = np.arange(5.0)[:, None], np.array([1, 1, 3, 1, 1])
    merged, size = tome.merge_rows(x, sizes, matching)
    assert merged.ravel().tolist() == [0, 4, (1 * 1 + 3 * 2) / 4, 3]
    assert size.tolist() == [1, 1, 4, 1]
    assert tome.match(metric, 7, 1).pairs == [(2, 1), (4, 3)]  # at most half of four
    assert tome.match(metric, 0, 1).stay == [0, 1, 2, 3, 4]


def test_schedules_of_merging():
    assert tome.schedule(4, 3) == [3, 3, 3, 3]
    assert tome.schedule(5, (4, -1.0)) == [8, 6, 4, 2, 0]
    assert tome.schedule(5, (4, 1.0)) == [0, 2, 4, 6, 8]
    assert tome.schedule(4, (3, -0.5)) == [4, 3, 2, 2]
    assert tome.schedule(4, [2, 1]) == [2, 1, 0, 0]


@pytest.mark.parametrize("pool", POOLS)
def test_merged_tokens_stand_for_all_patches(pool):
    model = small(pool)
    results = [
        (tome.forward(model, IMAGES, [3, 2, 1, 9]), [13, 11, 10, 5]),
        (squeeze.forward(model, IMAGES, {1: 0.7, 3: 0.5}), [13, 8]),
    ]
    for result, counts in results:
        for location, candidates in enumerate(counts):
            for image in range(2):
                holder, sizes = result.chosen[location][image], result.sizes[location][image]
                assert np.bincount(holder, minlength=candidates).tolist() == sizes.tolist()
                assert (len(sizes), sizes.sum()) == (candidates, 16)
                if location:  # what was together stays together
                    before = result.chosen[location - 1][image]
                    assert len(set(zip(before, holder, strict=True))) == len(set(before))


def test_proportional_attention_counts_a_token_by_its_size():
    """Of patches that are all equal, merged ones attend and are attended to like the patches they were."""
    model = small("norm-mean")
    weights = dict(model.weights)
    weights["pos_embed"] = np.zeros_like(weights["pos_embed"])
    model = model._replace(weights=weights)
    image = np.tile(IMAGES[:1, :, :16, :16], (1, 1, 4, 4))
    dense = vit.dense(model, image).logits
    close(tome.forward(model, image, [4, 2, 1, 0]).logits, dense)
    assert np.abs(tome.forward(model, image, [4, 2, 1, 0], proportional=False).logits - dense).max() > 1e-3


def test_a_dropped_token_joins_the_most_similar_kept_one_by_hand():
    x = np.array([[1.0, 0], [0, 2], [3, 0.1], [0.1, 1]])
    rows, sizes, holder = squeeze.squeeze(x, np.array([1, 1, 2, 3]), np.array([1, 0]))
    assert holder.tolist() == [1, 0, 1, 0]
    assert sizes.tolist() == [4, 3]
    close(rows, np.array([[0.3 / 4, 5 / 4], [7 / 3, 0.2 / 3]]))


# ---- EViT's options


def test_fused_tokens_add_up():
    model = small("mean")
    rates = {1: 0.7, 2: 0.5, 3: 0.5}
    results = {fusion: evit.forward(model, IMAGES, rates, fusion) for fusion in ("none", "sum", "mean")}
    for image in range(2):
        assert [len(sizes[image]) for sizes in results["none"].sizes] == [12, 6, 3]
        for fusion in ("sum", "mean"):
            assert [len(sizes[image]) for sizes in results[fusion].sizes] == [13, 8, 5]
            assert [sizes[image].sum() for sizes in results[fusion].sizes] == [16, 16, 16]
            assert results[fusion].chosen[0][image].tolist() == results["none"].chosen[0][image].tolist()
    shares = [np.abs(results["sum"].logits - results[other].logits).max() for other in ("none", "mean")]
    assert min(shares) > 1e-3
