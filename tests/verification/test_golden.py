"""The golden answers: what counts as a tie, and how far right answers may lie apart."""

import copy
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from evit_deploy.export.answer import normalize_
from evit_deploy.export.card import LOGITS, kept_name
from evit_deploy.export.precision import set_precision
from evit_deploy.models.create import create_model
from evit_deploy.report.report import Report
from evit_deploy.tokens.choices import FLOOR, original_patches
from evit_deploy.tokens.plan import TokenSpec, make_plan
from evit_deploy.tokens.reduce import capture, reduce_tokens_, token_plan
from evit_deploy.verification.agreement import agreement, answer_error, same_choice
from evit_deploy.verification.answers.answers import overlap
from evit_deploy.verification.golden import Golden, KnownAnswers, make_golden
from evit_deploy.verification.tolerances import NOISE_LIMIT
from evit_deploy.verification.verify import verify_precision
from tests.support import levit_oracle
from tests.support.exports import calibration_of, exported, lowered, reduced
from tests.support.models import TINY, images, of_kind, seeded

EPS = float(np.finfo(np.float32).eps)


# Kept sets: the same, a tie, or wrong.

PLAN = make_plan(TokenSpec(keep_rate=0.5, locations=(0, 1), fuse=True), prefix=1, patches=6, depth=3)
FUSED = 6  # the fused token's place in a row of margins


def synthetic(*near: tuple[int, int, list[int]], **changes: Any) -> Golden:
    """Three images; keeps patches 0, 1, 2 of 6, then candidates 0 and 1 (patches 0 and 1) of the 4.

    Args:
        near: Block, image and the patches whose scores there lie within rounding of the boundary.
        changes: Other fields.
    """
    logits = np.array([[1.0, 2.0], [3.0, 1.0], [0.0, 1.0]], np.float32)
    kept = {0: np.tile([0, 1, 2, -1], (3, 1)), 1: np.tile([0, 1, -1], (3, 1))}
    margin = {block: np.full((3, 7), 9.0) for block in (0, 1)}
    for block, image, patches in near:
        margin[block][image, patches] = 0.5
    exact = logits.astype(np.float64)
    fields: dict[str, Any] = dict.fromkeys(("logits", "expected", "expected_free", "dense", "dense_expected"), logits)
    fields |= dict.fromkeys(("reference", "swapped", "dense_reference"), exact)
    fields |= dict.fromkeys(("terms", "dense_terms"), np.abs(exact).max(axis=1))
    fields |= {"precision": "fp32", "inputs": np.zeros((3, 1, 1, 1), np.float32), "kept": kept, "margin": margin}
    return Golden(**fields | changes)


def outputs_of(golden: Golden, **changes: Any) -> dict[str, np.ndarray]:
    """What a runtime says that agrees, but for some changes: ``kept_0`` and ``kept_1`` image by image."""
    kept = {"kept_0": [[0, 1, 2]] * 3, "kept_1": [[0, 1]] * 3}
    kept = {name: np.array(changes.pop(name, value), np.int32) for name, value in kept.items()}
    return {LOGITS: golden.logits.copy()} | kept | changes


def compared(golden: Golden, **changes: Any) -> Any:
    return agreement(golden, np.arange(3), outputs_of(golden, **changes), PLAN)


def shares(found: Any) -> tuple[float, float, float]:
    return found.same, found.ties, found.wrong


SECOND = [[0, 1, 2], [0, 1, 3], [0, 1, 2]]  # the second image keeps patch 3 in place of 2


def test_equal_answers_agree():
    found = compared(synthetic())
    assert shares(found) == (1, 0, 0)
    assert (found.top1, found.error, found.overlap) == (1, 0, 1)
    assert found.limit == FLOOR * EPS * 3
    assert np.isnan(found.tie_error)
    assert found.tie_limit == 0


