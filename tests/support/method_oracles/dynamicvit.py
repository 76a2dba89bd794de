"""DynamicViT (Rao et al., "DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification", NeurIPS 2021).

A predictor before some blocks says of each patch how likely it is to be kept. Training masks patches instead of
removing them; inference keeps a fixed count.
"""

from collections.abc import Callable, Sequence
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
    gelu,
    last_tokens,
    layer_norm,
    linear,
    log_softmax,
    mlp,
    together,
)

PREDICTOR_EPS = 1e-5  # of the predictor's own norm, whatever the model's is


def counts(patches: int, rate: float, stages: int = 3) -> list[int]:
    """``int(patches · ρ^s)`` for s = 1, 2, ...: exact on the rate as it is written."""
    return [int(patches * Fraction(repr(rate)) ** stage) for stage in range(1, stages + 1)]


def predict(model: Model, stage: int, patches: Array, mask: Array) -> Array:
    """Log probabilities ``[N, 2]`` (keep, drop) of patches ``[N, C]``.

    Half of the channels stay each patch's own, the others become their mean over the patches weighted by ``mask [N]``.
    """
    name = f"score_predictor.{stage}"
    x = gelu(linear(model, f"{name}.in_conv.1", layer_norm(model, f"{name}.in_conv.0", patches, PREDICTOR_EPS)))
    half = x.shape[1] // 2
    mean = (x[:, half:] * mask[:, None]).sum(0) / mask.sum()
    x = np.concatenate([x[:, :half], np.broadcast_to(mean, (len(x), len(mean)))], axis=1)
    for layer in (0, 2):
        x = gelu(linear(model, f"{name}.out_conv.{layer}", x))
    return log_softmax(linear(model, f"{name}.out_conv.4", x))


def forward(model: Model, images: Array, locations: Sequence[int], keeps: Sequence[int]) -> Result:
    """Inference: before block ``locations[s]`` the ``keeps[s]`` patches of the highest score stay, in that order."""
    return together([_one(model, image, dict(zip(locations, keeps, strict=True))) for image in images])


def _one(model: Model, image: Array, keeps: dict[int, int]) -> OneResult:
    x = embed(model, image)
    numbers, chosen = np.arange(len(x) - 1), []
    for block in range(model.depth):
        if block in keeps:
            scores = predict(model, len(chosen), x[1:], np.ones(len(x) - 1))[:, 0]
            order = descending(scores)[: keeps[block]]
            numbers, x = numbers[order], np.concatenate([x[:1], x[1:][order]])
            chosen.append(numbers)
        x = x + attend(model, block, x).update
        x = x + mlp(model, block, x)
    return OneResult(classify(model, x), chosen)


# ---- training


class Trained(NamedTuple):
    """The training pass of a batch.

    Attributes:
        logits: Of the class token ``[B, classes]``.
        tokens: The patches after the last norm ``[B, patches, C]``; on LV-ViT their auxiliary logits.
        masks: At each location, of all patches ``[stages, B, patches]``: dropped ones stay dropped.
        scores: Log probabilities at each location ``[stages, B, patches, 2]``.
    """

    logits: Array
    tokens: Array
    masks: Array
    scores: Array


Decide = Callable[[int, int, Array], Array]  # stage, image, log probabilities [N, 2] -> decisions [N]


def train(model: Model, images: Array, locations: Sequence[int], decisions: Array | Decide) -> Trained:
    """The training pass with given decisions instead of drawn ones.

    Every block uses the masked attention, with a mask of ones before the first location. On LV-ViT the logits are the
    class head's alone.

    Args:
        model: The model.
        images: ``[B, 3, height, width]``.
        locations: Blocks with a predictor.
        decisions: ``[stages, B, patches]``, 1 for keep, or a function that makes them from the scores; each is
            multiplied by those before it. Numbers between 0 and 1 are allowed, for derivatives.
    """
    if isinstance(decisions, np.ndarray):
        given = decisions.astype(np.float64)
        return train(model, images, locations, lambda stage, image, scores: given[stage, image])
    rows = [_train_one(model, image, locations, decisions, number) for number, image in enumerate(images)]
    logits, tokens, masks, scores = zip(*rows, strict=True)
    return Trained(np.stack(logits), np.stack(tokens), np.stack(masks, axis=1), np.stack(scores, axis=1))


def _train_one(model: Model, image: Array, locations: Sequence[int], decide: Decide, number: int) -> Trained:
    x = embed(model, image)
    mask, masks, scores = np.ones(len(x) - 1), [], []
    for block in range(model.depth):
        if block in locations:
            scores.append(predict(model, len(masks), x[1:], mask))
            mask = mask * decide(len(masks), number, scores[-1])
            masks.append(mask)
        x = x + attend(model, block, x, mask=np.concatenate([[1.0], mask])).update
        x = x + mlp(model, block, x)
    return Trained(*_outputs(model, x), np.stack(masks), np.stack(scores))


def _outputs(model: Model, x: Array) -> tuple[Array, Array]:
    x = layer_norm(model, "norm", x)
    patches = linear(model, "aux_head", x[1:]) if "aux_head.weight" in model.weights else x[1:]
    return linear(model, "head", x[0]), patches


def teach(model: Model, images: Array) -> tuple[Array, Array]:
    """What the dense teacher says: logits ``[B, classes]`` and tokens ``[B, patches, C]`` as :class:`Trained` has."""
    outputs = [_outputs(model, last_tokens(model, image)) for image in images]
    return np.stack([logits for logits, _ in outputs]), np.stack([tokens for _, tokens in outputs])


def soft(scores: Array, noise: Array) -> Array:
    """The soft decision of Gumbel softmax at temperature 1 with given Gumbel noise: of scores ``[..., 2]``, the first.

    The hard one is 1 where this is at least one half; it has this one's derivative ("straight through").
    """
    return np.exp(log_softmax(np.asarray(scores, np.float64) + noise))[..., 0]


def ratio_loss(masks: Array, ratios: Sequence[float]) -> float:
    """Mean over the stages and images of (share of the patches kept − ratio)², masks ``[stages, B, patches]``."""
    shares = np.asarray(masks, np.float64).mean(-1)
    return float(np.mean([((share - ratio) ** 2).mean() for share, ratio in zip(shares, ratios, strict=True)]))


def divergence(student: Array, teacher: Array) -> float:
    """KL(teacher ‖ student) of logits ``[rows, classes]``, the mean over rows."""
    logs, truth = log_softmax(np.asarray(student, np.float64)), log_softmax(np.asarray(teacher, np.float64))
    return float((np.exp(truth) * (truth - logs)).sum(-1).mean())


def token_loss(student: Array, teacher: Array, mask: Array) -> float:
    """Mean squared difference over the kept patches of all images and over channels; 0 where nothing is kept."""
    kept = np.asarray(mask) > 0.5
    return float(((student - teacher)[kept] ** 2).mean()) if kept.any() else 0.0


def token_divergence(student: Array, teacher: Array, mask: Array) -> float:
    """LV-ViT's token loss: :func:`divergence` of the auxiliary logits of the kept patches of all images."""
    kept = np.asarray(mask) > 0.5
    return divergence(student[kept], teacher[kept]) if kept.any() else 0.0
