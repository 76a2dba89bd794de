"""Golden answers: PyTorch's outputs for a few real images, computed at conversion and stored in ``golden.npz``.

The reference is the same model in FP64. The outputs in the bundle's precision, computed by PyTorch (for a quantized
graph, in float arithmetic), set the limits of :mod:`evit_deploy.verification.tolerances`. Kept sets are compared by
original patch numbers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from evit_deploy.bundle.manifest import Manifest
from evit_deploy.errors import InputError
from evit_deploy.export.answer import answer_in, is_normalized
from evit_deploy.export.card import feeds, read_card
from evit_deploy.export.precision import DTYPES
from evit_deploy.registry import METHODS
from evit_deploy.runtimes.fp32 import fp32_products
from evit_deploy.tokens.backbone import backbone_of, copy_sharing_weights
from evit_deploy.tokens.choices import original_patches, patch_margins
from evit_deploy.tokens.plan import FUSED, TokenPlan
from evit_deploy.tokens.reduce import capture, token_plan, token_spec
from evit_deploy.tokens.reducer import TokenReducer
from evit_deploy.verification.arrays import ArraySpec, read_arrays
from evit_deploy.verification.tolerances import error_limit, noise, tie_limits


class Golden(msgspec.Struct):
    """Golden inputs and answers; ``golden.npz`` holds the fields by name, per-location ones as ``<field>_<block>``.

    For a model without classes, all fields described as logits hold embeddings. *Expected* fields are computed in the
    bundle's precision: by PyTorch cast to it, or by the Q/DQ graph in float arithmetic. In an FP32 bundle they equal
    ``logits``.

    Args:
        precision: Precision of the bundle.
        inputs: float32 ``[n, C, H, W]``.
        logits: PyTorch FP32 ``[n, classes]``.
        reference: PyTorch FP64 ``[n, classes]``, keeping the tokens that the FP32 model kept.
        swapped: Like ``reference``, with the next best choice at every location.
        expected: ``[n, classes]`` in the bundle's precision, keeping the tokens that the FP32 model kept.
        expected_free: Like ``expected``, with the model's own choice of tokens.
        terms: float64 ``[n]``: per image, the largest sum of absolute terms over the logits. The terms of a logit may
            cancel to almost zero, as with two classes after a short fine-tune, but their rounding errors do not.
        dense: PyTorch FP32 logits of the dense model.
        dense_reference: The same in FP64.
        dense_expected: The same in the bundle's precision.
        dense_terms: ``terms`` of the dense model.
        kept: Per location, the FP32 model's choice in original patch numbers: ``[n, K(+1)]``, fused = −1, or
            ``[n, patches]`` where tokens are merged; see :func:`~evit_deploy.tokens.choices.original_patches`.
        margin: Per location ``[n, patches + 1]``, by original patch number, fused tokens last: distance of the
            patch's score from the boundary between kept and dropped, divided by the rounding error of the scores, both
            in logarithms. Below 1, the patch may be kept or dropped; infinite for patches that are not candidates.
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
        """Largest error against FP64 allowed for answers with the golden kept sets; see :func:`error_limit`."""
        return error_limit(self.expected, self.reference, self.terms)

    def tie_limits(self) -> np.ndarray:
        """Limit for each image ``[n]``, larger where rounding may change the choice of tokens."""
        margins: tuple[list[np.ndarray], list[np.ndarray]] = [], []
        for block, margin in self.margin.items():
            margins[self._merges(block)].append(margin)
        return tie_limits(self.limit(), self.expected_free, self.swapped, self.reference, *margins)

    def _merges(self, block: int) -> bool:
        """Whether a location merges tokens: it then has one number for each patch, and no fused token."""
        kept = self.kept[block]
        return kept.shape[1] == self.margin[block].shape[1] - 1 and bool((kept >= 0).all())

    def dense_limit(self) -> float:
        """Like :meth:`limit`, for the dense twin."""
        return error_limit(self.dense_expected, self.dense_reference, self.dense_terms)

    def noise(self, *, embedding: bool = False) -> float:
        """Relative error of the precision; see :func:`evit_deploy.verification.tolerances.noise`."""
        return noise(self.expected, self.reference, embedding=embedding)


_LOCATED = ("kept", "margin")
_PLAIN = tuple(field for field in Golden.__struct_fields__ if field not in _LOCATED)
_IMAGES = 64
"""Largest number of images in a golden file."""


