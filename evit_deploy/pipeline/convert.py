"""The one-shot: checkpoint in, verified and measured bundle out."""

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

import msgspec
import numpy as np
import torch

from evit_deploy.bundle import bundle as bundles
from evit_deploy.bundle.bundle import Bundle, Staging
from evit_deploy.bundle.manifest import GOLDEN, REPORT, Manifest, Parent, TensorSpec
from evit_deploy.data.images import calibration_images, image_files, sample_inputs
from evit_deploy.data.preprocess import Preprocess
from evit_deploy.data.sources import Folder, is_labelled
from evit_deploy.environment.machine import device, versions
from evit_deploy.errors import InputError
from evit_deploy.export.answer import answer_name, answer_size, has_classes, normalize_
from evit_deploy.export.card import INPUT, LOGITS, kept_name
from evit_deploy.export.precision import QUANTIZED
from evit_deploy.models import hub
from evit_deploy.models.checkpoint import Checkpoint, build_model, read_checkpoint, resolve_tokens
from evit_deploy.models.preprocessing import described
from evit_deploy.models.safe_weights import split_part
from evit_deploy.models.sources import FILE_SUFFIXES
from evit_deploy.pipeline.lowering import Lowering, export, lowering, write_targets
from evit_deploy.profiling.batch_sizes import sizes_within
from evit_deploy.profiling.candidates import bundle_candidates
from evit_deploy.profiling.profile import speed_gate
from evit_deploy.profiling.timing import measure_all
from evit_deploy.progress import doing, stage, stages
from evit_deploy.recipe.options import ConvertOptions, ProfileOptions
from evit_deploy.registry import METHODS
from evit_deploy.report.report import Report
from evit_deploy.targets.target import Exported
from evit_deploy.tokens.backbone import backbone_of
from evit_deploy.tokens.plan import TokenOptions, TokenPlan, TokenSpec
from evit_deploy.tokens.reduce import dense_twin, reduce_tokens_, token_label, token_plan
from evit_deploy.verification.cost import MODEL_NAME
from evit_deploy.verification.golden import Golden, make_golden
from evit_deploy.verification.pictures import check_images, pictures_of
from evit_deploy.verification.verify import Trial, prove, verify_precision

_LOG = logging.getLogger(__name__)

GOLDEN_IMAGES = 8
CALIBRATION_IMAGES, FEW_IMAGES = 512, 32
# For a first look; `profile` takes its time.
FIRST_BATCHES, PROFILE_ROUNDS = (1, 8), 3
FIRST_LOOK = ProfileOptions(batch_sizes=FIRST_BATCHES, duration=2.0)
# Methods with their own recipe for fine-tuning.
_RECIPES = {"dynamicvit": "recipes/paper/dynamicvit-deit-small-0.7.yaml --set model.name=null"}
# Paper, table 1: top-1 of a trained DeiT-S (79.8) whose tokens are dropped without any training. Of no other model.
_DEIT_S, _DEIT_S_TASK = "deit_small_patch16_224", {"img_size": 224, "num_classes": 1000}
_DEIT_S_LOCATIONS = (3, 6, 9)
_UNTRAINED_DEIT_S = {0.9: 79.7, 0.8: 79.2, 0.7: 78.5, 0.6: 76.8, 0.5: 73.8}


