"""The method ``merge``: written from its definition in docs/methods.md, one image and one token at a time."""

import math
from collections.abc import Mapping
from fractions import Fraction

import numpy as np

from tests.support.method_oracles.squeeze import squeeze
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


def worth(weights: Array, keys: Array) -> Array:
    """sqrt(w) · (1 − highest cosine to a token of higher weight, −1 where there is none).

    Args:
        weights: Attention of the class token to all patches in each token ``[N]``.
        keys: ``[N, d]``.
    """
    unit = keys / np.linalg.norm(keys, axis=-1, keepdims=True)
    found = []
    for token, weight in enumerate(weights):
        similar = [float(unit[token] @ unit[other]) for other in np.flatnonzero(weights > weight)]
        found.append(math.sqrt(weight) * (1 - max(similar, default=-1.0)))
    return np.array(found)


def forward(model: Model, images: Array, rates: Mapping[int, float], proportional: bool = True) -> Result:
    """Logits and, at each location where fewer stay, the candidate that holds each patch and the candidates' sizes.

    Args:
        model: The model; heads that pool count each token by its size.
        images: ``[B, 3, height, width]``.
        rates: Keep rate κ of each block that reduces: ceil(κN) of N candidates stay.
        proportional: Whether log(size) is added to the attention logits of the keys.
    """
    return together([_one(model, image, rates, proportional) for image in images])


def _one(model: Model, image: Array, rates: Mapping[int, float], proportional: bool) -> OneResult:
    x, prefix = embed(model, image), model.prefix
    sizes = np.ones(len(x) - prefix)
    holder = np.arange(len(sizes))
    chosen, counted = [], []
    for block in range(model.depth):
        bias = np.log(np.concatenate([np.ones(prefix), sizes])) if proportional else None
        plain = attend(model, block, x)  # its attention is to one token, whatever is in it
        x = x + attend(model, block, x, key_bias=bias).update
        keep = math.ceil(Fraction(repr(rates.get(block, 1.0))) * len(sizes))
        if keep < len(sizes):
            weights = plain.attention[:, 0, prefix:].mean(0) * sizes
            keys = plain.keys.mean(0)[prefix:]
            kept = descending(worth(weights, keys))[:keep]
            holds = squeeze(keys, sizes, kept)[2]  # whom each joins is a matter of keys, not of what is averaged
            grouped = [np.flatnonzero(holds == place) for place in range(keep)]
            rows = [np.average(x[prefix:][group], axis=0, weights=sizes[group]) for group in grouped]
            sizes = np.array([sizes[group].sum() for group in grouped])
            x, holder = np.concatenate([x[:prefix], np.stack(rows)]), holds[holder]
            chosen.append(holder)
            counted.append(sizes)
        x = x + mlp(model, block, x)
    return OneResult(classify(model, x, sizes), chosen, counted)
