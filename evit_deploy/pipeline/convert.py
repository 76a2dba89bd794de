"""Converts a checkpoint to a verified, measured bundle."""

import json
import logging
import os
import shlex
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Unpack

import msgspec
import numpy as np
import torch

from evit_deploy.bundle import bundle as bundles
from evit_deploy.bundle.bundle import Bundle, Staging
from evit_deploy.bundle.manifest import GOLDEN, MODEL, PAGE, REPORT, Manifest, Parent, TensorSpec
from evit_deploy.bundle.signature import read_private_key, sign
from evit_deploy.data.images import calibration_images, image_files, sample_inputs
from evit_deploy.data.preprocess import Preprocess
from evit_deploy.data.sources.class_folders import Folder, is_labeled
from evit_deploy.environment.command import commands
from evit_deploy.environment.machine import device, versions
from evit_deploy.errors import InputError
from evit_deploy.export.answer import answer_name, answer_size, has_classes, normalize_
from evit_deploy.export.card import INPUT, LOGITS, kept_name
from evit_deploy.export.precision import QUANTIZED
from evit_deploy.models.checkpoint import Checkpoint, build_model, preprocess_of, read_checkpoint, resolve_tokens
from evit_deploy.models.files import hub
from evit_deploy.models.files.safe_weights import split_part
from evit_deploy.models.files.sources import FILE_SUFFIXES
from evit_deploy.models.preprocessing import described
from evit_deploy.pages.bundle import report_page
from evit_deploy.pages.sections import Picture
from evit_deploy.pipeline.kept import kept_pictures
from evit_deploy.pipeline.lowering import Exports, Lowering, export, lowering, write_targets
from evit_deploy.pipeline.untrained import merging_note
from evit_deploy.profiling.batch_sizes import sizes_within
from evit_deploy.profiling.candidates import bundle_candidates
from evit_deploy.profiling.profile import speed_gate
from evit_deploy.profiling.timing import measure_all, measure_variants
from evit_deploy.progress import doing, stage, stages
from evit_deploy.recipe.options import ConvertOptions, ProfileOptions
from evit_deploy.registry import METHODS
from evit_deploy.report.report import Report
from evit_deploy.targets.target import Exported
from evit_deploy.tokens.backbone import backbone_of, copy_sharing_weights
from evit_deploy.tokens.plan import TokenOptions, TokenPlan, TokenSpec
from evit_deploy.tokens.reduce import dense_twin, reduce_tokens_, token_label, token_plan
from evit_deploy.verification.answers.answers import DATA_BATCH
from evit_deploy.verification.answers.block_errors import block_errors
from evit_deploy.verification.answers.cost import MODEL_NAME
from evit_deploy.verification.answers.pictures import check_images, embeds, pictures_of
from evit_deploy.verification.answers.sensitivity import Shown, of_array
from evit_deploy.verification.golden import Golden, KnownAnswers, make_golden
from evit_deploy.verification.verify import Trial, prove, verify_precision

_LOG = logging.getLogger(__name__)

GOLDEN_IMAGES = 8
CALIBRATION_IMAGES, FEW_IMAGES = 512, 32
# For a first look; `profile` measures longer.
FIRST_BATCHES, PROFILE_ROUNDS = (1, 8), 3
FIRST_LOOK = ProfileOptions(batch_sizes=FIRST_BATCHES, duration=2.0)
# Total bytes of ONNX files up to which several variants are opened together and measured in turn.
_TOGETHER = 2**31
# Methods with their own recipe for fine-tuning.
_RECIPES = {"dynamicvit": ("recipes/paper/dynamicvit-deit-small-0.7.yaml", "--set", "model.name=null")}
# EViT paper, table 1: top-1 of DeiT-S (79.8) with its tokens reduced without training. Valid for this model only.
_DEIT_S, _DEIT_S_TASK = "deit_small_patch16_224", {"img_size": 224, "num_classes": 1000}
_DEIT_S_LOCATIONS = (3, 6, 9)
_UNTRAINED_DEIT_S = {0.9: 79.7, 0.8: 79.2, 0.7: 78.5, 0.6: 76.8, 0.5: 73.8}


