"""Verifies a lowered model against PyTorch: logits, kept patches, all batch sizes, all positions in a batch."""

import copy
import logging
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from evit_deploy.bundle import bundle as bundles
from evit_deploy.bundle.manifest import DENSE, GOLDEN, MODEL
from evit_deploy.engines.plugin.library import provide_plugin
from evit_deploy.environment.availability import TENSORRT
from evit_deploy.environment.command import commands
from evit_deploy.environment.machine import device, versions
from evit_deploy.errors import InputError, MissingRequirement
from evit_deploy.export.answer import answer_in
from evit_deploy.export.card import EMBEDDING, LOGITS, feeds, load_onnx
from evit_deploy.export.precision import QUANTIZED
from evit_deploy.models.parent import parent_model
from evit_deploy.progress import doing, in_stages, stage
from evit_deploy.registry import RUNTIMES
from evit_deploy.report.report import Check, Report
from evit_deploy.runtimes.runner import Runner
from evit_deploy.runtimes.select import artifact_of, check_server, opened, subject_of
from evit_deploy.targets.claims import check_claims
from evit_deploy.tokens.plan import TokenPlan
from evit_deploy.tokens.reduce import dense_twin
from evit_deploy.triton.connection import Server
from evit_deploy.triton.find import find_model
from evit_deploy.verification.agreement import agreement, same_choice
from evit_deploy.verification.answers.answers import Answers, agreement_row, infer_all, named_patches
from evit_deploy.verification.answers.cost import Pair, dense_of, side_by_side
from evit_deploy.verification.answers.pictures import pictures_of
from evit_deploy.verification.ensemble import verify_ensemble
from evit_deploy.verification.golden import Golden, load_golden, make_golden
from evit_deploy.verification.limits import own_limits
from evit_deploy.verification.tolerances import NOISE_LIMIT, distance

_LOG = logging.getLogger(__name__)

BATCH_SIZES = (1, 2, 8)


class Trial(msgspec.Struct, frozen=True):
    """Settings for verifying runtimes.

    Args:
        batch_sizes: Batch sizes to test; :func:`default_batches` by default.
        threads: CPU threads; ``None`` for each runtime's default.
        data: Folder of images on which the model is compared with its dense twin.
    """

    batch_sizes: Sequence[int] | None = None
    threads: int | None = None
    data: Path | None = None


USUAL = Trial()
_WIDER = 4
"""Largest allowed ratio of a recorded tolerance to the recomputed one. They differ because processors round differently
and the weights are perturbed at random."""


