"""Golden answers: what PyTorch says to a few real pictures, and how far two right answers may lie apart.

The reference is the same model in FP64. How far the bundle's own precision lies from it, computed by PyTorch (a
quantised graph: in float arithmetic), sets the tolerance for everybody else, so no number is picked by hand.

Kept sets are compared in original patch numbers. Where scores lie closer together than rounding, either choice is
right: such an image counts as a tie. Its logits answer another question, and have more room: as much as it moves the
FP64 answer when the last kept and the first dropped patch change places at every location.
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
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Golden(msgspec.Struct):
    """Golden inputs and answers; ``golden.npz`` holds the fields by name, per-location ones as ``<field>_<block>``.

    *Expected* is what the bundle's precision itself says: PyTorch cast to it, or the Q/DQ graph in float arithmetic.
    In an FP32 bundle that is ``logits``.

    Args:
        precision: Of the bundle.
        inputs: float32 ``[n, C, H, W]``.
        logits: PyTorch FP32 ``[n, classes]``.
        reference: PyTorch FP64 ``[n, classes]``, keeping the tokens that the FP32 model kept.
        swapped: The same with the last kept and the first dropped token exchanged at every location.
        expected: ``[n, classes]`` in the bundle's precision, keeping the tokens that the FP32 model kept.
        expected_free: The same with a choice of its own.
        dense: PyTorch FP32 logits of the dense model.
        dense_reference: The same in FP64.
        dense_expected: The same in the bundle's precision.
        kept: Per location, original patch numbers ``[n, K(+1)]``, fused = −1, of the FP32 model.
        margin: Per location ``[n, patches + 1]``, by original patch number, fused tokens last: distance of the
            patch's score from the boundary between kept and dropped, over what the scores differ by for rounding,
            both in logarithms. Below 1 the patch may be kept or not; infinite where it is no candidate.
    """

    precision: str
    inputs: np.ndarray
    logits: np.ndarray
    reference: np.ndarray
    swapped: np.ndarray
    expected: np.ndarray
    expected_free: np.ndarray
    dense: np.ndarray
    dense_reference: np.ndarray
    dense_expected: np.ndarray
    kept: dict[int, np.ndarray]
    margin: dict[int, np.ndarray]

    def save(self, path: Path) -> None:
        """Writes ``golden.npz``."""
        np.savez(path, **self._arrays())  # type: ignore[arg-type]

    def _arrays(self) -> dict[str, np.ndarray]:
        plain = {name: np.asarray(getattr(self, name)) for name in _PLAIN}
        kept = {f"kept_{block}": value for block, value in self.kept.items()}
        return plain | kept | {f"margin_{block}": value for block, value in self.margin.items()}

    def limit(self) -> float:
        """Largest logit error against FP64 of answers with the golden kept sets: twice the precision's own."""
        return max(2 * _distance(self.expected, self.reference), _floor(self.reference))

    def tie_limits(self) -> np.ndarray:
        """The same for each image ``[n]`` where another choice within rounding may have been made."""
        free = max(self.limit(), 2 * _distance(self.expected_free, self.reference))
        free = free + np.abs(self.swapped - self.reference).max(axis=1)
        # It takes two patches within rounding to change places; elsewhere there is no other choice.
        possible = [(~(margin >= 1)).sum(axis=1) > 1 for margin in self.margin.values()]
        return np.where(np.any([np.zeros(len(free), bool), *possible], axis=0), free, self.limit())

    def dense_limit(self) -> float:
        """The same for the dense twin."""
        return max(2 * _distance(self.dense_expected, self.dense_reference), _floor(self.dense_reference))

    def noise(self) -> float:
        """What the precision costs: its error over the spread of the logits, both as root mean squares."""
        axis = 0 if self.reference.shape[1] == 1 else 1  # a single logit has no others to stand out from
        spread = self.reference - self.reference.mean(axis=axis, keepdims=True)
        with np.errstate(invalid="ignore", over="ignore"):
            error = np.linalg.norm(self.expected - self.reference)
        return float(error / max(float(np.linalg.norm(spread)), np.finfo(np.float64).tiny))


_PLAIN = tuple(field for field in Golden.__struct_fields__ if field not in ("kept", "margin"))


def _distance(answers: np.ndarray, reference: np.ndarray) -> float:
    with np.errstate(invalid="ignore"):
        return float(np.abs(answers - reference).max(initial=0.0))


def _floor(reference: np.ndarray) -> float:
    return FLOOR * float(np.finfo(np.float32).eps) * float(np.abs(reference).max(initial=0.0))


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
        plain: dict[str, Any] = {name: arrays[name] for name in _PLAIN}
        plain["precision"] = str(plain["precision"])
        return Golden(**plain, kept=ordered["kept"], margin=ordered["margin"])
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise InputError(f"not a golden file ({error})", where=path, fix="Convert again.") from None
    except Exception as error:  # zipfile and zlib raise their own
        raise InputError(f"the golden file is damaged ({type(error).__name__})", where=path) from None


