"""ToMe: against the NumPy oracle, its schedules by hand, its ties, its margins, and what it refuses."""

import itertools
import logging
import math

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st

from evit_deploy.errors import InputError
from evit_deploy.models.timm_vit import ReducedBlock
from evit_deploy.registry import METHODS
from evit_deploy.tokens.choices import original_patches, patch_rows
from evit_deploy.tokens.methods.tome import ToMe, choose, numbered_by_parts
from evit_deploy.tokens.operators.token_reorg import select
from evit_deploy.tokens.plan import BlockPlan, TokenPlan, TokenSpec
from evit_deploy.tokens.reduce import capture, reduce_tokens_, set_keep_rate_, token_label, token_plan
from tests.support.families import create, images, logits
from tests.support.method_oracles import tome, vit

DEPTH = 4
ASKED = [
    ({"merge": 3}, [3, 3, 3, 3]),
    ({"merge": 3, "inflect": -0.5}, [4, 3, 2, 2]),
    ({"merge": [4, 0, 2]}, [4, 0, 2, 0]),
    ({"merge": 2, "proportional_attention": False}, [2, 2, 2, 2]),
]


def spec(**options) -> TokenSpec:
    return TokenSpec(method="tome", options=options)


def oracle_of(model: torch.nn.Module) -> vit.Model:
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    pool = {"token": "token", "avg": "mean" if isinstance(model.norm, torch.nn.Identity) else "norm-mean"}
    return vit.Model(weights, heads=model.blocks[0].attn.num_heads, pool=pool[model.global_pool])


def pooling(**args) -> torch.nn.Module:
    """A model whose head averages the patches."""
    torch.manual_seed(0)
    small = {"img_size": 64, "patch_size": 16, "embed_dim": 48, "depth": DEPTH, "num_heads": 3, "num_classes": 7}
    model = timm.create_model("vit_tiny_patch16_224", global_pool="avg", **(small | args)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.5 if parameter.ndim == 1 or "pos" in name else 1.2 / math.sqrt(parameter[0].numel()))
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)
    return model


MODELS = {"deit": lambda: create("deit"), "distilled": lambda: create("deit_distilled")}
POOLING = {"mean": pooling, "norm-mean": lambda: pooling(fc_norm=False)}


# ---- the answers


@pytest.mark.parametrize(("options", "merges"), ASKED)
@pytest.mark.parametrize("kind", [*MODELS, *POOLING])
def test_it_answers_like_the_oracle(kind, options, merges):
    model = (MODELS | POOLING)[kind]()
    oracle, pixels = oracle_of(model), images(model)
    wanted = tome.forward(
        oracle, pixels.numpy().astype(np.float64), merges, options.get("proportional_attention", True)
    )
    reduce_tokens_(model, spec(**options))
    with capture(model) as seen:
        found = model(pixels)
    assert np.abs(found.numpy() - wanted.logits).max() <= 2e-5 * np.abs(wanted.logits).max()
    plan = token_plan(model)
    rows = patch_rows(seen.kept, plan)
    for row, holders in zip(plan.locations, rows, strict=True):
        np.testing.assert_array_equal(holders, np.stack(wanted.chosen[row.block]))


def test_without_a_class_token_the_first_patch_is_even():
    """The oracle's models have a class token; its matching does not need one."""
    model = pooling(class_token=False)
    reduce_tokens_(model, spec(merge=3))
    keys = []
    for block in model.blocks:
        assert isinstance(block, ReducedBlock)
        block.reducer.register_forward_hook(lambda _, inputs, output: keys.append((inputs[2], output[1])))
    with torch.inference_mode():
        model(images(model))
    assert len(keys) == DEPTH
    for key, choice in keys:
        for image in range(3):
            wanted = tome.match(key[image].double().mean(1).numpy(), 3, 0)
            keep = key.shape[1] - 3
            assert choice[image, :keep].tolist() == wanted.stay
            moves = zip(choice[image, keep : keep + 3].tolist(), choice[image, keep + 3 :].tolist(), strict=True)
            assert [(moving, wanted.stay[place]) for moving, place in moves] == wanted.pairs


def test_proportional_attention_starts_where_sizes_differ():
    """Before the first merge no bias is added, so that attention takes its fastest kernel there."""
    ask = ToMe.key_bias
    for options, biased in [
        ({"merge": [0, 2, 1]}, [False, False, True, True]),
        ({"merge": 2, "proportional_attention": False}, [False] * 4),
    ]:
        model = reduce_tokens_(create("deit"), spec(**options))
        found = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ToMe, "key_bias", lambda self, state, seen=found: seen.append(ask(self, state)) or seen[-1])
            logits(model)
        assert [bias is not None for bias in found] == biased
        for bias in found:
            if bias is not None:
                assert bias.shape[1:3] == (1, 1)
                assert not bias[..., 0].any()  # the class token's
                assert (bias.exp().sum(-1).round() == 17).all()  # sizes add up to the patches, and the class token