def test_a_clear_difference_is_wrong_and_a_tie_is_not():
    assert shares(compared(synthetic(), kept_0=SECOND)) == (2 / 3, 0, 1 / 3)
    assert shares(compared(synthetic((0, 1, [2, 3])), kept_0=SECOND)) == (2 / 3, 1 / 3, 0)
    assert shares(compared(synthetic((0, 0, [2, 3])), kept_0=SECOND)) == (2 / 3, 0, 1 / 3)  # near in another image
    assert shares(compared(synthetic((1, 1, [2, 3])), kept_0=SECOND)) == (2 / 3, 0, 1 / 3)  # or at another location


@pytest.mark.parametrize(("margin", "wrong"), [(0.999, 0), (1, 1 / 3), (1.5, 1 / 3)])
def test_at_a_margin_of_1_the_choice_is_clear(margin, wrong):
    golden = synthetic()
    golden.margin[0][1, [2, 3]] = margin
    assert compared(golden, kept_0=SECOND).wrong == wrong


@pytest.mark.parametrize("near", [[2], [3], [2, 4], [0, 1, 3, 4, 5]])
def test_both_patches_that_change_places_must_be_near(near):
    """A tiny gap at the boundary excuses the patches at it, and no others."""
    assert compared(synthetic((0, 1, near)), kept_0=SECOND).wrong == 1 / 3


def test_patches_far_from_a_tiny_gap_are_no_tie():
    golden = synthetic((0, 1, [2, 3]))
    exchanged = [[0, 1, 2], [5, 1, 2], [0, 1, 2]]
    assert compared(golden, kept_0=exchanged).wrong == 1 / 3
    both = [[0, 1, 2], [5, 1, 3], [0, 1, 2]]  # a tie does not hide it
    assert compared(golden, kept_0=both).wrong == 1 / 3


def test_the_fused_token_is_a_candidate_like_any_other():
    # candidates of the second location: patches 0, 1, 2 and the fused token, which is candidate 3
    fused = [[0, 1], [0, 3], [0, 1]]
    assert shares(compared(synthetic(), kept_1=fused)) == (2 / 3, 0, 1 / 3)
    assert shares(compared(synthetic((1, 1, [1, FUSED])), kept_1=fused)) == (2 / 3, 1 / 3, 0)
    assert shares(compared(synthetic((1, 1, [1, 2])), kept_1=fused)) == (2 / 3, 0, 1 / 3)


def test_an_earlier_fused_token_is_not_the_new_one():
    """Both are -1; that there is one more or one less of them is a difference."""
    kept = {1: np.array([[0, -1, -1]] * 3)}  # a patch, the fused token of the first location, and the new one
    for other, same in (([0, -1, -1], True), ([-1, 0, -1], True), ([0, 1, -1], False)):
        found, _ = same_choice(synthetic(), np.arange(3), kept, {1: np.array([other] * 3)})
        assert found.all() == same


def test_a_difference_after_a_tie_follows_from_it():
    kept_0, kept_1 = [[0, 1, 2], [0, 1, 5], [0, 1, 2]], [[0, 1], [2, 3], [0, 1]]
    assert compared(synthetic((0, 1, [2, 5])), kept_0=kept_0, kept_1=kept_1).wrong == 0
    # ... but a clear one that comes first is not excused by a later tie
    assert compared(synthetic((1, 1, [0, 1, 2, 5, FUSED])), kept_0=kept_0, kept_1=kept_1).wrong == 1 / 3


def test_kept_sets_are_compared_in_original_patch_numbers():
    golden = synthetic()
    # The first location gives 2, 0, 1 in this order: patches 0 and 1 are candidates 1 and 2 of the second.
    assert compared(golden, kept_0=[[2, 0, 1]] * 3, kept_1=[[2, 1]] * 3).same == 1
    assert compared(golden, kept_0=[[2, 0, 1]] * 3).wrong == 1  # now 0 and 1 stand for 2 and 0


