"""Tests the scores: answers if patches are removed by score, at random, or in inverse order.

This is the experiment in figure 1 of the EViT paper (arXiv 2202.07800): removing the patches with the least attention
hardly changes the answers, while removing those with the most does.
"""

import csv
import io
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Unpack

import msgspec
import numpy as np
import torch
from torch import nn

from evit_deploy import progress
from evit_deploy.charts.kinds import Axes, Point, lines
from evit_deploy.charts.svg import standalone
from evit_deploy.data.images import EXTENSIONS
from evit_deploy.data.preprocess import Preprocess
from evit_deploy.data.sources.class_folders import class_folders, is_labeled
from evit_deploy.errors import InputError
from evit_deploy.inference.choice import asked_for
from evit_deploy.inference.inputs import Given, image_paths
from evit_deploy.inference.model import checked_bundle
from evit_deploy.models.checkpoint import build_model, preprocess_of, read_checkpoint, resolve_tokens
from evit_deploy.registry import METHODS
from evit_deploy.report.html import html_table
from evit_deploy.report.statistics import wilson
from evit_deploy.runtimes.fp32 import fp32_products
from evit_deploy.tokens.backbone import backbone_of, copy_sharing_weights
from evit_deploy.tokens.ending import for_inference
from evit_deploy.tokens.plan import TokenOptions, TokenSpec
from evit_deploy.tokens.reduce import dense_twin, reduce_tokens_, token_plan
from evit_deploy.verification.answers.pictures import pictures_for
from evit_deploy.verification.answers.retrieval import centered_cosines
from evit_deploy.visualization.subject import is_bundle

_LOG = logging.getLogger(__name__)
RATES = (0.9, 0.7, 0.5, 0.3)
SAMPLE = 64
DRAWS = 3
"""Number of random draws to average."""
_BATCH = 16
_BY_SCORE, _AT_RANDOM, _INVERSE = "least attended first", "at random", "most attended first"
_MEANS = {_BY_SCORE: "evit", _AT_RANDOM: "random", _INVERSE: "inverse"}


class CurvePoint(msgspec.Struct, frozen=True):
    """Result at one keep rate, with patches removed in one order.

    Args:
        removed: ``least attended first``, ``at random``, ``most attended first``, or a method's name.
        keep_rate: Fraction of the candidates that each location keeps.
        tokens: Patches and fused tokens after the last location.
        gmacs: Multiply-adds per image, in 10⁹.
        images: Number of images.
        agreement: Fraction with the same class as the dense model; ``None`` for a model without classes.
        agreement_low: Lower end of its 95 % interval over the images.
        agreement_high: Upper end.
        cosine: Centered cosine to the dense model's embedding, mean over the images; ``None`` for a model with classes.
        top1: Fraction with the correct class, if labels are known.
        top1_low: Lower end of its 95 % interval over the images.
        top1_high: Upper end.
    """

    removed: str
    keep_rate: float
    tokens: int
    gmacs: float
    images: int
    agreement: float | None = None
    agreement_low: float | None = None
    agreement_high: float | None = None
    cosine: float | None = None
    top1: float | None = None
    top1_low: float | None = None
    top1_high: float | None = None


class RemovalCurve(msgspec.Struct, frozen=True):
    """Results at several keep rates and orders of removal; displayed as a chart and a table in notebooks.

    Args:
        about: Short description of the model.
        locations: Blocks that remove patches.
        images: Number of images.
        points: By order of removal, the highest keep rate first.
        dense_top1: Top-1 of the dense model, if labels are known.
        notes: Sentences for the reader.
    """

    about: str
    locations: tuple[int, ...]
    images: int
    points: tuple[CurvePoint, ...]
    dense_top1: float | None = None
    notes: tuple[str, ...] = ()

    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Titles and cells, with a row per keep rate and a column per order of removal."""
        orders = tuple(dict.fromkeys(point.removed for point in self.points))
        found = {(point.removed, point.keep_rate): point for point in self.points}
        rates = tuple(dict.fromkeys(point.keep_rate for point in self.points))
        first = [found[orders[0], rate] for rate in rates]
        rows = [
            (f"{p.keep_rate:g}", str(p.tokens), f"{p.gmacs:.3g}", *(_cell(found.get((o, p.keep_rate))) for o in orders))
            for p in first
        ]
        return ("keep rate", "tokens", "GMACs", *orders), rows

    def csv(self) -> str:
        """CSV with one line per point."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(CurvePoint.__struct_fields__)
        for point in self.points:
            values = msgspec.structs.astuple(point)
            writer.writerow(["" if v is None else f"{v:.6g}" if isinstance(v, float) else v for v in values])
        return text.getvalue()

    def svg(self) -> str:
        """SVG chart of top-1 if labels are known, else of agreement with the dense model, or of the cosine to it."""
        return standalone(self._chart())

    def _chart(self) -> str:
        axes = Axes(x="keep rate at each location", y=self.measure, line=self.dense_top1, percent=not self._cosines)
        values = [
            Point(
                point.keep_rate, value, f"{point.removed}, {point.keep_rate:g}: {value:.3f}", point.removed, low, high
            )
            for point in self.points
            for value, low, high in [_measured(point)]
        ]
        return lines(values, axes, f"{self.about}: {self.measure}, by the order in which patches are removed")

    @property
    def measure(self) -> str:
        """Name of the measure in the chart and the table."""
        if self.dense_top1 is not None:
            return "top-1"
        return "centered cosine to the dense model" if self._cosines else "same class as the dense model"

    @property
    def caption(self) -> str:
        """Explains the cells of the table."""
        if self.dense_top1 is None:
            return self.measure if self._cosines else "% with the dense model's class"
        return f"top-1 %, in brackets % with the dense model's class; dense {100 * self.dense_top1:.1f} %"

    @property
    def _cosines(self) -> bool:
        return self.points[0].cosine is not None

    def _repr_html_(self) -> str:
        return self.svg() + html_table(*self.table(), f"{self.about}: {self.caption}")