def verify(
    path: str | Path | bundles.Bundle,
    *,
    runtimes: Sequence[str] = (),
    batch_sizes: Sequence[int] | None = None,
    threads: int | None = None,
    against: str | Path | None = None,
    data: str | Path | None = None,
    plugin: str | Path | None = None,
    server: Server | None = None,
) -> Report:
    """Verifies a bundle against its golden answers, and its runtimes against each other.

    The PyTorch runtimes use the GPU if there is one, in FP32 without TF32.

    Args:
        path: The bundle, or its folder.
        runtimes: Names in the registry of runtimes; if empty, all that can run the bundle on this machine.
        batch_sizes: Batch sizes to test. By default 1, 2 and 8, or the minimum, optimum and maximum of each
            optimization profile of an engine.
        threads: CPU threads; ``None`` for each runtime's default.
        against: Checkpoint that the bundle was converted from, if it was moved.
        data: Folder of images on which the model is compared with its dense twin, and the runtimes with each other:
            top-1, top-5 and agreement, or cosine and retrieval for a model without classes. Without class folders
            (class/image), only metrics that need no labels are computed.
        plugin: Plugin library that the engine needs; by default, the one in the user's cache that matches the hash in
            the manifest.
        server: A running Triton server, verified like any other runtime. If it names an ensemble that accepts image
            files, the ensemble is verified too.

    Returns:
        The report; ``passed`` is true if every check passed.

    Raises:
        InputError: The path is not a bundle, a runtime is unknown or cannot run the bundle, or the server serves
            another model.
        MissingRequirement: A requested runtime or the server is not available, or no available runtime can run any
            file of the bundle.
    """
    against = Path(against) if against is not None else None
    data = Path(data) if data is not None else None
    trial = Trial(batch_sizes, threads, data)
    runtimes = check_server(runtimes, server)
    bundle = path if isinstance(path, bundles.Bundle) else bundles.read_bundle(path)
    changed = bundles.changed_files(bundle)
    reason = f"changed or gone: {', '.join(changed)}. Copy the bundle here again, or convert again." if changed else ""
    check = Check("files as written", len(changed), 0, not changed, reason)
    if changed:  # the manifest does not describe these files, so further checks would be meaningless
        return Report(checks=(check,), versions=versions(), device=device(), commands=commands())
    if data is not None:
        pictures_of(data, bundle.manifest)  # reject an invalid folder before the long checks
    golden = load_golden(bundle.file(GOLDEN), bundle.manifest)
    report = Report(checks=(check,), versions=versions(), device=device(), commands=commands()) + check_claims(bundle)
    model, why_not = parent_model(bundle, against)
    if why_not and (against or "eager" in runtimes):
        raise InputError(
            f"the PyTorch model is not available: {why_not}", where="--against" if against else "--runtime eager"
        )
    golden, found = hold_golden(bundle, golden, model, why_not, served=server is not None)
    report += found + verify_precision(golden, bundle.manifest.answer)
    lacking = provide_plugin(bundle.manifest.engine, plugin)
    if lacking is not None and TENSORRT in runtimes:
        raise lacking
    on_server = find_model(server, bundle.manifest) if server is not None else None
    if runtimes:
        served = on_server.served if on_server is not None else None
        report += prove(bundle, golden, runtimes, trial, model=model, server=served)
        if on_server is not None and on_server.ensemble is not None:
            doing(_LOG, f"sending files to {on_server.ensemble}")
            report += verify_ensemble(on_server, bundle.manifest, golden)
        return report
    unable = {} if lacking is None else {TENSORRT: lacking}
    return report + _prove_all(bundle, golden, trial, model, unable)


def hold_golden(
    bundle: bundles.Bundle, golden: Golden, model: torch.nn.Module | None, why_not: str, *, served: bool
) -> tuple[Golden, Report]:
    """Checks the golden answers and tolerances of a bundle; neither is trusted as recorded.

    With the PyTorch model, both are recomputed. Without it, the golden answers are compared with the bundle's ONNX
    files, within limits derived from their tensors.

    Args:
        bundle: The bundle.
        golden: Contents of its golden file.
        model: The PyTorch model it was converted from, FP32, if available.
        why_not: Why the PyTorch model is not available.
        served: Whether a server runs the model. For a package, only the golden file is then available.

    Returns:
        Golden answers to compare runtimes with, and the checks.

    Raises:
        InputError: The bundle's ONNX files cannot be computed.
    """
    plan, answer = bundle.manifest.plan, bundle.manifest.answer
    which = np.arange(len(golden.inputs))
    whole = {MODEL, DENSE} <= bundle.manifest.files.keys()
    if not whole and (model is None or golden.precision in QUANTIZED):  # a package: only the server has the model
        note = "Golden answers and tolerances are as they were written: the package has no model.onnx to find them by."
        fix = "Give --against CHECKPOINT, or verify the bundle." if model is None else "Verify the bundle."
        # Recorded tolerances do not verify local files: anyone who changes the files can change the tolerances.
        checks = () if served else (Check("golden answers", None, None, False, f"{note} {fix}"),)
        return golden, Report(checks=checks, notes=(f"{note} {fix}",))
    if model is not None:
        doing(_LOG, "computing the golden answers anew")
        dense = dense_twin(model)
        files = None
        if golden.precision in QUANTIZED:
            files = load_onnx(bundle.file(MODEL)), load_onnx(bundle.file(DENSE))
        fresh = make_golden(model, dense, golden.inputs, golden.precision, files)
        same, tie = same_choice(fresh, which, golden.kept, fresh.kept, plan.merging)
        error = distance(np.where(same[:, None], golden.reference, fresh.reference), fresh.reference)
        checks = [_held(f"golden {answer}: PyTorch's", error, fresh.limit(), bool((same | tie).all()))]
        twin = fresh.dense_reference
        note = "The reference was computed again, in FP64, from the checkpoint."
    else:
        doing(_LOG, "computing what rounding may change")
        own = own_limits(golden, bundle.file(MODEL), bundle.file(DENSE), plan, bundle.manifest.tokens.method)
        fresh, twin = own.golden, own.dense
        checks = _answer_checks("golden answers, by model.onnx in FP32", fresh, which, own.outputs, plan)
        note = f"Compared with the bundle's own golden answers: PyTorch itself was not run again ({why_not})."
    checks.append(
        _held(f"golden {answer} of the dense twin", distance(golden.dense_reference, twin), fresh.dense_limit())
    )
    room = fresh.limit() + float(np.abs(fresh.swapped - fresh.reference).max())
    for what, recorded, most in (
        ("tolerance", golden.limit(), fresh.limit()),
        ("tolerance on ties", float(golden.tie_limits().max()), room),
        ("tolerance of the dense twin", golden.dense_limit(), fresh.dense_limit()),
    ):
        checks.append(_held(f"golden file: {what}", recorded, _WIDER * most))
    return fresh, Report(checks=tuple(checks), notes=(note,))