def load_golden(path: Path, manifest: Manifest) -> Golden:
    """Reads ``golden.npz``.

    Args:
        path: The file.
        manifest: Manifest of the bundle, which determines the shapes of the arrays.

    Raises:
        InputError: The file is not a golden file, or belongs to another model.
    """
    plan = manifest.plan
    floats = ("float32", "float64")
    wanted = {name: ArraySpec(floats, ("images", manifest.answer_size)) for name in _PLAIN}
    wanted["inputs"] = ArraySpec(floats, ("images", *manifest.image_shape))
    wanted["terms"] = wanted["dense_terms"] = ArraySpec(floats, ("images",))
    wanted["precision"] = ArraySpec(("str",), ())
    for row in plan.locations:
        assert row.keep is not None
        numbers = plan.patches if row.choice == "merge" else row.keep + (row.fused and not row.aside)
        wanted[f"kept_{row.block}"] = ArraySpec(("int32", "int64"), ("images", numbers))
        wanted[f"margin_{row.block}"] = ArraySpec(floats, ("images", plan.patches + 1), infinite=True)
    arrays = read_arrays(path, wanted, {"images": _IMAGES})
    kept, margin = ({row.block: arrays[f"{field}_{row.block}"] for row in plan.locations} for field in _LOCATED)
    for block, numbers in kept.items():
        if numbers.min() < FUSED or numbers.max() >= plan.patches:
            raise InputError(
                "numbers of patches that the image does not have", where=f"{path}: kept_{block}",
                seen=f"{numbers.min()} to {numbers.max()}", wanted=f"{FUSED} to {plan.patches - 1}",
            )  # fmt: skip
    plain: dict[str, Any] = {name: arrays[name] for name in _PLAIN} | {"precision": str(arrays["precision"])}
    if plain["precision"] != manifest.precision:
        raise InputError(
            "the precision of the golden answers does not match the manifest", where=path, seen=plain["precision"],
            wanted=manifest.precision,
        )  # fmt: skip
    return Golden(**plain, kept=kept, margin=margin)


class Expected(msgspec.Struct, frozen=True):
    """Outputs for the golden inputs in the bundle's precision.

    Args:
        logits: ``[n, classes]``, with a given choice of tokens.
        scores: Scores of each location ``[n, N]``, from the same run.
        free: Logits with the model's own choice of tokens.
        dense: Logits of the dense model.
    """

    logits: np.ndarray
    scores: list[Any]
    free: np.ndarray
    dense: np.ndarray


class _InFull(msgspec.Struct, frozen=True):
    """Outputs of a model in FP32 and FP64.

    Args:
        logits: FP32 logits.
        kept: Choice of the FP32 model at each location.
        scores: Scores of the FP32 model at each location.
        reference: FP64 logits, with the choices of the FP32 model.
        exact_scores: Scores of the FP64 model at each location, from the same run.
        swapped: FP64 logits, with the next best choices.
        terms: See :class:`Golden`.
    """

    logits: np.ndarray
    kept: list[np.ndarray]
    scores: list[Any]
    reference: np.ndarray
    exact_scores: list[Any]
    swapped: np.ndarray
    terms: np.ndarray


class KnownAnswers(msgspec.Struct):
    """Cache of PyTorch outputs for the same inputs and weights, used and filled by :func:`make_golden`.

    Args:
        found: Cached results by key.
    """

    found: dict[Any, Any] = {}

    def once(self, key: Any, ask: Callable[[], Any]) -> Any:
        """Returns the cached result of a key; calls ``ask`` and caches its result if there is no entry."""
        if key not in self.found:
            self.found[key] = ask()
        return self.found[key]