class Job(msgspec.Struct, frozen=True):
    """Settings of :func:`convert_checkpoint`.

    Args:
        made: Targets, precision and options.
        image_size: Side of the input in pixels, if not the checkpoint's.
        images: Preprocessed calibration images, float32 ``[n, C, H, W]``, if they do not come from a folder.
        measure: How to measure speed.
        out: Folder for the bundle. Default: :func:`default_out`.
        force: Whether to replace an existing bundle.
        model: timm name that set the architecture, for the manifest.
        recipe: The recipe of the run, for the manifest.
    """

    made: Lowering
    image_size: int | None = None
    images: np.ndarray | None = None
    measure: ProfileOptions = FIRST_LOOK
    out: Path | None = None
    force: bool = False
    model: str | None = None
    recipe: dict[str, Any] | None = None


class Reduced(msgspec.Struct, frozen=True):
    """A reduced model with the facts that the manifest records.

    Args:
        checkpoint: The checkpoint; its weights have been released.
        model: The reduced PyTorch model; ``None`` when it is no longer needed.
        dense: The same model without token reduction; ``None`` likewise.
        spec: The requested token reduction.
        plan: Token counts.
        preprocess: How an image file becomes an input tensor.
        notes: Assumptions to report.
    """

    checkpoint: Checkpoint
    model: Any
    dense: Any
    spec: TokenSpec
    plan: TokenPlan
    preprocess: Preprocess
    notes: list[str]

    @property
    def channels(self) -> int:
        """Channels of the input image."""
        return backbone_of(self.model).channels(self.model)


def convert(
    source: str | Path,
    *,
    model: str | None = None,
    image_size: int | None = None,
    options: ConvertOptions | None = None,
    measure: ProfileOptions = FIRST_LOOK,
    out: str | Path | None = None,
    force: bool = False,
    **tokens: Unpack[TokenOptions],
) -> tuple[Bundle, Report]:
    """Reduces, exports, verifies and profiles a checkpoint, and writes the bundle.

    Args:
        source: File, folder, hub id or timm name, see :func:`~evit_deploy.models.checkpoint.read_checkpoint`.
        model: timm name that sets the architecture.
        image_size: Side of the input in pixels, if not the checkpoint's.
        options: Targets, precision, options of the builder, gates, preprocessing and labels.
        measure: How to measure speed. The default, two seconds for each of two batch sizes, is a first look.
        out: Folder for the bundle. Default: ``<stem>-<method>-k<rate>`` next to the checkpoint.
        force: Whether to replace an existing bundle.
        tokens: Fields of :class:`~evit_deploy.tokens.plan.TokenSpec`, such as ``keep_rate=0.7``. Missing fields come
            from the checkpoint, then from the defaults.

    Returns:
        The bundle on disk and the report.

    Raises:
        InputError: The input cannot be used; nothing was written.
        MissingRequirement: A package or a GPU that a target needs is missing; nothing was written.
        GateFailed: A check failed; the bundle and its report are in ``<out>.rejected``.
        StageError: Exporting or writing failed; nothing was written.
    """
    check_method(tokens)
    made = lowering(options)
    calibration = check_folders(made.options)
    with stages(stages_of(made)):
        stage(_LOG, "reading the checkpoint")
        checkpoint = read_checkpoint(source, model, made.options.preprocess)
        label_by_folders(checkpoint, made.options.data)
        spec, notes = resolve_tokens(checkpoint, **tokens)
        job = Job(made, image_size, None, measure, Path(out) if out is not None else None, force, model)
        return convert_checkpoint(checkpoint, spec, job, [*notes, *calibration])


def convert_checkpoint(
    checkpoint: Checkpoint, spec: TokenSpec, job: Job, notes: Sequence[str] = ()
) -> tuple[Bundle, Report]:
    """Converts a checkpoint that was already read; see :func:`convert`.

    Args:
        checkpoint: Result of :func:`read_checkpoint`; its weights are released.
        spec: Token reduction.
        job: What to create, and where.
        notes: Assumptions so far.

    Returns:
        See :func:`convert`.

    Raises:
        InputError: See :func:`convert`.
        GateFailed: See :func:`convert`.
        StageError: See :func:`convert`.
    """
    (made,) = convert_all(checkpoint, [Variant(spec, job, notes)])
    if made.rejected:
        made.report.raise_if_failed(fix=f"{made.report.failed[0].reason} {made.rejected}".strip())
    return made.bundle, made.report


