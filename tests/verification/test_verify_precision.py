"""Damage is caught in every precision, and nothing else is; runtimes that say less, and places in a batch."""

import contextlib
import functools
import importlib
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from onnx import ModelProto

from evit_deploy.errors import InputError
from evit_deploy.export.card import EMBEDDING, INPUT, LOGITS, kept_name
from evit_deploy.report.report import Report
from evit_deploy.tokens.reduce import token_plan
from evit_deploy.verification.answers.answers import Answers, agreement_row, infer_all
from evit_deploy.verification.golden import Golden, make_golden
from evit_deploy.verification.verify import verify_dense, verify_precision, verify_runtime
from tests.support.damage import (
    depend_on_the_neighbors,
    depend_on_the_place,
    keep_the_lowest,
    keep_the_second_best,
    lose_the_fused_row,
    negate_a_weight,
    poison_a_weight,
    reverse_the_order,
)
from tests.support.exports import answers, copied, exported, lowered, reduced, widened
from tests.support.models import images, of_kind

BATCHES = (1, 2, 8)
PLAN = token_plan(reduced("plain"))


def model_of(precision: str) -> ModelProto:
    proto = exported("plain") if precision == "fp32" else lowered("plain", precision)
    return copied(widened(proto) if precision == "bf16" else proto)


@functools.cache
def golden_of(precision: str) -> Golden:
    """Shared; replace its fields to change it."""
    pair: Any = None
    if precision in ("int8", "fp8"):
        pair = lowered("plain", precision), lowered("plain", precision, spec=None)
    return make_golden(reduced("plain"), of_kind("plain"), images(of_kind("plain"), 8), precision, pair)


def failures(precision: str, damage: Callable[[ModelProto], None]) -> set[str]:
    """What fails at any batch size, without the batch size."""
    proto = model_of(precision)
    damage(proto)
    report, _ = verify_runtime("onnxruntime", proto, golden_of(precision), PLAN, BATCHES, 1)
    assert all(check.reason for check in report.failed)
    return {check.name.split(": ")[1] for check in report.failed}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8", "fp8"])
def test_a_sound_model_passes_in_any_precision(precision):
    assert failures(precision, lambda proto: None) == set()
    assert failures(precision, reverse_the_order) == set()
    assert verify_precision(golden_of(precision)).passed


DAMAGE: dict[str, tuple[Callable[[ModelProto], None], set[str]]] = {
    "a weight": (negate_a_weight, {"logits"}),
    "the fused row": (lose_the_fused_row, {"kept patches"}),
    "the lowest": (keep_the_lowest, {"kept patches", "logits"}),
    "the second best": (keep_the_second_best, {"kept patches", "logits"}),
    "the place": (functools.partial(depend_on_the_place, shift=0.2), {"same answer at every place", "logits"}),
    "the neighbors": (depend_on_the_neighbors, {"logits"}),
    "not a number": (functools.partial(poison_a_weight, value=np.nan), {"logits"}),
}
FLOATS = ("fp32", "fp16", "bf16")


@pytest.mark.parametrize(
    ("precision", "kind"),
    [(precision, kind) for precision in FLOATS for kind in DAMAGE]
    # an integer is always finite; and the images' mean logits differ by less than int8 costs
    + [("int8", kind) for kind in DAMAGE if kind not in ("not a number", "the neighbors")]
    + [("fp8", kind) for kind in ("the lowest", "the second best", "the place")],  # it is too coarse for the others
)
def test_damage_is_caught(precision, kind):
    damage, found = DAMAGE[kind]
    assert found <= {name.removesuffix(" on ties") for name in failures(precision, damage)}


# Runtimes that say less.


class Scripted:
    """A runner that a function answers for."""

    profiles = ()

    def __init__(self, answer: Callable[[np.ndarray], dict[str, np.ndarray]]) -> None:
        self.answer = answer

    def infer(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self.answer(feeds[INPUT])


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Report, Answers]]:
    """Verifies a function in place of a runtime."""

    def run(golden: Golden, answer: Callable[[np.ndarray], dict[str, np.ndarray]]) -> tuple[Report, Answers]:
        module = importlib.import_module(
            "evit_deploy.verification.verify"
        )  # the package's own attribute is the function
        monkeypatch.setattr(module, "opened", lambda *_, **__: contextlib.nullcontext(Scripted(answer)))
        return verify_runtime("x", None, golden, PLAN, (2,), 1)

    return run