def _held(name: str, value: float, limit: float, also: bool = True) -> Check:
    held = value <= limit and also
    reason = "" if held else "the golden file is not this model's, or allows more than rounding explains"
    return Check(name, value, limit, held, reason)


def _prove_all(
    bundle: bundles.Bundle,
    golden: Golden,
    trial: Trial,
    model: torch.nn.Module | None,
    unable: dict[str, MissingRequirement],
) -> Report:
    """Verifies all files that a runtime on this machine can run, and adds a note for each of the others.

    Raises:
        MissingRequirement: No available runtime can run any file of the bundle.
    """
    artifacts: dict[str, Any] = {}
    for name in RUNTIMES.names():
        runtime: type[Runner] = RUNTIMES.get(name)
        artifact = subject_of(bundle, runtime, model, None)
        if artifact is not None and runtime.default and not runtime.accepts(artifact):
            artifacts[name] = artifact
            missing = runtime.missing()
            unable |= {name: missing} if missing is not None and name not in unable else {}
    names = [name for name in artifacts if name not in unable]
    report = prove(bundle, golden, names, trial, model=model, unable=unable)
    proven = {artifact for name, artifact in artifacts.items() if name not in unable and artifact is not model}
    if not proven:
        reasons = "; ".join(f"{name}: {error.what}" for name, error in unable.items())
        raise MissingRequirement(
            f"nothing here runs any file of this bundle ({reasons or 'no runtime is for its precision'})",
            where=bundle.path, fix="evit-deploy doctor says what is missing.",
        )  # fmt: skip
    for artifact in dict.fromkeys(artifacts[name] for name in unable):
        if artifact not in proven:
            reasons = "; ".join(f"{n}: {error.what}" for n, error in unable.items() if artifacts[n] == artifact)
            report += Report(notes=(f"{artifact.relative_to(bundle.path)} was not verified here ({reasons}).",))
    return report


