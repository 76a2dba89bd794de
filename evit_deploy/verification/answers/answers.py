"""What runtimes answer to any number of images, in batches that they can take, and how far two of them agree."""

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
"""Images in a call, where the runtime takes any number."""


class Answers(msgspec.Struct, frozen=True):
    """What one runtime said to some images.

    Args:
        logits: ``[n, classes]``, or embeddings ``[n, width]``.
        kept: By block, original patch numbers ``[n, K(+1)]``; empty where the runtime gives none out.
    """

    logits: np.ndarray
    kept: Mapping[int, np.ndarray]


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


def named_patches(outputs: Mapping[str, np.ndarray], plan: TokenPlan) -> dict[int, np.ndarray]:
    """A runner's kept outputs in original patch numbers, by block; empty if it gives none out."""
    blocks = [row.block for row in plan.locations]
    if any(kept_name(block) not in outputs for block in blocks):
        return {}
    kept: list[Any] = [outputs[kept_name(block)] for block in blocks]
    return dict(zip(blocks, original_patches(kept, plan), strict=True))


def members(numbers: np.ndarray, patches: int) -> np.ndarray:
    """How often each number is among ``[rows, K]``, as ``[rows, patches + 1]``.

    Fused tokens come last: there may be several, the one just made and those of earlier locations that were kept.
    """
    members = np.zeros((len(numbers), patches + 1), int)
    np.add.at(members, (np.arange(len(numbers))[:, None], numbers.astype(np.int64) % (patches + 1)), 1)
    return members


def overlap(kept: np.ndarray, others: np.ndarray, merging: bool = False) -> float:
    """Mean over images of patches in common over patches of either (Jaccard), without the fused token.

    Where tokens are merged: the share of patches that joined the same token.
    """
    if merging:
        return float((kept == others).mean())
    patches = int(max(kept.max(), others.max())) + 1
    one, other = (members(numbers, patches)[:, :-1] for numbers in (kept, others))
    either = np.maximum(one, other).sum(axis=1)
    return float((np.minimum(one, other).sum(axis=1) / np.maximum(either, 1)).mean())


def agreement_row(first: str, one: Answers, second: str, other: Answers, manifest: Manifest) -> AgreementRow:
    """Compares what two runtimes said to the same images.

    Args:
        first: Name of the one.
        one: What it said.
        second: Name of the other.
        other: What that said.
        manifest: Of the bundle that both run.
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