def removal_curve(
    source: str | Path,
    images: str | Path | Iterable[str | Path],
    *,
    rates: Sequence[float] = RATES,
    sample: int = SAMPLE,
    against: str | Path | None = None,
    model: str | None = None,
    **tokens: Unpack[TokenOptions],
) -> RemovalCurve:
    """Removes patches by score, at random and in inverse order, at several keep rates, in PyTorch without training.

    Args:
        source: A bundle, whose checkpoint is used, or a checkpoint.
        images: Files, and folders, which are searched recursively. A single folder with one folder per class of the
            model also provides labels.
        rates: Keep rates of each location.
        sample: Maximum number of images, evenly spaced among all.
        against: Current path of the bundle's checkpoint, if it was moved.
        model: For a checkpoint: timm name of the architecture.
        tokens: For a checkpoint: ``locations``, ``fuse``, and a ``method`` to compare with.

    Raises:
        InputError: The source or an image cannot be used, or the model cannot be reduced.
    """
    _check(rates, sample)
    asked = _of_bundle(source, against, tokens, model) if is_bundle(source) else _of_checkpoint(source, tokens, model)
    given = _images([images] if isinstance(images, str | Path) else list(images), asked, sample)
    return _measure(asked, given, sorted(set(rates), reverse=True))


class _Asked(msgspec.Struct, frozen=True):
    """The dense model and how its tokens are reduced."""

    about: str
    dense: Any
    spec: TokenSpec
    preprocess: Preprocess
    labels: list[str] | None

    @property
    def classes(self) -> int | None:
        """Number of classes; ``None`` for none."""
        return int(getattr(self.dense, "num_classes", 0)) or None


class _Images(msgspec.Struct, frozen=True):
    """The images, and their labels if known."""

    given: Given
    labels: np.ndarray | None
    notes: tuple[str, ...]


def _check(rates: Sequence[float], sample: int) -> None:
    strange = next((rate for rate in rates if not 0 < rate < 1), None)
    if strange is not None or not rates:
        raise InputError(
            "not a keep rate at which patches are removed", where="rates", seen=strange, wanted="0 < rate < 1"
        )
    if sample < 1:
        raise InputError("no images to answer", where="sample", seen=sample, wanted="a whole number from 1 up")


def _of_bundle(source: str | Path, against: str | Path | None, tokens: TokenOptions, model: str | None) -> _Asked:
    if tokens or model is not None:
        name = "model" if model is not None else next(iter(tokens))
        raise InputError("the options of a bundle are fixed", where=name, fix=f"Leave {name} out.")
    bundle = checked_bundle(source)
    manifest = bundle.manifest
    parent = asked_for(bundle, "eager", None if against is None else Path(against))
    return _Asked(manifest.model, dense_twin(parent), manifest.tokens, manifest.preprocess, manifest.labels)


def _of_checkpoint(source: str | Path, tokens: TokenOptions, model: str | None) -> _Asked:
    if "keep_rate" in tokens:
        raise InputError("a curve has separate keep rates", where="keep_rate", fix="Give rates.")
    checkpoint = read_checkpoint(source, model)
    spec, notes = resolve_tokens(checkpoint, **{"keep_rate": RATES[0], **tokens})
    for note in (*checkpoint.notes, *notes):
        _LOG.warning(note)
    built = build_model(checkpoint)
    built = built.to("cuda") if torch.cuda.is_available() else built
    return _Asked(checkpoint.model, built, spec, preprocess_of(checkpoint, built), checkpoint.labels)


def _images(paths: Sequence[str | Path], asked: _Asked, sample: int) -> _Images:
    backbone = backbone_of(asked.dense)
    shape = (backbone.channels(asked.dense), *backbone.image_size(asked.dense))
    labels, notes = None, ()
    only = Path(paths[0]) if len(paths) == 1 else None
    if only is not None and _holds_classes(only, asked):
        pictures = pictures_for(only, asked.labels, asked.classes)
        assert pictures.folder is not None
        files, labels, notes = pictures.folder.files, np.array(pictures.folder.labels), pictures.notes
    else:
        files = tuple(image_paths(paths))
    chosen = np.unique(np.linspace(0, len(files) - 1, min(sample, len(files))).astype(int))
    labels = labels[chosen] if labels is not None else None
    return _Images(Given([files[number] for number in chosen], asked.preprocess, shape), labels, notes)


