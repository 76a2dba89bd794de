"""Evo-LeViT in NumPy float64, written from the papers: one image at a time, and no token ever moves.

Tokens stay at their grid positions, and those that take part are given by a list of patch indices. Nothing is sorted or
moved back, so the package's permutations are tested independently.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

NORM_EPSILON = 1e-5
GAIN, GAIN_STEM = 0.8, 1.5
"""Parameters of batch norms, chosen so that logits are a few units and depend on the image and on every choice."""


class Sizes(NamedTuple):
    """Values that cannot be read from tensors: heads per stage, key width, blocks per stage."""

    heads: tuple[int, ...]
    key_dim: int
    depth: tuple[int, ...]


TINY = Sizes((2, 3, 4), 8, (3, 2, 2))
TINY_ARGS: dict[str, Any] = {
    "img_size": 112, "embed_dim": (32, 48, 64), "key_dim": 8, "num_heads": (2, 3, 4), "depth": (3, 2, 2),
    "num_classes": 10,
}  # fmt: skip
"""49, 16 and 4 patches; the same as ``TINY``."""


def weights(shapes: Mapping[str, Sequence[int]], seed: int = 0) -> dict[str, np.ndarray]:
    """float32 tensors of these shapes from NumPy's legacy generator, whose numbers never change."""
    draw, made = np.random.RandomState(seed), {}
    for name in sorted(shapes):
        noise = draw.standard_normal(tuple(shapes[name]))
        if name.endswith("num_batches_tracked"):
            made[name] = np.zeros((), np.int64)
            continue
        if name.endswith("running_var"):
            noise = np.exp(0.3 * noise)
        elif name.endswith("bn.weight"):
            noise = (GAIN_STEM if name.startswith("patch_embed") else GAIN) + 0.1 * noise
        elif name.endswith(".weight"):
            noise = noise / np.sqrt(np.prod(shapes[name][1:]))
        else:
            noise = 0.3 * noise
        made[name] = np.asarray(noise, np.float32)
    return made


def pictures(count: int, size: int, seed: int = 1) -> np.ndarray:
    """float32 ``[count, 3, size, size]``, normally distributed and reproducible."""
    return np.random.RandomState(seed).standard_normal((count, 3, size, size)).astype(np.float32)


class Answer(NamedTuple):
    """Logits ``[B, classes]`` of each classifier, the model's output, and for each choice the patch indices ``[B,
    P]``."""

    heads: dict[str, np.ndarray]
    logits: np.ndarray
    choices: list[np.ndarray]


def evo_levit(
    given: Mapping[str, np.ndarray],
    images: np.ndarray,
    sizes: Sizes,
    keep: Mapping[int, int],
    alpha: float | None = None,
) -> Answer:
    """The model.

    Args:
        given: Its tensors under the released names.
        images: ``[B, C, H, W]``.
        sizes: Values that cannot be read from tensors.
        keep: Block -> candidates that stay informative from there to the end of the stage, or to the next such block.
        alpha: Weight of a block's attention in the moving average; ``None`` for the learned one.
    """
    w = {name: np.asarray(value, np.float64) for name, value in given.items()}
    answers = [_one(w, np.asarray(image, np.float64), sizes, keep, alpha) for image in images]
    heads = {name: np.stack([answer[0][name] for answer in answers]) for name in answers[0][0]}
    seeing = [heads[name] for name in ("head", "head_dist") if name in heads]
    choices = [np.stack(rows) for rows in zip(*(answer[1] for answer in answers), strict=True)]
    return Answer(heads, sum(seeing) / len(seeing), choices)


