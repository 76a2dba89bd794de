"""Limits that a bundle's own files set: golden answers with every tolerance found anew, none of it read.

What a golden file says about rounding is as trustworthy as whoever wrote it. The model's tensors and their types say
the same: see :mod:`evit_deploy.export.disturbed`. The answers themselves, and the patches that were kept, stay those of
the golden file; the model in FP32 arithmetic has to give them within these limits.
"""

from pathlib import Path

import msgspec
import numpy as np

from evit_deploy.export.answer import answer_in
from evit_deploy.export.card import feeds, kept_name
from evit_deploy.export.disturbed import OwnArithmetic
from evit_deploy.export.variants import scores_in
from evit_deploy.registry import METHODS
from evit_deploy.tokens.choices import patch_margins
from evit_deploy.tokens.plan import TokenPlan
from evit_deploy.tokens.reducer import TokenReducer
from evit_deploy.verification.golden import Golden

DRAWS = 3
"""Draws of the weights; the farthest counts."""


class Own(msgspec.Struct, frozen=True):
    """What a bundle's files say of themselves.

    Args:
        golden: The golden answers with the files' own tolerances.
        outputs: What the model says to the golden inputs in FP32 arithmetic, choices included.
        dense: What its dense twin says.
    """

    golden: Golden
    outputs: dict[str, np.ndarray]
    dense: np.ndarray


def own_limits(golden: Golden, model: Path, dense: Path, plan: TokenPlan, method: str) -> Own:
    """Finds what rounding costs the files of a bundle.

    Args:
        golden: What the bundle's golden file says; of its tolerances nothing is used.
        model: The model.
        dense: Its dense twin.
        plan: The model's plan.
        method: Its method.

    Raises:
        InputError: A file cannot be computed.
        StageError: ONNX Runtime failed.
    """
    inputs, low = feeds(golden.inputs), golden.precision != "fp32"
    exact_dense, *drawn_dense = _drawn(dense, inputs, low, chosen=False)
    dense_answer = answer_in(exact_dense)
    outputs = OwnArithmetic(model, rounded=False, chosen=False).answers(inputs)
    answer, blocks = answer_in(outputs), [row.block for row in plan.locations]
    choices = [outputs[kept_name(block)] for block in blocks]
    given = inputs | _choices(blocks, choices)
    exact, *drawn = _drawn(model, given, low, chosen=bool(blocks))
    own = OwnArithmetic(model, rounded=True, chosen=False).answers(inputs)[answer] if low else outputs[answer]
    rule: type[TokenReducer] = METHODS.get(method)
    margins = [np.array(np.inf)] * len(blocks)
    for one in drawn:
        scores = zip(blocks, plan.locations, choices, strict=True)
        for index, (block, row, choice) in enumerate(scores):
            found = rule.margin(scores_in(one, block), scores_in(exact, block), choice, row)
            margins[index] = np.minimum(margins[index], found)
    nearest = [
        rule.nearest_choice(c, scores_in(exact, b), row)
        for c, b, row in zip(choices, blocks, plan.locations, strict=True)
    ]
    swapped = exact
    if any((margin < 1).any() for margin in margins):
        exchanged = OwnArithmetic(model, rounded=False, chosen=True)
        swapped = exchanged.answers(inputs | _choices(blocks, nearest))
    none = np.zeros(len(golden.inputs))
    recomputed = msgspec.structs.replace(
        golden,
        # The limits are distances from the reference, so what the files' own say is moved there.
        expected=golden.reference + _farthest([one[answer] - exact[answer] for one in drawn]),
        expected_free=golden.reference + (own - exact[answer]),
        swapped=golden.reference + (swapped[answer] - exact[answer]),
        terms=none,
        dense_expected=golden.dense_reference
        + _farthest([one[dense_answer] - exact_dense[dense_answer] for one in drawn_dense]),
        dense_terms=none,
        margin=dict(zip(blocks, patch_margins(margins, choices, plan), strict=True)),
    )
    return Own(recomputed, outputs, exact_dense[dense_answer])


def _drawn(path: Path, given: dict[str, np.ndarray], low: bool, *, chosen: bool) -> list[dict[str, np.ndarray]]:
    """What a file says exactly, and with weights drawn anew, rounding where it rounds."""
    file = OwnArithmetic(path, rounded=False, chosen=chosen)
    found = [file.answers(given)]
    if low:
        del file
        file = OwnArithmetic(path, rounded=True, chosen=chosen)
    return found + [file.answers(given, draw) for draw in range(DRAWS)]


def _choices(blocks: list[int], choices: list[np.ndarray]) -> dict[str, np.ndarray]:
    return {f"choice_{block}": choice for block, choice in zip(blocks, choices, strict=True)}


def _farthest(moves: list[np.ndarray]) -> np.ndarray:
    """Of several distances ``[n, classes]`` the one whose largest number is largest; NaN is larger than any."""
    return max(moves, key=lambda move: float(np.nan_to_num(np.abs(move), nan=np.inf).max(initial=0.0)))