class Variant(msgspec.Struct, frozen=True):
    """One of the bundles that :func:`convert_all` creates from a checkpoint.

    Args:
        spec: Token reduction.
        job: What to create, and where.
        notes: Assumptions so far.
        label: Distinguishes it from the other variants; empty for a single one.
    """

    spec: TokenSpec
    job: Job
    notes: Sequence[str] = ()
    label: str = ""

    @property
    def prefix(self) -> str:
        """Prefix of the messages about its stages."""
        return f"{self.label}: " if self.label else ""


class Converted(msgspec.Struct, frozen=True):
    """Result of a variant.

    Args:
        variant: The variant.
        bundle: The bundle; if a check failed, the one in ``<out>.rejected``.
        report: Checks and measurements.
        rejected: If a check failed, a sentence that says where the rejected bundle is.
    """

    variant: Variant
    bundle: Bundle
    report: Report
    rejected: str = ""


class _Work(msgspec.Struct):
    """A variant that is being converted."""

    variant: Variant
    out: Path
    reduced: Reduced
    staging: Staging
    manifest: Manifest
    report: Report
    golden: Golden | None = None
    pictures: tuple[Picture, ...] = ()


def convert_all(checkpoint: Checkpoint, variants: Sequence[Variant]) -> list[Converted]:
    """Creates several bundles from one checkpoint; they share the weights, the dense twin and its golden answers.

    Args:
        checkpoint: Result of :func:`read_checkpoint`; its weights are released.
        variants: The bundles; all with the same image size and calibration images.

    Returns:
        The result of each, in order; a failed check does not stop the others.

    Raises:
        InputError: See :func:`convert`; nothing was written.
        StageError: See :func:`convert`; nothing was written.
    """
    for variant in variants:
        check_own_weights(checkpoint, variant.spec)
        if variant.job.made.options.normalize and checkpoint.output == LOGITS:
            raise has_classes(checkpoint.model_args.get("num_classes", "its"))
        if variant.job.made.options.sign is not None:
            read_private_key(Path(variant.job.made.options.sign))  # refuse a wrong key before the long work
    outs = [variant.job.out or default_out(checkpoint, variant.spec) for variant in variants]
    twice = next((out for out in outs if outs.count(out) > 1), None)
    if twice is not None:
        raise InputError("two of them would be written to the same place", where=twice, fix="Leave one of them out.")
    for out, variant in zip(outs, variants, strict=True):
        bundles.check_out(out, force=variant.job.force)
    base = build_model(checkpoint, variants[0].job.image_size)
    checkpoint.weights = {}  # the model holds its own copy
    models = [copy_sharing_weights(base) for _ in variants[1:]] + [base]
    found = [_reduce(checkpoint, one, model) for one, model in zip(variants, models, strict=True)]
    del base, models
    manifests = [manifest_of(one, v.job, out) for one, v, out in zip(found, variants, outs, strict=True)]
    for variant, manifest in zip(variants, manifests, strict=True):
        if variant.job.made.options.data is not None:
            pictures_of(Path(variant.job.made.options.data), manifest)  # refuse unsuitable images before the long work
    for note in dict.fromkeys(note for reduced in found for note in reduced.notes):
        _LOG.warning(note)
    _LOG.info(described(found[0].preprocess, checkpoint.labels, checkpoint.origins))
    with ExitStack() as stack:
        work = []
        for variant, out, reduced, manifest in zip(variants, outs, found, manifests, strict=True):
            staging = stack.enter_context(Staging(out, force=variant.job.force))
            report = Report(notes=tuple(reduced.notes), versions=versions(), device=device(), commands=commands())
            work.append(_Work(variant, out, reduced, staging, manifest, report))
        del found
        shared = _Shared()
        for one in work:
            _make(one, shared)
        for one in work:  # release the PyTorch models
            one.reduced = msgspec.structs.replace(one.reduced, model=None, dense=None)
        del shared
        for one in work:
            one.report += _proof(one)
        _measure([one for one in work if one.report.passed])
        return [_finish(one) for one in work]


