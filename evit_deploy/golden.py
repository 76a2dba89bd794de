"""Golden answers: what PyTorch says to a few real pictures, and how far two right answers may lie apart.

The reference is the same model in FP64. PyTorch's own FP32 error against it sets the tolerance for everybody else, so
no number is picked by hand. Kept sets are compared in original patch numbers. Where the last kept and the first
dropped score lie closer than rounding, either choice is right: an image whose choice differs there counts as a tie, and
its logits, which answer another question, are not compared.
"""

import copy
import functools
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from evit_deploy.errors import InputError
from evit_deploy.export import INPUT, LOGITS, kept_name
from evit_deploy.tokens.op import reorganize
from evit_deploy.tokens.plan import TokenPlan, original_patches
from evit_deploy.tokens.reduce import TokenReducer, capture, token_plan

FLOOR = 4  # times eps · max|reference|: no tolerance is tighter than this


class Golden(msgspec.Struct):
    """Golden inputs and answers; ``golden.npz`` holds the fields by name, per-location ones as ``<field>_<block>``.

    Args:
        inputs: float32 ``[n, C, H, W]``.
        logits: PyTorch FP32 ``[n, classes]``.
        reference: PyTorch FP64 ``[n, classes]``, keeping the tokens that the FP32 model kept.
        dense: PyTorch FP32 logits of the dense model.
        dense_reference: The same in FP64.
        kept: Per location, original patch numbers ``[n, K(+1)]``, fused = −1, of the FP32 model.
        margin: Per location ``[n]``: gap between the last kept and the first dropped score, over the score rounding
            that FP32 PyTorch showed there. Below 1 the choice is a tie.
    """

    inputs: np.ndarray
    logits: np.ndarray
    reference: np.ndarray
    dense: np.ndarray
    dense_reference: np.ndarray
    kept: dict[int, np.ndarray]
    margin: dict[int, np.ndarray]

    def save(self, path: Path) -> None:
        """Writes ``golden.npz``."""
        np.savez(path, **self._arrays())  # type: ignore[arg-type]

    def _arrays(self) -> dict[str, np.ndarray]:
        plain = {name: getattr(self, name) for name in _PLAIN}
        kept = {f"kept_{block}": value for block, value in self.kept.items()}
        return plain | kept | {f"margin_{block}": value for block, value in self.margin.items()}


_PLAIN = ("inputs", "logits", "reference", "dense", "dense_reference")


def load_golden(path: Path, plan: TokenPlan) -> Golden:
    """Reads ``golden.npz``; pickled arrays are refused.

    Args:
        path: The file.
        plan: The plan of the model it belongs to.

    Raises:
        InputError: The file is not a golden file, or not this model's.
    """
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as archive:
            arrays = dict(archive)
        located: dict[str, dict[int, np.ndarray]] = {"kept": {}, "margin": {}}
        for name in arrays.keys() - set(_PLAIN):
            field, block = name.split("_")
            located[field][int(block)] = arrays[name]
        ordered = {field: dict(sorted(value.items())) for field, value in located.items()}
        blocks = [row.block for row in plan.locations]
        if any(list(value) != blocks for value in ordered.values()):
            raise KeyError(f"its locations are not those of the plan, {blocks}")
        plain: list[Any] = [arrays[name] for name in _PLAIN]
        return Golden(*plain, **ordered)
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise InputError(f"not a golden file ({error})", where=path, fix="Convert again.") from None
    except Exception as error:  # zipfile and zlib raise their own
        raise InputError(f"the golden file is damaged ({type(error).__name__})", where=path) from None


def make_golden(model: torch.nn.Module, dense: torch.nn.Module, inputs: np.ndarray) -> Golden:
    """Runs PyTorch in FP32 and FP64.

    Args:
        model: The reduced model, FP32, on the CPU.
        dense: The same weights without reduction.
        inputs: float32 ``[n, C, H, W]``.
    """
    plan = token_plan(model)
    logits, kept, scores = _answers(model, inputs)
    # The FP64 model keeps what the FP32 model kept: otherwise it answers another question wherever scores nearly tie.
    exact = copy.deepcopy(model).double()
    for reducer, choice in zip(_reducers(exact), kept, strict=True):
        reducer.forward = functools.partial(_replay, reducer, torch.from_numpy(choice))
    reference, _, exact_scores = _answers(exact, inputs)
    dense_logits, _, _ = _answers(dense, inputs)
    dense_reference, _, _ = _answers(copy.deepcopy(dense).double(), inputs)
    margin = {}
    for row, own, true in zip(plan.locations, scores, exact_scores, strict=True):
        assert row.keep is not None
        ranked = -np.sort(-true, axis=1)
        gap = ranked[:, row.keep - 1] - ranked[:, row.keep]
        margin[row.block] = gap / (2 * np.abs(own - true).max() + FLOOR * np.finfo(np.float32).eps * true.max())
    numbers = dict(zip((row.block for row in plan.locations), original_patches(kept, plan), strict=True))
    return Golden(inputs, logits, reference, dense_logits, dense_reference, numbers, margin)