def _one(w: Any, image: np.ndarray, sizes: Sizes, keep: Mapping[int, int], fixed: float | None) -> Any:
    for i in (0, 2, 4, 6):
        image = _norm(w, f"patch_embed.{i}", _convolved(w[f"patch_embed.{i}.c.weight"], image))
        image = image if i == 6 else _hardswish(image)
    channels, rows, columns = image.shape
    tokens = image.reshape(channels, -1).T + w["poss"][0, 1:]
    token = w["cls_token"][0, 0] + w["poss"][0, 0]
    g, number, choices = None, 0, []
    for stage, depth in enumerate(sizes.depth):
        if stage:
            token, tokens, g, (rows, columns) = _downsampled(
                w, number, sizes.key_dim, token, tokens, g, (rows, columns), fixed
            )
            change = np.vstack([token, tokens])
            change = change + _mlp(w, f"blocks.{number + 1}.m", change)
            token, tokens, number = change[0], change[1:], number + 2
        taking_part, waiting, gained = list(range(len(tokens))), [], 0.0
        stand_in = np.zeros((0, tokens.shape[1]))
        for _ in range(depth):
            if number in keep:
                tokens[waiting] += gained
                order = sorted(range(len(tokens)), key=lambda patch, g=g: -g[patch])
                choices.append(np.array(order))
                taking_part, waiting, gained = order[: keep[number]], order[keep[number] :], 0.0
                stand_in = sum(g[p] * tokens[p] for p in waiting)[None] / sum(g[p] for p in waiting)
            x = np.vstack([token, tokens[taking_part], stand_in])
            name = f"blocks.{number}.m1.m"
            made = _linear(w, f"{name}.qkv", x).reshape(len(x), sizes.heads[stage], 4 * sizes.key_dim)
            q, k, v = (
                made[..., : sizes.key_dim],
                made[..., sizes.key_dim : 2 * sizes.key_dim],
                made[..., 2 * sizes.key_dim :],
            )
            update, row = _attended(q, k, v)
            own = row[1 : 1 + len(taking_part)]
            share = _share(w, name, fixed)
            if g is None:
                g = own
            else:
                g = g.copy()
                g[taking_part] = (1 - share) * g[taking_part] + share * own
            first = _linear(w, f"{name}.proj.1", _hardswish(update))
            second = _mlp(w, f"blocks.{number}.m2.m", x + first)
            x = x + first + second
            token, tokens[taking_part], stand_in = x[0], x[1 : 1 + len(taking_part)], x[1 + len(taking_part) :]
            gained = gained + (first[-1] + second[-1] if waiting else 0.0)
            number += 1
        tokens[waiting] += gained
    mean = tokens.mean(0)
    logits = {}
    for name in ("head", "head_dist", "head_cls", "head_cls_dist"):
        if f"{name}.l.weight" in w:
            seen = token if "cls" in name else mean
            logits[name] = _norm(w, name, seen[:, None])[:, 0] @ w[f"{name}.l.weight"].T + w[f"{name}.l.bias"]
    return logits, choices


def _downsampled(w, number, key_dim, token, tokens, g, grid, fixed):  # type: ignore[no-untyped-def]
    rows, columns = grid
    places = [row * columns + column for row in range(0, rows, 2) for column in range(0, columns, 2)]
    name, x = f"blocks.{number}", np.vstack([token, tokens]) + w[f"blocks.{number}.poss"][0]
    heads = x.shape[1] // key_dim
    made = _linear(w, f"{name}.kv", x).reshape(len(x), heads, 5 * key_dim)
    queries = _linear(w, f"{name}.q.1", x[[0, *(1 + place for place in places)]]).reshape(-1, heads, key_dim)
    update, row = _attended(queries, made[..., :key_dim], made[..., key_dim:])
    share, sum_before = _share(w, name, fixed), g.sum()
    g = np.array([(1 - share) * g[place] + share * row[1 + place] for place in places])
    y = _linear(w, f"{name}.proj.1", _hardswish(update))
    return y[0], y[1:], g * sum_before / g.sum(), ((rows + 1) // 2, (columns + 1) // 2)


def _attended(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Output ``[n, H · value width]``, and the attention of query 0 to each key, mean over heads."""
    outputs, rows = [], []
    for head in range(q.shape[1]):
        logits = q[:, head] @ k[:, head].T / np.sqrt(q.shape[2])
        shares = np.exp(logits - logits.max(1, keepdims=True))
        shares /= shares.sum(1, keepdims=True)
        outputs.append(shares @ v[:, head])
        rows.append(shares[0])
    return np.concatenate(outputs, axis=1), np.mean(rows, axis=0)


def _share(w: Any, name: str, fixed: float | None) -> float:
    return float(1 / (1 + np.exp(-w[f"{name}.learn_tradeoff"][0]))) if fixed is None else fixed


def _mlp(w: Any, name: str, x: np.ndarray) -> np.ndarray:
    return _linear(w, f"{name}.2", _hardswish(_linear(w, f"{name}.0", x)))


def _linear(w: Any, name: str, x: np.ndarray) -> np.ndarray:
    return _norm(w, name, (x @ w[f"{name}.c.weight"].T).T).T


def _norm(w: Any, name: str, x: np.ndarray) -> np.ndarray:
    """A batch norm in evaluation; channels first."""
    mean, variance, weight, bias = (
        w[f"{name}.bn.{part}"].reshape(-1, *(1,) * (x.ndim - 1))
        for part in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / np.sqrt(variance + NORM_EPSILON) * weight + bias


def _hardswish(x: np.ndarray) -> np.ndarray:
    return x * np.clip(x + 3, 0, 6) / 6


def _convolved(kernel: np.ndarray, image: np.ndarray) -> np.ndarray:
    """3 × 3 convolution with stride 2 and one pixel of zero padding."""
    padded = np.pad(image, ((0, 0), (1, 1), (1, 1)))
    height, width = image.shape[1] // 2, image.shape[2] // 2
    parts = [
        np.tensordot(kernel[:, :, i, j], padded[:, i : i + 2 * height : 2, j : j + 2 * width : 2], axes=1)
        for i in range(3)
        for j in range(3)
    ]
    return np.sum(parts, axis=0)