class _Shared(msgspec.Struct):
    """Results that variants of one checkpoint share; filled by the first variant that needs them."""

    exports: Exports = msgspec.field(default_factory=Exports)
    answers: KnownAnswers = msgspec.field(default_factory=KnownAnswers)
    images: np.ndarray | None = None


def _make(one: _Work, shared: _Shared) -> None:
    """Exports a variant, computes its golden answers, and writes its targets unless the precision breaks the model."""
    made, folder = one.variant.job.made, one.staging.path
    folder_of_pictures = made.options.data or made.options.calibration
    if folder_of_pictures is not None:
        reduced = one.reduced
        one.pictures = kept_pictures(
            reduced.model, reduced.preprocess, reduced.checkpoint.labels, Path(folder_of_pictures)
        )
    one.golden = _export(one, shared)
    one.report += block_errors(one.reduced.model, folder / MODEL, one.golden.inputs, one.variant.job.measure.threads)
    one.report += verify_precision(one.golden, one.manifest.answer)
    if one.report.passed:
        exported = Exported(one.reduced.model, one.reduced.dense, one.reduced.plan, made.precision, folder)
        written = write_targets(exported, made)
        one.manifest = msgspec.structs.replace(one.manifest, engine=written.engine)
        one.report += written.report
    one.manifest = bundles.write_manifest(folder, one.manifest)


def _finish(one: _Work) -> Converted:
    """Writes the report and publishes the bundle, or keeps it as ``<out>.rejected`` if a check failed."""
    stage(_LOG, f"{one.variant.prefix}writing the bundle")
    folder, report = one.staging.path, one.report
    (folder / REPORT).write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2))
    manifest = msgspec.structs.replace(one.manifest, results=_results(report))
    (folder / PAGE).write_text(report_page(report, one.out.name, manifest, pictures=one.pictures), encoding="utf-8")
    manifest = bundles.write_manifest(folder, manifest, one.manifest.files)
    if report.passed:
        key = one.variant.job.made.options.sign
        if key is not None:
            sign(folder, read_private_key(Path(key)))
        one.staging.publish(one.out)
        return Converted(one.variant, bundles.read_bundle(one.out), report)
    place, kept = _reject(one.staging)
    return Converted(one.variant, Bundle(place, manifest), report, kept)


def label_by_folders(checkpoint: Checkpoint, data: str | None) -> None:
    """Takes class names from the folders of labeled images if there is no other source and their number fits."""
    known = checkpoint.labels is not None or checkpoint.output != "logits"
    if data is None or known or not is_labeled(Path(data)):
        return
    names = Folder(data).classes
    if len(names) == checkpoint.model_args.get("num_classes"):
        checkpoint.labels = list(names)
        checkpoint.origins = checkpoint.origins | {"labels": "the folders of --data"}


def check_own_weights(checkpoint: Checkpoint, spec: TokenSpec) -> None:
    """Checks that the checkpoint has the weights of a method with learned layers.

    Raises:
        InputError: They are missing.
    """
    method = METHODS.get(spec.method)
    present = any(name.startswith(method.own_parameters) for name in checkpoint.method_weights)
    if method.needs_own_weights and not spec.dense and not present:
        raise InputError(
            f"the method {spec.method!r} decides by its own layers, and these weights have none",
            where=checkpoint.source, wanted=f"a checkpoint with {', '.join(method.own_parameters)}*",
            fix=f"Train them first: {_training_command(checkpoint, spec)}",
        )  # fmt: skip


def check_method(tokens: TokenOptions) -> None:
    """Refuses a method that cannot be deployed, before any file is read."""
    if "method" not in tokens:
        return
    method = METHODS.get(tokens["method"])
    if method.comparison_only:
        raise InputError(
            f"the method {tokens['method']!r} exists only for comparison and cannot be deployed",
            where="--method", wanted="one of " + ", ".join(METHODS.offered()),
            fix="Use it in a recipe's compare.baselines, or in Python with reduce_tokens_.",
        )  # fmt: skip


def stages_of(made: Lowering) -> int:
    """Number of calls of :func:`stage` in one conversion."""
    return 6 + len(made.targets) - 1  # the portable target is the export


