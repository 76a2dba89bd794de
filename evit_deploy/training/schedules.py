"""Learning rate and keep rate of every step: functions of the step alone, so that a resumed run needs nothing else."""

import math

from evit_deploy.recipe.sections import TrainSection


def learning_rate(section: TrainSection, step: int, steps: int, world: int = 1) -> float:
    """The learning rate of a step: a line up to the highest, then a cosine down to the lowest.

    Args:
        section: How to train.
        step: 0 to ``steps`` - 1.
        steps: Length of the run.
        world: Processes that share the work.
    """
    highest, lowest = section.effective_learning_rate(world), section.lowest_learning_rate(world)
    warmup = round(section.warmup * steps)
    if step < warmup:
        return highest * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return lowest + (highest - lowest) * 0.5 * (1 + math.cos(math.pi * progress))


def backbone_rate_scale(section: TrainSection, step: int, steps_per_epoch: int) -> float:
    """Factor on the learning rate of all but the reduction method's own layers, at a step.

    Args:
        section: How to train.
        step: From 0.
        steps_per_epoch: Steps of an epoch.
    """
    return 0.0 if step < section.backbone_frozen_epochs * steps_per_epoch else section.backbone_lr_scale


def keep_rate_progress(section: TrainSection, step: int, steps_per_epoch: int) -> float:
    """How far the keep rate has moved from 1 to its target, as EViT's official code counts.

    Before epoch s it is 1, from epoch s + L on the target; in between base + (1 − base) · ½(1 + cos(π·i / (L·n))),
    with i the steps since epoch s and n those of an epoch: a new value at every step.

    Args:
        section: Its ``keep_rate_start`` is s and its ``keep_rate_epochs`` L.
        step: From 0.
        steps_per_epoch: n.

    Returns:
        0 (rate 1) to 1 (the target), for :func:`~evit_deploy.tokens.reduce.set_keep_rate_`.
    """
    since = step - section.keep_rate_start * steps_per_epoch
    if since < 0:
        return 0.0
    length = section.keep_rate_epochs * steps_per_epoch
    return min(since / length, 1.0) if length > 0 else 1.0


def is_layer_wise(section: TrainSection, step: int, steps_per_epoch: int) -> bool:
    """Whether every block sorts anew in a step (Evo-ViT's schedule from layers to stages).

    Args:
        section: Its ``layer_wise_epochs`` count from the beginning.
        step: From 0.
        steps_per_epoch: Steps of an epoch.
    """
    return step < section.layer_wise_epochs * steps_per_epoch
