"""Golden answers: what PyTorch says to a few real pictures, made when a bundle is, and kept in ``golden.npz``.

The reference is the same model in FP64; what the bundle's own precision says, computed by PyTorch (a quantised graph:
in float arithmetic), sets the limits of :mod:`evit_deploy.verification.tolerances`. Kept sets are compared in original
patch numbers.
"""

import copy
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from evit_deploy.errors import InputError
from evit_deploy.export.answer import answer_in, is_normalized
from evit_deploy.export.card import feeds
from evit_deploy.export.precision import DTYPES
from evit_deploy.registry import METHODS
from evit_deploy.runtimes.fp32 import fp32_products
from evit_deploy.tokens.choices import original_patches, patch_margins
from evit_deploy.tokens.plan import TokenPlan
from evit_deploy.tokens.reduce import capture, token_plan, token_spec
from evit_deploy.tokens.reducer import TokenReducer
from evit_deploy.verification.tolerances import error_limit, noise, tie_limits


class Golden(msgspec.Struct):
    """Golden inputs and answers; ``golden.npz`` holds the fields by name, per-location ones as ``<field>_<block>``.

    Of a model without classes, ``logits`` and all that is called so is its embedding. *Expected* is what the bundle's
    precision itself says: PyTorch cast to it, or the Q/DQ graph in float arithmetic. In an FP32 bundle that is
    ``logits``.

    Args:
        precision: Of the bundle.
        inputs: float32 ``[n, C, H, W]``.
        logits: PyTorch FP32 ``[n, classes]``.
        reference: PyTorch FP64 ``[n, classes]``, keeping the tokens that the FP32 model kept.
        swapped: The same with the next best choice at every location.
        expected: ``[n, classes]`` in the bundle's precision, keeping the tokens that the FP32 model kept.
        expected_free: The same with a choice of its own.
        terms: float64 ``[n]``: the largest sum of absolute terms that a logit of the image is added up from. Terms may
            cancel to almost nothing, as two classes' after a short fine-tune do; their rounding does not.
        dense: PyTorch FP32 logits of the dense model.
        dense_reference: The same in FP64.
        dense_expected: The same in the bundle's precision.
        dense_terms: ``terms`` of the dense model.
        kept: Per location, what the FP32 model chose, in original patch numbers: ``[n, K(+1)]``, fused = −1, or of a
            merge ``[n, patches]``; see :func:`~evit_deploy.tokens.choices.original_patches`.
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
    terms: np.ndarray
    dense: np.ndarray
    dense_reference: np.ndarray
    dense_expected: np.ndarray
    dense_terms: np.ndarray
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
        """Largest error against FP64 of answers with the golden kept sets: twice the precision's own."""
        return error_limit(self.expected, self.reference, self.terms)

    def tie_limits(self) -> np.ndarray:
        """The same for each image ``[n]`` where another choice within rounding may have been made."""
        margins: tuple[list[np.ndarray], list[np.ndarray]] = [], []
        for block, margin in self.margin.items():
            margins[self._merges(block)].append(margin)
        return tie_limits(self.limit(), self.expected_free, self.swapped, self.reference, *margins)

    def _merges(self, block: int) -> bool:
        """Whether a location merges: then it has a number for every patch, none of them a fused token's."""
        kept = self.kept[block]
        return kept.shape[1] == self.margin[block].shape[1] - 1 and bool((kept >= 0).all())

    def dense_limit(self) -> float:
        """The same for the dense twin."""
        return error_limit(self.dense_expected, self.dense_reference, self.dense_terms)

    def noise(self, *, embedding: bool = False) -> float:
        """What the precision costs: see :func:`evit_deploy.verification.tolerances.noise`."""
        return noise(self.expected, self.reference, embedding=embedding)


