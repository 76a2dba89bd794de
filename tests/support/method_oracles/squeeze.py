"""EViT's option ``squeeze``: TPS's fusion (Wei et al., "Joint Token Pruning and Squeezing", CVPR 2023), EViT's choice.

Where EViT keeps K patches and fuses the others into one, this keeps K + 1 and lets each dropped token join the kept
one most similar to it, so that both have as many tokens.
"""

import math
from collections.abc import Mapping
from fractions import Fraction

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
    mlp,
    together,
)


def squeeze(x: Array, sizes: Array, kept: Array) -> tuple[Array, Array, Array]:
    """Lets dropped tokens join kept ones.

    Args:
        x: The candidates ``[N, C]``.
        sizes: Patches in each ``[N]``.
        kept: Those that are kept, in their order ``[K]``.

    Returns:
        The kept tokens ``[K, C]``, each the mean by size of itself and what joins it; their sizes ``[K]``; and for
        every candidate the kept one that holds it ``[N]``. Ties of similarity go to the one kept first.
    """
    unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
    total, size = x[kept] * sizes[kept][:, None], sizes[kept].astype(np.float64)
    holder = np.zeros(len(x), np.int64)
    holder[kept] = np.arange(len(kept))
    for dropped in sorted(set(range(len(x))) - set(kept.tolist())):
        similarities = [float(unit[dropped] @ unit[place]) for place in kept]
        nearest = similarities.index(max(similarities))
        holder[dropped] = nearest
        total[nearest] += sizes[dropped] * x[dropped]
        size[nearest] += sizes[dropped]
    return total / size[:, None], size, holder


def forward(model: Model, images: Array, rates: Mapping[int, float]) -> Result:
    """Logits and, at each location where fewer stay, the candidate that holds each patch and the candidates' sizes.

    Args:
        model: The model, with one token in front; heads that pool count each token by its size.
        images: ``[B, 3, height, width]``.
        rates: Keep rate κ of each block that reduces: ceil(κN) + 1 of N candidates stay, all where that is N or more.
    """
    return together([_one(model, image, rates) for image in images])


def _one(model: Model, image: Array, rates: Mapping[int, float]) -> OneResult:
    x = embed(model, image)
    sizes = np.ones(len(x) - 1)
    holder = np.arange(len(x) - 1)  # candidate that holds each patch
    chosen, counted = [], []
    for block in range(model.depth):
        attended = attend(model, block, x)
        x = x + attended.update
        if block in rates:
            keep = math.ceil(Fraction(repr(rates[block])) * len(sizes)) + 1
            if keep < len(sizes):
                scores = attended.attention[:, 0, 1:].mean(0)
                rows, sizes, joined = squeeze(x[1:], sizes, descending(scores)[:keep])
                x, holder = np.concatenate([x[:1], rows]), joined[holder]
                chosen.append(holder)
                counted.append(sizes)
        x = x + mlp(model, block, x)
    return OneResult(classify(model, x, sizes), chosen, counted)