def prove(
    bundle: bundles.Bundle,
    golden: Golden,
    runtimes: Sequence[str],
    trial: Trial = USUAL,
    *,
    model: torch.nn.Module | None = None,
    unable: dict[str, MissingRequirement] | None = None,
    server: Server | None = None,
) -> Report:
    """Compares the answers of runtimes with the golden answers and with each other.

    Args:
        bundle: The bundle.
        golden: Its golden answers.
        runtimes: Names in the registry of runtimes.
        trial: Batch sizes, threads and images to use.
        model: The PyTorch model, FP32, for the runtimes that run it; on the GPU if there is one, as in profiling.
        unable: Filled with the runtimes that cannot run here and the errors they raised. If ``None``, these errors are
            raised.
        server: The served model, for the runtimes that use a server.

    Raises:
        InputError: The bundle has no file that a runtime can run.
        MissingRequirement: A runtime is not available, or the processor does not support the precision.
    """
    manifest, report, threads = bundle.manifest, Report(), trial.threads
    pictures = pictures_of(trial.data, manifest) if trial.data is not None else None
    if model is not None and torch.cuda.is_available():
        model = copy.deepcopy(model).to("cuda")
    answers = {} if pictures is not None else {"pytorch fp32": Answers(golden.logits, golden.kept)}
    for name in in_stages(runtimes):
        runtime = RUNTIMES.get(name)
        artifact = subject_of(bundle, runtime, model, server)
        if artifact is None:
            raise InputError(
                f"this bundle has nothing that {name} runs", where=bundle.path, seen=", ".join(bundle.manifest.files),
                wanted=" or ".join(runtime.files) or "a PyTorch model",
            )  # fmt: skip
        stage(_LOG, f"verifying on {name}")
        try:
            found, answers[name] = verify_runtime(name, artifact, golden, manifest.plan, trial.batch_sizes, threads)
        except MissingRequirement as error:  # an unsupported data type is only detected when the file is opened
            if unable is None:
                raise
            unable[name] = error
            continue
        report += found
        dense = artifact_of(bundle, runtime, dense=True)
        if dense is not None:
            report += verify_dense(name, dense, golden, threads)
        if pictures is not None:
            doing(_LOG, f"answering the images on {name}")
            pair = Pair(name, artifact, dense_of(artifact, dense))
            found, answers[name] = side_by_side(pair, manifest, pictures, threads)
            report += found
    pairs = combinations(answers.items(), 2)
    return report + Report(agreement=tuple(agreement_row(*one, *other, manifest) for one, other in pairs))


def verify_precision(golden: Golden, answer: str = LOGITS) -> Report:
    """Checks that the error of the precision itself, independent of any runtime, is below :data:`NOISE_LIMIT`.

    Args:
        golden: The golden answers.
        answer: Name of the model's output; see :attr:`evit_deploy.bundle.manifest.Manifest.answer`.
    """
    if golden.precision == "fp32":
        return Report()
    noise = golden.noise(embedding=answer == EMBEDDING)
    held = noise <= NOISE_LIMIT
    reason = (
        "" if held else "This precision breaks the model. For fp16 try bf16, for int8 and fp8 other calibration images."
    )
    return Report(
        checks=(Check(f"{golden.precision}: error over spread of {answer}", noise, NOISE_LIMIT, held, reason),)
    )


def verify_runtime(
    name: str,
    artifact: Any,
    golden: Golden,
    plan: TokenPlan,
    batch_sizes: Sequence[int] | None = None,
    threads: int | None = None,
) -> tuple[Report, Answers]:
    """Compares one runtime's answers with the golden answers, at several batch sizes.

    Args:
        name: Name of the runtime.
        artifact: File or model to run.
        golden: The golden answers.
        plan: The model's token plan.
        batch_sizes: Batch sizes to test; see :func:`verify`.
        threads: CPU threads; ``None`` for the runtime's default.

    Returns:
        The checks, and the runtime's answers to the golden images.

    Raises:
        InputError: The runtime cannot run the artifact, or does not support one of the batch sizes.
    """
    checks: list[Check] = []
    found: list[Answers] = []
    with opened(name, artifact, threads, with_indices=True) as runner:
        for batch in batch_sizes or default_batches(runner):
            which = np.arange(max(batch, len(golden.inputs))) % len(golden.inputs)
            outputs = infer_all(runner, golden.inputs[which], batch)
            kept = named_patches(outputs, plan)
            checks += _answer_checks(f"{name}, batch {batch}", golden, which, outputs, plan)
            checks.append(_place_check(f"{name}, batch {batch}", runner, golden, batch, plan))
            first = slice(len(golden.inputs))
            own = {block: numbers[first] for block, numbers in kept.items()}
            found.append(Answers(outputs[answer_in(outputs)][first], own))
    *_, answers = found
    known = bool(answers.kept) or not plan.locations
    what = "only its answers were compared"
    note = f"{name} does not say which patches it keeps, so that {what}; convert --with-indices tells."
    return Report(checks=tuple(checks), notes=() if known else (note,)), answers