def truth(inputs: np.ndarray) -> dict[str, np.ndarray]:
    return answers(exported("plain"), inputs, indices=True)


def test_a_runtime_that_tells_no_kept_patches_is_held_to_its_logits(verified):
    golden = golden_of("fp32")
    report, found = verified(golden, lambda inputs: {LOGITS: truth(inputs)[LOGITS]})
    assert report.passed
    assert [check.name for check in report.checks] == ["x, batch 2: logits", "x, batch 2: same answer at every place"]
    (note,) = report.notes
    assert "does not say which patches" in note
    assert "--with-indices" in note
    assert found.kept == {}
    # no tie is possible on these images, so that there is nothing to excuse a larger error
    report, _ = verified(golden, lambda inputs: {LOGITS: truth(inputs)[LOGITS] + np.float32(1e-4)})
    assert [check.name for check in report.failed] == ["x, batch 2: logits"]


def near(golden: Golden) -> tuple[Golden, np.ndarray]:
    """The same with two patches of each image within rounding at the last location, one kept and one not; and them."""
    row = PLAN.locations[-1]
    margin, kept = golden.margin[row.block].copy(), golden.kept[row.block]
    pairs = []
    for image in range(len(margin)):
        margin[image, -1] = np.inf  # not the fused one
        ranked = [int(patch) for patch in np.argsort(margin[image]) if np.isfinite(margin[image, patch])]
        inside = [patch for patch in ranked if patch in kept[image]]
        pair = [inside[0], next(patch for patch in ranked if patch not in kept[image])]
        margin[image, pair] = 0.5
        pairs.append(pair)
    return msgspec.structs.replace(golden, margin=golden.margin | {row.block: margin}), np.array(pairs)


@pytest.mark.parametrize(
    ("tie", "share", "failed"),
    [
        (True, 0.5, []),
        (True, 1.5, ["same answer at every place", "logits on ties"]),
        (False, 0.5, ["same answer at every place", "kept patches"]),
    ],
)
def test_a_tie_may_fall_otherwise_at_another_place(verified, tie, share, failed):
    """The second image of a batch keeps another patch, and its logits move by a share of what that may do to them."""
    golden = golden_of("fp32")
    tied, pairs = near(golden)
    shift = np.abs(golden.swapped - golden.reference).max(axis=1)
    blocks = [row.block for row in PLAN.locations]

    def answer(inputs: np.ndarray) -> dict[str, np.ndarray]:
        outputs = truth(inputs)
        image = next(i for i in range(len(golden.inputs)) if np.array_equal(golden.inputs[i], inputs[1]))
        candidates = golden.kept[blocks[-2]][image].tolist()
        inside, outside = (candidates.index(patch) for patch in pairs[image])
        kept = outputs[kept_name(blocks[-1])]
        kept[1] = np.where(kept[1] == inside, outside, kept[1])
        outputs[LOGITS][1] += np.float32(share * shift[image])
        return outputs

    report, _ = verified(tied if tie else golden, answer)
    assert sorted(check.name.split(": ")[1] for check in report.failed) == sorted(failed)
    found = {check.name.split(": ")[1]: check for check in report.checks}
    assert found["kept patches"].value == ("100%" if tie else "50%")
    assert ("differ within rounding" if tie else "keep other patches than PyTorch") in found["kept patches"].reason
    moved = found["same answer at every place"].reason
    assert moved.startswith({0.5: "", 1.5: "logits: moved by"}[share] if tie else "at 2 places other patches are kept")
    assert moved or tie