def _reduce(checkpoint: Checkpoint, variant: Variant, dense: torch.nn.Module) -> Reduced:
    spec, job = variant.spec, variant.job
    model = reduce_tokens_(dense, spec)
    if job.made.options.normalize:
        normalize_(model)
    known = [*checkpoint.notes, *_size_notes(checkpoint, model, job.image_size), *variant.notes]
    known += _training_notes(checkpoint, spec, job.image_size)
    preprocess = preprocess_of(checkpoint, model)
    pictures = job.made.options.calibration or job.made.options.data
    if checkpoint.tokens is None and spec.method == "evit" and not spec.dense and pictures is not None:
        doing(_LOG, "comparing with merging")
        note = merging_note(model, preprocess, Path(pictures))
        known += [note] if note else []
    return Reduced(checkpoint, model, dense_twin(model), spec, token_plan(model), preprocess, known)


def _size_notes(checkpoint: Checkpoint, model: torch.nn.Module, image_size: int | None) -> list[str]:
    """A note if the preprocessing configuration has another image size than the position embedding."""
    origin, size = checkpoint.origins.get("preprocess", ""), backbone_of(model).image_size(model)
    if image_size is not None or checkpoint.preprocess is None or not origin.endswith(".json"):
        return []
    said = checkpoint.preprocess.size
    if said == size:
        return []
    return [
        f"Its {origin} makes images of {said[0]}×{said[1]} pixels, and its position embedding is for "
        f"{size[0]}×{size[1]}, which the bundle takes. --image-size {said[0]} resamples the position embedding."
    ]


def manifest_of(reduced: Reduced, job: Job, out: Path) -> Manifest:
    """Creates the manifest of a bundle, still without files and results.

    Args:
        reduced: The model.
        job: Settings of the conversion.
        out: Final folder of the bundle.
    """
    model, checkpoint, preprocess = reduced.model, reduced.checkpoint, reduced.preprocess
    outputs = (TensorSpec(answer_name(model), "float32", (None, answer_size(model))),)
    if job.made.options.indices:
        lengths = {kept_name(row.block): row.choice_length for row in reduced.plan.locations}
        outputs += tuple(TensorSpec(name, "int32", (None, length)) for name, length in lengths.items())
    return Manifest(
        kind=reduced.spec.method,
        model=checkpoint.model,
        model_args=checkpoint.model_args | {"img_size": preprocess.size[0]},
        tokens=reduced.spec,
        plan=reduced.plan,
        preprocess=preprocess,
        precision=job.made.precision,
        labels=checkpoint.labels,
        inputs=(TensorSpec(INPUT, "float32", (None, reduced.channels, *preprocess.size)),),
        outputs=outputs,
        files={},
        parents=[_parent(checkpoint, out, job.model)],
        recipe=job.recipe,
        versions=versions(),
        device=device(),
        results={},
        notes=reduced.notes,
        normalized=job.made.options.normalize,
        origins=checkpoint.origins,
    )


def _export(one: _Work, shared: _Shared) -> Golden:
    """Writes the model and its dense twin as ONNX, and PyTorch's answers to the golden inputs."""
    reduced, job, folder = one.reduced, one.variant.job, one.staging.path
    stage(_LOG, f"{one.variant.prefix}exporting")
    made, models = job.made, (reduced.model, reduced.dense)
    if job.images is not None:
        shared.images = job.images
    if shared.images is None and made.options.calibration is not None and made.precision in QUANTIZED:
        doing(_LOG, "reading calibration images")
        place = Path(made.options.calibration)
        shared.images = calibration_images(place, reduced.preprocess, reduced.channels, CALIBRATION_IMAGES)
    about = reduced.checkpoint.model, reduced.preprocess
    files = export(models, made, about, shared.images, folder, shared.exports, _shown(one, shared.images))
    one.manifest = msgspec.structs.replace(one.manifest, unquantized=files.unquantized)
    one.report += files.report
    stage(_LOG, f"{one.variant.prefix}asking PyTorch for golden answers")
    inputs = sample_inputs(reduced.preprocess, GOLDEN_IMAGES, reduced.channels)
    golden = make_golden(*models, inputs, made.precision, files.quantized, shared.answers)
    golden.save(folder / GOLDEN)
    return golden


