"""Accuracy cost of token reduction: compares a model with its dense twin on the same images and runtime."""

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import msgspec
import numpy as np
import torch

from evit_deploy.bundle.manifest import Manifest
from evit_deploy.progress import step
from evit_deploy.report.report import ComparedRow, Report
from evit_deploy.report.statistics import difference, hits_of, row_of_hits, wilson
from evit_deploy.runtimes.select import opened
from evit_deploy.tokens.plan import TokenPlan, TokenSpec
from evit_deploy.tokens.reduce import dense_twin
from evit_deploy.verification.answers.answers import Answers, data_batch, named_patches, outputs_of
from evit_deploy.verification.answers.pictures import Pictures, embeds
from evit_deploy.verification.answers.retrieval import centered_cosines, cosines, nearest, recalled

_LOG = logging.getLogger(__name__)

MODEL_NAME, DENSE_NAME = "model", "dense"
"""Names of the two rows, as in profile rows."""


class Pair(msgspec.Struct, frozen=True):
    """A reduced model and its dense twin on one runtime.

    Args:
        runtime: Name in the registry of runtimes.
        model: File or PyTorch model to run.
        dense: The dense twin; ``None`` if there is no twin, such as on a server.
    """

    runtime: str
    model: Any
    dense: Any


class Answered(msgspec.Struct, frozen=True):
    """Answers of several models to the same images.

    Args:
        runtime: Name of the runtime that computed them.
        answers: Logits ``[n, classes]`` or embeddings ``[n, width]`` of every model and dense twin, by name.
        labels: int64 ``[n]``; ``None`` if the images have no labels.
        embeds: Whether the answers are embeddings.
    """

    runtime: str
    answers: Mapping[str, np.ndarray]
    labels: np.ndarray | None
    embeds: bool = False
    _nearest: dict[str, np.ndarray] = {}

    def nearest(self, name: str) -> np.ndarray:
        """Index of each image's nearest other image in one model's embeddings; cached."""
        if name not in self._nearest:
            self._nearest[name] = nearest(self.answers[name])
        return self._nearest[name]


def side_by_side(
    pair: Pair, manifest: Manifest, pictures: Pictures, threads: int | None = None
) -> tuple[Report, Answers]:
    """Runs a model and its dense twin on the same images; each image is read only once.

    Args:
        pair: The model and its dense twin.
        manifest: Manifest of their bundle.
        pictures: The images.
        threads: CPU threads; ``None`` for the runtime's default.

    Returns:
        A report with a row for each of the two, and the answers and kept patches of the reduced model.

    Raises:
        InputError: An image cannot be read, or the runtime cannot run one of the two.
        MissingRequirement: The runtime is not available.
    """
    answer, parts, kept, truth = manifest.answer, {}, [], []
    with ExitStack() as stack:
        runners = {MODEL_NAME: stack.enter_context(opened(pair.runtime, pair.model, threads, with_indices=True))}
        if pair.dense is not None:
            runners[DENSE_NAME] = stack.enter_context(opened(pair.runtime, pair.dense, threads))
        done, total = 0, len(pictures)
        for images, labels in pictures.batches(manifest, data_batch(runners[MODEL_NAME])):
            step(_LOG, f"answering the images on {pair.runtime}", done, total)
            for name, runner in runners.items():
                outputs = outputs_of(runner, images)
                parts.setdefault(name, []).append(outputs[answer])
                if name == MODEL_NAME:
                    kept.append(named_patches(outputs, manifest.plan))
            truth += [labels] if labels is not None else []
            done += len(images)
    answers = {name: np.concatenate(found) for name, found in parts.items()}
    labels = np.concatenate(truth) if truth else None
    answered = Answered(pair.runtime, answers, labels, embeds(manifest))
    patches = {block: np.concatenate([part[block] for part in kept]) for block in kept[0]}
    notes = pictures.notes
    if pair.dense is None:
        notes += (f"There is no dense twin on {pair.runtime} to hold its answers to the images against.",)
    rows = _rows_of(manifest, _precision_of(pair.model, manifest), answered)
    return Report(compared=rows, notes=notes), Answers(answers[MODEL_NAME], patches)


def _precision_of(artifact: Any, manifest: Manifest) -> str:
    """Precision of an artifact: the bundle's for a file, the data type of the weights for a PyTorch model."""
    if not isinstance(artifact, torch.nn.Module):
        return manifest.precision
    kinds = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
    kind = next(artifact.parameters()).dtype
    return kinds.get(kind, str(kind).removeprefix("torch."))


def dense_of(model: Any, dense: Any) -> Any:
    """Dense twin of an artifact: ``dense`` for a file, a twin with the same weights for a PyTorch model."""
    return dense_twin(model) if isinstance(model, torch.nn.Module) else dense