class Expected(msgspec.Struct, frozen=True):
    """What a precision itself says to the golden inputs.

    Args:
        logits: ``[n, classes]``, keeping given tokens.
        scores: Per location ``[n, N]``, on the way there.
        free: Logits with a choice of its own.
        dense: Logits of the dense model.
    """

    logits: np.ndarray
    scores: list[np.ndarray]
    free: np.ndarray
    dense: np.ndarray


def make_golden(
    model: torch.nn.Module,
    dense: torch.nn.Module,
    inputs: np.ndarray,
    precision: str = "fp32",
    quantized: tuple[Any, Any] | None = None,
) -> Golden:
    """Runs PyTorch in FP32, in FP64 and in the bundle's precision.

    Args:
        model: The reduced model, FP32, on the CPU.
        dense: The same weights without reduction.
        inputs: float32 ``[n, C, H, W]``.
        precision: Of the bundle.
        quantized: For ``int8`` and ``fp8``: the quantised model and its dense twin, ONNX, which say themselves what is
            rounded where.
    """
    plan = token_plan(model)
    logits, kept, scores = _answers(model, inputs)
    dense_logits = _answers(dense, inputs)[0]
    expected = Expected(logits, scores, logits, dense_logits)
    if quantized is not None:
        expected = _quantized_answers(*quantized, inputs, kept, plan)
    elif precision != "fp32":
        low, low_dense = (copy.deepcopy(m).to(DTYPES[precision]) for m in (model, dense))
        free, low_logits = _answers(low, inputs)[0], _answers(low_dense, inputs)[0]
        expected = Expected(*_replayed(low, inputs, kept), free, low_logits)
    # The FP64 model keeps what the FP32 model kept: otherwise it answers another question wherever scores nearly tie.
    exact = copy.deepcopy(model).double()
    reference, exact_scores = _replayed(exact, inputs, kept)
    swapped, _ = _replayed(exact, inputs, [_swap(k, s) for k, s in zip(kept, exact_scores, strict=True)])
    dense_reference = _answers(copy.deepcopy(dense).double(), inputs)[0]
    numbers = original_patches(kept, plan)
    margin, candidates = {}, np.broadcast_to(np.arange(plan.patches), (len(inputs), plan.patches))
    for row, low, true, patches in zip(plan.locations, expected.scores, exact_scores, numbers, strict=True):
        assert row.keep is not None
        # In logarithms: scores are exponentials, so that rounding moves each by a share of itself.
        ranked, true, low = -np.sort(-_logarithm(true), axis=1), _logarithm(true), _logarithm(low)
        boundary = ranked[:, row.keep - 1 : row.keep + 1].mean(axis=1, keepdims=True)
        rounding = 2 * np.abs(low - true).max() + FLOOR * np.finfo(np.float32).eps
        margin[row.block] = np.full((len(inputs), plan.patches + 1), np.inf)
        place = np.arange(len(inputs))[:, None], candidates % (plan.patches + 1)
        np.minimum.at(margin[row.block], place, np.abs(true - boundary) / rounding)  # fused tokens share one place
        candidates = patches
    kept_patches = dict(zip((row.block for row in plan.locations), numbers, strict=True))
    return Golden(
        precision, inputs, logits, reference, swapped, expected.logits, expected.free,
        dense_logits, dense_reference, expected.dense, kept_patches, margin,
    )  # fmt: skip


def _logarithm(scores: np.ndarray) -> np.ndarray:
    """What FP32 cannot hold counts as its smallest number."""
    return np.log(np.maximum(scores.astype(np.float64), np.finfo(np.float32).tiny))


