"""The one-shot: checkpoint in, verified and measured bundle out."""

import logging
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import numpy as np
import torch

from evit_deploy.bundle import bundle as bundles
from evit_deploy.bundle.bundle import Bundle, Staging
from evit_deploy.bundle.manifest import GOLDEN, REPORT, Manifest, Parent, TensorSpec
from evit_deploy.data.images import Preprocess, calibration_images, image_files, sample_inputs
from evit_deploy.data.sources import Folder
from evit_deploy.engines.options import BuildOptions
from evit_deploy.environment.machine import device, versions
from evit_deploy.errors import GateFailed, InputError
from evit_deploy.export.card import INPUT, LOGITS, kept_name
from evit_deploy.export.precision import QUANTIZED
from evit_deploy.models.checkpoint import FILE_SUFFIXES, Checkpoint, Tokens, build_model, read_checkpoint
from evit_deploy.pipeline.lowering import Lowering, lowering, write_engines, write_models, write_openvino
from evit_deploy.profiling.batch_sizes import sizes_within
from evit_deploy.profiling.candidates import bundle_candidates
from evit_deploy.profiling.profile import speed_gate
from evit_deploy.profiling.timing import measure_all
from evit_deploy.progress import doing
from evit_deploy.report.report import Report
from evit_deploy.tokens.backbone import backbone_of
from evit_deploy.tokens.plan import TokenSpec
from evit_deploy.tokens.reduce import dense_twin, reduce_tokens_, token_plan
from evit_deploy.verification.golden import Golden, make_golden
from evit_deploy.verification.verify import prove, verify_precision

_LOG = logging.getLogger(__name__)

GOLDEN_IMAGES = 8
CALIBRATION_IMAGES, FEW_IMAGES = 512, 32
# For a first look; `profile` takes its time.
PROFILE_BATCHES, PROFILE_SECONDS, PROFILE_ROUNDS = (1, 8), 2.0, 3
# Paper, table 1: top-1 of a trained DeiT-S (79.8) whose tokens are dropped without any training.
_UNTRAINED_DEIT_S = {0.9: 79.7, 0.8: 79.2, 0.7: 78.5, 0.6: 76.8, 0.5: 73.8}


