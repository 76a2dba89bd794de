"""The NumPy oracles of the methods against what the official code answered on the same weights, training included."""

import functools

import numpy as np
import pytest

from tests.support.method_oracles import dynamicvit, evo_vit, levit
from tests.support.method_oracles.vit import Model
from tests.support.official import Official, read_official

TARGETS = np.zeros((2, 100))
TARGETS[0, [3, 7]], TARGETS[1, [7, 3]] = (0.8, 0.2), (0.6, 0.4)
SCHEDULES = {
    "stage": evo_vit.stage_wise(12, representative=False),
    "layer": evo_vit.layer_wise(12, representative=False),
}
STEP = 1e-5
official = functools.cache(read_official)


def close(result: np.ndarray | float | None, wanted: np.ndarray, atol: float = 1e-9) -> None:
    assert result is not None
    np.testing.assert_allclose(result, wanted, rtol=0, atol=atol)


def directions(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Steps for the tensors whose gradients are known: any will do, these are the gradients, each of length 1."""
    found = {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}
    return {name: gradient / np.linalg.norm(gradient) for name, gradient in found.items()}


def slope(directions: dict[str, np.ndarray], arrays: dict[str, np.ndarray], prefix: str) -> float:
    """The derivative along all directions at once, as the official gradients say it."""
    return sum(float((arrays[prefix + name] * step).sum()) for name, step in directions.items())


def moved(weights: dict[str, np.ndarray], directions: dict[str, np.ndarray], by: float) -> dict[str, np.ndarray]:
    return weights | {name: weights[name].astype(np.float64) + by * step for name, step in directions.items()}


# ---- Evo-ViT


def of_evo_vit(weights: dict[str, np.ndarray]) -> Model:
    """Evo-ViT's released names as timm's."""
    timm = {name: value for name, value in weights.items() if not name.startswith(("qks", "vs", "projs", "norm"))}
    for name in ("norm_cls.weight", "norm_cls.bias"):
        timm[name] = weights[name]
    for part in ("weight", "bias"):
        timm[f"fc_norm.{part}"] = weights[f"norm.{part}"]
        for block in range(12):
            qkv = [weights[f"qks.{block}.qk.{part}"], weights[f"vs.{block}.v.{part}"]]
            timm[f"blocks.{block}.attn.qkv.{part}"] = np.concatenate(qkv)
            timm[f"blocks.{block}.attn.proj.{part}"] = weights[f"projs.{block}.{part}"]
            timm[f"blocks.{block}.norm1.{part}"] = weights[f"norms.{block}.{part}"]
    return Model(timm, 3, "mean")


@pytest.mark.parametrize("kind", SCHEDULES)
def test_evo_vit_is_the_official_one(kind):
    file = official("evo_deit_tiny")
    result = evo_vit.forward(of_evo_vit(file.weights), file.images, SCHEDULES[kind])
    close(result.logits, file.arrays[f"{kind}:logits"])
    close(result.logits, file.arrays[f"{kind}:train:logits"])
    close(result.class_logits, file.arrays[f"{kind}:train:class_logits"])
    close(evo_vit.loss(result, TARGETS), file.arrays[f"{kind}:train:loss"])
    np.testing.assert_array_equal(result.chosen, file.arrays[f"{kind}:chosen"])
    first, last = (set(file.arrays[f"{kind}:chosen"][place, 0, :98].tolist()) for place in (0, -1))
    assert first != last or kind == "stage"  # weights of which the choice does not hang would show nothing


def test_the_gradients_of_evo_vit_are_the_official_ones():
    """By central differences of the oracle's loss; choices do not change over so small a step."""
    file, prefix = official("evo_deit_tiny"), "stage:train:gradient:"
    steps = directions(file.arrays, prefix)
    losses = [
        evo_vit.loss(
            evo_vit.forward(of_evo_vit(moved(file.weights, steps, by)), file.images, SCHEDULES["stage"]), TARGETS
        )
        for by in (-STEP, STEP)
    ]
    close((losses[1] - losses[0]) / (2 * STEP), np.array(slope(steps, file.arrays, prefix)), 1e-7)


# ---- LeViT


def test_levit_is_the_official_one():
    file = official("levit_128s")
    close(levit.dense(levit.Model(file.weights, 16, (4, 6, 8), (2, 3, 4)), file.images).logits, file.arrays["logits"])


@pytest.mark.parametrize("kind", SCHEDULES)
def test_evo_levit_is_the_official_one(kind):
    file = official("evo_levit_128s")
    schedule = levit.Schedule(kind == "stage", learned=kind == "stage")
    result = levit.forward(levit.Model(file.weights, 16, (4, 6, 8), (2, 3, 4)), file.images, schedule)
    close(result.logits, file.arrays[f"{kind}:logits"])
    close(result.class_logits, file.arrays[f"{kind}:class_logits"])
    orders = [file.arrays[f"{kind}:order:{number}"] for number in range(2 + len(result.chosen))]
    restored = [0, len(orders) - (2 if kind == "stage" else 5)]  # the two downsamplings put patches back in order
    sorts = [order for number, order in enumerate(orders) if number not in restored]
    for chosen, order in zip(result.chosen, sorts, strict=True):
        np.testing.assert_array_equal(chosen, order)


# ---- DynamicViT


def of_dynamicvit(file: Official, weights: dict[str, np.ndarray]) -> Model:
    """DynamicViT's names are timm's, and LV-ViT's."""
    lvvit = "aux_head.weight" in weights
    return Model(weights, 6 if lvvit else 3, eps=1e-5 if lvvit else 1e-6, skip=2.0 if lvvit else 1.0)


@pytest.mark.parametrize("name", ["dynamicvit_deit_tiny", "dynamicvit_lvvit_s"])
def test_dynamicvit_is_the_official_one(name):
    file = official(name)
    keeps = dynamicvit.counts(196, file.recipe["rate"])
    model = of_dynamicvit(file, file.weights)
    result = dynamicvit.forward(model, file.images[:1], file.recipe["locations"], keeps)
    close(result.logits, file.arrays["logits"][:1])
    for stage, kept in enumerate(result.chosen):
        assert kept[0].tolist() == file.arrays[f"chosen:{stage}"][0].tolist()


# The official masked softmax is computed in float32 whatever the model is.
FLOAT32 = 1e-5


def parts(trained: dynamicvit.Trained, file: Official, teacher: tuple[np.ndarray, np.ndarray]) -> list[float]:
    """The four losses: cross entropy, ratio (a sum over the locations), logits, tokens."""
    ratios = [file.recipe["rate"] ** stage for stage in (1, 2, 3)]
    token_loss = dynamicvit.token_divergence if "aux_head.weight" in file.weights else dynamicvit.token_loss
    return [
        evo_vit.cross_entropy(trained.logits, TARGETS),
        3 * dynamicvit.ratio_loss(trained.masks, ratios),
        dynamicvit.divergence(trained.logits, teacher[0]),
        token_loss(trained.tokens, teacher[1], trained.masks[-1]),
    ]


def total(parts: list[float]) -> float:
    return parts[0] + 2.0 * parts[1] / 3 + 0.5 * parts[2] + 0.5 * parts[3]


@pytest.mark.parametrize("name", ["dynamicvit_deit_tiny", pytest.param("dynamicvit_lvvit_s", marks=pytest.mark.slow)])
def test_dynamicvit_trains_like_the_official_one(name):
    file = official(name)
    noise, decisions = file.noise(), file.decisions()
    model = of_dynamicvit(file, file.weights)
    trained = dynamicvit.train(model, file.images, file.recipe["locations"], decisions)
    np.testing.assert_array_equal(dynamicvit.soft(trained.scores, noise) > 0.5, decisions > 0.5)
    np.testing.assert_array_equal(trained.masks[-1] > 0.5, np.unpackbits(file.arrays["train:mask"]).reshape(2, 196))
    close(trained.logits, file.arrays["train:logits"], FLOAT32)
    close(trained.tokens[:, ::49], file.arrays["train:tokens"], FLOAT32)
    found = parts(trained, file, dynamicvit.teach(of_dynamicvit(file, file.teacher()), file.images))
    close(np.array(found), file.arrays["train:parts"], FLOAT32)
    close(total(found), file.arrays["train:loss"], FLOAT32)


@pytest.mark.slow
def test_the_gradients_of_dynamicvit_are_the_official_ones():
    """By central differences, with decisions that are hard but move like the soft ones: the straight-through rule."""
    file, prefix = official("dynamicvit_deit_tiny"), "train:gradient:"
    noise, hard = file.noise(), file.decisions()
    locations = file.recipe["locations"]
    teacher = dynamicvit.teach(of_dynamicvit(file, file.teacher()), file.images)
    start = dynamicvit.soft(
        dynamicvit.train(of_dynamicvit(file, file.weights), file.images, locations, hard).scores, noise
    )

    def loss(weights: dict[str, np.ndarray]) -> float:
        def decide(stage: int, image: int, scores: np.ndarray) -> np.ndarray:
            return hard[stage, image] + dynamicvit.soft(scores, noise[stage, image]) - start[stage, image]

        trained = dynamicvit.train(of_dynamicvit(file, weights), file.images, locations, decide)
        return total(parts(trained, file, teacher))

    steps = directions(file.arrays, prefix)
    before, after = (loss(moved(file.weights, steps, by)) for by in (-STEP, STEP))
    close((after - before) / (2 * STEP), np.array(slope(steps, file.arrays, prefix)), 1e-5)
