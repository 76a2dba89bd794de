"""Proof that a lowered model answers like PyTorch: logits, kept patches, every batch size, every place in a batch."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evit_deploy import bundle as bundles
from evit_deploy.checkpoint import build_model, read_checkpoint
from evit_deploy.errors import CheckpointError, InputError
from evit_deploy.export import LOGITS, kept_name, versions
from evit_deploy.golden import Golden, agreement, feeds, load_golden, logit_error
from evit_deploy.registry import RUNTIMES
from evit_deploy.report import Check, Report, accuracy_row, device
from evit_deploy.runtimes import Runner
from evit_deploy.tokens.plan import TokenPlan
from evit_deploy.tokens.reduce import reduce_tokens_

BATCH_SIZES = (1, 2, 8)


def verify(
    path: Path,
    *,
    runtimes: Sequence[str] = (),
    batch_sizes: Sequence[int] = BATCH_SIZES,
    threads: int | None = None,
    against: Path | None = None,
    data: Path | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Report:
    """Verifies a bundle against its golden answers.

    Args:
        path: The bundle.
        runtimes: Names in the registry of runtimes; all that can run the bundle here when empty.
        batch_sizes: Batches to try.
        threads: CPU threads, ``None`` for each runtime's own choice.
        against: Checkpoint that the bundle was made from, where it is no longer in its place.
        data: Folder of labelled images (class/image) for top-1 and top-5.
        progress: Told what is being done.

    Returns:
        The report; ``passed`` says whether everything held.

    Raises:
        InputError: No bundle, an unknown runtime, or a runtime that cannot run it.
    """
    bundle = bundles.read_bundle(path)
    changed = bundles.changed_files(bundle)
    check = Check(
        "files as written", len(changed), 0, not changed, "changed or gone: " + ", ".join(changed) if changed else ""
    )
    if changed:  # what follows would be about other files than the manifest's
        return Report(checks=(check,), versions=versions(), device=device())
    golden = load_golden(bundle.file(bundles.GOLDEN), bundle.manifest.plan)
    report = Report(checks=(check,), versions=versions(), device=device())
    model, why_not = parent_model(bundle, against)
    if why_not and (against or "eager" in runtimes):
        raise InputError(
            f"the PyTorch model cannot be had: {why_not}", where="--against" if against else "--runtime eager"
        )
    names = list(runtimes) or [name for name in RUNTIMES.names() if name != "eager" or model is not None]
    if why_not and not runtimes:
        report += Report(notes=(f"PyTorch itself was not run again ({why_not}); its golden answers were used.",))
    for name in names:
        artifact = model if name == "eager" else bundle.file(bundles.MODEL)
        progress(f"verifying on {name}")
        report += verify_runtime(name, artifact, golden, bundle.manifest.plan, batch_sizes, threads)
        if name == "onnxruntime":
            report += verify_dense(name, bundle.file(bundles.DENSE), golden, threads)
        if data is not None:
            progress(f"accuracy on {name}")
            report += accuracy(name, artifact, bundle.manifest, data, threads)
    return report


def verify_runtime(
    name: str, artifact: Any, golden: Golden, plan: TokenPlan, batch_sizes: Sequence[int], threads: int | None = None
) -> Report:
    """Holds one runtime's answers against the golden ones, at several batch sizes.

    Args:
        name: Of the runtime.
        artifact: What it runs.
        golden: The answers.
        plan: The model's plan.
        batch_sizes: Batches to try.
        threads: CPU threads.

    Raises:
        InputError: The runtime cannot run the artifact.
    """
    checks = []
    with opened(name, artifact, threads, with_indices=True) as runner:
        for batch in batch_sizes:
            which = np.arange(max(batch, len(golden.inputs))) % len(golden.inputs)
            parts = [runner.infer(feeds(golden.inputs[part])) for part in _batches(which, batch)]
            outputs = {key: np.concatenate([part[key] for part in parts])[: len(which)] for key in parts[0]}
            checks += _answer_checks(f"{name}, batch {batch}", golden, which, outputs, plan)
            checks.append(_place_check(f"{name}, batch {batch}", runner, golden, batch, plan))
    return Report(checks=tuple(checks))


def _batches(which: np.ndarray, batch: int) -> Iterator[np.ndarray]:
    for start in range(0, len(which), batch):
        part = which[start : start + batch]
        yield np.resize(part, batch)  # the last one is filled up by repeating; the caller cuts the excess off


def _answer_checks(label: str, golden: Golden, which: np.ndarray, outputs: Any, plan: TokenPlan) -> list[Check]:
    found = agreement(golden, which, outputs, plan)
    ties = f"{found.ties:.0%} of the images differ within rounding (ties)" if found.ties else ""
    kept = Check(
        f"{label}: kept patches", f"{found.same + found.ties:.0%}", "100%", found.wrong == 0,
        ties if found.wrong == 0 else f"{found.wrong:.0%} of the images keep other patches than PyTorch",
    )  # fmt: skip
    if np.isnan(found.error) and not found.limit:  # NaN with a limit is an answer of NaN
        reason = (
            "no image to compare: every one lies on a tie" if found.wrong == 0 else "no image keeps PyTorch's patches"
        )
        return [kept, Check(f"{label}: logits", None, None, False, reason)]
    held = found.error <= found.limit
    reason = (
        "" if held else f"the largest error against FP64 is {found.error:.2e}, PyTorch's own doubled {found.limit:.2e}"
    )
    return [kept, Check(f"{label}: logits", found.error, found.limit, held, reason)]


def _place_check(label: str, runner: Runner, golden: Golden, batch: int, plan: TokenPlan) -> Check:
    """The same image at every place of a batch has to give the same answer (NVIDIA/TensorRT#4813, #4853)."""
    worst, limit, moved = 0.0, 0.0, 0
    for image in range(min(2, len(golden.inputs))):
        outputs = runner.infer(feeds(np.repeat(golden.inputs[image : image + 1], batch, axis=0)))
        logits = outputs[LOGITS]
        with np.errstate(invalid="ignore"):
            moves = np.abs(logits - logits[0])
        worst = max(worst, float(np.nan_to_num(moves, nan=np.inf).max()))
        which = np.full(batch, image)
        limit = max(limit, logit_error(golden.logits, golden.reference, which, logits)[1])
        certain = all(margin[image] >= 1 for margin in golden.margin.values())
        if certain:
            kept = [np.sort(outputs[kept_name(row.block)], axis=1) for row in plan.locations]
            moved += sum(bool((numbers != numbers[0]).any()) for numbers in kept)
    reason = f"its logits move by {worst:.2e} with its place" if worst > limit else ""
    reason = f"{moved} locations keep other patches at other places" if moved else reason
    return Check(f"{label}: same answer at every place", worst, limit, worst <= limit and not moved, reason)


def verify_dense(name: str, artifact: Any, golden: Golden, threads: int | None = None) -> Report:
    """Holds the dense twin against the dense PyTorch model: a wrong twin would make every speed-up worthless."""
    with opened(name, artifact, threads) as runner:
        logits = runner.infer(feeds(golden.inputs))[LOGITS]
    which = np.arange(len(golden.inputs))
    error, limit = logit_error(golden.dense, golden.dense_reference, which, logits)
    held = error <= limit
    reason = "" if held else "the twin that every speed-up is measured against is not the dense model"
    return Report(checks=(Check(f"{name}: dense twin's logits", error, limit, held, reason),))


def accuracy(name: str, artifact: Any, manifest: bundles.Manifest, data: Path, threads: int | None = None) -> Report:
    """Top-1 and top-5 on a folder of labelled images, in the deployment's preprocessing."""
    from evit_deploy.data import image_folder

    folder = image_folder(data, manifest.preprocess)
    classes = manifest.outputs[0].shape[-1]
    if classes is not None and len(folder.classes) > classes:
        raise InputError(
            "more class folders than the model has classes",
            where=data,
            seen=len(folder.classes),
            wanted=f"at most {classes}",
        )
    with opened(name, artifact, threads) as runner:
        answers = ((runner.infer(feeds(images))[LOGITS], labels) for images, labels in folder.batches(32))
        row = accuracy_row(name, answers, manifest.plan.macs() / 1e9)
    return Report(accuracy=(row,))


@contextmanager
def opened(name: str, artifact: Any, threads: int | None = None, *, with_indices: bool = False) -> Iterator[Runner]:
    """A runner by its runtime's name, opened.

    Raises:
        InputError: No such runtime, or it cannot run this.
        MissingRequirement: The runtime is not installed, or its device is not there.
    """
    runtime: type[Runner] = RUNTIMES.get(name)
    missing = runtime.missing()
    if missing is not None:
        raise missing
    reasons = runtime.accepts(artifact)
    if reasons:
        raise InputError(f"the runtime {name!r} cannot run this: {'; '.join(reasons)}", where="--runtime")
    with runtime(artifact, threads=threads, with_indices=with_indices) as runner:
        yield runner


def artifact_of(bundle: bundles.Bundle, runtime: type[Runner], *, dense: bool = False) -> Path | None:
    """The file of a bundle that a runtime runs best; ``None`` if it can run none of them.

    Args:
        bundle: The bundle.
        runtime: A class from the registry of runtimes.
        dense: The dense twin's file instead of the model's.
    """
    names = (bundles.TWIN * dense + name for name in runtime.files)
    found = next((name for name in names if name in bundle.manifest.files), None)
    return bundle.file(found) if found else None


def parent_model(bundle: bundles.Bundle, against: Path | None = None) -> tuple[torch.nn.Module | None, str]:
    """The reduced PyTorch model that a bundle was made from, if its checkpoint is still there.

    Args:
        bundle: The bundle.
        against: Where the checkpoint is now.

    Returns:
        The model and an empty text; or ``None`` and why not.
    """
    manifest, parent = bundle.manifest, bundle.manifest.parents[0]
    if against is None and parent.sha256 is None:
        return None, f"it was made from {parent.source!r}, which would have to be fetched"
    path = against or bundle.path / parent.source
    if not path.is_file():
        return None, f"its checkpoint {path} is gone; --against says where it is"
    if bundles.sha256(path) != parent.sha256:
        return None, f"{path} is not the checkpoint it was made from"
    try:
        checkpoint = read_checkpoint(path, parent.model)
        size = manifest.preprocess.size[0]
        model = reduce_tokens_(build_model(checkpoint, size), manifest.tokens)
    except CheckpointError as error:
        return None, str(error)
    return model, ""