def test_overlap_is_common_over_either():
    assert overlap(np.array([[0, 1, 2, -1]]), np.array([[0, 1, 3, -1]])) == 2 / 4
    assert overlap(np.array([[0, 1], [2, 3]]), np.array([[1, 0], [0, 1]])) == 1 / 2
    assert overlap(np.array([[3]]), np.array([[3]])) == 1
    assert overlap(np.array([[0, 0, 2]]), np.array([[0, 1, 2]]), merging=True) == 2 / 3
    assert compared(synthetic(), kept_0=SECOND).overlap == pytest.approx((1 + (1 + 0.5 + 1) / 3) / 2)


def test_choices_of_two_places_are_compared_with_each_other():
    golden = synthetic((0, 1, [2, 3]))
    first, other = {0: np.array([[0, 1, 2, -1]] * 3)}, {0: np.array([[0, 1, 3, -1]] * 3)}
    same, tie = same_choice(golden, np.array([1, 1, 0]), first, other)
    assert (same.tolist(), tie.tolist()) == ([False] * 3, [True, True, False])


def test_of_a_merge_every_patch_is_compared_with_its_own_token():
    """There it has a number for every patch, and the fused token's place in the margins means nothing."""
    golden = synthetic((0, 1, [5]), kept={0: np.tile([0, 1, 2, 0, 1, 2], (3, 1))})
    golden.margin[0][:, FUSED] = 0.5
    kept = {0: golden.kept[0].copy()}
    found = [part.tolist() for part in same_choice(golden, np.arange(3), golden.kept, kept, merging=[0])]
    assert found == [[True] * 3, [False] * 3]
    kept[0][:, 5] = 1  # within rounding in the second image alone
    found = [part.tolist() for part in same_choice(golden, np.arange(3), golden.kept, kept, merging=[0])]
    assert found == [[False] * 3, [False, True, False]]


def test_a_model_that_chooses_nothing_chooses_the_same():
    golden = synthetic(kept={}, margin={})
    found = agreement(golden, np.arange(3), {LOGITS: golden.logits}, PLAN.dense())
    assert (shares(found), found.overlap, found.error) == ((1, 0, 0), 1, 0)


# Logits.


def test_logits_are_compared_wherever_the_choice_is_the_same():
    golden = synthetic((0, 1, [2, 3]))  # also where it might have been another
    for image in range(3):
        shifted = golden.logits.copy()
        shifted[image] += 5
        assert compared(golden, logits=shifted).error == 5


def test_logits_on_a_tie_may_move_as_far_as_the_choice_moves_them():
    swapped = np.array([[1.0, 2.0], [3.5, 1.0], [9.0, 1.0]])
    golden = synthetic((0, 1, [2, 3]), swapped=swapped)
    near = golden.limit() + 0.5
    assert golden.tie_limits() == pytest.approx([golden.limit(), near, golden.limit()])  # the others cannot tie
    moved = golden.logits + np.array([[0], [0.25], [0]], np.float32)
    found = compared(golden, kept_0=SECOND, logits=moved)
    assert (found.error, found.tie_error, found.tie_limit) == (0, 0.25, pytest.approx(near))


def test_it_takes_two_near_patches_to_keep_another_and_one_to_merge_otherwise():
    swapped = np.array([[1.0, 2.0], [3.5, 1.0], [0.0, 1.0]])
    margin = {0: np.full((3, 7), 9.0)}
    margin[0][1, 3] = 0.5
    for kept, room in (([0, 1, 2], 0.0), ([0, 1, 2, -1], 0.0), ([0, 1, 2, 3, 2, 0], 0.5), ([0, 1, 2, 3, 2, -1], 0.0)):
        golden = synthetic(swapped=swapped, kept={0: np.tile(kept, (3, 1))}, margin=margin)
        assert golden.tie_limits() == pytest.approx(golden.limit() + np.array([0, room, 0]))


