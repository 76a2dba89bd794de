"""Weights and images drawn from a seed, so that golden files need to hold results only."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

Array = np.ndarray

WIDTHS = {"qk.weight": 2.4, "c.weight": 0.9}


def draw(shapes: Mapping[str, Sequence[int]], seed: int) -> dict[str, Array]:
    """float32 weights for names in sorted order; counters of batches are int64 zeros.

    They are wide enough that every one matters and that scores are well apart: matrices and filters have a deviation
    of 1.2 / √inputs, norms are 1 ± 0.2, variances exp(± 0.3), everything else ± 0.4. Two layouts need their own width:
    Evo-ViT's attention 2.4 (else the patches chosen first are chosen for good), LeViT's trunk without norms 0.9 (else
    its logits grow to thousands).
    """
    generator = np.random.default_rng(seed)
    weights = {}
    for name in sorted(shapes):
        shape = tuple(shapes[name])
        if name.endswith("num_batches_tracked"):
            weights[name] = np.zeros(shape, np.int64)
            continue
        noise = generator.standard_normal(shape)
        if name.endswith("running_var"):
            value = np.exp(0.3 * noise)
        elif name.endswith("weight") and len(shape) > 1:
            width = WIDTHS.get(".".join(name.split(".")[-2:]), 1.2)
            value = width / math.sqrt(math.prod(shape[1:])) * noise
        elif name.endswith("weight"):
            value = 1 + 0.2 * noise
        else:
            value = 0.4 * noise
        weights[name] = value.astype(np.float32)
    return weights


def images(count: int, size: int, seed: int) -> Array:
    """float32 ``[count, 3, size, size]``, normally distributed."""
    return np.random.default_rng(seed).standard_normal((count, 3, size, size)).astype(np.float32)
