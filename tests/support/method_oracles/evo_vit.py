"""Evo-ViT (Xu et al., "Evo-ViT: Slow-Fast Token Evolution for Dynamic Vision Transformer", AAAI 2022).

g is each patch's global class attention. The patches with the highest g are informative and go through the blocks; the
others wait as placeholders and are put back. With the paper's representative token, placeholders learn from the blocks
too: they get the updates of a token that stands for them all.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from tests.support.method_oracles.vit import (
    Array,
    Model,
    OneResult,
    Result,
    attend,
    classify,
    descending,
    embed,
    layer_norm,
    linear,
    mlp,
    together,
)


class Schedule(NamedTuple):
    """Where and how tokens are chosen.

    Attributes:
        sorts: Blocks that sort the patches before their attention.
        ends: Blocks after which the placeholders are put back.
        keeps: For each sort, the share of the patches that are informative; ``int(share · patches)`` are.
        alpha: Weight of the new class attention, a number for each block; the first one's is not used.
        representative: Whether placeholders learn by a representative token (the paper) or not (released DeiT code).
    """

    sorts: Sequence[int]
    ends: Sequence[int]
    keeps: Sequence[float]
    alpha: Sequence[float]
    representative: bool


def released_alpha(depth: int, first: int = 4) -> list[float]:
    """α: 1 before the first block that sorts, then one half."""
    return [1.0] * first + [0.5] * (depth - first)


def stage_wise(depth: int, sorts: Sequence[int] = (4, 8), keep: float = 0.5, representative: bool = True) -> Schedule:
    """Inference: one choice a stage; a stage ends where the next begins, the last with the last block."""
    ends = [start - 1 for start in sorts[1:]] + [depth - 1]
    return Schedule(sorts, ends, [keep] * len(sorts), released_alpha(depth, sorts[0]), representative)


def layer_wise(depth: int, first: int = 4, keep: float = 0.5, representative: bool = True) -> Schedule:
    """The first part of training: every block from ``first`` on chooses anew."""
    blocks = range(first, depth)
    return Schedule(blocks, blocks, [keep] * len(blocks), released_alpha(depth, first), representative)


def forward(model: Model, images: Array, schedule: Schedule) -> Result:
    """Logits, and at each sort all patches by g, original numbers, the informative ones in front.

    ``class_logits`` is ``head_cls(norm_cls(x)[0])`` where the weights have that head.
    """
    return together([_one(model, image, schedule) for image in images])


def _one(model: Model, image: Array, schedule: Schedule) -> OneResult:
    x = embed(model, image)
    patches = len(x) - 1
    numbers = np.arange(patches)  # original numbers of the patches as they stand; g is in the same order
    g = np.zeros(patches)
    placeholders, learned, present, chosen = x[:0], np.zeros(x.shape[1]), patches, []
    for block in range(model.depth):
        if block in schedule.sorts:
            keep = int(Fraction(repr(schedule.keeps[len(chosen)])) * patches)
            order = descending(g)
            numbers, g, standing = numbers[order], g[order], x[1:][order]
            chosen.append(numbers.copy())
            present, placeholders, learned = keep, standing[keep:], np.zeros(x.shape[1])
            x = np.concatenate([x[:1], standing[:keep]])
            if schedule.representative and len(placeholders):
                weights = g[keep:] / g[keep:].sum()
                x = np.concatenate([x, (weights[:, None] * placeholders).sum(0, keepdims=True)])
        attended = attend(model, block, x)
        seen = attended.attention[:, 0, 1 : 1 + present].sum(0)
        alpha = schedule.alpha[block] if block else 1.0
        g[:present] = (1 - alpha) * g[:present] + alpha * seen  # placeholders keep what they had
        x = x + attended.update
        update = mlp(model, block, x)
        x = x + update
        if len(placeholders):
            learned = learned + attended.update[-1] + update[-1]
            if block in schedule.ends:
                gained = learned if schedule.representative else 0.0
                x = np.concatenate([x[: 1 + present], placeholders + gained])
                placeholders, present = x[:0], patches
    second = None
    if "head_cls.weight" in model.weights:
        second = linear(model, "head_cls", layer_norm(model, "norm_cls", x[0]))
    return OneResult(classify(model, x), chosen, class_logits=second)


def cross_entropy(logits: Array, targets: Array) -> float:
    """Mean over images of −Σ target · log softmax, for targets ``[B, classes]`` that sum to 1."""
    shifted = logits - logits.max(-1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return float(-(np.asarray(targets, np.float64) * logs).sum(-1).mean())


def loss(result: Result, targets: Array) -> float:
    """Training: half the cross entropy of each head."""
    assert result.class_logits is not None
    return 0.5 * cross_entropy(result.logits, targets) + 0.5 * cross_entropy(result.class_logits, targets)