def _shown(one: _Work, calibration: np.ndarray | None) -> Shown | None:
    """The images on which the cost of quantizing is measured: those of ``--data``, else the calibration images."""
    job, manifest = one.variant.job, one.manifest
    if calibration is None:
        return None
    batches, data = of_array(calibration), job.made.options.data
    if data is not None:
        pictures = pictures_of(Path(data), manifest)
        batches = lambda: pictures.batches(manifest, DATA_BATCH)  # noqa: E731
    return Shown(batches, embeds(manifest), job.measure.threads)


def _proof(one: _Work) -> Report:
    stage(_LOG, f"{one.variant.prefix}verifying")
    job = one.variant.job
    assert one.golden is not None
    data = Path(job.made.options.data) if job.made.options.data is not None else None
    trial = Trial(None, job.measure.threads, data)
    return prove(bundles.read_bundle(one.staging.path), one.golden, job.made.runtimes, trial)


def _measure(work: Sequence[_Work]) -> None:
    """Measures the speed of variants; those of one precision together if memory allows."""
    groups: dict[Any, list[_Work]] = {}
    for one in work:
        made = one.variant.job.made
        weight = sum(path.stat().st_size for path in one.staging.path.rglob("*.onnx"))
        together = made.engine_target is None and len(work) * weight < _TOGETHER
        groups.setdefault((made.precision, made.runtimes) if together else id(one), []).append(one)
    for group in groups.values():
        stage(_LOG, f"{group[0].variant.prefix if len(group) == 1 else ''}profiling")
        for _ in group[1:]:
            stage(_LOG, "profiling")
        for one, report in zip(group, _speeds(group), strict=True):
            one.report += report + speed_gate(report, one.variant.job.made.options.min_speedup)


def _speeds(group: Sequence[_Work]) -> list[Report]:
    job = group[0].variant.job
    made, measure = job.made, job.measure
    timed = [
        (bundle_candidates(bundles.read_bundle(one.staging.path), made.runtimes), one.reduced.plan) for one in group
    ]
    sizes = sizes_within(made.options.profiles if made.engine_target else (), measure.batch_sizes or FIRST_BATCHES)
    if len(timed) > 1:
        return measure_variants(timed, sizes, measure.threads, measure.duration, PROFILE_ROUNDS)
    candidates, plan = timed[0]
    report = measure_all(
        candidates, plan, sizes, threads=measure.threads, duration=measure.duration, minimum_rounds=PROFILE_ROUNDS
    )
    return [report]


def _reject(staging: Staging) -> tuple[Path, str]:
    """Moves a failed bundle to ``<out>.rejected``; returns this path and a sentence about what was done."""
    place = staging.out.with_name(staging.out.name + ".rejected")
    try:
        bundles.check_out(place, force=True)  # replaces an earlier rejected bundle, but nothing else
        staging.publish(place)
        return place, f"The evidence is in {place}."
    except InputError:
        return place, f"The evidence was not kept: {place} holds something else."


def default_out(checkpoint: Checkpoint, spec: TokenSpec) -> Path:
    """``<stem>-<method>-k<rate>`` next to the checkpoint; in the current directory for a timm name or a hub id."""
    if checkpoint.source.startswith(hub.PREFIX):
        name, _, part = checkpoint.source.partition("#")
        path, local = Path(name.partition("@")[0].rpartition("/")[2]), False
    else:
        path, part = split_part(checkpoint.source)
        local = checkpoint.sha256 is not None
    stem = path.name
    while local and Path(stem).suffix in FILE_SUFFIXES:
        stem = Path(stem).stem
    name = "-".join(filter(None, (stem, part, token_label(spec))))
    return path.with_name(name) if local else Path(name)


def check_folders(options: ConvertOptions) -> list[str]:
    """Checks the folders of images before any other work.

    Returns:
        A note if there are few calibration images.

    Raises:
        InputError: A folder does not exist or contains no usable images.
    """
    if options.data is not None:
        check_images(Path(options.data))
    if options.calibration is None:
        return []
    count = len(image_files(Path(options.calibration)))
    if count >= FEW_IMAGES:
        return []
    return [f"Few images to learn ranges from ({count}): larger values than theirs will be cut off. Give 128 or more."]


