"""The one-shot: checkpoint in, verified and measured bundle out."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import onnx
import torch

from evit_deploy import bundle as bundles
from evit_deploy.backbones import backbone_of
from evit_deploy.bundle import Bundle, Manifest, Parent, Staging
from evit_deploy.checkpoint import FILE_SUFFIXES, Checkpoint, Tokens, build_model, read_checkpoint
from evit_deploy.data import Preprocess, sample_inputs
from evit_deploy.errors import GateFailed, InputError
from evit_deploy.export import INPUT, LOGITS, export_onnx, kept_name, versions, with_indices
from evit_deploy.golden import Golden, make_golden
from evit_deploy.profile import measure_all, onnx_contestants, speed_gate
from evit_deploy.report import Report, device
from evit_deploy.runtimes import TensorSpec
from evit_deploy.tokens.plan import TokenSpec
from evit_deploy.tokens.reduce import dense_twin, reduce_tokens_, token_plan
from evit_deploy.verify import accuracy, verify_dense, verify_runtime

TARGETS = ("onnx",)
PRECISIONS = ("fp32",)
GOLDEN_IMAGES = 4
VERIFY_BATCHES = (1, 2, 8)
PROFILE_BATCHES, PROFILE_SECONDS, PROFILE_ROUNDS = (
    (1, 8),
    2.0,
    3,
)  # a first look: `profile` takes its time, and PyTorch in
# Paper, table 1: top-1 of a trained DeiT-S (79.8) whose tokens are dropped without any training.
_UNTRAINED_DEIT_S = {0.9: 79.7, 0.8: 79.2, 0.7: 78.5, 0.6: 76.8, 0.5: 73.8}


def convert(
    source: str | Path,
    *,
    tokens: Tokens | TokenSpec = Tokens(),  # noqa: B008 -- frozen
    model: str | None = None,
    image_size: int | None = None,
    precision: str = "fp32",
    targets: Sequence[str] = ("onnx",),
    out: Path | None = None,
    force: bool = False,
    indices: bool = False,
    data: Path | None = None,
    min_speedup: float | None = None,
    threads: int | None = None,
    batch_sizes: Sequence[int] = PROFILE_BATCHES,
    duration: float = PROFILE_SECONDS,
    recipe: dict[str, Any] | None = None,
    progress: Callable[[str], None] = lambda text: None,
    notice: Callable[[str], None] = lambda text: None,
) -> tuple[Bundle, Report]:
    """Reduces, exports, verifies and profiles a checkpoint, and writes the bundle.

    Args:
        source: Checkpoint file or timm name.
        tokens: The reduction; what is left open comes from the checkpoint.
        model: timm name that decides the architecture.
        image_size: Pixels, if not the checkpoint's.
        precision: Of the weights in the files.
        targets: What to make.
        out: Folder for the bundle; ``<stem>-<method>-k<rate>`` beside the checkpoint by default.
        force: Whether to replace an older bundle there.
        indices: Whether ``model.onnx`` gives out the kept candidates as ``kept_<block>``.
        data: Folder of labelled images for top-1 and top-5.
        min_speedup: Fail unless every profiled batch size is at least this much faster than the dense twin.
        threads: CPU threads.
        batch_sizes: Batches to profile.
        duration: Seconds for each of them.
        recipe: The recipe this is part of, for the record.
        progress: Told what is being done.
        notice: Told what the user should know (assumptions, costs).

    Returns:
        The bundle on disk and the report.

    Raises:
        InputError: The input cannot be used; nothing was written.
        GateFailed: A check did not hold; the bundle lies in ``<out>.rejected``, with the report.
        StageError: Exporting or writing failed; nothing was written.
    """
    _check_asked(precision, targets)
    if data is not None:
        from evit_deploy.data import image_folder

        image_folder(data, Preprocess((224, 224)))  # a wrong folder is told before the work, not after it
    progress("reading the checkpoint")
    checkpoint = read_checkpoint(source, model)
    spec, notes = tokens.resolve(checkpoint) if isinstance(tokens, Tokens) else (tokens, [])
    notes = checkpoint.notes + notes
    out = out or default_out(checkpoint, spec)
    bundles.check_out(out, force=force)
    reduced = reduce_tokens_(build_model(checkpoint, image_size), spec)
    checkpoint.weights = {}  # the model has its own copy by now
    plan = token_plan(reduced)
    preprocess = preprocess_of(checkpoint, reduced)
    notes += _training_notes(checkpoint, spec)
    for note in notes:
        notice(note)

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
        precision=precision,
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
        golden = _write_models(reduced, manifest, staging.path, indices, progress)
        exported, dense = staging.path / bundles.MODEL, staging.path / bundles.DENSE
        progress("verifying")
        report += verify_runtime("onnxruntime", exported, golden, plan, VERIFY_BATCHES, threads)
        report += verify_dense("onnxruntime", dense, golden, threads)
        if report.passed and data is not None:
            progress("accuracy")
            report += accuracy("onnxruntime", exported, manifest, data, threads)
        if report.passed:
            report += measure_all(
                onnx_contestants(exported, dense),
                plan,
                batch_sizes,
                threads=threads,
                duration=duration,
                minimum_rounds=PROFILE_ROUNDS,
                progress=progress,
            )
            report += speed_gate(report, min_speedup)
        progress("writing the bundle")
        (staging.path / bundles.REPORT).write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2))
        bundles.write_manifest(staging.path, msgspec.structs.replace(manifest, results=_results(report)))
        if report.passed:
            staging.publish(out)
        else:
            _reject(staging, report)
    return bundles.read_bundle(out), report


def _write_models(
    reduced: torch.nn.Module, manifest: Manifest, staging: Path, indices: bool, progress: Callable[[str], None]
) -> Golden:
    """Exports the model and its dense twin, and asks PyTorch for the golden answers."""
    dense_model = dense_twin(reduced)
    about = {"name": manifest.model, "preprocess": manifest.preprocess}
    progress("exporting to ONNX")
    exported = export_onnx(reduced, **about)
    onnx.save(with_indices(exported) if indices else exported, staging / bundles.MODEL)
    progress("exporting the dense twin")
    (staging / bundles.DENSE).parent.mkdir()
    onnx.save(export_onnx(dense_model, **about), staging / bundles.DENSE)
    progress("asking PyTorch for golden answers")
    inputs = sample_inputs(manifest.preprocess, GOLDEN_IMAGES, backbone_of(reduced).channels(reduced))
    golden = make_golden(reduced, dense_model, inputs)
    golden.save(staging / bundles.GOLDEN)
    return golden


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


def _check_asked(precision: str, targets: Sequence[str]) -> None:
    for target in targets:
        if target not in TARGETS:
            raise InputError(
                "this version cannot make that target", where="--target", seen=repr(target), wanted=", ".join(TARGETS)
            )
    if precision not in PRECISIONS:
        raise InputError(
            "this version cannot make that precision",
            where="--precision",
            seen=repr(precision),
            wanted=", ".join(PRECISIONS),
        )


def _training_notes(checkpoint: Checkpoint, spec: TokenSpec) -> list[str]:
    rates = set(spec.keep_rate) if isinstance(spec.keep_rate, tuple) else {spec.keep_rate}
    if rates == {1.0}:
        return []
    trained = checkpoint.tokens
    if trained is not None:
        if trained.keep_rate != spec.keep_rate:
            return [f"These weights were trained at keep rate {trained.keep_rate} and run at {spec.keep_rate}."]
        return []
    rate = rates.pop() if len(rates) == 1 else None
    if rate in _UNTRAINED_DEIT_S:
        cost = f"For DeiT-S at {rate:g} that costs {79.8 - _UNTRAINED_DEIT_S[rate]:.1f} points of ImageNet top-1"
    else:
        known = ", ".join(f"{79.8 - top1:.1f} at {rate:g}" for rate, top1 in _UNTRAINED_DEIT_S.items())
        cost = f"For DeiT-S that costs, in points of ImageNet top-1, {known}"
    source = checkpoint.source if checkpoint.sha256 else "CHECKPOINT"
    if Path(source).is_absolute():  # this goes into the bundle, which is not to name folders of this machine
        source = Path(source).name
    keep = f"[{','.join(map(str, spec.keep_rate))}]" if isinstance(spec.keep_rate, tuple) else f"{spec.keep_rate:g}"
    return [
        f"These weights were never trained with token reduction. {cost} (EViT paper, table 1). To fine-tune: "
        f"evit-deploy train recipes/finetune.yaml --set model.checkpoint={source} --set tokens.keep_rate={keep} "
        f"--set data.train=DIR --set data.validation=DIR"
    ]


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