def test_the_head_sees_every_patch_by_the_size_of_its_token():
    model = reduce_tokens_(pooling(), spec(merge=[4, 3]))
    seen = {}
    model.blocks[1].reducer.register_forward_hook(lambda _, inputs, output: seen.update(sizes=output[2].sizes))
    model.blocks[-1].mlp.register_forward_hook(lambda _, inputs, output: seen.update(tokens=output.shape[1]))
    model.fc_norm.register_forward_hook(lambda _, inputs, output: seen.update(pooled=inputs[0]))
    last = {}
    model.blocks.register_forward_hook(lambda _, inputs, output: last.update(x=output))
    with torch.inference_mode():
        model(images(model))
    assert last["x"].shape[1] == 17
    assert seen["tokens"] == 10
    assert seen["sizes"].sum(1).tolist() == [16.0] * 3
    for image in range(3):
        tokens, counts = torch.unique(last["x"][image, 1:], dim=0, return_counts=True)
        assert sorted(counts.tolist()) == sorted(seen["sizes"][image].tolist())
        mean = (tokens * counts[:, None]).sum(0) / 16
        torch.testing.assert_close(mean, seen["pooled"][image])


# ---- the matching


@st.composite
def similarities(draw) -> tuple[np.ndarray, int, int]:
    """Similarities with many ties, how many merge, and the first candidate at an even place."""
    odds, first = draw(st.integers(1, 7)), draw(st.integers(0, 1))
    evens = max(odds + draw(st.integers(*((-1, 0) if first else (0, 1)))), 1)
    values = draw(st.lists(st.integers(-2, 2), min_size=2 * evens * odds, max_size=2 * evens * odds))
    merge = draw(st.integers(1, min(evens, (evens + odds) // 2)))
    return np.array(values, np.float32).reshape(2, evens, odds) / 4, merge, first


@given(similarities())
def test_choices_are_partitions_and_ties_go_to_the_lowest_place(given_similarities):
    similarity, merge, first = given_similarities
    choice = choose(torch.from_numpy(similarity), merge, first)
    evens, odds = similarity.shape[1:]
    assert choice.dtype == torch.int32
    assert choice.shape == (2, evens + odds + merge)
    for image in range(2):
        edges = []
        for even in range(evens):
            best = max(range(odds), key=lambda odd, row=similarity[image, even]: (row[odd], -odd))
            edges.append((-similarity[image, even, best], even, best))
        edges = sorted(edges)[:merge]
        moved = [even for _, even, _ in edges]
        staying = [even for even in range(evens) if even not in moved]
        stays = [2 * even + first for even in staying] + [2 * odd + 1 - first for odd in range(odds)]
        moves = [2 * even + first for even in moved]
        assert choice[image].tolist() == [*stays, *moves, *(len(staying) + best for *_, best in edges)]
        assert sorted(stays + moves) == list(range(evens + odds))


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, 4), min_size=1, max_size=4))
def test_sizes_add_up_to_the_patches(seed, listed):
    model = MODEL_16
    reduce_tokens_(model, spec(merge=[min(r, 2 if i else 8) for i, r in enumerate(listed)]))
    plan = token_plan(model)
    sizes = []
    for block in model.blocks:
        if isinstance(block, ReducedBlock):
            block.reducer.register_forward_hook(lambda _, inputs, output: sizes.append(output[2].sizes))
    with capture(model) as seen:
        model(images(model, 2, seed))
    for row, holders, size in zip(plan.locations, patch_rows(seen.kept, plan), sizes, strict=True):
        assert size.shape == (2, row.keep)
        for image in range(2):
            assert np.bincount(holders[image], minlength=row.keep).tolist() == size[image].tolist()
            assert size[image].sum() == 16


MODEL_16 = create("deit")


def test_a_merged_patch_is_named_by_the_lowest_one_in_its_token():
    model = reduce_tokens_(create("deit"), spec(merge=[3, 2]))
    with capture(model) as seen:
        model(images(model))
    plan = token_plan(model)
    first = original_patches(seen.kept, plan)[0]
    assert first.shape == (3, 16)
    for image in range(3):
        moved = [patch for patch in range(16) if first[image, patch] != patch]
        assert len(moved) == 3
        assert all(patch % 2 == 1 and first[image, patch] % 2 == 0 for patch in moved)  # place 0 is the class token's


# ---- schedules and plans