def _swap(kept: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """The choice with its last candidate replaced by the first that was dropped."""
    order = np.argsort(-scores, axis=1, kind="stable")
    chosen = np.zeros(scores.shape, bool)
    np.put_along_axis(chosen, kept.astype(np.int64), True, axis=1)
    swapped = kept.copy()
    for image, row in enumerate(order):
        dropped = row[~chosen[image, row]]
        if len(dropped):
            swapped[image, -1] = dropped[0]
    return swapped


def _replayed(
    model: torch.nn.Module, inputs: np.ndarray, kept: list[np.ndarray]
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Logits and scores of a model that is told which tokens to keep."""
    reducers = [module for module in model.modules() if isinstance(module, TokenReducer)]
    for reducer, choice in zip(reducers, kept, strict=True):
        reducer.forward = functools.partial(_replay, reducer, torch.from_numpy(choice))
    try:
        logits, _, scores = _answers(model, inputs)
    finally:
        for reducer in reducers:
            del reducer.forward
    return logits, scores


def _replay(reducer: TokenReducer, kept: Tensor, x: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """A reducer's forward pass with the choice already made."""
    y = reorganize(x, reducer.scores(x, q, k), kept.long(), reducer.plan.fused, reducer.prefix)
    return y, kept


def _answers(model: torch.nn.Module, inputs: np.ndarray) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
    dtype = next(model.parameters()).dtype
    was_training = model.training
    model.eval()
    with capture(model) as seen:
        logits = model(torch.from_numpy(inputs).to(dtype))
    model.train(was_training)
    logits = logits if dtype == torch.float64 else logits.float()
    return logits.numpy(), [k.numpy() for k in seen.kept], [s.numpy() for s in seen.scores]


def _quantized_answers(model: Any, dense: Any, inputs: np.ndarray, kept: list[np.ndarray], plan: TokenPlan) -> Expected:
    """A Q/DQ graph as it is written: every rounding where the graph has it, everything between in float arithmetic."""
    import onnxruntime

    from evit_deploy.variants import with_choice

    def run(proto: Any, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # or int8 kernels run
        session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        answers: Any = session.run(names, feeds)
        return dict(zip(names, answers, strict=True))

    blocks = [row.block for row in plan.locations]
    choices = {f"choice_{block}": choice for block, choice in zip(blocks, kept, strict=True)}
    replayed = run(with_choice(model) if blocks else model, feeds(inputs) | choices)
    scores = [replayed[f"scores_{block}"] for block in blocks]
    free, dense_logits = run(model, feeds(inputs))[LOGITS], run(dense, feeds(inputs))[LOGITS]
    return Expected(replayed[LOGITS], scores, free, dense_logits)


def named_patches(outputs: Mapping[str, np.ndarray], plan: TokenPlan) -> dict[int, np.ndarray]:
    """A runner's kept outputs in original patch numbers, by block; empty if it gives none out."""
    blocks = [row.block for row in plan.locations]
    if any(kept_name(block) not in outputs for block in blocks):
        return {}
    kept: list[Any] = [outputs[kept_name(block)] for block in blocks]
    return dict(zip(blocks, original_patches(kept, plan), strict=True))


class Agreement(msgspec.Struct, frozen=True):
    """How one runtime's answers compare with the golden ones.

    Args:
        error: Largest logit error against FP64, over the images with equal kept sets; NaN if there is none.
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
        outputs: ``logits`` and, where the runner gives them out, ``kept_<block>`` for every location of the plan.
        plan: The model's plan.
    """
    kept = named_patches(outputs, plan)
    told = bool(kept) or not plan.locations
    same, tie = same_choice(golden, which, kept, {b: golden.kept[b][which] for b in kept})
    overlaps = [overlap(numbers, golden.kept[block][which]) for block, numbers in kept.items()]
    if not told:  # it may have kept others within rounding
        same, tie = ~same, same
    tie_error, tie_limit = _closest_to_limit(golden, which[tie], outputs[LOGITS][tie])
    return Agreement(
        error=logit_error(golden, which[same], outputs[LOGITS][same]),
        limit=golden.limit(),
        tie_error=tie_error,
        tie_limit=tie_limit,
        same=float(same.mean()) if told else float("nan"),
        ties=float(tie.mean()) if told else float("nan"),
        wrong=float((~same & ~tie).mean()),
        overlap=float(np.mean(overlaps)) if overlaps else float("nan" if not told else 1.0),
        top1=float((outputs[LOGITS].argmax(axis=1) == golden.logits[which].argmax(axis=1)).mean()),
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
    golden: Golden, which: np.ndarray, kept: Mapping[int, np.ndarray], others: Mapping[int, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Compares two choices of patches image by image, location by location.

    Args:
        golden: Has the margins.
        which: Golden image of every row.
        kept: By block, original patch numbers ``[rows, K(+1)]``.
        others: The same of the other.

    Returns:
        Which rows have the same patches everywhere, and of the rest, whose first difference lies within rounding.
    """
    same, tie = np.ones(len(which), bool), np.zeros(len(which), bool)
    for block, numbers in kept.items():
        patches = golden.margin[block].shape[1] - 1
        exchanged = _members(numbers, patches) != _members(others[block], patches)
        clear = (exchanged & (golden.margin[block][which] >= 1)).any(axis=1)
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


def overlap(kept: np.ndarray, others: np.ndarray) -> float:
    """Mean over images of patches in common over patches of either (Jaccard); the fused token is none."""
    patches = int(max(kept.max(), others.max())) + 1
    one, other = (_members(numbers, patches)[:, :-1] for numbers in (kept, others))
    either = np.maximum(one, other).sum(axis=1)
    return float((np.minimum(one, other).sum(axis=1) / np.maximum(either, 1)).mean())


def logit_error(golden: Golden, which: np.ndarray, answers: np.ndarray) -> float:
    """Largest error of some logits against FP64; NaN with none to judge.

    Args:
        golden: The answers.
        which: Golden image of every row of ``answers``.
        answers: Logits to judge.
    """
    return _distance(answers, golden.reference[which]) if len(which) else float("nan")


def feeds(images: np.ndarray) -> dict[str, np.ndarray]:
    """What a runner's ``infer`` takes for these images."""
    return {INPUT: images}