def test_of_several_ties_the_one_closest_to_its_own_limit_is_told():
    near = [(0, image, [2, 3]) for image in range(3)]
    golden = synthetic(*near, swapped=np.array([[2.0, 2.0], [3.1, 1.0], [0.0, 1.0]]))
    moved = golden.logits + np.array([[0.9], [0.2], [0]], np.float32)  # the larger error is within its limit
    found = compared(golden, kept_0=[[0, 1, 3]] * 3, logits=moved)
    assert shares(found) == (0, 1, 0)
    assert (found.tie_error, found.tie_limit) == (pytest.approx(0.2), pytest.approx(0.1, rel=1e-4))
    assert np.isnan(found.error)


def test_a_runtime_that_tells_no_kept_patches_may_have_chosen_otherwise_only_where_that_is_possible():
    golden = synthetic((0, 1, [2, 3]), swapped=np.array([[1.0, 2.0], [3.5, 1.0], [0.0, 6.0]]))
    for image, error, held in ((1, 0.25, True), (1, 0.75, False), (0, 0.25, False), (2, 0.25, False)):
        moved = golden.logits.copy()
        moved[image, 0] += error
        found = agreement(golden, np.arange(3), {LOGITS: moved}, PLAN)
        assert all(np.isnan([found.same, found.ties, found.overlap, found.error]))
        assert found.wrong == 0
        assert (found.tie_error <= found.tie_limit) is held


@pytest.mark.parametrize("image", [0, 1])
def test_an_answer_that_is_not_a_number_is_the_largest_error(image):
    golden = synthetic((0, 1, [2, 3]))
    broken = golden.logits.copy()
    broken[image, 0] = np.nan
    found = compared(golden, kept_0=SECOND, logits=broken)
    assert not (found.error if image == 0 else found.tie_error) <= 1e30


@pytest.mark.parametrize(
    ("eager_error", "limit"), [(1e-3, 2e-3), (0.0, FLOOR * EPS * 8), (1e-7, FLOOR * EPS * 8), (np.inf, np.inf)]
)
def test_the_limit_is_twice_the_precisions_own_error_or_the_floor(eager_error, limit):
    reference = np.array([[4.0, -8.0]])
    terms = np.array([8.0])
    golden = synthetic(reference=reference, expected=reference + eager_error, swapped=reference, terms=terms)
    assert golden.limit() == pytest.approx(limit, rel=1e-9)
    golden = synthetic(dense_reference=reference, dense_expected=reference - eager_error, dense_terms=terms)
    assert golden.dense_limit() == pytest.approx(limit, rel=1e-9)


def test_terms_that_cancel_leave_room_for_their_own_rounding():
    model = copy.deepcopy(of_kind("plain"))
    inputs = images(model, 2)
    with torch.no_grad():
        model.head.weight.fill_(3.0)  # behind a norm, whose features add up to nothing
        model.head.bias.fill_(-0.25)
    golden, exact = make_golden(model, model, inputs), model.double()
    with torch.inference_mode():
        features = exact.forward_features(torch.from_numpy(inputs).double())
        features = exact.forward_head(features, pre_logits=True).numpy()
    assert golden.terms == pytest.approx(3 * np.abs(features).sum(axis=1) + 0.25)
    np.testing.assert_array_equal(golden.dense_terms, golden.terms)
    assert golden.terms.min() > 5 * np.abs(golden.reference).max()
    assert golden.limit() == pytest.approx(FLOOR * EPS * golden.terms.max())


@pytest.mark.parametrize("kind", ["plain", "distilled"])
def test_terms_are_those_of_the_reference_and_of_no_other_choice(kind):
    """Of the class token after the last norm; of two classifiers' terms the larger."""
    model, inputs = reduced(kind), images(of_kind(kind), 4)
    golden, exact = make_golden(model, of_kind(kind), inputs), model.double()
    heads = [exact.head, exact.head_dist] if kind == "distilled" else [exact.head]
    with torch.inference_mode():
        tokens = exact.forward_features(torch.from_numpy(inputs).double()).abs()
        terms = [tokens[:, i] @ head.weight.abs().T + head.bias.abs() for i, head in enumerate(heads)]
    wanted = torch.cat(terms, dim=1).max(dim=1).values.numpy()
    assert golden.terms == pytest.approx(wanted, rel=1e-9)