def default_batches(runner: Runner) -> tuple[int, ...]:
    """Batch sizes to test: minimum, optimum and maximum of each optimization profile, else :data:`BATCH_SIZES`."""
    ends = {size for p in runner.profiles for size in (p.minimum, p.optimum, p.maximum)}
    return tuple(sorted(ends)) or BATCH_SIZES


def _answer_checks(label: str, golden: Golden, which: np.ndarray, outputs: Any, plan: TokenPlan) -> list[Check]:
    found = agreement(golden, which, outputs, plan)
    known = not np.isnan(found.same)
    checks, answer = [], answer_in(outputs)
    if known:
        reason = f"{found.ties:.0%} of the images differ within rounding (ties)" if found.ties else ""
        reason = f"{found.wrong:.0%} of the images keep other patches than PyTorch" if found.wrong else reason
        share = f"{found.same + found.ties:.0%}"
        checks.append(Check(f"{label}: kept patches", share, "100%", found.wrong == 0, reason))
    compared = []
    if known and found.same:
        compared.append((answer, found.error, found.limit))
    if not known or found.ties:
        compared.append((f"{answer} on ties" if known else answer, found.tie_error, found.tie_limit))
    for what, error, limit in compared:
        held = error <= limit
        reason = "" if held else f"the largest error against FP64 is {error:.2e}, allowed is {limit:.2e}"
        checks.append(Check(f"{label}: {what}", error, limit, held, reason))
    if not compared:
        checks.append(Check(f"{label}: {answer}", None, None, False, "no image keeps PyTorch's patches"))
    return checks


def _place_check(label: str, runner: Runner, golden: Golden, batch: int, plan: TokenPlan) -> Check:
    """Checks that an image yields the same answer at every position of a batch (NVIDIA/TensorRT#4813, #4853)."""
    worst, limit, moved, answer = 0.0, golden.limit(), 0, LOGITS
    for image in range(min(2, len(golden.inputs))):
        outputs = runner.infer(feeds(np.repeat(golden.inputs[image : image + 1], batch, axis=0)))
        kept, answer = named_patches(outputs, plan), answer_in(outputs)
        first = {block: np.broadcast_to(numbers[:1], numbers.shape) for block, numbers in kept.items()}
        same, tie = same_choice(golden, np.full(batch, image), kept, first, plan.merging)
        moved += int((~same & ~tie).sum())
        if tie.any() or not kept:
            limit = max(limit, float(golden.tie_limits()[image]))
        with np.errstate(invalid="ignore"):
            moves = np.abs(outputs[answer] - outputs[answer][0])
        worst = max(worst, float(np.nan_to_num(moves, nan=np.inf).max()))
    held = worst <= limit
    reason = "" if held else f"{answer}: moved by {worst:.2e} with its place"
    reason = f"at {moved} places other patches are kept" if moved else reason
    return Check(f"{label}: same answer at every place", worst, limit, held and not moved, reason)


def verify_dense(name: str, artifact: Any, golden: Golden, threads: int | None = None) -> Report:
    """Compares the dense twin with the dense PyTorch model, since every speed-up is relative to the twin."""
    with opened(name, artifact, threads) as runner:
        batch = max((p.maximum for p in runner.profiles), default=len(golden.inputs))
        outputs = infer_all(runner, golden.inputs, min(batch, len(golden.inputs)))
    answer = answer_in(outputs)
    error, limit = float(np.abs(outputs[answer] - golden.dense_reference).max()), golden.dense_limit()
    held = error <= limit
    reason = "" if held else "the twin that every speed-up is measured against is not the dense model"
    return Report(checks=(Check(f"{name}: dense twin's {answer}", error, limit, held, reason),))
