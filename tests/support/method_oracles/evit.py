"""EViT (Liang et al., "Not All Patches are What You Need", ICLR 2022) with the options of its fused token.

The op itself has an oracle of its own, :mod:`tests.support.oracle`; this is the whole model with what options change.
"""

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Literal

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

Fusion = Literal["none", "sum", "mean"]


def forward(model: Model, images: Array, rates: Mapping[int, float], fusion: Fusion = "sum") -> Result:
    """Logits and, where fewer stay, the kept tokens as original patch numbers (−1 is an earlier fused token).

    Heads that pool weight each token by the patches in it: a kept patch counts 1 and a fused token as many as were
    fused into it, those of an earlier fused token included. Without fusion every token counts 1.

    Args:
        model: The model, with one token in front.
        images: ``[B, 3, height, width]``.
        rates: Keep rate κ of each block that reduces: ceil(κN) of N candidates stay.
        fusion: What the others become: nothing; Σ a·x, the paper's; or Σ a·x / Σ a, normalized.
    """
    return together([_one(model, image, rates, fusion) for image in images])


def _one(model: Model, image: Array, rates: Mapping[int, float], fusion: Fusion) -> OneResult:
    x = embed(model, image)
    numbers, sizes = np.arange(len(x) - 1), np.ones(len(x) - 1)
    chosen, counted = [], []
    for block in range(model.depth):
        attended = attend(model, block, x)
        x = x + attended.update
        if block in rates:
            keep = math.ceil(Fraction(repr(rates[block])) * len(sizes))
            if keep < len(sizes):
                scores = attended.attention[:, 0, 1:].mean(0)
                order = descending(scores)
                kept, rest = order[:keep], order[keep:]
                chosen.append(numbers[kept])
                rows, numbers, left = [x[:1], x[1:][kept]], numbers[kept], sizes[rest].sum()
                sizes = sizes[kept]
                if fusion != "none":
                    fused = (scores[rest][:, None] * x[1:][rest]).sum(0, keepdims=True)
                    rows.append(fused / scores[rest].sum() if fusion == "mean" else fused)
                    numbers, sizes = np.append(numbers, -1), np.append(sizes, left)
                x = np.concatenate(rows)
                counted.append(sizes)
        x = x + mlp(model, block, x)
    return OneResult(classify(model, x, sizes), chosen, counted)
