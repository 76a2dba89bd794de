"""Which weights and which way of reducing tokens are right how often: accuracy, and the table that compares them."""

import logging

import msgspec
import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn

from evit_deploy.data.training_data import TrainingData
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
    """Accuracy on the validation images, on the device the model is on; of several processes each takes a share.

    Args:
        model: Its mode is left as it was.
        data: Where the images come from.
        batch_size: Images a batch.
        name: Which model, for the row.
    """
    return evaluate_each(model, data, batch_size, name)[0]


@torch.inference_mode()
def evaluate_each(model: nn.Module, data: TrainingData, batch_size: int, name: str) -> tuple[AccuracyRow, np.ndarray]:
    """:func:`evaluate`'s row, and for every validation image whether it was classified correctly, bool ``[images]``."""
    device, training = next(model.parameters()).device, model.training
    model.eval()
    processes = PartialState()
    hits: list[np.ndarray] = []
    for images, labels in data.validation(batch_size, rank=processes.process_index, world=processes.num_processes):
        hits.append(hits_of(model(images.to(device)).float().cpu().numpy(), labels.numpy()))
    model.train(training)
    if processes.num_processes > 1:  # whole images, none of them twice: nothing is padded
        hits = gather_object(hits)
    together = np.concatenate(hits)
    return row_of_hits(name, together), together[:, 0]


def untrained_name(spec: TokenSpec) -> str:
    """Name of the row of the dense weights whose tokens are reduced."""
    return f"{_settings(spec)}, not fine-tuned"


def finetuned_name(spec: TokenSpec) -> str:
    """Name of the fine-tuned model's row."""
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
    """The comparison table: dense, the dense weights with tokens reduced in several ways, the fine-tuned model.

    Every row has its paired difference to another: a baseline to the recipe's own method at the same rate on the same
    weights, all others to the dense model; the fine-tuned model's has one to what it started from as well. Only what
    was evaluated on the same images is comparable, and a gain by fine-tuning is the reduction's merit only beside a
    dense model that was trained as much longer.

    Args:
        dense: The dense model; left dense. ``None`` where the reduced one started from nothing.
        evit: The fine-tuned model; its token spec is that of the table.
        data: Where the images come from.
        section: Which rows to add; by default all that a recipe has by default.
        batch_size: Images a batch.
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
    """The same spec with another method; options stay with the method they belong to.

    Raises:
        InputError: No such method.
    """
    other = METHODS.get(method)  # an unknown one is refused with the nearest name
    if spec.keep_rate is None and other.takes_keep_rate and method != spec.method:
        raise InputError(
            f"{method!r} keeps a share of the patches, and {spec.method!r} gives none to compare it at",
            where="compare.baselines", seen=method, fix="Set compare.baselines=[].",
        )  # fmt: skip
    return spec if method == spec.method else msgspec.structs.replace(spec, method=method, options={})


def rate_text(rate: float | tuple[float, ...]) -> str:
    """One rate as it is, several joined by ``/``."""
    return "/".join(f"{part:g}" for part in (rate if isinstance(rate, tuple) else (rate,)))