@pytest.mark.parametrize(
    ("options", "merges"),
    [
        ({"merge": 13}, [13] * 12),
        ({"merge": 13, "inflect": -1}, [26, 23, 21, 18, 16, 14, 11, 9, 7, 4, 2, 0]),
        ({"merge": 13, "inflect": 1}, [0, 2, 4, 7, 9, 11, 14, 16, 18, 21, 23, 26]),
        ({"merge": 13, "inflect": 0.5}, [6, 7, 8, 9, 11, 12, 13, 14, 16, 17, 18, 20]),
        ({"merge": 10, "inflect": 0.9}, [1, 2, 4, 5, 7, 9, 10, 12, 14, 15, 17, 19]),  # in floats the first would be 0
        ({"merge": [16, 16, 8]}, [16, 16, 8, *[0] * 9]),
    ],
)
def test_schedules(options, merges):
    assert merged_by(plan_of(**options)) == merges


def plan_of(patches: int = 196, progress: float = 1.0, **options) -> TokenPlan:
    from evit_deploy.tokens.plan import ModelCost, ModelShape
    from evit_deploy.tokens.reducer import options_of

    cost = ModelCost(196 * 384 * 768, 4 * 384 * 384, 8 * 384 * 384, 384, 384 * 1000)
    return ToMe.plan_for(
        spec(**options), options_of(ToMe, spec(**options)), ModelShape(1, patches, 12, 384, cost), progress
    )


def merged_by(plan: TokenPlan) -> list[int]:
    return [row.tokens_in - row.tokens_out for row in plan.blocks]


def test_multiply_adds_of_deit_s_are_the_published_ones():
    plan = plan_of(merge=13)
    assert plan.blocks[-1].tokens_out == 41
    assert plan.macs() / 1e9 == pytest.approx(2.7, abs=0.05)  # the paper's table 1 has 2.7 GFLOPs
    assert plan.locations[0] == BlockPlan(0, 197, 183, False, 184, choice="merge", choice_indices=209)


def test_constant_and_linear_schedules_end_where_half_of_the_tokens_is_less(caplog):
    plan = plan_of(patches=16, merge=7)
    assert merged_by(plan) == [7, 4, 2, 1, 1, *[0] * 7]
    model = create("deit")
    with caplog.at_level(logging.WARNING, "evit_deploy"):
        reduce_tokens_(model, spec(merge=7))
    assert [record.message for record in caplog.records] == [
        "Fewer tokens merge than asked for where they are more than half of what is left: 4 in block 1, 2 in block 2, "
        "1 in block 3."
    ]


def test_the_schedule_of_training_starts_dense_and_merges_more_and_more():
    dense = logits(create("deit"))
    model = reduce_tokens_(create("deit"), spec(merge=4, inflect=-0.5))
    end = token_plan(model)
    merges = []
    for progress in (0, 0.25, 0.5, 0.75, 1):
        plan = set_keep_rate_(model, progress)
        merges.append(merged_by(plan))
        if progress == 0:
            assert torch.equal(logits(model), dense)
        assert logits(model).isfinite().all()
    assert merges[0] == [0, 0, 0, 0]
    assert merges[-1] == merged_by(end) == [6, 4, 3, 1]
    assert all(a <= b for one, other in itertools.pairwise(merges) for a, b in zip(one, other, strict=True))
    assert merges[2] == [3, 2, 1, 1]  # halfway: half of each, truncated


@pytest.mark.parametrize(
    ("options", "label"),
    [
        ({"merge": 13}, "tome-r13"),
        ({"merge": 13, "inflect": 0.5}, "tome-r13-inflect-0.5"),
        ({"merge": [16, 16, 8]}, "tome-r16-16-8"),
        ({"merge": 13, "proportional_attention": False}, "tome-r13-no-proportional"),
    ],
)
def test_labels(options, label):
    assert token_label(spec(**options)) == label


# ---- margins


ROW = BlockPlan(0, 9, 6, False, 7, choice="merge", choice_indices=10)
SIMILAR = np.array([[[0.9, 0.1, 0.2, 0.3], [0.5, 0.45, 0.1, 0.0], [0.4, 0.0, 0.1, 0.2], [0.1, 0.0, 0.05, 0.0]]])
CHOSEN = choose(torch.from_numpy(SIMILAR), 2, 1).numpy()


def test_the_choice_of_the_example():
    assert CHOSEN.tolist() == [[5, 7, 0, 2, 4, 6, 1, 3, 2, 2]]


def test_margins_tell_which_tokens_may_merge_otherwise():
    noisy = SIMILAR + 0.01 * np.array([[[1, -1, 1, -1]] * 4])
    rounding = 0.02 + 4 * np.finfo(np.float32).eps
    margin = ToMe.margin(noisy, SIMILAR, CHOSEN, ROW)
    # The boundary is at 0.45. Candidate 3 merges, but is 0.05 from its second best; those at odd places never move.
    expected = np.array([[np.inf, 0.45, np.inf, 0.05, np.inf, 0.05, np.inf, 0.35]])
    np.testing.assert_allclose(margin * rounding, expected, rtol=1e-6)


