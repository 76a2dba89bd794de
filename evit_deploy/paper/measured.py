"""Tables of the paper with figures computed and measured here."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import timm
import torch

from evit_deploy.data.preprocess import Preprocess
from evit_deploy.data.sources.class_folders import Folder
from evit_deploy.data.sources.sources import labeled_batches
from evit_deploy.engines.options import BUILDERS
from evit_deploy.environment.machine import device, versions
from evit_deploy.environment.nvidia import compute_capability
from evit_deploy.errors import InputError
from evit_deploy.export.portable import export_onnx
from evit_deploy.files.drafts import draft
from evit_deploy.models.checkpoint import build_model, preprocess_of, read_checkpoint, set_image_size_
from evit_deploy.models.identify import check_model_name
from evit_deploy.paper.published import PaperRow, PaperTable, paper, published_table
from evit_deploy.profiling.candidates import Candidate
from evit_deploy.profiling.clocks.gpu_times import measure_on_gpu
from evit_deploy.profiling.clocks.turns import MINIMUM_ROUNDS, random_feeds
from evit_deploy.profiling.speedup import ratios_to_dense, row_of
from evit_deploy.profiling.timing import measure_on_cpu
from evit_deploy.progress import doing, step
from evit_deploy.recipe.options import PaperOptions
from evit_deploy.registry import RUNTIMES
from evit_deploy.report.report import AccuracyRow, ProfileRow
from evit_deploy.report.statistics import hits_of, row_of_hits
from evit_deploy.runtimes.select import opened
from evit_deploy.tokens.plan import TokenPlan
from evit_deploy.tokens.reduce import reduce_tokens_, token_plan

_LOG = logging.getLogger(__name__)
_BATCH = 32  # batch size for measuring accuracy


class MeasuredRow(msgspec.Struct, frozen=True):
    """A row of the paper with our figures.

    Args:
        row: The published row.
        gmacs: Multiply-adds per image, in 10⁹, counting every matrix product once.
        speed: Measured speed, if any; with random weights, because speed does not depend on them.
        accuracy: Measured accuracy, if weights and images were given.
    """

    row: PaperRow
    gmacs: float
    speed: ProfileRow | None = None
    accuracy: AccuracyRow | None = None


class MeasuredTable(msgspec.Struct, frozen=True):
    """A table of the paper with our figures.

    Args:
        number: ``2b``.
        title: Title of the table.
        source: The paper.
        rows: The rows in the paper's order.
        notes: Notes on the figures, and on missing ones.
        versions: Package versions.
        device: The machine used.
    """

    number: str
    title: str
    source: str
    rows: tuple[MeasuredRow, ...]
    notes: tuple[str, ...] = ()
    versions: dict[str, str] = {}
    device: dict[str, Any] = {}


def paper_table(
    number: str,
    *,
    options: PaperOptions | None = None,
    weights: Mapping[str, str | Path] | None = None,
    data: str | Path | None = None,
) -> MeasuredTable:
    """Computes and measures the figures of a table of the EViT paper.

    Multiply-adds are always computed. Throughput is measured if the options request it, with all rows in turn. Accuracy
    is measured with PyTorch in FP32, for the rows with given weights.

    Args:
        number: ``1``, ``2a``, ``2b``, ``3a``, ``3b``, ``4``, ``5``, ``6a``, ``6b`` or ``7``.
        options: Whether and how throughput is measured.
        weights: Row name -> checkpoint; in table 1, all rows share ``DeiT-S``.
        data: Folder of labeled images (class/image) for accuracy, with one folder for each class of the models.

    Raises:
        InputError: Unknown table or row, weights without images or images without weights, or weights or images that do
            not fit.
        MissingRequirement: The runtime is not installed.
    """
    table, options = published_table(number), options or PaperOptions()
    given = {name: Path(file) for name, file in (weights or {}).items()}
    _check(table, options, given, data)
    plans = [_plan(row) for row in table.rows]
    accuracy = _accuracies(table, given, Folder(data)) if data is not None else {}
    speeds = _speeds(table.rows, plans, options) if options.throughput else {}
    rows = tuple(
        MeasuredRow(row, plan.macs() / 1e9, speeds.get(row.name), accuracy.get(row.name))
        for row, plan in zip(table.rows, plans, strict=True)
    )
    notes = (paper().conditions, paper().counting, *table.notes, *_missing(rows))
    return MeasuredTable(number, table.title, paper().source, rows, notes, versions(), device())


def _check(table: PaperTable, options: PaperOptions, weights: Mapping[str, Path], data: str | Path | None) -> None:
    """Refuses impossible measurements before any work."""
    names = list(dict.fromkeys(row.takes for row in table.rows))
    strange = next((name for name in weights if name not in names), None)
    if strange is not None:
        raise InputError(
            "no row of the table uses these weights", where="--weights", seen=strange, wanted="; ".join(names)
        )
    if bool(weights) != (data is not None):
        fix = "Give --data DIR too." if weights else "Give --weights NAME=FILE too."
        raise InputError("accuracy needs weights and labeled images", fix=fix)
    if options.throughput and options.runtime in BUILDERS:
        raise InputError(
            "throughput is measured only on runtimes that need no engine", where="--runtime", seen=options.runtime,
            fix="For engines: evit-deploy run a100.",
        )  # fmt: skip
    if options.throughput:
        runtime = RUNTIMES.get(options.runtime)
        if runtime.served:
            raise InputError("throughput is measured here, not on a server", where="--runtime", seen=options.runtime)
        missing = runtime.missing()
        if missing is not None:
            raise missing


def _model(row: PaperRow) -> torch.nn.Module:
    """The reduced model of a row, with random weights from a fixed seed."""
    torch.manual_seed(0)
    check_model_name(row.model, where="published.json")  # also registers our models with timm
    model = timm.create_model(row.model).eval()
    if row.image_size is not None:
        set_image_size_(model, row.image_size)
    return reduce_tokens_(model, row.tokens)


def _plan(row: PaperRow) -> TokenPlan:
    doing(_LOG, f"counting the multiply-adds of {row.name}")
    with torch.device("meta"):  # shapes are enough
        return token_plan(_model(row))


def _speeds(rows: Sequence[PaperRow], plans: Sequence[TokenPlan], options: PaperOptions) -> dict[str, ProfileRow]:
    """Measures the speed of all rows in turn."""
    runtime, on_gpu = options.runtime, False
    place = torch.device("cuda" if compute_capability() else "cpu")
    with draft() as scratch, ExitStack() as stack:
        runners = []
        for row in rows:
            doing(_LOG, f"{row.name}: preparing {runtime}")
            model = _model(row)
            artifact: Any = scratch.folder / f"{len(runners)}.onnx"
            if RUNTIMES.get(runtime).files:
                onnx.save(export_onnx(model, name=row.model, preprocess=Preprocess.from_model(model)), artifact)
            else:
                artifact = model.to(place)
            on_gpu = Candidate(runtime, row.name, artifact).on_gpu
            runners.append(stack.enter_context(opened(runtime, artifact, options.threads)))
        batch = options.batch or (128 if on_gpu else 8)
        doing(_LOG, f"measuring {len(runners)} rows in turn")
        if on_gpu:
            times = measure_on_gpu(runners, random_feeds(runners, batch), options.duration, MINIMUM_ROUNDS)
        else:
            times = measure_on_cpu(runners, batch, options.duration, MINIMUM_ROUNDS, options.threads)
    dense = times[0] if rows[0].dense else None
    found = {}
    for row, plan, own in zip(rows, plans, times, strict=True):
        ratios = {} if row.dense else ratios_to_dense(dense, own, plan)
        measured = row_of(runtime, row.name, batch, own, on_gpu=on_gpu)
        found[row.name] = msgspec.structs.replace(measured, **ratios)
    return found


def _accuracies(table: PaperTable, weights: Mapping[str, Path], folder: Folder) -> dict[str, AccuracyRow]:
    return {row.name: _accuracy(row, weights[row.takes], folder) for row in table.rows if row.takes in weights}


def _accuracy(row: PaperRow, file: Path, folder: Folder) -> AccuracyRow:
    checkpoint = read_checkpoint(file)
    if checkpoint.model != row.model and row.model not in _alike(checkpoint.model):
        raise InputError(
            f"these are not the weights of {row.name}", where=file, seen=checkpoint.model, wanted=row.model
        )
    model = build_model(checkpoint, row.image_size)
    preprocess = preprocess_of(checkpoint, model)
    model = reduce_tokens_(model, row.tokens).eval()
    hits = []
    with torch.inference_mode():
        for images, labels in labeled_batches(folder, preprocess, _BATCH):
            step(_LOG, f"{row.name}: answering the images", len(hits) * _BATCH, len(folder))
            logits = model(torch.from_numpy(images)).numpy()
            if logits.shape[1] != len(folder.classes):
                raise InputError(
                    "the class folders are not the model's classes", where="--data", seen=len(folder.classes),
                    wanted=f"{logits.shape[1]} folders, as {file} has classes",
                )  # fmt: skip
            hits.append(hits_of(logits, labels))
    return row_of_hits(row.name, np.concatenate(hits))


def _alike(name: str) -> tuple[str, ...]:
    """Architectures with the same tensors as the identified one."""
    same = name.replace("vit_", "deit_", 1) if name.startswith("vit_") else name.replace("deit_", "vit_", 1)
    return (same,)


def _missing(rows: Sequence[MeasuredRow]) -> Iterator[str]:
    """Describes what was not measured, and how to measure it."""
    if all(row.speed is None for row in rows):
        yield "Throughput here is missing: --throughput measures it."
    lacking = list(dict.fromkeys(row.row.takes for row in rows if row.accuracy is None))
    if lacking:
        names = "; ".join(lacking)
        yield f"Accuracy here is missing, for want of weights (--weights NAME=FILE) and images (--data): {names}."