class Job(msgspec.Struct, frozen=True):
    """What :func:`convert_checkpoint` does with a checkpoint.

    Args:
        made: What to make.
        image_size: Pixels, if not the checkpoint's.
        images: Calibration images in the deployment's preprocessing, float32 ``[n, C, H, W]``, where they do not come
            from a folder.
        measure: How to measure speed.
        out: Folder for the bundle; :func:`default_out` by default.
        force: Whether to replace an older bundle there.
        model: timm name that decided the architecture, for the record.
        recipe: The recipe that this is part of, for the record.
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
    """A reduced model, and all that the manifest records about it.

    Args:
        checkpoint: Where it came from; its weights are given up.
        model: The reduced PyTorch model.
        dense: The same without token reduction.
        spec: What was asked for.
        plan: Token counts.
        preprocess: From image file to input tensor.
        notes: What was assumed.
    """

    checkpoint: Checkpoint
    model: torch.nn.Module
    dense: torch.nn.Module
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
        model: timm name that decides the architecture.
        image_size: Pixels, if not the checkpoint's.
        options: What to make: targets, precision, options of the builder, gates; and preprocessing and labels.
        measure: How to measure speed; two seconds for each of two batch sizes are enough for a first look.
        out: Folder for the bundle; ``<stem>-<method>-k<rate>`` beside the checkpoint by default.
        force: Whether to replace an older bundle there.
        tokens: Fields of :class:`~evit_deploy.tokens.plan.TokenSpec`: ``keep_rate=0.7``; what is left out comes from
            the checkpoint, then from the defaults.

    Returns:
        The bundle on disk and the report.

    Raises:
        InputError: The input cannot be used; nothing was written.
        MissingRequirement: A package or a GPU that a target needs is not here; nothing was written.
        GateFailed: A check did not hold; the bundle lies in ``<out>.rejected``, with the report.
        StageError: Exporting or writing failed; nothing was written.
    """
    _check_method(tokens)
    made = lowering(options)
    calibration = check_folders(made.options)
    with stages(stages_of(made)):
        stage(_LOG, "reading the checkpoint")
        checkpoint = read_checkpoint(source, model, made.options.preprocess)
        _label_by_folders(checkpoint, made.options.data)
        spec, notes = resolve_tokens(checkpoint, **tokens)
        job = Job(made, image_size, None, measure, Path(out) if out is not None else None, force, model)
        return convert_checkpoint(checkpoint, spec, job, [*notes, *calibration])


def convert_checkpoint(
    checkpoint: Checkpoint, spec: TokenSpec, job: Job, notes: Sequence[str] = ()
) -> tuple[Bundle, Report]:
    """Makes a bundle of a checkpoint: reduced model, exported files, targets, proof, speed.

    Args:
        checkpoint: What :func:`read_checkpoint` gave; its weights are given up.
        spec: How to reduce it.
        job: What to make, and where.
        notes: What was assumed so far.

    Returns:
        See :func:`convert`.

    Raises:
        InputError: See :func:`convert`.
        GateFailed: See :func:`convert`.
        StageError: See :func:`convert`.
    """
    check_own_weights(checkpoint, spec)
    if job.made.options.normalize and checkpoint.output == LOGITS:
        raise has_classes(checkpoint.model_args.get("num_classes", "its"))
    out = job.out or default_out(checkpoint, spec)
    bundles.check_out(out, force=job.force)
    reduced = _reduce(checkpoint, spec, job, notes)
    manifest = _manifest(reduced, job, out)
    if job.made.options.data is not None:
        pictures_of(Path(job.made.options.data), manifest)  # what does not fit is refused before the work
    for note in reduced.notes:
        _LOG.warning(note)
    _LOG.info(described(reduced.preprocess, checkpoint.labels, checkpoint.origins))
    report = Report(notes=tuple(reduced.notes), versions=versions(), device=device())
    with Staging(out, force=job.force) as staging:
        exported, golden = _export(reduced, job, staging.path)
        report += verify_precision(golden, manifest.answer)
        if report.passed:
            written = write_targets(exported, job.made)
            manifest = msgspec.structs.replace(manifest, engine=written.engine)
            report += written.report
        bundles.write_manifest(staging.path, manifest)
        report += _proof(staging.path, golden, job)
        if report.passed:
            report += _speed(staging.path, reduced.plan, job)
        stage(_LOG, "writing the bundle")
        (staging.path / REPORT).write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2))
        bundles.write_manifest(staging.path, msgspec.structs.replace(manifest, results=_results(report)))
        if report.passed:
            staging.publish(out)
        else:
            _reject(staging, report)
    return bundles.read_bundle(out), report


