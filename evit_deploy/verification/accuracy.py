"""What a runtime answers to any number of images, in batches that it can take."""

import numpy as np

from evit_deploy.export.card import feeds
from evit_deploy.runtimes.runner import Runner

DATA_BATCH = 32


def data_batch(runner: Runner) -> int:
    """Images a call: :data:`DATA_BATCH`, or of the sizes that an engine covers the nearest to it."""
    sizes = [min(max(DATA_BATCH, profile.minimum), profile.maximum) for profile in runner.profiles]
    return min(sizes or [DATA_BATCH], key=lambda size: abs(size - DATA_BATCH))


def outputs_of(runner: Runner, images: np.ndarray) -> dict[str, np.ndarray]:
    """What a runner answers to any number of images.

    Args:
        runner: Opened.
        images: Float32 ``[n, C, H, W]``, prepared.

    Returns:
        By output, ``[n, ...]``.
    """
    return infer_all(runner, images, data_batch(runner) if runner.profiles else len(images))


def infer_all(runner: Runner, images: np.ndarray, batch: int) -> dict[str, np.ndarray]:
    """Runs any number of images in batches of one size; the last one is filled up, and the excess cut off."""
    parts = []
    for start in range(0, len(images), batch):
        part = images[start : start + batch]
        parts.append(runner.infer(feeds(part if len(part) == batch else np.resize(part, (batch, *part.shape[1:])))))
    return {key: np.concatenate([part[key] for part in parts])[: len(images)] for key in parts[0]}
