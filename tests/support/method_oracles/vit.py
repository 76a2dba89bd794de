"""A vision transformer in NumPy float64: every step that the methods' own passes are put together from.

It reads weights under timm's names and takes one image at a time: tokens are ``[N, C]``, attention is ``[H, N, N]``.
LV-ViT is told by its stem (``patch_embed.conv1``): that one's head adds the auxiliary head's maximum.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

Array = np.ndarray


class Model(NamedTuple):
    """Weights, and what they do not say.

    Attributes:
        weights: timm's names (``blocks.0.attn.qkv.weight``) and arrays of any float type.
        heads: H.
        pool: ``token`` is ``head(norm(x)[0])``, ``mean`` is ``head(fc_norm(mean(patches)))``, ``norm-mean`` is
            ``head(mean(norm(patches)))``.
        eps: Of the layer norms.
        skip: λ that every residual update is divided by (LV-ViT).
    """

    weights: Mapping[str, Array]
    heads: int
    pool: Literal["token", "mean", "norm-mean"] = "token"
    eps: float = 1e-6
    skip: float = 1.0

    @property
    def depth(self) -> int:
        """Blocks."""
        return 1 + max(int(name.split(".")[1]) for name in self.weights if name.startswith("blocks."))

    @property
    def prefix(self) -> int:
        """Tokens in front of the patches."""
        return 1 + ("dist_token" in self.weights)


class Result(NamedTuple):
    """What a pass gives for a batch.

    Attributes:
        logits: ``[B, classes]``.
        chosen: A row for each location (block), and in it one array for each image: original patch numbers in the
            order in which they stand (kept lists), or for each patch the candidate that holds it (merges).
        sizes: As ``chosen``: patches that each candidate stands for; empty where a method does not count them.
        class_logits: Of a second head on the class token; None where there is none.
    """

    logits: Array
    chosen: list[list[Array]]
    sizes: list[list[Array]]
    class_logits: Array | None = None


class OneResult(NamedTuple):
    """As :class:`Result`, for one image: without the batch dimension."""

    logits: Array
    chosen: Sequence[Array] = ()
    sizes: Sequence[Array] = ()
    class_logits: Array | None = None


def together(results: Sequence[OneResult]) -> Result:
    """A batch of what was found for each image."""
    second = [one.class_logits for one in results if one.class_logits is not None]
    return Result(
        np.stack([one.logits for one in results]),
        [list(row) for row in zip(*(one.chosen for one in results), strict=True)],
        [list(row) for row in zip(*(one.sizes for one in results), strict=True)],
        np.stack(second) if second else None,
    )


def dense(model: Model, images: Array) -> Result:
    """The model without any reduction, for images ``[B, 3, height, width]``."""
    return together([OneResult(classify(model, last_tokens(model, image))) for image in images])


def last_tokens(model: Model, image: Array) -> Array:
    """The tokens after the last block, before the norm ``[N, C]``."""
    x = embed(model, image)
    for block in range(model.depth):
        x = x + attend(model, block, x).update
        x = x + mlp(model, block, x)
    return x


# ---- the steps


def tensor(model: Model, name: str) -> Array:
    """A weight in float64."""
    return np.asarray(model.weights[name], np.float64)


def linear(model: Model, name: str, x: Array) -> Array:
    """``x @ weight.T + bias``; the bias may be missing."""
    y = x @ tensor(model, f"{name}.weight").T
    return y + tensor(model, f"{name}.bias") if f"{name}.bias" in model.weights else y


def layer_norm(model: Model, name: str, x: Array, eps: float | None = None) -> Array:
    """Over the last dimension, with the biased variance; ``eps`` is the model's unless given."""
    centered = x - x.mean(-1, keepdims=True)
    scaled = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + (model.eps if eps is None else eps))
    return scaled * tensor(model, f"{name}.weight") + tensor(model, f"{name}.bias")


def gelu(x: Array) -> Array:
    """The exact one, by the error function."""
    error = np.fromiter(map(math.erf, (x / math.sqrt(2)).ravel().tolist()), np.float64, x.size)
    return 0.5 * x * (1 + error.reshape(x.shape))


