"""What fewer tokens cost: a model's answers beside its dense twin's, to the same images, on the same runtime."""

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
"""What the two rows are called; profile rows call their variants so."""


class Pair(msgspec.Struct, frozen=True):
    """A reduced model and its dense twin on one runtime.

    Args:
        runtime: Name in the registry of runtimes.
        model: What it runs.
        dense: The twin; ``None`` if there is no twin, such as on a server.
    """

    runtime: str
    model: Any
    dense: Any


class Answered(msgspec.Struct, frozen=True):
    """What was answered to the images.

    Args:
        runtime: What answered.
        answers: Logits ``[n, classes]`` or embeddings ``[n, width]`` of every model and dense twin, by name.
        labels: int64 ``[n]``, where they are known.
        embeds: Whether the answers are embeddings.
    """

    runtime: str
    answers: Mapping[str, np.ndarray]
    labels: np.ndarray | None
    embeds: bool = False
    _nearest: dict[str, np.ndarray] = {}

    def nearest(self, name: str) -> np.ndarray:
        """For each image the one whose embedding is nearest in one model's answers; found once."""
        if name not in self._nearest:
            self._nearest[name] = nearest(self.answers[name])
        return self._nearest[name]


def side_by_side(
    pair: Pair, manifest: Manifest, pictures: Pictures, threads: int | None = None
) -> tuple[Report, Answers]:
    """Shows the images to a model and its dense twin, which read each of them once.

    Args:
        pair: The two.
        manifest: Of their bundle.
        pictures: The images.
        threads: CPU threads.

    Returns:
        A row for each of the two, and what the reduced one answered and kept.

    Raises:
        InputError: An image cannot be read, or the runtime cannot run one of the two.
        MissingRequirement: The runtime is not here.
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
    """What the runtime computes in: of a file its own, of a PyTorch model the type of its weights."""
    if not isinstance(artifact, torch.nn.Module):
        return manifest.precision
    kinds = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
    kind = next(artifact.parameters()).dtype
    return kinds.get(kind, str(kind).removeprefix("torch."))


def dense_of(model: Any, dense: Any) -> Any:
    """The twin of what a runtime runs: of a file the bundle's, of a PyTorch model one of the same weights."""
    return dense_twin(model) if isinstance(model, torch.nn.Module) else dense


def _rows_of(manifest: Manifest, precision: str, answered: Answered) -> tuple[ComparedRow, ...]:
    rows = []
    if DENSE_NAME in answered.answers:
        rows.append(row_of_plan(DENSE_NAME, "dense", "", precision, manifest.plan.dense()))
    row = row_of_plan(MODEL_NAME, manifest.kind, settings_of(manifest.tokens), precision, manifest.plan)
    rows.append(msgspec.structs.replace(row, dense=DENSE_NAME if rows else None))
    return tuple(with_answers(row, None, answered) for row in rows)


def row_of_plan(name: str, method: str, settings: str, precision: str, plan: TokenPlan) -> ComparedRow:
    """What a model is; nothing of its answers yet.

    Args:
        name: What its rows are called.
        method: How its tokens are reduced.
        settings: See :func:`settings_of`.
        precision: What it computes in.
        plan: Its token counts.
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
    """The settings of a method that are not its defaults.

    >>> settings_of(TokenSpec(keep_rate=0.7, fuse=False))
    'keep_rate=0.7, fuse=no'
    """
    defaults = {field.name: field.default for field in msgspec.structs.fields(TokenSpec)}
    told = {}
    for field, value in msgspec.structs.asdict(spec).items():
        if field not in ("method", "options") and value is not None and value != defaults[field]:
            told[field] = value
    return ", ".join(f"{field}={_text(value)}" for field, value in (told | spec.options).items())


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return "/".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def with_answers(row: ComparedRow, reference: str | None, answered: Answered | None) -> ComparedRow:
    """Adds to a row how right its answers are, and what they differ in from those it is to be held against.

    Args:
        row: Of a model or a dense twin; :attr:`~ComparedRow.dense` names the baseline.
        reference: Name of the bundle that the others are held against, if any.
        answered: What was answered to the images, if there were any.
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
            assert others is not None  # the labels are the same
            changes[field] = difference(other, right, others)
    return msgspec.structs.replace(row, **changes)


def _class_fields(name: str, baseline: str | None, answered: Answered) -> tuple[dict[str, Any], np.ndarray | None]:
    """Fields of a row about classes, and of each image whether the class was right."""
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
    """Fields of a row about embeddings, and of each image whether the nearest other one is of its class.

    Only images whose class has another image take part in the latter.
    """
    found, fields = answered.answers[name], {}
    several = len(found) > 1  # one image has no other, and the mean of one is that one
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