def _reducers(model: torch.nn.Module) -> list[TokenReducer]:
    return [module for module in model.modules() if isinstance(module, TokenReducer)]


def _replay(reducer: TokenReducer, kept: Tensor, x: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """A reducer's forward pass with the choice already made."""
    y = reorganize(x, reducer.scores(x, q, k), kept.long(), reducer.plan.fused, reducer.prefix)
    return y, kept


def _answers(model: torch.nn.Module, inputs: np.ndarray) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
    dtype = next(model.parameters()).dtype
    was_training = model.training
    model.eval()
    with capture(model) as seen:
        logits = model(torch.from_numpy(inputs).to(dtype)).numpy()
    model.train(was_training)
    return logits, [k.numpy() for k in seen.kept], [s.numpy() for s in seen.scores]


def named_patches(outputs: Mapping[str, np.ndarray], plan: TokenPlan) -> dict[int, np.ndarray]:
    """A runner's kept outputs in original patch numbers, by block."""
    blocks = [row.block for row in plan.locations]
    kept: list[Any] = [outputs[kept_name(block)] for block in blocks]
    return dict(zip(blocks, original_patches(kept, plan), strict=True))


class Agreement(msgspec.Struct, frozen=True):
    """How one runtime's answers compare with the golden ones.

    Args:
        error: Largest logit error against FP64, over the images with equal kept sets.
        limit: What it may be.
        same: Share of images whose kept sets are equal at every location.
        ties: Share whose first difference lies within rounding.
        wrong: Share whose first difference does not.
        top1: Share of images with the golden top-1, over all images.
    """

    error: float
    limit: float
    same: float
    ties: float
    wrong: float
    top1: float


def agreement(golden: Golden, which: np.ndarray, outputs: Mapping[str, np.ndarray], plan: TokenPlan) -> Agreement:
    """Compares a runner's outputs with the golden answers.

    Args:
        golden: The answers.
        which: For every row of the outputs, the number of the golden image it belongs to.
        outputs: ``logits`` and, for every location of the plan, ``kept_<block>``.
        plan: The model's plan.
    """
    kept = named_patches(outputs, plan)
    same = np.ones(len(which), bool)
    tie = np.zeros(len(which), bool)
    for block, numbers in kept.items():
        equal = (np.sort(numbers, axis=1) == np.sort(golden.kept[block][which], axis=1)).all(axis=1)
        tie |= same & ~equal & (golden.margin[block][which] < 1)
        same &= equal
    error, limit = logit_error(golden.logits, golden.reference, which[same], outputs[LOGITS][same])
    top1 = (outputs[LOGITS].argmax(axis=1) == golden.logits[which].argmax(axis=1)).mean()
    return Agreement(error, limit, float(same.mean()), float(tie.mean()), float((~same & ~tie).mean()), float(top1))


def logit_error(
    eager: np.ndarray, reference: np.ndarray, which: np.ndarray, answers: np.ndarray
) -> tuple[float, float]:
    """Largest error against FP64 and its limit: twice eager's own, and at least 4·eps·max|reference|.

    Args:
        eager: PyTorch FP32 logits of the golden images.
        reference: PyTorch FP64 logits.
        which: Golden image of every row of ``answers``.
        answers: Logits to judge.

    Returns:
        Error and limit; with no row to compare, NaN and 0.
    """
    if not len(which):
        return float("nan"), 0.0
    error = float(np.abs(answers - reference[which]).max())
    eager_error = float(np.abs(eager[which] - reference[which]).max())
    floor = FLOOR * float(np.finfo(np.float32).eps) * float(np.abs(reference[which]).max())
    return error, max(2 * eager_error, floor)


def feeds(images: np.ndarray) -> dict[str, np.ndarray]:
    """What a runner's ``infer`` takes for these images."""
    return {INPUT: images}