def softmax(x: Array) -> Array:
    """Over the last dimension."""
    exponentials = np.exp(x - x.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def log_softmax(x: Array) -> Array:
    """Over the last dimension."""
    shifted = x - x.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def convolve(model: Model, name: str, image: Array, stride: int, padding: int) -> Array:
    """A convolution of ``[C, height, width]`` as a product of windows and weights."""
    weight = tensor(model, f"{name}.weight")
    padded = np.pad(image, ((0, 0), (padding, padding), (padding, padding)))
    windows: Any = np.lib.stride_tricks.sliding_window_view(padded, weight.shape[2:], axis=(1, 2))
    y = np.einsum("cyxij,ocij->oyx", windows[:, ::stride, ::stride], weight, optimize=True)
    return y + tensor(model, f"{name}.bias")[:, None, None] if f"{name}.bias" in model.weights else y


def _stem(model: Model, image: Array) -> Array:
    """LV-ViT's three convolutions in front of the patch projection."""
    for number, (stride, padding) in enumerate([(2, 3), (1, 1), (1, 1)], 1):
        image = convolve(model, f"patch_embed.conv{number}", image, stride, padding)
        mean, variance, weight, bias = (
            tensor(model, f"patch_embed.bn{number}.{part}")[:, None, None]
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        image = np.maximum((image - mean) / np.sqrt(variance + 1e-5) * weight + bias, 0)
    return image


def embed(model: Model, image: Array) -> Array:
    """The tokens of an image ``[3, height, width]`` before block 0: prefix, then patches row by row, with positions."""
    image = np.asarray(image, np.float64)
    if "patch_embed.conv1.weight" in model.weights:
        image = _stem(model, image)
    weight = tensor(model, "patch_embed.proj.weight")
    width, channels, side, _ = weight.shape
    rows, columns = image.shape[1] // side, image.shape[2] // side
    cells = image.reshape(channels, rows, side, columns, side).transpose(1, 3, 0, 2, 4).reshape(rows * columns, -1)
    patches = cells @ weight.reshape(width, -1).T + tensor(model, "patch_embed.proj.bias")
    front = [tensor(model, name)[0] for name in ("cls_token", "dist_token") if name in model.weights]
    return np.concatenate([*front, patches]) + tensor(model, "pos_embed")[0]


class Attended(NamedTuple):
    """Of one attention: its residual update ``[N, C]``, its probabilities ``[H, N, N]`` and its keys ``[H, N, d]``."""

    update: Array
    attention: Array
    keys: Array


def attend(
    model: Model, block: int, x: Array, key_bias: Array | None = None, mask: Array | None = None, mask_eps: float = 1e-6
) -> Attended:
    """The attention of a block, its norm included.

    Args:
        model: The model.
        block: Its number.
        x: Tokens ``[N, C]``.
        key_bias: ``[N]``, added to every logit of that key.
        mask: ``[N]``, 1 for a key that is seen by all and 0 for one that is seen by itself only: the probabilities are
            ``(e·P + ε/N) / (Σ e·P + ε)`` with e = exp(logit − the row's largest), and P the mask with ones on the
            diagonal (DynamicViT's training).
        mask_eps: ε.
    """
    tokens = len(x)
    qkv = linear(model, f"blocks.{block}.attn.qkv", layer_norm(model, f"blocks.{block}.norm1", x))
    q, k, v = qkv.reshape(tokens, 3, model.heads, -1).transpose(1, 2, 0, 3)
    logits = q @ k.transpose(0, 2, 1) / math.sqrt(q.shape[-1])
    if key_bias is not None:
        logits = logits + key_bias
    if mask is None:
        attention = softmax(logits)
    else:
        policy = np.where(np.eye(tokens, dtype=bool), 1.0, np.asarray(mask, np.float64)[None, :])
        exponentials = np.exp(logits - logits.max(-1, keepdims=True)) * policy
        attention = (exponentials + mask_eps / tokens) / (exponentials.sum(-1, keepdims=True) + mask_eps)
    mixed = (attention @ v).transpose(1, 0, 2).reshape(tokens, -1)
    return Attended(linear(model, f"blocks.{block}.attn.proj", mixed) / model.skip, attention, k)


def mlp(model: Model, block: int, x: Array) -> Array:
    """The residual update of a block's MLP, its norm included."""
    hidden = gelu(linear(model, f"blocks.{block}.mlp.fc1", layer_norm(model, f"blocks.{block}.norm2", x)))
    return linear(model, f"blocks.{block}.mlp.fc2", hidden) / model.skip


def classify(model: Model, x: Array, sizes: Array | None = None) -> Array:
    """The logits of tokens ``[N, C]``; a mean over patches weights them by ``sizes [N - prefix]`` if given."""
    patches = x[model.prefix :]
    weights = np.ones(len(patches)) if sizes is None else np.asarray(sizes, np.float64)
    share = (weights / weights.sum())[:, None]
    if model.pool == "mean":
        return linear(model, "head", layer_norm(model, "fc_norm", (share * patches).sum(0)))
    x = layer_norm(model, "norm", x)
    if model.pool == "norm-mean":
        return linear(model, "head", (share * x[model.prefix :]).sum(0))
    if "aux_head.weight" in model.weights:
        return linear(model, "head", x[0]) + 0.5 * linear(model, "aux_head", x[1:]).max(0)
    if "head_dist.weight" in model.weights:
        return (linear(model, "head", x[0]) + linear(model, "head_dist", x[1])) / 2
    return linear(model, "head", x[0])


def descending(scores: Array) -> Array:
    """Places by score, the highest first and the lowest place first on ties."""
    return np.array(sorted(range(len(scores)), key=lambda place: (-scores[place], place)), np.int64)
