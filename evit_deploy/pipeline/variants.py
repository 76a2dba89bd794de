"""Converts a checkpoint at several keep rates and precisions; the weights, dense twin and golden answers are shared."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

import msgspec

from evit_deploy.bundle.bundle import Bundle
from evit_deploy.errors import InputError
from evit_deploy.export.precision import QUANTIZED
from evit_deploy.models.checkpoint import read_checkpoint, resolve_tokens
from evit_deploy.pipeline.convert import (
    FIRST_LOOK,
    Converted,
    Job,
    Variant,
    check_folders,
    check_method,
    convert_all,
    default_out,
    label_by_folders,
    stages_of,
)
from evit_deploy.pipeline.lowering import Lowering, lowering
from evit_deploy.progress import stage, stages
from evit_deploy.recipe.options import ConvertOptions, ProfileOptions
from evit_deploy.report.report import Report
from evit_deploy.tokens.plan import TokenOptions
from evit_deploy.tokens.reduce import token_label

_LOG = logging.getLogger(__name__)


class VariantOptions(TokenOptions, total=False):
    """Keep rates and precisions of the variants, and the fields of ``TokenSpec`` that all of them share."""

    keep_rates: Sequence[float | tuple[float, ...]]
    precisions: Sequence[str]


def convert_variants(
    source: str | Path,
    *,
    model: str | None = None,
    image_size: int | None = None,
    options: ConvertOptions | None = None,
    measure: ProfileOptions = FIRST_LOOK,
    out: str | Path | None = None,
    force: bool = False,
    **variants: Unpack[VariantOptions],
) -> list[tuple[Bundle, Report]]:
    """Creates a bundle for every keep rate and precision, like :func:`convert` for one.

    Args:
        source: Checkpoint file or timm name.
        model: See :func:`convert`.
        image_size: See :func:`convert`.
        options: Options of every bundle; calibration images are used by those precisions that need them.
        measure: How to measure speed; variants of one precision are measured in turn if memory allows.
        out: Folder for the bundles, each named ``<stem>-<method>-k<rate>``, with ``-<precision>`` if there are several.
            Default: next to the checkpoint.
        force: Whether to replace existing bundles.
        variants: ``keep_rates=(0.9, 0.7)``, ``precisions=("fp32", "fp16")``, and the fields of
            :class:`~evit_deploy.tokens.plan.TokenSpec` that :func:`convert` accepts.

    Returns:
        A (bundle, report) pair for each, in the order of the rates, and for each rate in the order of the precisions.
        If a check failed (``report.passed`` is false), that bundle is in ``<out>.rejected``; the others are not
        affected.

    Raises:
        InputError: The input cannot be used, or two bundles would have the same folder; nothing was written.
        MissingRequirement: A package or a GPU that a target needs is missing; nothing was written.
        StageError: Exporting or writing failed; nothing was written.
    """
    place = Path(out) if out is not None else None
    found = make_variants(source, (model, image_size), options, measure, place, force, variants)
    return [(one.bundle, one.report) for one in found]


def make_variants(
    source: str | Path,
    read_as: tuple[str | None, int | None],
    options: ConvertOptions | None,
    measure: ProfileOptions,
    out: Path | None,
    force: bool,
    asked: VariantOptions,
) -> list[Converted]:
    """Does the work of :func:`convert_variants`, and also reports where rejected bundles are.

    ``read_as`` is (model, image size).
    """
    tokens: dict[str, Any] = {**asked}
    rates, precisions = tokens.pop("keep_rates", ()), tokens.pop("precisions", ())
    if rates and "keep_rate" in tokens:
        raise InputError(
            "keep_rate is for one model, keep_rates for several", where="--keep-rate",
            seen=tokens["keep_rate"], fix="Give one of the two.",
        )  # fmt: skip
    fields: list[Any] = [tokens | {"keep_rate": rate} for rate in rates] or [tokens]
    for one in fields:
        check_method(one)
    options = options or ConvertOptions()
    made = [_lowering(options, precision, precisions) for precision in precisions or (None,)]
    calibration = check_folders(options)
    count = len(fields) * sum(stages_of(one) - 1 for one in made)
    with stages(1 + count):
        stage(_LOG, "reading the checkpoint")
        model, image_size = read_as
        checkpoint = read_checkpoint(source, model, options.preprocess)
        label_by_folders(checkpoint, options.data)
        chosen = []
        for one in fields:
            spec, notes = resolve_tokens(checkpoint, **one)
            usual = default_out(checkpoint, spec)
            for lowered in made:
                precise = f"-{lowered.precision}" if len(made) > 1 else ""
                where = (out if out is not None else usual.parent) / f"{usual.name}{precise}"
                job = Job(lowered, image_size, None, measure, where, force, model)
                chosen.append(Variant(spec, job, [*notes, *calibration], f"{token_label(spec)}{precise}"))
        return convert_all(checkpoint, chosen)


def _lowering(options: ConvertOptions, precision: str | None, among: Sequence[str]) -> Lowering:
    """Settings for one of several precisions; options of quantization are dropped if only the others are quantized."""
    if precision is not None:
        options = msgspec.structs.replace(options, precision=precision)
    if precision not in QUANTIZED and any(other in QUANTIZED for other in among):
        options = msgspec.structs.replace(
            options, calibration=None, keep_precision=(), max_drop=None, sensitivity=False
        )
    return lowering(options)
