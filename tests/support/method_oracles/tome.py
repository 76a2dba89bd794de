"""ToMe (Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023), from the paper's section 3 and appendix D.

Every block merges r pairs of similar tokens between attention and MLP. A token's size is the patches it stands for.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tests.support.method_oracles.vit import Array, Model, OneResult, Result, attend, classify, embed, mlp, together


def schedule(depth: int, merge: int | tuple[int, float] | Sequence[int]) -> list[int]:
    """r of each block.

    Args:
        depth: Blocks.
        merge: A number for all blocks; ``(r, inflect)``: from ``int(r · (1 − inflect))`` in the first block to what
            makes the mean r in the last, linear between and truncated; or a list, zeros after its end.
    """
    if isinstance(merge, int):
        return [merge] * depth
    if isinstance(merge, tuple):
        mean, inflect = merge
        first = int(mean * (1 - inflect))
        last = 2 * mean - first
        return [int(first + (last - first) / (depth - 1) * block) for block in range(depth)]
    return [*merge, *[0] * (depth - len(merge))]


class Matching(NamedTuple):
    """Token numbers: those that stay in their new order, and ``(moves, joins)`` pairs, the most similar first."""

    stay: list[int]
    pairs: list[tuple[int, int]]


def match(metric: Array, merge: int, prefix: int) -> Matching:
    """Bipartite soft matching of tokens with metric ``[N, d]``; tokens of the prefix take no part.

    Tokens at even places (A) each look for the most similar one at an odd place (B) by cosine; the ``merge`` best
    pairs merge, at most half of the tokens after the prefix. Ties go to the lower place. The new order is the prefix,
    then what is left of A, then B; without a merge it stays as it was.
    """
    tokens = len(metric)
    unit = metric / np.linalg.norm(metric, axis=-1, keepdims=True)
    movers = [place for place in range(prefix, tokens) if place % 2 == 0]
    joined = [place for place in range(prefix, tokens) if place % 2 == 1]
    edges = []
    for mover in movers if joined else []:
        similarities = [float(unit[mover] @ unit[other]) for other in joined]
        best = max(range(len(joined)), key=lambda place: (similarities[place], -place))
        edges.append((-similarities[best], mover, joined[best]))
    merge = min(merge, (tokens - prefix) // 2)
    if merge <= 0:
        return Matching(list(range(tokens)), [])
    pairs = [(mover, other) for _, mover, other in sorted(edges)[:merge]]
    moved = {mover for mover, _ in pairs}
    return Matching([*range(prefix), *(place for place in movers if place not in moved), *joined], pairs)


def merge_rows(x: Array, sizes: Array, matching: Matching) -> tuple[Array, Array]:
    """Tokens that stay ``[M, C]``, each the mean by size of itself and what joins it, and their sizes ``[M]``."""
    total, size = (x * sizes[:, None]).copy(), sizes.astype(np.float64)
    for mover, other in matching.pairs:
        total[other] += total[mover]
        size[other] += size[mover]
    return total[matching.stay] / size[matching.stay][:, None], size[matching.stay]


def forward(model: Model, images: Array, merges: Sequence[int], proportional: bool = True) -> Result:
    """Logits and, after each block, the candidate that holds each patch ``[patches]`` and the candidates' sizes.

    Args:
        model: The model; heads that pool count each token by its size.
        images: ``[B, 3, height, width]``.
        merges: r of each block, see :func:`schedule`.
        proportional: Whether log(size) is added to the attention logits of the keys.
    """
    return together([_one(model, image, merges, proportional) for image in images])


def _one(model: Model, image: Array, merges: Sequence[int], proportional: bool) -> OneResult:
    x = embed(model, image)
    sizes = np.ones(len(x))
    holder = np.arange(model.prefix, len(x))  # token that holds each patch
    chosen, counted = [], []
    for block in range(model.depth):
        attended = attend(model, block, x, key_bias=np.log(sizes) if proportional else None)
        x = x + attended.update
        matching = match(attended.keys.mean(0), merges[block], model.prefix)
        x, sizes = merge_rows(x, sizes, matching)
        target = dict(matching.pairs)
        holder = np.array([matching.stay.index(target.get(token, token)) for token in holder.tolist()])
        x = x + mlp(model, block, x)
        chosen.append(holder - model.prefix)
        counted.append(sizes[model.prefix :])
    return OneResult(classify(model, x, sizes[model.prefix :]), chosen, counted)
