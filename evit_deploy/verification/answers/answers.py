"""Runs any number of images in batches that a runtime supports, and compares the answers of two runtimes."""

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np

from evit_deploy.bundle.manifest import Manifest
from evit_deploy.export.card import feeds, kept_name
from evit_deploy.report.report import AgreementRow
from evit_deploy.runtimes.runner import Runner
from evit_deploy.tokens.choices import original_patches
from evit_deploy.tokens.plan import TokenPlan
from evit_deploy.verification.answers.pictures import embeds
from evit_deploy.verification.answers.retrieval import cosines

DATA_BATCH = 32
"""Images per call if the runtime supports any batch size."""


class Answers(msgspec.Struct, frozen=True):
    """Outputs of one runtime for a set of images.

    Args:
        logits: ``[n, classes]``, or embeddings ``[n, width]``.
        kept: Original patch numbers ``[n, K(+1)]`` by block; empty if the runtime does not return them.
    """

    logits: np.ndarray
    kept: Mapping[int, np.ndarray]


def data_batch(runner: Runner) -> int:
    """Images per call: :data:`DATA_BATCH`, or the nearest size that an engine supports."""
    sizes = [min(max(DATA_BATCH, profile.minimum), profile.maximum) for profile in runner.profiles]
    return min(sizes or [DATA_BATCH], key=lambda size: abs(size - DATA_BATCH))


def outputs_of(runner: Runner, images: np.ndarray) -> dict[str, np.ndarray]:
    """Runs any number of images, in a batch size that the runner supports.

    Args:
        runner: An opened runner.
        images: Preprocessed images, float32 ``[n, C, H, W]``.

    Returns:
        Arrays ``[n, ...]`` by output name.
    """
    return infer_all(runner, images, data_batch(runner) if runner.profiles else len(images))


def infer_all(runner: Runner, images: np.ndarray, batch: int) -> dict[str, np.ndarray]:
    """Runs any number of images in batches of a fixed size; the last batch is padded and its excess dropped."""
    parts = []
    for start in range(0, len(images), batch):
        part = images[start : start + batch]
        parts.append(runner.infer(feeds(part if len(part) == batch else np.resize(part, (batch, *part.shape[1:])))))
    return {key: np.concatenate([part[key] for part in parts])[: len(images)] for key in parts[0]}


def named_patches(outputs: Mapping[str, np.ndarray], plan: TokenPlan) -> dict[int, np.ndarray]:
    """Kept patches of a runner's outputs in original patch numbers, by block; empty if it does not return them."""
    blocks = [row.block for row in plan.locations]
    if any(kept_name(block) not in outputs for block in blocks):
        return {}
    kept: list[Any] = [outputs[kept_name(block)] for block in blocks]
    return dict(zip(blocks, original_patches(kept, plan), strict=True))


def members(numbers: np.ndarray, patches: int) -> np.ndarray:
    """Counts each patch number in ``[rows, K]``; returns ``[rows, patches + 1]``.

    Fused tokens come last. There may be several: the newest one, and kept ones of earlier locations.
    """
    members = np.zeros((len(numbers), patches + 1), int)
    np.add.at(members, (np.arange(len(numbers))[:, None], numbers.astype(np.int64) % (patches + 1)), 1)
    return members


def overlap(kept: np.ndarray, others: np.ndarray, merging: bool = False) -> float:
    """Jaccard index of two choices of patches without fused tokens, mean over images.

    With ``merging``, the share of patches that joined the same token.
    """
    if merging:
        return float((kept == others).mean())
    patches = int(max(kept.max(), others.max())) + 1
    one, other = (members(numbers, patches)[:, :-1] for numbers in (kept, others))
    either = np.maximum(one, other).sum(axis=1)
    return float((np.minimum(one, other).sum(axis=1) / np.maximum(either, 1)).mean())


def agreement_row(first: str, one: Answers, second: str, other: Answers, manifest: Manifest) -> AgreementRow:
    """Compares the answers of two runtimes to the same images.

    Args:
        first: Name of the first runtime.
        one: Its answers.
        second: Name of the second runtime.
        other: Its answers.
        manifest: Manifest of the bundle that both run.
    """
    merging, embedding = manifest.plan.merging, embeds(manifest)
    kept = {str(b): overlap(one.kept[b], other.kept[b], b in merging) for b in one.kept if b in other.kept}
    same = one.logits.argmax(axis=1) == other.logits.argmax(axis=1)
    return AgreementRow(
        first=first,
        second=second,
        images=len(one.logits),
        top1=None if embedding else float(same.mean()),
        kept=kept,
        logits=float(np.abs(one.logits - other.logits).max()),
        cosine=float(cosines(one.logits, other.logits).min()) if embedding else None,
    )