def _training_notes(checkpoint: Checkpoint, spec: TokenSpec, image_size: int | None) -> list[str]:
    if spec.dense:
        return []
    trained = checkpoint.tokens
    if trained is not None:
        if trained.keep_rate not in (None, spec.keep_rate):
            return [f"These weights were trained at keep rate {trained.keep_rate} and run at {spec.keep_rate}."]
        if trained.method == spec.method and trained.options != spec.options:
            return [f"These weights were trained with the options {trained.options} and run with {spec.options}."]
        return []
    cost = _published_cost(checkpoint, spec, image_size) if spec.method == "evit" else ""
    command = _training_command(checkpoint, spec)
    return [f"These weights were never trained with token reduction. {cost}To fine-tune: {command}"]


def _training_command(checkpoint: Checkpoint, spec: TokenSpec) -> str:
    source = checkpoint.source if checkpoint.sha256 else "CHECKPOINT"
    if Path(source).is_absolute():  # the command is stored in the bundle, which must not contain local paths
        source = Path(source).name
    recipe, settings = _RECIPES.get(spec.method, ("recipes/finetune.yaml",)), {}
    if spec.method != "evit":
        settings["method"] = spec.method
    if spec.rates:
        texts = [f"{rate:g}" for rate in spec.rates]
        settings["keep_rate"] = f"[{','.join(texts)}]" if isinstance(spec.keep_rate, tuple) else ",".join(texts)
    settings |= {f"options.{name}": json.dumps(value) for name, value in spec.options.items()}
    values = {"model.checkpoint": source} | {f"tokens.{name}": value for name, value in settings.items()}
    values |= {"data.train": "DIR", "data.validation": "DIR"}
    given = [part for key, value in values.items() for part in ("--set", f"{key}={value}")]
    return shlex.join(["evit-deploy", "train", *recipe, *given])


def _published_cost(checkpoint: Checkpoint, spec: TokenSpec, image_size: int | None) -> str:
    """The published loss of accuracy; empty for models and settings that the paper did not measure."""
    task = _DEIT_S_TASK | checkpoint.model_args | ({} if image_size is None else {"img_size": image_size})
    measured = spec.locations in (None, _DEIT_S_LOCATIONS) and spec.fuse and not spec.options
    if checkpoint.model.partition(".")[0] != _DEIT_S or task != _DEIT_S_TASK or not measured:
        return ""
    rates = set(spec.rates)
    rate = next(iter(rates)) if len(rates) == 1 else None
    if rate in _UNTRAINED_DEIT_S:
        cost = f"For DeiT-S at {rate:g} that costs {79.8 - _UNTRAINED_DEIT_S[rate]:.1f} points of ImageNet top-1"
    else:
        known = ", ".join(f"{79.8 - top1:.1f} at {rate:g}" for rate, top1 in _UNTRAINED_DEIT_S.items())
        cost = f"For DeiT-S that costs, in points of ImageNet top-1, {known}"
    return f"{cost} (EViT paper, table 1). "


def _parent(checkpoint: Checkpoint, out: Path, model: str | None) -> Parent:
    if checkpoint.sha256 is None or checkpoint.source.startswith(hub.PREFIX):
        return Parent(checkpoint.source, checkpoint.sha256, model)
    # Relative to the bundle: both can be moved together, and the manifest contains no absolute local path.
    return Parent(os.path.relpath(Path(checkpoint.source).absolute(), out.absolute()), checkpoint.sha256, model)


def _results(report: Report) -> dict[str, Any]:
    own = [row for row in report.compared if row.name == MODEL_NAME]
    return {
        "passed": report.passed,
        "speedup": {f"{r.runtime}, batch {r.batch}": r.speedup for r in report.rows if r.variant == "model"},
        "accuracy": {row.runtime: row.top1 for row in own if row.top1 is not None},
        "to_dense": {row.runtime: row.to_dense.value for row in own if row.to_dense is not None},
        "cosine": {row.runtime: row.cosine_centered for row in own if row.cosine_centered is not None},
    }
