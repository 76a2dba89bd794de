"""Top-1 and top-5 of a runtime on labelled images."""

from pathlib import Path
from typing import Any

import numpy as np

from evit_deploy.bundle.manifest import Manifest
from evit_deploy.data.sources import Folder, labelled_batches
from evit_deploy.errors import InputError
from evit_deploy.export.answer import answer_in
from evit_deploy.export.card import feeds
from evit_deploy.report.report import Report
from evit_deploy.report.statistics import accuracy_row
from evit_deploy.runtimes.runner import Runner
from evit_deploy.runtimes.select import opened
from evit_deploy.verification.agreement import Answers, named_patches

DATA_BATCH = 32


def accuracy(
    name: str, artifact: Any, manifest: Manifest, folder: Folder, threads: int | None = None
) -> tuple[Report, Answers]:
    """Top-1 and top-5 on a folder of labelled images, and what was answered."""
    with opened(name, artifact, threads, with_indices=True) as runner:
        batch = data_batch(runner)
        parts, labels = [], []
        for images, truth in labelled_batches(folder, manifest.preprocess, batch):
            outputs = infer_all(runner, images, batch if runner.profiles else len(images))
            parts.append((outputs[answer_in(outputs)], named_patches(outputs, manifest.plan)))
            labels.append(truth)
    row = accuracy_row(name, zip((p[0] for p in parts), labels, strict=True), manifest.plan.macs() / 1e9)
    kept = {block: np.concatenate([part[1][block] for part in parts]) for block in parts[0][1]}
    return Report(accuracy=(row,)), Answers(np.concatenate([part[0] for part in parts]), kept)


def data_batch(runner: Runner) -> int:
    """Images a call: :data:`DATA_BATCH`, or of the sizes that an engine covers the nearest to it."""
    sizes = [min(max(DATA_BATCH, profile.minimum), profile.maximum) for profile in runner.profiles]
    return min(sizes or [DATA_BATCH], key=lambda size: abs(size - DATA_BATCH))


def logits_of(runner: Runner, images: np.ndarray) -> np.ndarray:
    """What a runner answers to any number of images.

    Args:
        runner: Opened.
        images: Float32 ``[n, C, H, W]``, prepared.

    Returns:
        ``[n, classes]``.
    """
    outputs = infer_all(runner, images, data_batch(runner) if runner.profiles else len(images))
    return outputs[answer_in(outputs)]


def folder_of(data: Path, manifest: Manifest) -> Folder:
    """Labelled images that fit the model.

    Raises:
        InputError: No such folder, or it has more classes than the model.
    """
    folder = Folder(data)
    classes = manifest.outputs[0].shape[-1]
    if classes is not None and len(folder.classes) > classes:
        raise InputError(
            "more class folders than the model has classes",
            where=data,
            seen=len(folder.classes),
            wanted=f"at most {classes}",
        )
    return folder


def infer_all(runner: Runner, images: np.ndarray, batch: int) -> dict[str, np.ndarray]:
    """Runs any number of images in batches of one size; the last one is filled up, and the excess cut off."""
    parts = []
    for start in range(0, len(images), batch):
        part = images[start : start + batch]
        parts.append(runner.infer(feeds(part if len(part) == batch else np.resize(part, (batch, *part.shape[1:])))))
    return {key: np.concatenate([part[key] for part in parts])[: len(images)] for key in parts[0]}