def convert(
    source: str | Path,
    *,
    tokens: Tokens | TokenSpec = Tokens(),  # noqa: B008 -- frozen
    model: str | None = None,
    image_size: int | None = None,
    precision: str | None = None,
    targets: Sequence[str] = (),
    options: BuildOptions | None = None,
    calibration: Path | np.ndarray | None = None,
    out: Path | None = None,
    force: bool = False,
    indices: bool = False,
    data: Path | None = None,
    min_speedup: float | None = None,
    threads: int | None = None,
    batch_sizes: Sequence[int] = PROFILE_BATCHES,
    duration: float = PROFILE_SECONDS,
    recipe: dict[str, Any] | None = None,
) -> tuple[Bundle, Report]:
    """Reduces, exports, verifies and profiles a checkpoint, and writes the bundle.

    Args:
        source: Checkpoint file or timm name.
        tokens: The reduction; what is left open comes from the checkpoint.
        model: timm name that decides the architecture.
        image_size: Pixels, if not the checkpoint's.
        precision: Of the files; ``fp16`` for an engine and ``fp32`` otherwise by default.
        targets: What to make besides the ONNX file; ``tensorrt`` where it is usable by default.
        options: What to tell the builder of an engine.
        calibration: For ``int8`` and ``fp8``: a folder of real images, or such images in the deployment's
            preprocessing, float32 ``[n, C, H, W]``.
        out: Folder for the bundle; ``<stem>-<method>-k<rate>`` beside the checkpoint by default.
        force: Whether to replace an older bundle there.
        indices: Whether ``model.onnx`` gives out the kept candidates as ``kept_<block>``.
        data: Folder of labelled images for top-1 and top-5.
        min_speedup: Fail unless every profiled batch size is at least this much faster than the dense twin.
        threads: CPU threads.
        batch_sizes: Batches to profile.
        duration: Seconds for each of them.
        recipe: The recipe this is part of, for the record.

    Returns:
        The bundle on disk and the report.

    Raises:
        InputError: The input cannot be used; nothing was written.
        MissingRequirement: A package or a GPU that a target needs is not here; nothing was written.
        GateFailed: A check did not hold; the bundle lies in ``<out>.rejected``, with the report.
        StageError: Exporting or writing failed; nothing was written.
    """
    made = lowering(targets, precision, options, calibration, indices)
    if data is not None:
        Folder(data)  # a wrong folder is told before the work, not after it
    calibration_notes = _calibration_notes(calibration)
    doing(_LOG, "reading the checkpoint")
    checkpoint = read_checkpoint(source, model)
    spec, notes = tokens.resolve(checkpoint) if isinstance(tokens, Tokens) else (tokens, [])
    notes = checkpoint.notes + notes + calibration_notes
    out = out or default_out(checkpoint, spec)
    bundles.check_out(out, force=force)
    reduced = reduce_tokens_(build_model(checkpoint, image_size), spec)
    checkpoint.weights = {}  # the model has its own copy by now
    plan = token_plan(reduced)
    preprocess = preprocess_of(checkpoint, reduced)
    notes += _training_notes(checkpoint, spec)
    for note in notes:
        _LOG.warning(note)

    classes = getattr(reduced, "num_classes", 0) or getattr(reduced, "num_features", 0)
    outputs = (TensorSpec(LOGITS, "float32", (None, int(classes))),)
    if indices:
        outputs += tuple(TensorSpec(kept_name(row.block), "int32", (None, row.keep)) for row in plan.locations)
    manifest = Manifest(
        kind=spec.method,
        model=checkpoint.model,
        model_args=checkpoint.model_args | {"img_size": preprocess.size[0]},
        tokens=spec,
        plan=plan,
        preprocess=preprocess,
        precision=made.precision,
        labels=checkpoint.labels,
        inputs=(TensorSpec(INPUT, "float32", (None, backbone_of(reduced).channels(reduced), *preprocess.size)),),
        outputs=outputs,
        files={},
        parents=[_parent(checkpoint, out, model)],
        recipe=recipe,
        versions=versions(),
        device=device(),
        results={},
        notes=notes,
    )
    report = Report(notes=tuple(notes), versions=versions(), device=device())
    with Staging(out, force=force) as staging:
        golden, manifest, checks = _write_files(reduced, manifest, made, calibration, staging.path)
        report += checks
        bundles.write_manifest(staging.path, manifest)
        report += prove(bundles.read_bundle(staging.path), golden, made.runtimes, data, threads)
        if report.passed:
            candidates = bundle_candidates(bundles.read_bundle(staging.path), made.runtimes)
            sizes = sizes_within(made.options.profiles if made.plan_target else (), batch_sizes)
            report += measure_all(
                candidates,
                plan,
                sizes,
                threads=threads,
                duration=duration,
                minimum_rounds=PROFILE_ROUNDS,
            )
            report += speed_gate(report, min_speedup)
        doing(_LOG, "writing the bundle")
        (staging.path / REPORT).write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2))
        bundles.write_manifest(staging.path, msgspec.structs.replace(manifest, results=_results(report)))
        if report.passed:
            staging.publish(out)
        else:
            _reject(staging, report)
    return bundles.read_bundle(out), report


def _write_files(
    reduced: torch.nn.Module,
    manifest: Manifest,
    made: Lowering,
    calibration: Path | np.ndarray | None,
    staging: Path,
) -> tuple[Golden, Manifest, Report]:
    """Writes the model and its dense twin in every form, and what PyTorch says to the golden inputs."""
    dense, preprocess = dense_twin(reduced), manifest.preprocess
    channels = backbone_of(reduced).channels(reduced)
    if isinstance(calibration, Path):
        doing(_LOG, "reading calibration images")
        calibration = calibration_images(calibration, preprocess, channels, CALIBRATION_IMAGES)
    models = write_models(reduced, dense, made, manifest.model, preprocess, calibration, staging)
    doing(_LOG, "asking PyTorch for golden answers")
    inputs = sample_inputs(preprocess, GOLDEN_IMAGES, channels)
    golden = make_golden(reduced, dense, inputs, made.precision, models if made.precision in QUANTIZED else None)
    golden.save(staging / GOLDEN)
    report = verify_precision(golden)
    if "openvino" in made.targets:
        doing(_LOG, "writing the OpenVINO files")
        write_openvino(staging)
    if made.plan_target is not None and report.passed:
        doing(_LOG, f"building the engines with {made.plan_target}")
        engine, checks = write_engines(reduced, dense, made, manifest.plan, staging)
        manifest = msgspec.structs.replace(manifest, engine=engine)
        report += checks
        if made.plan_target not in made.runtimes:
            report += Report(
                notes=(f"The engine was built ahead of time and not run: verify it on {', '.join(engine.gpus)}.",)
            )
    return golden, manifest, report