def _holds_classes(folder: Path, asked: _Asked) -> bool:
    """Whether a folder's subfolders are the model's classes: by name, or by number."""
    if asked.classes is None or not folder.is_dir() or not is_labeled(folder):
        return False
    names = class_folders(folder)
    named = bool(names) and asked.labels is not None and set(names) <= set(asked.labels)
    return (named or len(names) == asked.classes) and not any(
        file.suffix.lower() in EXTENSIONS for file in folder.iterdir() if file.is_file()
    )


def _measure(asked: _Asked, images: _Images, rates: Sequence[float]) -> RemovalCurve:
    """Runs every model on every batch, so that memory does not grow with the number of images."""
    reduced = list(_reduced(asked, rates))
    models = [for_inference(asked.dense), *(for_inference(model) for _, _, model in reduced)]
    found: list[list[np.ndarray]] = [[] for _ in models]
    for start in range(0, len(images.given), _BATCH):
        progress.step(_LOG, "removing patches", start, len(images.given))
        inputs, unusable = images.given.prepared(start, min(start + _BATCH, len(images.given)))
        if unusable:
            raise next(iter(unusable.values()))
        for model, answers in zip(models, found, strict=True):
            said = _answers(model, inputs)
            answers.append(said if asked.classes is None else said.argmax(axis=1))
    dense, *others = (np.concatenate(answers) for answers in found)
    points: dict[tuple[str, float], list[tuple[np.ndarray, Any]]] = {}
    for (order, rate, model), answers in zip(reduced, others, strict=True):
        points.setdefault((order, rate), []).append((answers, token_plan(model)))
    right = None if images.labels is None else float((dense == images.labels).mean())
    return RemovalCurve(
        about=asked.about,
        locations=tuple(row.block for row in token_plan(reduced[0][2]).locations),
        images=len(images.given),
        points=tuple(_point(*key, draws, dense, images.labels) for key, draws in points.items()),
        dense_top1=right,
        notes=images.notes,
    )


def _reduced(asked: _Asked, rates: Sequence[float]) -> Iterable[tuple[str, float, nn.Module]]:
    """Yields order of removal, keep rate and model; the random order several times."""
    own, spec = METHODS.get(asked.spec.method), asked.spec
    locations, fuse = spec.locations, spec.fuse or not own.fuses
    orders = [
        (order, TokenSpec(locations=locations, fuse=fuse, method=method, options=options))
        for order, method in _MEANS.items()
        for options in ([{"seed": seed} for seed in range(DRAWS)] if method == "random" else [{}])
    ]
    if spec.method not in _MEANS.values() and own.takes_keep_rate and not own.needs_own_weights:
        orders.append((spec.method, spec))
    for order, spec in orders:
        for rate in rates:
            at_rate = msgspec.structs.replace(spec, keep_rate=rate)
            yield order, rate, reduce_tokens_(copy_sharing_weights(asked.dense), at_rate)


def _answers(model: nn.Module, inputs: np.ndarray) -> np.ndarray:
    parameter = next(model.parameters())
    with torch.inference_mode(), fp32_products(tf32=False):
        return model(torch.from_numpy(inputs).to(parameter.device, parameter.dtype)).float().cpu().numpy()


def _point(
    removed: str, rate: float, draws: list[tuple[np.ndarray, Any]], dense: np.ndarray, labels: np.ndarray | None
) -> CurvePoint:
    plan = draws[0][1]
    last = plan.blocks[-1]
    point = CurvePoint(removed, rate, last.tokens_out - plan.prefix, plan.macs() / 1e9, len(dense))
    if dense.ndim == 2:
        cosine = float(np.mean([centered_cosines(answers, dense).mean() for answers, _ in draws]))
        return msgspec.structs.replace(point, cosine=cosine)
    values: dict[str, Any] = {}
    for name, wanted in (("agreement", dense), ("top1", labels)):
        if wanted is not None:
            share = float(np.mean([(answers == wanted).mean() for answers, _ in draws]))
            values[name] = share
            values[f"{name}_low"], values[f"{name}_high"] = wilson(round(share * len(wanted)), len(wanted))
    return msgspec.structs.replace(point, **values)


def _measured(point: CurvePoint) -> tuple[float, float | None, float | None]:
    """The displayed value of a point, with its interval."""
    if point.cosine is not None:
        return point.cosine, None, None
    if point.top1 is not None:
        return point.top1, point.top1_low, point.top1_high
    assert point.agreement is not None
    return point.agreement, point.agreement_low, point.agreement_high


def _cell(point: CurvePoint | None) -> str:
    if point is None:
        return ""
    value = _measured(point)[0]
    if point.cosine is not None:
        return f"{value:.3f}"
    agreement = "" if point.top1 is None or point.agreement is None else f" ({100 * point.agreement:.1f})"
    return f"{100 * value:.1f}{agreement}"