def test_the_nearest_choice_is_another_pair_or_another_target():
    assert ToMe.nearest_choice(CHOSEN, SIMILAR, ROW).tolist() == [[5, 7, 0, 2, 4, 6, 1, 3, 2, 3]]  # 0.5 against 0.45
    clear = SIMILAR.copy()
    clear[0, 1, 1] = 0.0
    assert ToMe.nearest_choice(CHOSEN, clear, ROW).tolist() == [[3, 7, 0, 2, 4, 6, 1, 5, 2, 2]]  # 0.5 against 0.4


def test_margins_where_all_even_tokens_merge():
    row = BlockPlan(0, 9, 4, False, 5, choice="merge", choice_indices=12)
    choice = choose(torch.from_numpy(SIMILAR), 4, 1).numpy()
    assert choice.tolist() == [[0, 2, 4, 6, 1, 3, 5, 7, 0, 0, 0, 0]]
    margin = ToMe.margin(SIMILAR, SIMILAR, choice, row) * 4 * np.finfo(np.float32).eps
    np.testing.assert_allclose(margin[0, 1::2], [0.6, 0.05, 0.2, 0.05], rtol=1e-6)
    assert ToMe.nearest_choice(choice, SIMILAR, row)[0, -4:].tolist().count(0) == 3


# ---- what is refused


@pytest.mark.parametrize(
    ("fields", "messages"),
    [
        ({"options": {}}, ["needs", "merge"]),
        ({"options": {"merge": 13}, "keep_rate": 0.7}, ["takes no keep rate", "--merge 13"]),
        ({"options": {"merge": 3}, "locations": (1, 2)}, ["takes no locations", "every block"]),
        ({"options": {"merge": 9}}, ["to merge in one block", "at most 8, half of the 16 patches"]),
        ({"options": {"merge": 5, "inflect": -1}}, ["to merge in one block", "10"]),
        ({"options": {"merge": [8, 5]}}, ["too many tokens to merge in block 1", "at most 4, half of the 8"]),
        ({"options": {"merge": [1, 1, 1, 1, 1]}}, ["more numbers than blocks", "at most 4"]),
        ({"options": {"merge": [3, 2], "inflect": 0.5}}, ["a list gives r for each block"]),
        ({"options": {"merge": -1}}, [">= 0"]),
        ({"options": {"merge": 3, "inflect": 2}}, ["<= 1"]),
        ({"options": {"merge": 3, "ratio": 2}}, ["ratio", "merge, inflect, proportional_attention"]),
    ],
)
def test_what_it_refuses(fields, messages):
    model = create("deit")
    with pytest.raises(InputError) as caught:
        reduce_tokens_(model, TokenSpec(method="tome", **fields))
    for message in messages:
        assert message in str(caught.value)
    assert not any(isinstance(block, ReducedBlock) for block in model.blocks)


def test_it_is_registered_as_one_that_can_be_asked_for():
    assert METHODS.get("tome") is ToMe
    assert not ToMe.comparison_only
    assert not ToMe.takes_keep_rate


# ---- training and compilation


def test_training_in_mixed_precision_compares_in_fp32():
    """Under autocast a matrix product is made in BF16; which tokens merge must not depend on it."""
    model = reduce_tokens_(create("deit"), spec(merge=3))
    keys = torch.randn(3, 17, 3, 64, generator=torch.Generator().manual_seed(0))
    reducer = model.blocks[0].reducer
    plain = reducer.scores(keys, keys, keys)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(reducer.scores(keys, keys, keys), plain)


def test_it_learns_with_activations_computed_again():
    gradients = []
    for again in (False, True):
        model = reduce_tokens_(create("deit").train(), spec(merge=3))
        model.blocks.checkpointing = again
        model(images(model)).sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.slow
def test_it_compiles_as_one_graph():
    model = reduce_tokens_(create("deit"), spec(merge=3))
    compiled = torch.compile(model, fullgraph=True)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(images(model)), model(images(model)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("evens", "odds", "first"), [(4, 5, 1), (5, 4, 0), (5, 5, 1)])
def test_a_gpu_numbers_a_choice_as_a_cpu_does(evens, odds, first):
    similarity = torch.randn(3, evens, odds, generator=torch.Generator().manual_seed(evens))
    for merge in range(1, evens + 1):
        wanted = choose(similarity, merge, first)
        order = select(similarity.amax(2), evens)
        staying = order[:, merge:].sort(1).values if merge < evens else None
        joined = similarity.argmax(2).gather(1, order[:, :merge])
        assert torch.equal(numbered_by_parts(staying, order[:, :merge], joined, odds, first), wanted)
