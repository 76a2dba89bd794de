"""How far a runtime's answers agree with the golden ones."""

from collections.abc import Collection, Mapping

import msgspec
import numpy as np

from evit_deploy.export.answer import answer_in
from evit_deploy.tokens.plan import TokenPlan
from evit_deploy.verification.answers.answers import members, named_patches, overlap
from evit_deploy.verification.golden import Golden
from evit_deploy.verification.tolerances import distance


class Agreement(msgspec.Struct, frozen=True):
    """How one runtime's answers compare with the golden ones.

    Args:
        error: Largest error of any number of the answers against FP64, over the images with equal kept sets; NaN if
            there is none.
        limit: What it may be.
        tie_error: The same of the image on a tie (of any, where the runtime gives no kept patches out) that comes
            closest to its own limit.
        tie_limit: What it may be.
        same: Share of images whose kept sets are equal at every location; NaN where the runtime gives none out.
        ties: Share whose first difference lies within rounding; NaN likewise.
        wrong: Share whose first difference does not.
        overlap: Kept patches in common over kept patches of either (Jaccard), mean over images and locations.
        top1: Share of images with the golden top-1, over all images.
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
        golden: The answers.
        which: For every row of the outputs, the number of the golden image it belongs to.
        outputs: The answer and, where the runner gives them out, ``kept_<block>`` for every location of the plan.
        plan: The model's plan.
    """
    kept, answer = named_patches(outputs, plan), outputs[answer_in(outputs)]
    told = bool(kept) or not plan.locations
    same, tie = same_choice(golden, which, kept, {b: golden.kept[b][which] for b in kept}, plan.merging)
    overlaps = [overlap(numbers, golden.kept[block][which], block in plan.merging) for block, numbers in kept.items()]
    if not told:  # it may have kept others within rounding
        same, tie = ~same, same
    tie_error, tie_limit = _closest_to_limit(golden, which[tie], answer[tie])
    return Agreement(
        error=answer_error(golden, which[same], answer[same]),
        limit=golden.limit(),
        tie_error=tie_error,
        tie_limit=tie_limit,
        same=float(same.mean()) if told else float("nan"),
        ties=float(tie.mean()) if told else float("nan"),
        wrong=float((~same & ~tie).mean()),
        overlap=float(np.mean(overlaps)) if overlaps else float("nan" if not told else 1.0),
        top1=float((answer.argmax(axis=1) == golden.logits[which].argmax(axis=1)).mean()),
    )


def _closest_to_limit(golden: Golden, which: np.ndarray, answers: np.ndarray) -> tuple[float, float]:
    """Error and limit of the image that comes closest to its own limit, or exceeds it most."""
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
    """Compares two choices of patches image by image, location by location.

    Args:
        golden: Has the margins.
        which: Golden image of every row.
        kept: By block, what :func:`~evit_deploy.tokens.choices.original_patches` gives.
        others: The same of the other.
        merging: Blocks that merge, see :attr:`~evit_deploy.tokens.plan.TokenPlan.merging`.

    Returns:
        Which rows have the same patches everywhere, and of the rest, whose first difference lies within rounding.
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
    """Largest error of some answers against FP64; NaN with none to judge.

    Args:
        golden: The answers.
        which: Golden image of every row of ``answers``.
        answers: What to judge.
    """
    return distance(answers, golden.reference[which]) if len(which) else float("nan")