def test_terms_of_a_normalized_embedding_are_scaled_as_it_is():
    model = create_model("vit_tiny_patch16_224", TINY | {"num_classes": 0, "projection": 20}).eval()
    inputs = images(model, 2)
    plain = make_golden(model, model, inputs)
    normalize_(model)
    scaled = make_golden(model, model, inputs)
    lengths = np.linalg.norm(plain.reference, axis=1)
    assert abs(lengths - 1).min() > 0.1
    np.testing.assert_allclose(scaled.terms, plain.terms / lengths)
    np.testing.assert_allclose(scaled.reference, plain.reference / lengths[:, None])
    np.testing.assert_array_equal(scaled.dense_terms, scaled.terms)


def test_the_error_is_the_largest_of_the_given_rows():
    golden = synthetic()
    answers = golden.reference[[2, 0]] + np.array([[0.5, 0], [-0.75, 0]])
    assert answer_error(golden, np.array([2, 0]), answers) == 0.75
    assert np.isnan(answer_error(golden, np.array([], int), np.empty((0, 2))))


# The precision itself.


def test_noise_is_the_error_over_the_spread_of_the_logits():
    golden = synthetic()  # spreads by ±0.5, ±1 and ±0.5
    assert golden.noise() == 0
    noisy = synthetic(expected=golden.reference + np.array([[0.3, 0], [0, 0.4], [0, 0]]))
    assert noisy.noise() == pytest.approx(0.5 / np.sqrt(2 * (0.25 + 1 + 0.25)))
    shifted = synthetic(expected=golden.reference * 1.1, reference=golden.reference * 1.1 + 100)
    assert shifted.noise() == pytest.approx(100 * np.sqrt(6) / (1.1 * np.sqrt(3)))


def test_a_single_logit_spreads_over_the_images():
    reference = np.array([[1.0], [2.0], [3.0]])
    assert synthetic(reference=reference, expected=reference + 0.1).noise() == pytest.approx(0.1 * np.sqrt(1.5))


def test_a_precision_that_breaks_the_model_fails():
    assert verify_precision(synthetic(expected=np.full((3, 2), np.nan))) == Report()  # fp32 is what it is
    for error, held in ((0.1, True), (0.35, True), (0.36, False), (np.nan, False), (np.inf, False)):
        golden = synthetic(precision="int8", expected=synthetic().reference + error)
        (check,) = verify_precision(golden).checks
        assert check.name == "int8: error over spread of logits"
        assert check.limit == NOISE_LIMIT
        assert check.passed is held
        assert ("calibration" in check.reason) is not held


# Made by PyTorch.


def without_places() -> tuple[Any, Any]:
    """Reduced and dense model that give equal patches equal scores."""
    model = of_kind("plain")
    with torch.no_grad():
        model.pos_embed[:, 1:] = 0
    dense = copy.deepcopy(model)
    reduce_tokens_(model, TokenSpec(keep_rate=0.6))
    return model, dense


def test_the_reference_keeps_what_the_fp32_model_kept():
    """All patches alike: FP64 left to itself would break the ties by other rounding, and answer something else."""
    model, dense = without_places()
    noise = np.random.default_rng(0).standard_normal(images(model, 3).shape)
    golden = make_golden(model, dense, 0.5 + 1e-7 * noise.astype(np.float32))
    assert answer_error(golden, np.arange(3), golden.logits) <= golden.limit() < 1e-4


