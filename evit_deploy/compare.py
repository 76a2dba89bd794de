"""Which weights and which way of reducing tokens are right how often: accuracy, and the table that compares them."""

from collections.abc import Callable

import msgspec
import torch
from torch import nn

from evit_deploy.recipe import CompareSection
from evit_deploy.registry import METHODS
from evit_deploy.report import AccuracyRow, accuracy_row
from evit_deploy.tokens.plan import TokenSpec
from evit_deploy.tokens.reduce import reduce_tokens_, token_plan, token_spec
from evit_deploy.training_data import TrainingData

Tell = Callable[[str], None]


@torch.inference_mode()
def evaluate(model: nn.Module, data: TrainingData, batch_size: int = 64, name: str = "model") -> AccuracyRow:
    """Accuracy on the validation images, on the device the model is on.

    Args:
        model: Its mode is left as it was.
        data: Where the images come from.
        batch_size: Images a batch.
        name: Which model, for the row.
    """
    device, training = next(model.parameters()).device, model.training
    model.eval()
    answers = (
        (model(images.to(device)).float().cpu().numpy(), labels.numpy())
        for images, labels in data.validation(batch_size)
    )
    row = accuracy_row(name, answers)
    model.train(training)
    return row


def finetuned_name(spec: TokenSpec) -> str:
    """Name of the fine-tuned model's row."""
    return f"{spec.method} {rate_text(spec.keep_rate)}, fine-tuned"


def compare(
    dense: nn.Module | None,
    evit: nn.Module,
    data: TrainingData,
    section: CompareSection | None = None,
    batch_size: int = 64,
    progress: Tell | None = None,
) -> list[AccuracyRow]:
    """The comparison table: dense, the dense weights with tokens reduced in several ways, the fine-tuned model.

    Only what was evaluated on the same images is comparable, and a gain by fine-tuning is the reduction's merit only
    beside a dense model that was trained as much longer.

    Args:
        dense: The dense model; left dense. ``None`` where the reduced one started from nothing.
        evit: The fine-tuned model; its token spec is that of the table.
        data: Where the images come from.
        section: Which rows to add; by default all that a recipe has by default.
        batch_size: Images a batch.
        progress: Told which row is being evaluated.
    """
    section, spec = section or CompareSection(), token_spec(evit)
    rates = dict.fromkeys([spec.keep_rate, *section.keep_rates])
    methods = (*([spec.method] if section.untrained else []), *section.baselines)
    specs = [(TokenSpec(keep_rate=1.0), "dense")]
    for rate in rates:
        for method in methods:
            reduced = with_method(msgspec.structs.replace(spec, keep_rate=rate), method)
            specs.append((reduced, f"{method} {rate_text(rate)}, not fine-tuned"))
    rows: list[AccuracyRow] = []
    if dense is None:
        return [_row(finetuned_name(spec), evit, data, batch_size, progress)]
    for reduced, name in specs:
        reduce_tokens_(dense, reduced)
        rows.append(_row(name, dense, data, batch_size, progress))
    reduce_tokens_(dense, TokenSpec(keep_rate=1.0))
    return [*rows, _row(finetuned_name(spec), evit, data, batch_size, progress)]


def _row(name: str, model: nn.Module, data: TrainingData, batch_size: int, progress: Tell | None) -> AccuracyRow:
    if progress is not None:
        progress(f"evaluating: {name}")
    return msgspec.structs.replace(evaluate(model, data, batch_size, name), gmacs=token_plan(model).macs() / 1e9)


def with_method(spec: TokenSpec, method: str) -> TokenSpec:
    """The same spec with another method; options stay with the method they belong to.

    Raises:
        InputError: No such method.
    """
    METHODS.get(method)  # an unknown one is refused with the nearest name
    return spec if method == spec.method else msgspec.structs.replace(spec, method=method, options={})


def rate_text(rate: float | tuple[float, ...]) -> str:
    """One rate as it is, several joined by ``/``."""
    return "/".join(f"{part:g}" for part in (rate if isinstance(rate, tuple) else (rate,)))
