"""Quantization error of each linear layer, and the layers to leave unquantized to meet a limit on the accuracy drop.

The cost of a layer is the *noise* of the answers when only this layer is quantized: their error over their spread; see
:func:`~evit_deploy.verification.tolerances.noise`. Errors of different layers are nearly independent, so their squares
add up to about the square of the error of all layers together, and each layer has a *share*. Comparing two layers by
the share of changed answers would take thousands of images; comparing their noise takes :data:`IMAGES`.

A limit on the *drop* is met as in NNCF's accuracy control: the most expensive layers are left in the base precision
until the measured drop is within the limit. All of this is computed by ONNX Runtime on the CPU, in FP32 between the
layers for every base precision.
"""

import logging
from collections.abc import Callable, Collection, Iterator, Sequence

import msgspec
import numpy as np
from onnx import ModelProto

from evit_deploy.errors import GateFailed
from evit_deploy.export.answer import answer_in
from evit_deploy.export.quantization import Quantized
from evit_deploy.progress import doing, step
from evit_deploy.report.report import Check, SensitivityRow
from evit_deploy.report.statistics import hits_of
from evit_deploy.runtimes.select import opened
from evit_deploy.verification.answers.answers import DATA_BATCH, infer_all
from evit_deploy.verification.answers.retrieval import nearest, recalled
from evit_deploy.verification.tolerances import noise

_LOG = logging.getLogger(__name__)
_RUNTIME = "onnxruntime"

IMAGES = 16
"""Number of images that :func:`layer_costs` runs for each layer."""

Batches = Callable[[], Iterator[tuple[np.ndarray, np.ndarray | None]]]


class Shown(msgspec.Struct, frozen=True):
    """Images to evaluate a quantized model on.

    Args:
        batches: Returns a new iterator over all images: float32 ``[B, C, H, W]``, and labels int64 ``[B]`` or ``None``.
        embeds: Whether the model returns an embedding instead of logits.
        threads: CPU threads; ``None`` for the runtime's default.
    """

    batches: Batches
    embeds: bool = False
    threads: int | None = None

    def answers(self, proto: ModelProto) -> tuple[np.ndarray, np.ndarray | None]:
        """Answers of a model ``[n, classes]``, and labels ``[n]`` or ``None``."""
        found, labels = [], []
        with opened(_RUNTIME, proto, self.threads) as runner:
            for images, truth in self.batches():
                outputs = runner.infer({runner.inputs[0].name: images})
                found.append(outputs[answer_in(outputs)])
                labels += [truth] if truth is not None else []
        return np.concatenate(found), np.concatenate(labels) if labels else None


class Kept(msgspec.Struct, frozen=True):
    """Layers that are left in the base precision, and the measurements behind this choice.

    Args:
        layers: Names of the layers.
        costs: Cost of each layer; empty if no layer had to be left out.
        check: The drop and its limit.
        notes: Notes on the measurements.
    """

    layers: tuple[str, ...]
    costs: tuple[SensitivityRow, ...]
    check: Check
    notes: tuple[str, ...]


def of_array(images: np.ndarray) -> Batches:
    """Returns an array of images as batches without labels.

    Args:
        images: float32 ``[n, C, H, W]``.
    """
    starts = range(0, len(images), DATA_BATCH)
    return lambda: ((images[start : start + DATA_BATCH], None) for start in starts)


def layer_costs(
    quantized: Quantized, images: np.ndarray, *, embeds: bool = False, threads: int | None = None
) -> tuple[SensitivityRow, ...]:
    """Measures the noise that quantizing each layer alone causes.

    Args:
        quantized: The model.
        images: float32 ``[n, C, H, W]``; :data:`IMAGES` evenly spaced ones are used.
        embeds: Whether the model returns an embedding.
        threads: CPU threads; ``None`` for the runtime's default.

    Returns:
        One row per layer, the most expensive first.
    """
    chosen = images[np.unique(np.linspace(0, len(images) - 1, min(IMAGES, len(images))).astype(int))]
    names = quantized.layers

    def answers(proto: ModelProto) -> np.ndarray:
        with opened(_RUNTIME, proto, threads) as runner:
            outputs = infer_all(runner, chosen, len(chosen))
        return outputs[answer_in(outputs)]

    exact, costs = answers(quantized.original), {}
    for number, name in enumerate(names):
        step(_LOG, "quantizing one layer at a time", number, len(names))
        alone = answers(quantized.without([other for other in names if other != name]))
        costs[name] = noise(alone, exact, embedding=embeds)
    whole = sum(cost**2 for cost in costs.values())
    rows = [
        SensitivityRow(name, cost, cost**2 / whole if whole else 0.0, quantized.share([name]))
        for name, cost in costs.items()
    ]
    return tuple(sorted(rows, key=lambda row: -row.noise))


