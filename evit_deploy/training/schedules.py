"""Schedules of learning rate and keep rate. They depend on the step only, so a resumed run needs no further state."""

import math

from evit_deploy.recipe.sections import TrainSection


def learning_rate(section: TrainSection, step: int, steps: int, world: int = 1) -> float:
    """Learning rate of a step: linear warm-up to the highest rate, then cosine decay to the lowest.

    Args:
        section: Settings of the training.
        step: 0 to ``steps`` - 1.
        steps: Length of the run.
        world: Number of processes.
    """
    highest, lowest = section.effective_learning_rate(world), section.lowest_learning_rate(world)
    warmup = round(section.warmup * steps)
    if step < warmup:
        return highest * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return lowest + (highest - lowest) * 0.5 * (1 + math.cos(math.pi * progress))


def backbone_rate_scale(section: TrainSection, step: int, steps_per_epoch: int) -> float:
    """Factor on the backbone's learning rate at a step (the backbone excludes layers of the reduction method).

    Args:
        section: Settings of the training.
        step: 0-based.
        steps_per_epoch: Steps per epoch.
    """
    return 0.0 if step < section.backbone_frozen_epochs * steps_per_epoch else section.backbone_lr_scale


def keep_rate_progress(section: TrainSection, step: int, steps_per_epoch: int) -> float:
    """Progress of the keep rate from 1 to its target, as defined by EViT's official code.

    The keep rate is 1 before epoch s, and its target from epoch s + L on. In between it is
    target + (1 − target) · ½(1 + cos(π·i / (L·n))) with i the steps since epoch s and n the steps per epoch, so it
    changes at every step.

    Args:
        section: ``keep_rate_start`` is s, ``keep_rate_epochs`` is L.
        step: 0-based.
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
    """Whether every block sorts the patches again in a step (Evo-ViT's schedule from layers to stages).

    Args:
        section: Provides ``layer_wise_epochs``, counted from the beginning.
        step: 0-based.
        steps_per_epoch: Steps per epoch.
    """
    return step < section.layer_wise_epochs * steps_per_epoch