def _label_by_folders(checkpoint: Checkpoint, data: str | None) -> None:
    """Without another source, classes are called like the folders of labelled images, one for each class."""
    known = checkpoint.labels is not None or checkpoint.output != "logits"
    if data is None or known or not is_labelled(Path(data)):
        return
    names = Folder(data).classes
    if len(names) == checkpoint.model_args.get("num_classes"):
        checkpoint.labels = list(names)
        checkpoint.origins = checkpoint.origins | {"labels": "the folders of --data"}


def check_own_weights(checkpoint: Checkpoint, spec: TokenSpec) -> None:
    """Makes sure that a method which decides by its own layers has their weights.

    Raises:
        InputError: The checkpoint has none.
    """
    method = METHODS.get(spec.method)
    present = any(name.startswith(method.own_parameters) for name in checkpoint.method_weights)
    if method.needs_own_weights and not spec.dense and not present:
        raise InputError(
            f"the method {spec.method!r} decides by its own layers, and these weights have none",
            where=checkpoint.source, wanted=f"a checkpoint with {', '.join(method.own_parameters)}*",
            fix=f"Train them first: {_training_command(checkpoint, spec)}",
        )  # fmt: skip


def _check_method(tokens: TokenOptions) -> None:
    """What is known of a method before a file is read."""
    if "method" not in tokens:
        return
    method = METHODS.get(tokens["method"])
    if method.comparison_only:
        raise InputError(
            f"the method {tokens['method']!r} exists to compare others with, and makes nothing to deploy",
            where="--method", wanted="one of " + ", ".join(METHODS.offered()),
            fix="Recipes take it in compare.baselines, Python in reduce_tokens_.",
        )  # fmt: skip


def stages_of(made: Lowering) -> int:
    """How often :func:`stage` is called."""
    return 6 + len(made.targets) - 1  # the portable target is the export


def _reduce(checkpoint: Checkpoint, spec: TokenSpec, job: Job, notes: Sequence[str]) -> Reduced:
    model = reduce_tokens_(build_model(checkpoint, job.image_size), spec)
    if job.made.options.normalize:
        normalize_(model)
    checkpoint.weights = {}  # the model has its own copy by now
    known = [*checkpoint.notes, *notes, *_training_notes(checkpoint, spec, job.image_size)]
    preprocess = preprocess_of(checkpoint, model)
    return Reduced(checkpoint, model, dense_twin(model), spec, token_plan(model), preprocess, known)


def _manifest(reduced: Reduced, job: Job, out: Path) -> Manifest:
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


def _export(reduced: Reduced, job: Job, folder: Path) -> tuple[Exported, Golden]:
    """Writes the model and its dense twin as ONNX, and what PyTorch answers to the golden inputs."""
    stage(_LOG, "exporting")
    images, options = job.images, job.made.options
    if images is None and options.calibration is not None:
        doing(_LOG, "reading calibration images")
        place = Path(options.calibration)
        images = calibration_images(place, reduced.preprocess, reduced.channels, CALIBRATION_IMAGES)
    models, precision = (reduced.model, reduced.dense), job.made.precision
    protos = export(models, job.made, reduced.checkpoint.model, reduced.preprocess, images, folder)
    stage(_LOG, "asking PyTorch for golden answers")
    inputs = sample_inputs(reduced.preprocess, GOLDEN_IMAGES, reduced.channels)
    golden = make_golden(*models, inputs, precision, protos if precision in QUANTIZED else None)
    golden.save(folder / GOLDEN)
    return Exported(*models, reduced.plan, precision, folder), golden


def _proof(folder: Path, golden: Golden, job: Job) -> Report:
    stage(_LOG, "verifying")
    data = Path(job.made.options.data) if job.made.options.data is not None else None
    return prove(bundles.read_bundle(folder), golden, job.made.runtimes, Trial(None, job.measure.threads, data))


