"""Accuracy of the trained models and baselines, and the table that compares them."""

import logging

import msgspec
import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn

from evit_deploy.data.training.training_data import TrainingData
from evit_deploy.errors import InputError
from evit_deploy.progress import doing
from evit_deploy.recipe.recipe import CompareSection
from evit_deploy.registry import METHODS
from evit_deploy.report.report import AccuracyRow
from evit_deploy.report.statistics import difference, hits_of, row_of_hits
from evit_deploy.tokens.plan import TokenSpec
from evit_deploy.tokens.reduce import reduce_tokens_, token_label, token_plan, token_spec

_LOG = logging.getLogger(__name__)

DENSE_NAME = "dense"
"""Name of the dense model's row."""


def evaluate(model: nn.Module, data: TrainingData, batch_size: int = 64, name: str = "model") -> AccuracyRow:
    """Measures accuracy on the validation images, on the model's device; several processes share the images.

    Args:
        model: The model; its train/eval mode is restored afterwards.
        data: Source of the validation images.
        batch_size: Images per batch.
        name: Name of the row.
    """
    return evaluate_each(model, data, batch_size, name)[0]


@torch.inference_mode()
def evaluate_each(model: nn.Module, data: TrainingData, batch_size: int, name: str) -> tuple[AccuracyRow, np.ndarray]:
    """Like :func:`evaluate`, and also returns whether each image was classified correctly, bool ``[images]``."""
    device, training = next(model.parameters()).device, model.training
    model.eval()
    processes = PartialState()
    hits: list[np.ndarray] = []
    for images, labels in data.validation(batch_size, rank=processes.process_index, world=processes.num_processes):
        hits.append(hits_of(model(images.to(device)).float().cpu().numpy(), labels.numpy()))
    model.train(training)
    if processes.num_processes > 1:  # gather_object because the processes may have unequal numbers of images
        hits = gather_object(hits)
    together = np.concatenate(hits)
    return row_of_hits(name, together), together[:, 0]


def untrained_name(spec: TokenSpec) -> str:
    """Name of the row for the dense weights with token reduction."""
    return f"{_settings(spec)}, not fine-tuned"


def finetuned_name(spec: TokenSpec) -> str:
    """Name of the row for the fine-tuned model."""
    return f"{_settings(spec)}, fine-tuned"


def _settings(spec: TokenSpec) -> str:
    return token_label(spec) if spec.keep_rate is None else f"{spec.method} {rate_text(spec.keep_rate)}"


def compare(
    dense: nn.Module | None,
    evit: nn.Module,
    data: TrainingData,
    section: CompareSection | None = None,
    batch_size: int = 64,
) -> list[AccuracyRow]:
    """Creates the comparison table: the dense model, its weights with several token reductions, the fine-tuned model.

    Each row has a paired difference to another row: a baseline to the recipe's method at the same rate and weights, all
    others to the dense model, and the fine-tuned model also to its initial weights. All rows use the same images. Note
    that fine-tuning also trains longer: its gain is due to token reduction only in comparison with a dense model that
    was trained for as long.

    Args:
        dense: The dense model; unchanged on return. ``None`` if the reduced model was trained from scratch.
        evit: The fine-tuned model; its token spec is used for the table.
        data: Source of the validation images.
        section: Rows to add. Default: the defaults of a recipe.
        batch_size: Images per batch.
    """
    section, spec = section or CompareSection(), token_spec(evit)
    rates = dict.fromkeys([spec.keep_rate, *section.keep_rates])
    methods = (*([spec.method] if section.untrained else []), *section.baselines)
    specs: list[tuple[TokenSpec, str, str | None]] = [(TokenSpec(keep_rate=1.0), DENSE_NAME, None)]
    for rate in rates:
        for method in methods:
            own = msgspec.structs.replace(spec, keep_rate=rate)
            reduced = with_method(own, method)
            baseline = section.untrained and method != spec.method
            specs.append((reduced, untrained_name(reduced), untrained_name(own) if baseline else DENSE_NAME))
    rows, right = [], {}

    def add(name: str, model: nn.Module, other: str | None) -> None:
        doing(_LOG, f"evaluating: {name}")
        row, right[name] = evaluate_each(model, data, batch_size, name)
        against = None if other is None else difference(other, right[name], right[other])
        rows.append(msgspec.structs.replace(row, gmacs=token_plan(model).macs() / 1e9, against=against))

    if dense is not None:
        for reduced, name, other in specs:
            reduce_tokens_(dense, reduced)
            add(name, dense, other)
        reduce_tokens_(dense, TokenSpec(keep_rate=1.0))
    add(finetuned_name(spec), evit, DENSE_NAME if dense is not None else None)
    start = untrained_name(spec)
    if start in right:
        gained = difference(start, right[rows[-1].name], right[start])
        rows[-1] = msgspec.structs.replace(rows[-1], gained=gained)
    return rows


def with_method(spec: TokenSpec, method: str) -> TokenSpec:
    """Returns the spec with another method, and without the options of its own.

    Raises:
        InputError: No such method, or the spec has no keep rate for it.
    """
    other = METHODS.get(method)  # raises for an unknown name
    if spec.keep_rate is None and other.takes_keep_rate and method != spec.method:
        raise InputError(
            f"{method!r} keeps a share of the patches, and {spec.method!r} gives none to compare it at",
            where="compare.baselines", seen=method, fix="Set compare.baselines=[].",
        )  # fmt: skip
    return spec if method == spec.method else msgspec.structs.replace(spec, method=method, options={})


def rate_text(rate: float | tuple[float, ...]) -> str:
    """Formats a keep rate; several are joined by ``/``."""
    return "/".join(f"{part:g}" for part in (rate if isinstance(rate, tuple) else (rate,)))
