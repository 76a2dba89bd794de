"""Agreement of a runtime's answers with the golden answers."""

from collections.abc import Collection, Mapping

import msgspec
import numpy as np

from evit_deploy.export.answer import answer_in
from evit_deploy.tokens.plan import TokenPlan
from evit_deploy.verification.answers.answers import members, named_patches, overlap
from evit_deploy.verification.golden import Golden
from evit_deploy.verification.tolerances import distance


class Agreement(msgspec.Struct, frozen=True):
    """Comparison of one runtime's answers with the golden answers.

    Args:
        error: Largest error of any output value against FP64, over the images with equal kept sets; NaN if there are
            none.
        limit: Largest value allowed for ``error``.
        tie_error: Largest error of the tied image that comes closest to its limit, or of any image if the runtime does
            not return kept patches; NaN if there are none.
        tie_limit: Limit of that image.
        same: Share of images with equal kept sets at every location; NaN if the runtime does not return kept patches.
        ties: Share of images where the first difference is within rounding; NaN if the runtime does not return kept
            patches.
        wrong: Share of images where the first difference exceeds rounding.
        overlap: Kept patches in common over kept patches of either (Jaccard), mean over images and locations.
        top1: Share of images with the golden top-1 class, over all images.
    """

    error: float
    limit: float
    tie_error: float
    tie_limit: float
    same: float
    ties: float
    wrong: float
    overlap: float
    top1: float


def agreement(golden: Golden, which: np.ndarray, outputs: Mapping[str, np.ndarray], plan: TokenPlan) -> Agreement:
    """Compares a runner's outputs with the golden answers.

    Args:
        golden: The golden answers.
        which: For each row of the outputs, the index of its golden image.
        outputs: The answer and, if the runner returns them, ``kept_<block>`` for every location of the plan.
        plan: The model's token plan.
    """
    kept, answer = named_patches(outputs, plan), outputs[answer_in(outputs)]
    known = bool(kept) or not plan.locations
    same, tie = same_choice(golden, which, kept, {b: golden.kept[b][which] for b in kept}, plan.merging)
    overlaps = [overlap(numbers, golden.kept[block][which], block in plan.merging) for block, numbers in kept.items()]
    if not known:  # the runtime may have kept different patches within rounding
        same, tie = ~same, same
    tie_error, tie_limit = _closest_to_limit(golden, which[tie], answer[tie])
    return Agreement(
        error=answer_error(golden, which[same], answer[same]),
        limit=golden.limit(),
        tie_error=tie_error,
        tie_limit=tie_limit,
        same=float(same.mean()) if known else float("nan"),
        ties=float(tie.mean()) if known else float("nan"),
        wrong=float((~same & ~tie).mean()),
        overlap=float(np.mean(overlaps)) if overlaps else float("nan" if not known else 1.0),
        top1=float((answer.argmax(axis=1) == golden.logits[which].argmax(axis=1)).mean()),
    )


def _closest_to_limit(golden: Golden, which: np.ndarray, answers: np.ndarray) -> tuple[float, float]:
    """Error and limit of the image with the largest ratio of error to limit."""
    if not len(which):
        return float("nan"), 0.0
    with np.errstate(invalid="ignore"):
        errors = np.abs(answers - golden.reference[which]).max(axis=1)
    limits = golden.tie_limits()[which]
    worst = int(np.argmax(errors / limits))
    return float(errors[worst]), float(limits[worst])


def same_choice(
    golden: Golden,
    which: np.ndarray,
    kept: Mapping[int, np.ndarray],
    others: Mapping[int, np.ndarray],
    merging: Collection[int] = (),
) -> tuple[np.ndarray, np.ndarray]:
    """Compares two choices of patches, per image and location.

    Args:
        golden: The golden answers, which contain the margins.
        which: Index of the golden image of each row.
        kept: First choice, by block, as returned by :func:`~evit_deploy.tokens.choices.original_patches`.
        others: Second choice, in the same form.
        merging: Blocks that merge tokens; see :attr:`~evit_deploy.tokens.plan.TokenPlan.merging`.

    Returns:
        Two boolean arrays: rows with the same patches at every location, and rows where the first difference is within
        rounding.
    """
    same, tie = np.ones(len(which), bool), np.zeros(len(which), bool)
    for block, numbers in kept.items():
        patches = golden.margin[block].shape[1] - 1
        if block in merging:
            exchanged, margin = numbers != others[block], golden.margin[block][which, :-1]
        else:
            exchanged = members(numbers, patches) != members(others[block], patches)
            margin = golden.margin[block][which]
        clear = (exchanged & (margin >= 1)).any(axis=1)
        tie |= same & exchanged.any(axis=1) & ~clear
        same &= ~exchanged.any(axis=1)
    return same, tie


def answer_error(golden: Golden, which: np.ndarray, answers: np.ndarray) -> float:
    """Largest error of answers against FP64; NaN if there are no answers.

    Args:
        golden: The golden answers.
        which: Index of the golden image of each row of ``answers``.
        answers: Answers to compare.
    """
    return distance(answers, golden.reference[which]) if len(which) else float("nan")