def _speed(folder: Path, plan: TokenPlan, job: Job) -> Report:
    stage(_LOG, "profiling")
    made, measure = job.made, job.measure
    candidates = bundle_candidates(bundles.read_bundle(folder), made.runtimes)
    sizes = sizes_within(made.options.profiles if made.engine_target else (), measure.batch_sizes or FIRST_BATCHES)
    report = measure_all(
        candidates, plan, sizes, threads=measure.threads, duration=measure.duration, minimum_rounds=PROFILE_ROUNDS
    )
    return report + speed_gate(report, made.options.min_speedup)


def _reject(staging: Staging, report: Report) -> None:
    """Keeps the evidence where nobody deploys it from, and says why.

    Raises:
        GateFailed: Always.
    """
    place = staging.out.with_name(staging.out.name + ".rejected")
    try:
        bundles.check_out(place, force=True)  # an earlier rejected one is replaced, anything else is not
        staging.publish(place)
        kept = f"The evidence is in {place}."
    except InputError:
        kept = f"The evidence was not kept: {place} holds something else."
    report.raise_if_failed(fix=f"{report.failed[0].reason} {kept}".strip())


def default_out(checkpoint: Checkpoint, spec: TokenSpec) -> Path:
    """``<stem>-<method>-k<rate>`` beside the checkpoint; in the current directory for a timm name or a hub id."""
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


def preprocess_of(checkpoint: Checkpoint, model: torch.nn.Module) -> Preprocess:
    """The checkpoint's preprocessing at the model's image size; timm's for one that says nothing."""
    own = checkpoint.preprocess
    size = backbone_of(model).image_size(model)
    if own is None:
        return Preprocess.from_model(model, size)
    if len(own.mean) not in (1, 3):  # whatever the model takes: see evit_deploy.data.images.with_channels
        raise InputError(
            "pictures have three colours when they are normalised", where="--mean and --std", seen=len(own.mean),
            wanted="three numbers, or one for all",
        )  # fmt: skip
    return msgspec.structs.replace(own, size=size)


def check_folders(options: ConvertOptions) -> list[str]:
    """Makes sure, before any work, that folders hold what they are given for.

    Returns:
        A note where there are few images to learn ranges from.

    Raises:
        InputError: A folder of images or of calibration images is none.
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
    if Path(source).is_absolute():  # this goes into the bundle, which is not to name folders of this machine
        source = Path(source).name
    recipe, settings = _RECIPES.get(spec.method, "recipes/finetune.yaml"), {}
    if spec.method != "evit":
        settings["method"] = spec.method
    if spec.rates:
        texts = [f"{rate:g}" for rate in spec.rates]
        settings["keep_rate"] = f"[{','.join(texts)}]" if isinstance(spec.keep_rate, tuple) else ",".join(texts)
    settings |= {f"options.{name}": json.dumps(value) for name, value in spec.options.items()}
    tokens = " ".join(f"--set tokens.{name}={value}" for name, value in settings.items())
    return (
        f"evit-deploy train {recipe} --set model.checkpoint={source} {tokens} "
        f"--set data.train=DIR --set data.validation=DIR"
    )


def _published_cost(checkpoint: Checkpoint, spec: TokenSpec, image_size: int | None) -> str:
    """What it cost others; nothing for a model or a way of reducing tokens other than what was measured."""
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
    # Relative to the bundle: the two can move together, and the manifest names no folder of this machine above them.
    return Parent(os.path.relpath(Path(checkpoint.source).absolute(), out.absolute()), checkpoint.sha256, model)


def _results(report: Report) -> dict[str, Any]:
    own = [row for row in report.compared if row.name == MODEL_NAME]
    return {
        "passed": report.passed,
        "speedup": {f"{r.runtime}, batch {r.batch}": r.speedup for r in report.rows if r.variant == "model"},
        "accuracy": {row.runtime: row.top1 for row in own if row.top1 is not None},
        "to_dense": {row.runtime: row.to_dense.value for row in own if row.to_dense is not None},
        "cosine": {row.runtime: row.cosine_centred for row in own if row.cosine_centred is not None},
    }