def make_golden(
    model: torch.nn.Module,
    dense: torch.nn.Module,
    inputs: np.ndarray,
    precision: str = "fp32",
    quantized: tuple[Any, Any] | None = None,
    known: KnownAnswers | None = None,
) -> Golden:
    """Runs PyTorch in FP32, in FP64 and in the bundle's precision.

    Args:
        model: The reduced model, FP32, on the CPU.
        dense: The same weights without reduction.
        inputs: float32 ``[n, C, H, W]``.
        precision: Precision of the bundle.
        quantized: For ``int8`` and ``fp8``: the quantized ONNX model and its dense twin, which define where values are
            rounded. The twin is not used if ``known`` has its answers.
        known: Cached results for the same weights and inputs; new ones are added.
    """
    known = known if known is not None else KnownAnswers()
    plan = token_plan(model)
    first = _first_of(model)
    begun: dict[int, Tensor] = known.once("begun", dict)
    twin: _InFull = known.once("dense", lambda: _in_full(dense, inputs, first, begun))
    own: _InFull = known.once(repr(token_spec(model)), lambda: _in_full(model, inputs, first, begun))
    expected = Expected(own.logits, own.scores, own.logits, twin.logits)
    if quantized is not None:
        card = read_card(quantized[0])
        kind = "dense", precision, card.unquantized if card is not None else ()
        dense_logits = known.once(kind, lambda: _answer_of(quantized[1], inputs))
        expected = _quantized_answers(quantized[0], dense_logits, inputs, own.kept, plan)
    elif precision != "fp32":
        dtype = DTYPES[precision]
        dense_logits = known.once(("dense", precision), lambda: _low_answers(dense, inputs, [], dtype)[2])
        expected = Expected(*_low_answers(model, inputs, own.kept, dtype), dense_logits)
    method: type[TokenReducer] = METHODS.get(token_spec(model).method)
    clear = [
        method.margin(low, true, choice, row)
        for low, choice, true, row in zip(expected.scores, own.kept, own.exact_scores, plan.locations, strict=True)
    ]
    blocks = [row.block for row in plan.locations]
    margins = dict(zip(blocks, patch_margins(clear, own.kept, plan), strict=True))
    kept_patches = dict(zip(blocks, original_patches(own.kept, plan), strict=True))
    return Golden(
        precision, inputs, own.logits, own.reference, own.swapped, expected.logits, expected.free, own.terms,
        twin.logits, twin.reference, expected.dense, twin.terms, kept_patches, margins,
    )  # fmt: skip


def _first_of(model: Any) -> int | None:
    """Index of the first block that differs from the dense model; ``None`` if blocks before it cannot be skipped."""
    blocks = backbone_of(model).blocks(model)
    stateful = any(isinstance(part, TokenReducer) and part.stateful for part in model.modules())
    locations = token_plan(model).locations
    return locations[0].block if locations and not stateful and type(blocks) is torch.nn.Sequential else None


def _in_full(model: torch.nn.Module, inputs: np.ndarray, first: int | None, begun: dict[int, Tensor]) -> _InFull:
    """Runs a model in FP32 and FP64.

    Args:
        model: The reduced model or its dense twin.
        inputs: float32 ``[n, C, H, W]``.
        first: Result of :func:`_first_of` for the reduced model.
        begun: FP64 input of the block ``first``, by block; the same for every schedule, because only blocks of the
            dense model come before it.
    """
    logits, kept, scores = _answers(model, inputs)
    method: type[TokenReducer] = METHODS.get(token_spec(model).method)
    # The FP64 model uses the FP32 model's choices, because its own may differ wherever scores nearly tie.
    with _computing_in(model, torch.float64) as exact:
        blocks = backbone_of(model).blocks(exact)
        _begin_at(blocks, first, begun)
        with _classifier_terms(exact) as terms:
            reference, exact_scores = _replayed(exact, inputs, kept)
        _begin_at(blocks, first, begun)
        decided = zip(kept, exact_scores, token_plan(model).locations, strict=True)
        nearest = [method.nearest_choice(*decision) for decision in decided]
        swapped = _replayed(exact, inputs, nearest)[0] if nearest else reference
    return _InFull(logits, kept, scores, reference, exact_scores, swapped, _largest(terms, reference))


class _Begun(torch.nn.Module):
    """Replaces a block and returns the recorded output of the blocks up to this point."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return self.value


def _begin_at(blocks: Any, first: int | None, begun: dict[int, Tensor]) -> None:
    """Skips the blocks before the first one that reduces if their output is recorded; else records it."""
    if first is None:
        return
    if first in begun:
        for index in range(first):
            blocks[index] = _Begun(begun[first])
    else:

        def note(block: torch.nn.Module, given: tuple[Tensor, ...]) -> None:
            (tokens,) = given
            begun[first] = tokens.clone()

        blocks[first].register_forward_pre_hook(note)


def _low_answers(
    model: torch.nn.Module, inputs: np.ndarray, kept: list[np.ndarray], dtype: torch.dtype
) -> tuple[np.ndarray, list[Any], np.ndarray]:
    """PyTorch's outputs in half precision: logits and scores with given choices, and logits with its own choices."""
    with _computing_in(model, dtype) as low:
        free = _answers(low, inputs)[0]
        logits, scores = _replayed(low, inputs, kept) if kept else (free, [])
    return logits, scores, free


