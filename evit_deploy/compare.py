"""Which weights and which way of reducing tokens are right how often: accuracy, and the table that compares them."""

from collections.abc import Callable

import msgspec
import torch
from torch import nn

from evit_deploy.recipe import CompareSection
from evit_deploy.registry import METHODS
from evit_deploy.report import AccuracyRow, wilson
from evit_deploy.tokens.plan import TokenSpec
from evit_deploy.tokens.reduce import reduce_tokens_, token_plan, token_spec
from evit_deploy.training_data import TrainingData

Tell = Callable[[str], None]


class Accuracy(msgspec.Struct, frozen=True):
    """How often a model was right.

    Args:
        top1: Share of images whose label came first.
        top5: Share of images whose label was among the first five.
        count: Images.
    """

    top1: float
    top5: float
    count: int


@torch.inference_mode()
def evaluate(model: nn.Module, data: TrainingData, batch_size: int = 64) -> Accuracy:
    """Accuracy on the validation images, on the device the model is on.

    Args:
        model: Its mode is left as it was.
        data: Where the images come from.
        batch_size: Images a batch.
    """
    device, training = next(model.parameters()).device, model.training
    model.eval()
    right1 = right5 = count = 0
    for images, labels in data.validation(batch_size):
        logits = model(images.to(device))
        order = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = order == labels.to(device).unsqueeze(1)
        right1, right5, count = right1 + int(hits[:, 0].sum()), right5 + int(hits.any(1).sum()), count + len(labels)
    model.train(training)
    return Accuracy(right1 / count, right5 / count, count)


def finetuned_name(spec: TokenSpec) -> str:
    """Name of the fine-tuned model's row."""
    return f"{spec.method} {rate_text(spec.keep_rate)}, fine-tuned"


def compare(
    dense: nn.Module,
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
        dense: The dense model; left dense.
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
    rows = []
    for reduced, name in specs:
        reduce_tokens_(dense, reduced)
        rows.append(_row(name, dense, data, batch_size, progress))
    reduce_tokens_(dense, TokenSpec(keep_rate=1.0))
    return [*rows, _row(finetuned_name(spec), evit, data, batch_size, progress)]


def _row(name: str, model: nn.Module, data: TrainingData, batch_size: int, progress: Tell | None) -> AccuracyRow:
    if progress is not None:
        progress(f"evaluating: {name}")
    found = evaluate(model, data, batch_size)
    low, high = wilson(round(found.top1 * found.count), found.count)
    return AccuracyRow(name, found.top1, found.top5, found.count, low, high, token_plan(model).macs() / 1e9)


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