def kept_within(
    quantized: Quantized,
    limit: float,
    shown: Shown,
    always: Collection[str],
    costs: Callable[[], Sequence[SensitivityRow]],
) -> Kept:
    """Leaves the most expensive layers unquantized, as few as needed to meet a limit on the drop.

    The number of layers is doubled until the drop is within the limit, then narrowed down by bisection. The drop is
    measured for the result and for one layer fewer, which exceeds the limit.

    Args:
        quantized: The model.
        limit: With labels, percentage points of top-1 (recall@1 for embeddings) that the model may lose. Without
            labels, percentage points of its answers (classes, or nearest neighbors) that may change.
        shown: The images.
        always: Layers that are never quantized.
        costs: Returns the cost of each layer; called only if layers have to be left out.

    Raises:
        GateFailed: The limit is exceeded even with a single layer quantized.
    """
    exact, labels = shown.answers(quantized.original)
    what = _measured(labels, embeds=shown.embeds)
    found: dict[int, float] = {}
    order: list[str] = []

    def drop(count: int) -> float:
        if count not in found:
            doing(_LOG, f"measuring the drop of {what} with {count + len(always)} layers left out")
            answers = shown.answers(quantized.without([*always, *order[:count]]))[0]
            found[count] = _drop(answers, exact, labels, embeds=shown.embeds)
        return found[count]

    rows: Sequence[SensitivityRow] = ()
    least = 0
    if drop(0) > limit:
        rows = costs()
        order = [row.layer for row in rows if row.layer not in always]
        failed, least, most = 0, 1, len(order) - 1
        while least < most and drop(least) > limit:
            failed, least = least, min(2 * least, most)
        if most < 1 or drop(least) > limit:
            raise GateFailed(
                f"the drop of {what} cannot be kept within the limit: it is larger even with one layer quantized",
                where="--max-drop", seen=f"{min(found.values()):.2f} points of {len(exact)} images",
                wanted=f"at most {limit:g}",
                fix="Allow more, show it more images, or use the base precision: no layer would be quantized.",
            )  # fmt: skip
        while least - failed > 1:
            middle = (failed + least) // 2
            failed, least = (failed, middle) if drop(middle) <= limit else (middle, least)
    reason = f"{len(exact)} images; {drop(0):.2f} points before layers were left out for it" if least else ""
    check = Check(f"drop of {what}, points", round(drop(least), 4), limit, True, reason)
    kept = {*always, *order[:least]}
    return Kept(
        tuple(name for name in quantized.layers if name in kept), tuple(rows), check, _notes(found, limit, exact)
    )


def _notes(found: dict[int, float], limit: float, exact: np.ndarray) -> tuple[str, ...]:
    one, notes = 100 / len(exact), []
    if len(found) > 1:
        drops = "; ".join(f"{drop:.2f} with {count}" for count, drop in sorted(found.items()))
        notes.append(f"Points lost on {len(exact)} images by the number of layers left out for --max-drop: {drops}.")
    if one > limit:
        notes.append(f"One of {len(exact)} images is {one:.2g} points: --max-drop {limit:g} lets none be lost.")
    return tuple(notes)


def _measured(labels: np.ndarray | None, *, embeds: bool) -> str:
    if labels is None:
        return "nearest neighbors in common" if embeds else "agreement"
    return "recall@1" if embeds else "top-1"


def _drop(answers: np.ndarray, exact: np.ndarray, labels: np.ndarray | None, *, embeds: bool) -> float:
    """Percentage points lost."""
    if labels is None:
        same = nearest(answers) == nearest(exact) if embeds else answers.argmax(1) == exact.argmax(1)
        return 100 * float(1 - same.mean())
    right = [recalled(nearest(one), labels) if embeds else hits_of(one, labels)[:, 0] for one in (exact, answers)]
    return 100 * float(right[0].mean() - right[1].mean())