@contextmanager
def _computing_in(model: torch.nn.Module, dtype: torch.dtype) -> Iterator[torch.nn.Module]:
    """Returns a copy of a model that computes in another data type.

    The weights of a block are cast only while it runs, so that memory never holds a second copy of all weights.
    """
    twin = copy_sharing_weights(model)
    blocks = list(backbone_of(model).blocks(twin))
    inside = {part for block in blocks for part in block.modules()}
    for part in twin.modules():
        if part not in inside:
            _cast(part, dtype)
    uncast: dict[torch.nn.Module, tuple[dict[str, Any], dict[str, Any]]] = {}

    def enter(block: torch.nn.Module, given: Any) -> None:
        for part in block.modules():
            uncast[part] = dict(part._parameters), dict(part._buffers)
            _cast(part, dtype)

    def leave(block: torch.nn.Module, given: Any, made: Any) -> None:
        for part in block.modules():
            parameters, buffers = uncast.pop(part)
            part._parameters.update(parameters)
            part._buffers.update(buffers)

    for block in blocks:
        block.register_forward_pre_hook(enter)
        block.register_forward_hook(leave)
    yield twin


def _cast(module: torch.nn.Module, dtype: torch.dtype) -> None:
    for name, value in module._parameters.items():
        if value is not None and value.is_floating_point():
            module._parameters[name] = torch.nn.Parameter(value.detach().to(dtype))
    for name, buffer in module._buffers.items():
        if buffer is not None and buffer.is_floating_point():
            module._buffers[name] = buffer.to(dtype)


@contextmanager
def _classifier_terms(model: Any) -> Iterator[list[np.ndarray]]:
    """Collects Σ|weight · feature| + |bias| ``[n, classes]`` of each classifier while the context is open.

    For a normalized embedding, the terms are divided by its norm.
    """
    found: list[np.ndarray] = []

    def note(layer: torch.nn.Linear, given: tuple[Tensor, ...]) -> None:
        bias = torch.zeros(()) if layer.bias is None else layer.bias
        (features,) = given
        found.append((features.abs() @ layer.weight.abs().T + bias.abs()).numpy())

    classifier = model.get_classifier()
    layers = classifier if isinstance(classifier, tuple) else (classifier,)
    handles = [layer.register_forward_pre_hook(note) for layer in layers if isinstance(layer, torch.nn.Linear)]

    def scale(layer: torch.nn.Module, given: tuple[Tensor, ...]) -> None:
        (embedding,) = given
        found[:] = [terms / embedding.norm(dim=1, keepdim=True).numpy() for terms in found]

    if is_normalized(model):
        handles.append(model.normalize.register_forward_pre_hook(scale))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _largest(terms: list[np.ndarray], reference: np.ndarray) -> np.ndarray:
    """Largest term of each image over classifiers and classes; without a classifier, the largest feature."""
    return np.max([np.abs(logits).max(axis=1) for logits in terms or [reference]], axis=0)


def _replayed(model: torch.nn.Module, inputs: np.ndarray, kept: list[np.ndarray]) -> tuple[np.ndarray, list[Any]]:
    """Logits and scores of a model with the given choices instead of its own."""
    reducers = [m for m in model.modules() if isinstance(m, TokenReducer) and m.plan.keep is not None]
    for reducer, choice in zip(reducers, kept, strict=True):
        reducer.given = torch.from_numpy(choice)
    try:
        logits, _, scores = _answers(model, inputs)
    finally:  # or the model would keep these choices for all later inputs
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


def _quantized_answers(
    model: Any, dense_logits: np.ndarray, inputs: np.ndarray, kept: list[np.ndarray], plan: TokenPlan
) -> Expected:
    """Runs a Q/DQ graph as written: rounding only at Q/DQ nodes, float arithmetic everywhere else."""
    from evit_deploy.export.variants import with_choice

    blocks = [row.block for row in plan.locations]
    choices = {f"choice_{block}": choice for block, choice in zip(blocks, kept, strict=True)}
    replayed = _run_graph(with_choice(model) if blocks else model, feeds(inputs) | choices)
    scores = []
    for block in blocks:
        found = [
            replayed[name] for name in replayed if name.startswith(f"scores_{block}_") or name == f"scores_{block}"
        ]
        one, *others = found
        scores.append((one, *others) if others else one)
    answer = answer_in(replayed)
    return Expected(replayed[answer], scores, _run_graph(model, feeds(inputs))[answer], dense_logits)


def _answer_of(proto: Any, inputs: np.ndarray) -> np.ndarray:
    answers = _run_graph(proto, feeds(inputs))
    return answers[answer_in(answers)]


def _run_graph(proto: Any, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Runs an ONNX graph without optimizations; returns its outputs by name."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # With optimizations, ONNX Runtime would replace Q/DQ nodes by int8 kernels.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    answers: Any = session.run(names, given)
    return dict(zip(names, answers, strict=True))
