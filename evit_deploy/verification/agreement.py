"""How far answers agree: a runtime's with the golden ones, and two runtimes' with one another."""

from collections.abc import Collection, Mapping
from typing import Any

import msgspec
import numpy as np

from evit_deploy.bundle.manifest import Manifest
from evit_deploy.export.answer import answer_in
from evit_deploy.export.card import kept_name
from evit_deploy.report.report import AgreementRow
from evit_deploy.tokens.choices import original_patches
from evit_deploy.tokens.plan import TokenPlan
from evit_deploy.verification.golden import Golden
from evit_deploy.verification.pictures import embeds
from evit_deploy.verification.retrieval import cosines
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


class Answers(msgspec.Struct, frozen=True):
    """What one runtime said to some images.

    Args:
        logits: ``[n, classes]``, or embeddings ``[n, width]``.
        kept: By block, original patch numbers ``[n, K(+1)]``; empty where the runtime gives none out.
    """

    logits: np.ndarray
    kept: Mapping[int, np.ndarray]


def named_patches(outputs: Mapping[str, np.ndarray], plan: TokenPlan) -> dict[int, np.ndarray]:
    """A runner's kept outputs in original patch numbers, by block; empty if it gives none out."""
    blocks = [row.block for row in plan.locations]
    if any(kept_name(block) not in outputs for block in blocks):
        return {}
    kept: list[Any] = [outputs[kept_name(block)] for block in blocks]
    return dict(zip(blocks, original_patches(kept, plan), strict=True))


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
            exchanged = _members(numbers, patches) != _members(others[block], patches)
            margin = golden.margin[block][which]
        clear = (exchanged & (margin >= 1)).any(axis=1)
        tie |= same & exchanged.any(axis=1) & ~clear
        same &= ~exchanged.any(axis=1)
    return same, tie


def _members(numbers: np.ndarray, patches: int) -> np.ndarray:
    """How often each number is among ``[rows, K]``, as ``[rows, patches + 1]``.

    Fused tokens come last: there may be several, the one just made and those of earlier locations that were kept.
    """
    members = np.zeros((len(numbers), patches + 1), int)
    np.add.at(members, (np.arange(len(numbers))[:, None], numbers.astype(np.int64) % (patches + 1)), 1)
    return members


def overlap(kept: np.ndarray, others: np.ndarray, merging: bool = False) -> float:
    """Mean over images of patches in common over patches of either (Jaccard); the fused token is none.

    Where tokens are merged: the share of patches that joined the same token.
    """
    if merging:
        return float((kept == others).mean())
    patches = int(max(kept.max(), others.max())) + 1
    one, other = (_members(numbers, patches)[:, :-1] for numbers in (kept, others))
    either = np.maximum(one, other).sum(axis=1)
    return float((np.minimum(one, other).sum(axis=1) / np.maximum(either, 1)).mean())


def answer_error(golden: Golden, which: np.ndarray, answers: np.ndarray) -> float:
    """Largest error of some answers against FP64; NaN with none to judge.

    Args:
        golden: The answers.
        which: Golden image of every row of ``answers``.
        answers: What to judge.
    """
    return distance(answers, golden.reference[which]) if len(which) else float("nan")


def agreement_row(first: str, one: Answers, second: str, other: Answers, manifest: Manifest) -> AgreementRow:
    """Compares what two runtimes said to the same images.

    Args:
        first: Name of the one.
        one: What it said.
        second: Name of the other.
        other: What that said.
        manifest: Of the bundle that both run.
    """
    merging, embedding = manifest.plan.merging, embeds(manifest)
    kept = {str(b): overlap(one.kept[b], other.kept[b], b in merging) for b in one.kept if b in other.kept}
    same = one.logits.argmax(axis=1) == other.logits.argmax(axis=1)
    return AgreementRow(
        first=first,
        second=second,
        images=len(one.logits),
        top1=None if embedding else float(same.mean()),
        kept=kept,
        logits=float(np.abs(one.logits - other.logits).max()),
        cosine=float(cosines(one.logits, other.logits).min()) if embedding else None,
    )