def _reject(staging: Staging, report: Report) -> NoReturn:
    """Keeps the evidence where nobody deploys it from, and says why.

    Raises:
        GateFailed: Always.
    """
    place, first = staging.out.with_name(staging.out.name + ".rejected"), report.failed[0]
    try:
        bundles.check_out(place, force=True)  # an earlier rejected one is replaced, anything else is not
        staging.publish(place)
        kept = f"The evidence is in {place}."
    except InputError:
        kept = f"The evidence was not kept: {place} holds something else."
    raise GateFailed(
        f"{len(report.failed)} of {len(report.checks)} checks failed, first: {first.name}",
        seen=first.value,
        wanted=first.limit,
        fix=f"{first.reason} {kept}".strip(),
    )


def default_out(checkpoint: Checkpoint, spec: TokenSpec) -> Path:
    """``<stem>-<method>-k<rate>`` beside the checkpoint; in the current directory for a timm name."""
    rates = spec.keep_rate if isinstance(spec.keep_rate, tuple) else (spec.keep_rate,)
    path = Path(checkpoint.source)
    stem = path.name
    while checkpoint.sha256 and Path(stem).suffix in FILE_SUFFIXES:
        stem = Path(stem).stem
    name = f"{stem}-{spec.method}-k{'-'.join(f'{rate:g}' for rate in rates)}"
    return path.with_name(name) if checkpoint.sha256 else Path(name)


def preprocess_of(checkpoint: Checkpoint, model: torch.nn.Module) -> Preprocess:
    """The checkpoint's own preprocessing, or timm's for the architecture, at the model's image size."""
    own = checkpoint.preprocess
    size: Any = model.patch_embed.img_size  # type: ignore[union-attr]
    if own is not None:
        return msgspec.structs.replace(own, size=tuple(size))
    return Preprocess.from_model(model, tuple(size))


def _calibration_notes(calibration: Path | np.ndarray | None) -> list[str]:
    """Whether there are enough images; a folder without any is told before the work, not after it."""
    if calibration is None:
        return []
    count = len(image_files(calibration) if isinstance(calibration, Path) else calibration)
    if count >= FEW_IMAGES:
        return []
    return [f"Few images to learn ranges from ({count}): larger values than theirs will be cut off. Give 128 or more."]


def _training_notes(checkpoint: Checkpoint, spec: TokenSpec) -> list[str]:
    rates = set(spec.keep_rate) if isinstance(spec.keep_rate, tuple) else {spec.keep_rate}
    if rates == {1.0}:
        return []
    trained = checkpoint.tokens
    if trained is not None:
        if trained.keep_rate != spec.keep_rate:
            return [f"These weights were trained at keep rate {trained.keep_rate} and run at {spec.keep_rate}."]
        return []
    source = checkpoint.source if checkpoint.sha256 else "CHECKPOINT"
    if Path(source).is_absolute():  # this goes into the bundle, which is not to name folders of this machine
        source = Path(source).name
    keep = f"[{','.join(map(str, spec.keep_rate))}]" if isinstance(spec.keep_rate, tuple) else f"{spec.keep_rate:g}"
    return [
        f"These weights were never trained with token reduction. {_published_cost(checkpoint, rates)}To fine-tune: "
        f"evit-deploy train recipes/finetune.yaml --set model.checkpoint={source} --set tokens.keep_rate={keep} "
        f"--set data.train=DIR --set data.validation=DIR"
    ]


def _published_cost(checkpoint: Checkpoint, rates: Collection[float]) -> str:
    """What it cost others; nothing for a family without a published figure."""
    if checkpoint.model.startswith("lvvit"):
        return ""
    rate = next(iter(rates)) if len(rates) == 1 else None
    if rate in _UNTRAINED_DEIT_S:
        cost = f"For DeiT-S at {rate:g} that costs {79.8 - _UNTRAINED_DEIT_S[rate]:.1f} points of ImageNet top-1"
    else:
        known = ", ".join(f"{79.8 - top1:.1f} at {rate:g}" for rate, top1 in _UNTRAINED_DEIT_S.items())
        cost = f"For DeiT-S that costs, in points of ImageNet top-1, {known}"
    return f"{cost} (EViT paper, table 1). "


def _parent(checkpoint: Checkpoint, out: Path, model: str | None) -> Parent:
    if checkpoint.sha256 is None:
        return Parent(checkpoint.source, None)
    # Relative to the bundle: the two can move together, and the manifest names no folder of this machine above them.
    return Parent(os.path.relpath(Path(checkpoint.source).absolute(), out.absolute()), checkpoint.sha256, model)


def _results(report: Report) -> dict[str, Any]:
    return {
        "passed": report.passed,
        "speedup": {f"{r.runtime}, batch {r.batch}": r.speedup for r in report.rows if r.variant == "model"},
        "accuracy": {row.name: row.top1 for row in report.accuracy},
    }