@pytest.mark.parametrize(
    ("kind", "spec"),
    [
        ("plain", TokenSpec(keep_rate=0.6, locations=(0,))),
        ("plain", TokenSpec(keep_rate=0.6, locations=(2, 3))),
        ("plain", TokenSpec(keep_rate=0.6, method="merge")),
        ("plain", TokenSpec(keep_rate=0.5, method="evo-vit", fuse=False)),
        ("plain", TokenSpec(method="tome", options={"merge": (5, 5, 5)})),
        ("LV-ViT", TokenSpec(keep_rate=0.6)),  # its stem has batch norms, whose buffers are cast too
        ("Evo-LeViT", TokenSpec(keep_rate=0.5, method="evo-vit")),  # has buffers of indices, which are not
    ],
    ids=lambda part: part if isinstance(part, str) else f"{part.method} at {part.locations}",
)
def test_the_reference_is_the_model_itself_in_fp64(kind, spec):
    """Whatever blocks the two models are found to have in common."""

    def fresh() -> Any:
        return seeded("evo_levit_128s", **levit_oracle.TINY_ARGS) if kind == "Evo-LeViT" else of_kind(kind)

    model, dense = reduce_tokens_(fresh(), spec), fresh()
    inputs = images(model, 2)
    golden, known = make_golden(model, dense, inputs), KnownAnswers()
    make_golden(reduce_tokens_(fresh(), msgspec.structs.replace(spec, locations=None)), dense, inputs, known=known)
    with torch.inference_mode():
        exact, whole = (one.double()(torch.from_numpy(inputs).double()).numpy() for one in (model, dense))
    for made in golden, make_golden(reduce_tokens_(fresh(), spec), fresh(), inputs, known=known):
        np.testing.assert_allclose(made.reference, exact, rtol=0, atol=1e-12)
        np.testing.assert_allclose(made.dense_reference, whole, rtol=0, atol=1e-12)


def test_blocks_that_both_models_share_are_computed_once_in_fp64():
    model, dense = reduced("plain", TokenSpec(keep_rate=0.6, locations=(2,))), of_kind("plain")
    seen = []

    def count(module: torch.nn.Module, given: Any, made: torch.Tensor) -> None:
        if type(module) is type(dense.blocks[0].mlp) and made.dtype == torch.float64:
            seen.append(module)

    handle = torch.nn.modules.module.register_module_forward_hook(count)
    try:
        make_golden(model, dense, images(dense, 1))
    finally:
        handle.remove()
    assert len(seen) == 4 + 2 + 2  # the dense model; the reduced one from its location on, with either choice


def test_no_second_copy_of_all_weights_is_in_memory():
    """Only the block that is running has its weights in FP64."""
    model, dense = reduced("plain"), of_kind("plain")
    kinds, seen = {type(block) for block in (*model.blocks, *dense.blocks)}, []

    def look(module: torch.nn.Module, given: Any) -> None:
        if type(module) in kinds:
            cast = [one for one in seen if next(one.parameters()).dtype == torch.float64]
            assert cast == []
            seen.append(module)

    handle = torch.nn.modules.module.register_module_forward_pre_hook(look)
    try:
        make_golden(model, dense, images(dense, 1))
    finally:
        handle.remove()
    assert len(seen) >= 2 * 4 * 2


def test_products_are_in_full_fp32_whatever_the_process_has_set():
    model, seen = of_kind("plain"), []
    handle = model.norm.register_forward_hook(lambda *_: seen.append(torch.get_float32_matmul_precision()))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        make_golden(model, model, images(model, 1))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
        handle.remove()
    assert set(seen) == {"highest"}


def test_known_answers_are_those_of_the_same_layers():
    """A search that leaves other layers unquantized asks the dense twin again; one that leaves the same does not."""
    model, dense = reduced("plain"), of_kind("plain")
    inputs, known, twins = images(dense, 2), KnownAnswers(), []
    for keep in ((), ("blocks.3.mlp.*",)):
        pair: Any = tuple(
            set_precision(exported("plain", spec), "int8", calibration=calibration_of("plain"), keep=keep)
            for spec in (TokenSpec(keep_rate=0.6), None)
        )
        twins.append(make_golden(model, dense, inputs, "int8", pair, known).dense_expected)
        np.testing.assert_array_equal(twins[-1], make_golden(model, dense, inputs, "int8", pair).dense_expected)
        without_twin: Any = (pair[0], None)
        again = make_golden(model, dense, inputs, "int8", without_twin, known).dense_expected
        np.testing.assert_array_equal(twins[-1], again)
    assert not np.array_equal(*twins)


