"""LeViT (Graham et al., ICCV 2021) and Evo-ViT on it (Xu et al., AAAI 2022), under their released names.

Evo-LeViT has a class token and positions instead of attention biases. Its patches are put back in their original order
before each downsampling, and g goes on from stage to stage.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from tests.support.method_oracles.vit import Array, OneResult, Result, descending, softmax, together

BATCH_NORM_EPS = 1e-5


class Model(NamedTuple):
    """Weights, and what they do not say: key width D, heads and blocks of each stage."""

    weights: Mapping[str, Array]
    key_width: int
    heads: Sequence[int]
    blocks: Sequence[int]


class Stage(NamedTuple):
    """Where the tensors of a stage are: ``(attention, MLP)`` of its blocks, and of the downsampling after it."""

    blocks: list[tuple[str, str]]
    down: tuple[str, str] | None


def stages(model: Model, evo: bool) -> Iterator[Stage]:
    """LeViT numbers attention and MLP apart, Evo-LeViT numbers their pairs."""
    number = 0
    for stage, count in enumerate(model.blocks):
        if evo:
            blocks = [(f"blocks.{number + i}.m1.m", f"blocks.{number + i}.m2.m") for i in range(count)]
        else:
            blocks = [(f"blocks.{number + 2 * i}.m", f"blocks.{number + 2 * i + 1}.m") for i in range(count)]
        number += count if evo else 2 * count
        last = stage == len(model.blocks) - 1
        yield Stage(blocks, None if last else (f"blocks.{number}", f"blocks.{number + 1}.m"))
        number += 2


# ---- the steps


def tensor(model: Model, name: str) -> Array:
    """A weight in float64."""
    return np.asarray(model.weights[name], np.float64)


def hardswish(x: Array) -> Array:
    """x · clip(x + 3, 0, 6) / 6."""
    return x * np.clip(x + 3, 0, 6) / 6


def batch_norm(model: Model, name: str, x: Array) -> Array:
    """Over the last dimension, with the running statistics."""
    scaled = (x - tensor(model, f"{name}.running_mean")) / np.sqrt(
        tensor(model, f"{name}.running_var") + BATCH_NORM_EPS
    )
    return scaled * tensor(model, f"{name}.weight") + tensor(model, f"{name}.bias")


def linear(model: Model, name: str, x: Array) -> Array:
    """A product and its batch norm."""
    return batch_norm(model, f"{name}.bn", x @ tensor(model, f"{name}.c.weight").T)


def mlp(model: Model, name: str, x: Array) -> Array:
    """The residual update of an MLP."""
    return linear(model, f"{name}.2", hardswish(linear(model, f"{name}.0", x)))


def embed(model: Model, image: Array) -> Array:
    """The patches ``[N, C]`` after four convolutions of stride 2."""
    x = np.asarray(image, np.float64).transpose(1, 2, 0)
    for layer in (0, 2, 4, 6):
        x = hardswish(x) if layer else x
        padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
        windows: Any = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(0, 1))[::2, ::2]
        weight = tensor(model, f"patch_embed.{layer}.c.weight")
        x = batch_norm(model, f"patch_embed.{layer}.bn", np.einsum("yxcij,ocij->yxo", windows, weight, optimize=True))
    return x.reshape(-1, x.shape[-1])


def subsample(x: Array) -> Array:
    """Every second row and column of a square grid of tokens."""
    side = math.isqrt(len(x))
    return x.reshape(side, side, *x.shape[1:])[::2, ::2].reshape(-1, *x.shape[1:])


def bias_indices(side: int, stride: int = 1) -> Array:
    """Which attention bias counts between queries and keys: by vertical and horizontal distance, numbered as met."""
    seen: dict[tuple[int, int], int] = {}
    queries = [(row, column) for row in range(0, side, stride) for column in range(0, side, stride)]
    rows = []
    for row, column in queries:
        offsets = [(abs(row - i), abs(column - j)) for i in range(side) for j in range(side)]
        rows.append([seen.setdefault(offset, len(seen)) for offset in offsets])
    return np.array(rows)


class Attended(NamedTuple):
    """Of one attention: its update (without residual) and its probabilities ``[H, queries, keys]``."""

    update: Array
    attention: Array


def _mix(model: Model, name: str, q: Array, k: Array, v: Array) -> Attended:
    """Queries, keys and values ``[H, N, ...]``; with biases where the weights have them."""
    logits = q @ k.transpose(0, 2, 1) / math.sqrt(model.key_width)
    if f"{name}.attention_biases" in model.weights:
        stride = 1 if q.shape[1] == k.shape[1] else 2
        logits = logits + tensor(model, f"{name}.attention_biases")[:, bias_indices(math.isqrt(k.shape[1]), stride)]
    attention = softmax(logits)
    mixed = (attention @ v).transpose(1, 0, 2).reshape(q.shape[1], -1)
    return Attended(linear(model, f"{name}.proj.1", hardswish(mixed)), attention)


def attend(model: Model, name: str, x: Array, heads: int) -> Attended:
    """Within a stage: of each head q, k (D) and v (2 D) lie together."""
    qkv = linear(model, f"{name}.qkv", x).reshape(len(x), heads, -1).transpose(1, 0, 2)
    d = model.key_width
    return _mix(model, name, qkv[..., :d], qkv[..., d : 2 * d], qkv[..., 2 * d :])


def shrink(model: Model, name: str, x: Array, prefix: int) -> Attended:
    """Between stages: all tokens are keys, the prefix and every second row and column of the patches are queries."""
    d, heads = model.key_width, x.shape[1] // model.key_width
    kv = linear(model, f"{name}.kv", x).reshape(len(x), heads, -1).transpose(1, 0, 2)
    queries = np.concatenate([x[:prefix], subsample(x[prefix:])])
    q = linear(model, f"{name}.q.1", queries).reshape(len(queries), heads, d).transpose(1, 0, 2)
    return _mix(model, name, q, kv[..., :d], kv[..., d:])


def classify(model: Model, x: Array, kind: str = "") -> Array:
    """The mean of the two heads of a kind (``_cls`` for the class token's) for one feature ``[C]``."""
    heads = [f"head{kind}", f"head{kind}_dist"]
    return sum(
        batch_norm(model, f"{name}.bn", x) @ tensor(model, f"{name}.l.weight").T + tensor(model, f"{name}.l.bias")
        for name in heads
    ) / len(heads)  # type: ignore[return-value]


# ---- LeViT


def dense(model: Model, images: Array) -> Result:
    """LeViT as it is."""
    return together([_dense(model, image) for image in images])


def _dense(model: Model, image: Array) -> OneResult:
    x = embed(model, image)
    for heads, stage in zip(model.heads, stages(model, evo=False), strict=True):
        for attention, hidden in stage.blocks:
            x = x + attend(model, attention, x, heads).update
            x = x + mlp(model, hidden, x)
        if stage.down:
            x = shrink(model, stage.down[0], x, 0).update
            x = x + mlp(model, stage.down[1], x)
    return OneResult(classify(model, x.mean(0)))


# ---- Evo-LeViT


class Schedule(NamedTuple):
    """How tokens are chosen.

    Attributes:
        stage_wise: One choice a stage, or else one a block.
        learned: α is the sigmoid of the learned number, or else one half.
        dense: Blocks from the first on that keep everything.
        keep: Share of the others' patches that are informative.
    """

    stage_wise: bool
    learned: bool
    dense: int = 2
    keep: float = 0.5


def forward(model: Model, images: Array, schedule: Schedule) -> Result:
    """Logits; at each sort the patches by g, as numbers of the first stage's grid; the class token's own logits."""
    return together([_one(model, image, schedule) for image in images])


class _Patches(NamedTuple):
    """What is known of the patches as they stand: numbers and g (None before the first attention)."""

    numbers: Array
    g: Array | None


def _refresh(model: Model, name: str, g: Array | None, seen: Array, learned: bool) -> Array:
    """g after an attention in which the first ``len(seen)`` patches took part."""
    if g is None:
        return seen
    alpha = 1 / (1 + math.exp(-float(model.weights[f"{name}.learn_tradeoff"][0]))) if learned else 0.5
    return np.concatenate([(1 - alpha) * g[: len(seen)] + alpha * seen, g[len(seen) :]])


def _one(model: Model, image: Array, schedule: Schedule) -> OneResult:
    x = np.concatenate([tensor(model, "cls_token")[0], embed(model, image)]) + tensor(model, "poss")[0]
    patches, done, chosen = _Patches(np.arange(len(x) - 1), None), 0, []
    for heads, stage in zip(model.heads, stages(model, evo=True), strict=True):
        left = max(0, schedule.dense - done)  # blocks of this stage that keep everything
        done += len(stage.blocks)
        for block in stage.blocks[:left]:
            x, g = _blocks(model, [block], x, patches.g, heads, schedule.learned, len(x) - 1)[:2]
            patches = patches._replace(g=g)
        rest = stage.blocks[left:]
        for group in ([rest] if rest else []) if schedule.stage_wise else [[block] for block in rest]:
            x, patches = _slow_and_fast(model, group, x, patches, heads, schedule)
            chosen.append(patches.numbers)
        if stage.down:
            x, patches = _down(model, stage.down, x, patches, schedule.learned)
    return OneResult(classify(model, x[1:].mean(0)), chosen, class_logits=classify(model, x[0], "_cls"))


def _blocks(
    model: Model, blocks: list[tuple[str, str]], x: Array, g: Array | None, heads: int, learned: bool, seen: int
) -> tuple[Array, Array | None, Array]:
    """Runs blocks; gives tokens, g of which the first ``seen`` took part, and the sum of the last token's updates."""
    gained = np.zeros(x.shape[1])
    for attention, hidden in blocks:
        attended = attend(model, attention, x, heads)
        g = _refresh(model, attention, g, attended.attention[:, 0, 1 : 1 + seen].mean(0), learned)
        x = x + attended.update
        update = mlp(model, hidden, x)
        x, gained = x + update, gained + attended.update[-1] + update[-1]
    return x, g, gained


def _slow_and_fast(
    model: Model, blocks: list[tuple[str, str]], x: Array, patches: _Patches, heads: int, schedule: Schedule
) -> tuple[Array, _Patches]:
    assert patches.g is not None
    order = descending(patches.g)
    numbers, g, standing = patches.numbers[order], patches.g[order], x[1:][order]
    keep = int(Fraction(repr(schedule.keep)) * len(order))
    weights = g[keep:] / g[keep:].sum()
    representative = (weights[:, None] * standing[keep:]).sum(0, keepdims=True)
    y = np.concatenate([x[:1], standing[:keep], representative])
    y, g, gained = _blocks(model, blocks, y, g, heads, schedule.learned, keep)
    return np.concatenate([y[:-1], standing[keep:] + gained]), _Patches(numbers, g)


def _down(model: Model, names: tuple[str, str], x: Array, patches: _Patches, learned: bool) -> tuple[Array, _Patches]:
    """Original order, fewer tokens, g mixed with this attention's own and of the same sum as before."""
    assert patches.g is not None
    order = np.argsort(patches.numbers)
    x = np.concatenate([x[:1], x[1:][order]]) + tensor(model, f"{names[0]}.poss")[0]
    attended = shrink(model, names[0], x, 1)
    seen = subsample(attended.attention[:, 0, 1:].mean(0))
    g = _refresh(model, names[0], subsample(patches.g[order]), seen, learned)
    y = attended.update
    y = y + mlp(model, names[1], y)
    return y, _Patches(subsample(patches.numbers[order]), g * patches.g.sum() / g.sum())
