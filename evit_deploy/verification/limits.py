"""Tolerances recomputed from a bundle's ONNX files instead of read from its golden file.

The tolerances in a golden file are only as trustworthy as its author. The tensors of the model and their data types
determine the same tolerances; see :mod:`evit_deploy.export.disturbed`. The answers and kept patches of the golden file
are retained, and the model in FP32 arithmetic must reproduce them within these limits.
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
"""Number of random perturbations of the weights; the largest deviation counts."""


class Own(msgspec.Struct, frozen=True):
    """Answers and tolerances computed from a bundle's ONNX files.

    Args:
        golden: The golden answers with the recomputed tolerances.
        outputs: Outputs of the model for the golden inputs in FP32 arithmetic, including the choices.
        dense: Answers of its dense twin.
    """

    golden: Golden
    outputs: dict[str, np.ndarray]
    dense: np.ndarray


def own_limits(golden: Golden, model: Path, dense: Path, plan: TokenPlan, method: str) -> Own:
    """Computes how much rounding changes the outputs of a bundle's ONNX files.

    Args:
        golden: Contents of the bundle's golden file; its tolerances are ignored.
        model: Path of the model.
        dense: Path of its dense twin.
        plan: The model's token plan.
        method: Name of its method.

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
        # Limits are distances from the reference, so the deviations of the files are added to it.
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
    """Outputs of a file in exact arithmetic, then with rounding and randomly perturbed weights."""
    file = OwnArithmetic(path, rounded=False, chosen=chosen)
    found = [file.answers(given)]
    if low:
        del file
        file = OwnArithmetic(path, rounded=True, chosen=chosen)
    return found + [file.answers(given, draw) for draw in range(DRAWS)]


def _choices(blocks: list[int], choices: list[np.ndarray]) -> dict[str, np.ndarray]:
    return {f"choice_{block}": choice for block, choice in zip(blocks, choices, strict=True)}


def _farthest(moves: list[np.ndarray]) -> np.ndarray:
    """The array ``[n, classes]`` with the largest absolute value; NaN counts as infinite."""
    return max(moves, key=lambda move: float(np.nan_to_num(np.abs(move), nan=np.inf).max(initial=0.0)))