@pytest.mark.parametrize("image", [0, 1])
def test_two_images_are_tried_at_every_place(verified, image):
    golden = golden_of("fp32")

    def answer(inputs: np.ndarray) -> dict[str, np.ndarray]:
        outputs = truth(inputs)
        if all(np.array_equal(given, golden.inputs[image]) for given in inputs):
            outputs[LOGITS][1] += 1
        return outputs

    report, _ = verified(golden, answer)
    (check,) = report.failed
    assert check.name == "x, batch 2: same answer at every place"
    assert check.reason == "logits: moved by 1.00e+00 with its place"


@pytest.mark.parametrize("told", [True, False])
def test_at_another_place_the_room_of_a_tie_is_for_those_that_may_have_made_one(verified, told):
    """The answer moves by half of what another choice does to it, where the choice is known to be the same, or not."""
    golden = golden_of("fp32")
    shift = np.abs(golden.swapped - golden.reference).max(axis=1)

    def answer(inputs: np.ndarray) -> dict[str, np.ndarray]:
        outputs = truth(inputs)
        for image in range(2):
            if all(np.array_equal(given, golden.inputs[image]) for given in inputs):
                outputs[LOGITS][1] += np.float32(shift[image] / 2)
        return outputs if told else {LOGITS: outputs[LOGITS]}

    report, _ = verified(near(golden)[0], answer)
    assert [check.name for check in report.failed] == ["x, batch 2: same answer at every place"] * told


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_the_dense_twin_is_held_to_the_dense_model(precision):
    golden = golden_of(precision)
    twin = exported("plain", None) if precision == "fp32" else lowered("plain", precision, spec=None)
    assert verify_dense("onnxruntime", twin, golden, 1).passed
    broken = copied(twin)
    negate_a_weight(broken)
    assert not verify_dense("onnxruntime", broken, golden, 1).passed


def test_the_last_batch_is_filled_up_and_cut_off():
    class Doubling:
        sizes: list[int] = []  # noqa: RUF012

        def infer(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            self.sizes.append(len(feeds[INPUT]))
            return {LOGITS: feeds[INPUT][:, 0, 0] * 2}

    given = np.arange(7, dtype=np.float32).reshape(7, 1, 1, 1)
    found = infer_all(Doubling(), given, 3)  # type: ignore[arg-type]
    np.testing.assert_array_equal(found[LOGITS][:, 0], 2 * np.arange(7))
    assert Doubling.sizes == [3, 3, 3]


def test_runtimes_agree_by_top_1_by_patches_and_by_logits(converted):
    one = Answers(np.array([[1.0, 0.0], [0.0, 1.0]]), {1: np.array([[0, 1, -1]] * 2), 2: np.array([[0, -1]] * 2)})
    other = Answers(np.array([[1.0, 0.5], [1.0, 0.0]]), {1: np.array([[1, 0, -1], [1, 2, -1]])})
    row = agreement_row("a", one, "b", other, converted.manifest)
    assert (row.first, row.second, row.images, row.top1, row.logits) == ("a", "b", 2, 0.5, 1.0)
    assert row.kept == {"1": (1 + 1 / 3) / 2}  # the other does not tell the second location
    assert row.cosine is None
    assert agreement_row("a", one, "a again", one, converted.manifest).top1 == 1
    assert agreement_row("a", one, "c", Answers(other.logits, {}), converted.manifest).kept == {}


def test_runtimes_agree_on_an_embedding_by_its_direction(converted):
    embedding = msgspec.structs.replace(converted.manifest.outputs[0], name=EMBEDDING)
    manifest = msgspec.structs.replace(converted.manifest, outputs=(embedding,))
    one, other = (Answers(np.array(rows), {}) for rows in ([[1.0, 0.0], [3.0, 4.0]], [[2.0, 0.0], [4.0, 3.0]]))
    row = agreement_row("a", one, "b", other, manifest)
    assert (row.top1, row.logits, row.cosine) == (None, 1.0, pytest.approx(24 / 25))


def test_a_runtime_that_does_not_run_a_file_is_refused():
    with pytest.raises(InputError, match="cannot run this: its CPU provider has no bf16"):
        verify_runtime("onnxruntime", lowered("plain", "bf16"), golden_of("fp32"), PLAN)
    assert verify_precision(golden_of("fp32")) == Report()