_PLAIN = tuple(field for field in Golden.__struct_fields__ if field not in ("kept", "margin"))


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
    scores: list[Any]
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
    with _classifier_terms(exact) as terms:
        reference, exact_scores = _replayed(exact, inputs, kept)
    method: type[TokenReducer] = METHODS.get(token_spec(model).method)
    decided = list(zip(kept, exact_scores, plan.locations, strict=True))
    swapped, _ = _replayed(exact, inputs, [method.nearest_choice(*decision) for decision in decided])
    exact_dense = copy.deepcopy(dense).double()
    with _classifier_terms(exact_dense) as dense_terms:
        dense_reference = _answers(exact_dense, inputs)[0]
    clear = [
        method.margin(low, true, choice, row) for low, (choice, true, row) in zip(expected.scores, decided, strict=True)
    ]
    blocks = [row.block for row in plan.locations]
    margins = dict(zip(blocks, patch_margins(clear, kept, plan), strict=True))
    kept_patches = dict(zip(blocks, original_patches(kept, plan), strict=True))
    return Golden(
        precision, inputs, logits, reference, swapped, expected.logits, expected.free, _largest(terms, reference),
        dense_logits, dense_reference, expected.dense, _largest(dense_terms, dense_reference), kept_patches, margins,
    )  # fmt: skip


@contextmanager
def _classifier_terms(model: Any) -> Iterator[list[np.ndarray]]:
    """Collects Σ|weight · feature| + |bias| of the answer ``[n, classes]``, an array a classifier, while it is open.

    Of a normalised embedding the terms are scaled as it is.
    """
    found: list[np.ndarray] = []

    def note(layer: torch.nn.Linear, given: tuple[Tensor, ...]) -> None:
        bias = torch.zeros(()) if layer.bias is None else layer.bias
        found.append((given[0].abs() @ layer.weight.abs().T + bias.abs()).numpy())

    classifier = model.get_classifier()
    layers = classifier if isinstance(classifier, tuple) else (classifier,)
    handles = [layer.register_forward_pre_hook(note) for layer in layers if isinstance(layer, torch.nn.Linear)]

    def scale(layer: torch.nn.Module, given: tuple[Tensor, ...]) -> None:
        found[:] = [terms / given[0].norm(dim=-1, keepdim=True).numpy() for terms in found]

    if is_normalized(model):
        handles.append(model.normalize.register_forward_pre_hook(scale))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _largest(terms: list[np.ndarray], reference: np.ndarray) -> np.ndarray:
    """Of each image the largest over the classifiers and classes; without a classifier, of the features themselves."""
    return np.max([np.abs(logits).max(axis=-1) for logits in terms or [reference]], axis=0)


def _replayed(model: torch.nn.Module, inputs: np.ndarray, kept: list[np.ndarray]) -> tuple[np.ndarray, list[Any]]:
    """Logits and scores of a model whose choices are given."""
    reducers = [m for m in model.modules() if isinstance(m, TokenReducer) and m.plan.keep is not None]
    for reducer, choice in zip(reducers, kept, strict=True):
        reducer.given = torch.from_numpy(choice)
    try:
        logits, _, scores = _answers(model, inputs)
    finally:
        for reducer in reducers:
            reducer.given = None
    return logits, scores


def _answers(model: torch.nn.Module, inputs: np.ndarray) -> tuple[np.ndarray, list[np.ndarray], list[Any]]:
    dtype = next(model.parameters()).dtype
    was_training = model.training
    model.eval()
    with capture(model) as seen, fp32_products(tf32=False):
        logits = model(torch.from_numpy(inputs).to(dtype))
    model.train(was_training)
    logits = logits if dtype == torch.float64 else logits.float()
    return logits.numpy(), [k.numpy() for k in seen.kept], [_as_numpy(s) for s in seen.scores]


def _as_numpy(scores: Any) -> Any:
    return tuple(map(_as_numpy, scores)) if isinstance(scores, tuple) else scores.numpy()


def _quantized_answers(model: Any, dense: Any, inputs: np.ndarray, kept: list[np.ndarray], plan: TokenPlan) -> Expected:
    """A Q/DQ graph as it is written: every rounding where the graph has it, everything between in float arithmetic."""
    import onnxruntime

    from evit_deploy.export.variants import with_choice

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
    scores = []
    for block in blocks:
        found = [
            replayed[name] for name in replayed if name.startswith(f"scores_{block}_") or name == f"scores_{block}"
        ]
        scores.append(found[0] if len(found) == 1 else tuple(found))
    answer = answer_in(replayed)
    free, dense_logits = run(model, feeds(inputs))[answer], run(dense, feeds(inputs))[answer]
    return Expected(replayed[answer], scores, free, dense_logits)