def _rows_of(manifest: Manifest, precision: str, answered: Answered) -> tuple[ComparedRow, ...]:
    rows = []
    if DENSE_NAME in answered.answers:
        rows.append(row_of_plan(DENSE_NAME, "dense", "", precision, manifest.plan.dense()))
    row = row_of_plan(MODEL_NAME, manifest.kind, settings_of(manifest.tokens), precision, manifest.plan)
    rows.append(msgspec.structs.replace(row, dense=DENSE_NAME if rows else None))
    return tuple(with_answers(row, None, answered) for row in rows)


def row_of_plan(name: str, method: str, settings: str, precision: str, plan: TokenPlan) -> ComparedRow:
    """Creates a row that describes a model, without results.

    Args:
        name: Name of the row.
        method: Method of token reduction.
        settings: See :func:`settings_of`.
        precision: Precision that the model computes in.
        plan: Its token plan.
    """
    return ComparedRow(
        name=name,
        method=method,
        settings=settings,
        precision=precision,
        gmacs=plan.macs() / 1e9,
        mac_ratio=plan.mac_ratio(),
        tokens=plan.blocks[-1].tokens_out,
    )


def settings_of(spec: TokenSpec) -> str:
    """Formats the settings of a method that differ from the defaults.

    >>> settings_of(TokenSpec(keep_rate=0.7, fuse=False))
    'keep_rate=0.7, fuse=no'
    """
    defaults = {field.name: field.default for field in msgspec.structs.fields(TokenSpec)}
    known = {}
    for field, value in msgspec.structs.asdict(spec).items():
        if field not in ("method", "options") and value is not None and value != defaults[field]:
            known[field] = value
    return ", ".join(f"{field}={_text(value)}" for field, value in (known | spec.options).items())


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return "/".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def with_answers(row: ComparedRow, reference: str | None, answered: Answered | None) -> ComparedRow:
    """Adds accuracy to a row, and the differences to its baseline and to a reference.

    Args:
        row: Row of a model or a dense twin; :attr:`~ComparedRow.dense` names the baseline.
        reference: Name of the bundle that the others are compared with, if any.
        answered: Answers to the images; ``None`` if there were no images.
    """
    if answered is None or row.name not in answered.answers:
        return row
    row = msgspec.structs.replace(row, images=len(answered.answers[row.name]), runtime=answered.runtime)
    baseline = row.dense if row.dense in answered.answers else None
    found = _embedding_fields if answered.embeds else _class_fields
    changes, right = found(row.name, baseline, answered)
    for field, other in (("to_dense", baseline), ("to_reference", reference)):
        if other is not None and other != row.name and right is not None:
            others = found(other, None, answered)[1]
            assert others is not None  # both are computed from the same labels
            changes[field] = difference(other, right, others)
    return msgspec.structs.replace(row, **changes)


def _class_fields(name: str, baseline: str | None, answered: Answered) -> tuple[dict[str, Any], np.ndarray | None]:
    """Fields of a row for a classifier, and whether each image was classified correctly."""
    logits, fields = answered.answers[name], {}
    if baseline is not None:
        fields["agreement"] = float((logits.argmax(1) == answered.answers[baseline].argmax(1)).mean())
    if answered.labels is None:
        return fields, None
    hits = hits_of(logits, answered.labels)
    found = row_of_hits(name, hits)
    fields |= {"top1": found.top1, "top1_low": found.low, "top1_high": found.high, "top5": found.top5}
    return fields, hits[:, 0]


def _embedding_fields(name: str, baseline: str | None, answered: Answered) -> tuple[dict[str, Any], np.ndarray | None]:
    """Fields of a row for embeddings, and whether the nearest neighbor of each image has the same class.

    The latter only includes images that share their class with another image.
    """
    found, fields = answered.answers[name], {}
    several = len(found) > 1  # a single image has no neighbor, and centering it leaves zero
    neighbors = answered.nearest(name) if several else None
    if baseline is not None:
        dense = answered.answers[baseline]
        near = cosines(found, dense)
        fields |= {"cosine": float(near.mean()), "cosine_low": float(np.quantile(near, 0.05))}
        if neighbors is not None:
            fields["cosine_centered"] = float(centered_cosines(found, dense).mean())
            fields["neighbors"] = float((neighbors == answered.nearest(baseline)).mean())
    if answered.labels is None or neighbors is None:
        return fields, None
    right = recalled(neighbors, answered.labels)
    if not len(right):
        return fields, None
    low, high = wilson(int(right.sum()), len(right))
    return fields | {"recall": float(right.mean()), "recall_low": low, "recall_high": high}, right