def test_equal_patches_are_a_tie_in_the_golden_file():
    model, dense = without_places()
    inputs = images(model, 3)
    inputs[1] = 0.5
    near = make_golden(model, dense, inputs).margin[1] < 1
    assert near[1, :-1].all()
    assert not near[[0, 2]].any()


def test_a_model_on_a_tie_may_choose_otherwise():
    # Ties broken the other way round, as OpenVINO may do: not wrong, and the remaining images are still compared.
    model, dense = without_places()
    reduce_tokens_(model, TokenSpec(keep_rate=0.6, locations=(1,)))
    inputs = images(model, 3)
    inputs[1] = 0.5
    golden, plan = make_golden(model, dense, inputs), token_plan(model)
    outputs = {LOGITS: golden.logits.copy(), kept_name(1): golden.kept[1][:, :-1].copy()}
    outputs[kept_name(1)][1] = np.arange(plan.patches - plan.locations[0].keep, plan.patches)  # type: ignore[operator]
    found = agreement(golden, np.arange(3), outputs, plan)
    assert shares(found) == (2 / 3, 1 / 3, 0)
    assert found.error <= found.limit
    assert found.tie_error <= found.tie_limit


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_margins_are_distances_from_the_boundary_by_patch(precision):
    model, inputs = reduced("distilled"), images(of_kind("distilled"), 3)
    golden, plan = make_golden(model, of_kind("distilled"), inputs, precision), token_plan(model)
    with capture(model) as seen:
        model(torch.from_numpy(inputs))
    numbers = [np.tile(np.arange(plan.patches), (3, 1)), *original_patches([k.numpy() for k in seen.kept], plan)]
    for row, scores, candidates in zip(plan.locations, seen.scores, numbers, strict=False):
        margin, keep = golden.margin[row.block], row.keep
        assert keep is not None
        for image in range(3):
            logs = np.log(scores[image].double().numpy())
            distance = np.abs(logs - np.sort(logs)[::-1][keep - 1 : keep + 1].mean())
            closest = {n: distance[candidates[image] == n].min() for n in candidates[image]}  # fused tokens are all -1
            assert np.isfinite(margin[image]).sum() == len(closest)
            ratio = np.array([d / margin[image][n] for n, d in closest.items()])  # what counts as rounding, everywhere
            assert ratio == pytest.approx(ratio[0], rel=0.02 if precision == "fp32" else 1e-3)
            assert {"fp32": 1e-7, "fp16": 1e-4, "bf16": 1e-3}[precision] < ratio[0] < 0.5


def test_each_precision_is_expected_to_be_as_far_off_as_it_is():
    model, dense, inputs = reduced("plain"), of_kind("plain"), images(of_kind("plain"), 4)
    made = {name: make_golden(model, dense, inputs, name) for name in ("fp32", "fp16", "bf16")}
    pair = lowered("plain", "int8"), lowered("plain", "int8", spec=None)
    made["int8"] = make_golden(model, dense, inputs, "int8", pair)
    for name, golden in made.items():
        assert golden.precision == name
        for field in ("logits", "reference", "swapped", "dense", "dense_reference"):
            np.testing.assert_array_equal(getattr(golden, field), getattr(made["fp32"], field))
        assert golden.expected.dtype == golden.dense_expected.dtype == np.float32
    limits = [golden.limit() for golden in made.values()]
    dense_limits = [golden.dense_limit() for golden in made.values()]
    assert limits == sorted(limits)
    assert dense_limits == sorted(dense_limits)
    np.testing.assert_array_equal(made["fp32"].expected, made["fp32"].logits)
    assert np.abs(made["fp32"].swapped - made["fp32"].reference).max(axis=1).min() > 1e-3
    assert model.training is False
    assert next(model.parameters()).dtype == torch.float32
