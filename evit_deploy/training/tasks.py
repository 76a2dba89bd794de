"""Tasks of training runs, each with a model and a loss: timm's, or our own with timm's interface.

A model learns from image labels, from a teacher, or from a label for every patch token.
"""

import logging
from typing import Any

import msgspec
import numpy as np
import torch
from timm.task import ClassificationTask, LogitDistillationTask, TokenDistillationTask
from timm.task.distillation import DistillationTeacher
from torch import Tensor, nn

from evit_deploy.data.training.token_labels import crop_token_labels
from evit_deploy.errors import InputError
from evit_deploy.models.levit import EvoLeViT
from evit_deploy.recipe.sections import DynamicViTSection, TeacherSection, TrainSection
from evit_deploy.tokens.methods.dynamicvit import Predictors
from evit_deploy.training.dynamicvit import DynamicViTTask
from evit_deploy.training.evo_vit import EvoLeViTTask, EvoViTTask, has_two_heads
from evit_deploy.training.token_labels import MixToken, TokenLogits, WithTokenLogits, token_label_loss, token_logits

_LOG = logging.getLogger(__name__)


class Teacher(msgspec.Struct, frozen=True):
    """A teacher for distillation, in addition to the labels.

    Args:
        model: The model, in evaluation mode.
        section: Its settings; ``None`` for initial dense weights that the method itself uses as the teacher.
    """

    model: nn.Module
    section: TeacherSection | None


def make_task(model: nn.Module, section: TrainSection, teacher: Teacher | None) -> Any:
    """Creates the training task for a model: one of timm's or ours.

    Args:
        model: The student.
        section: Settings of the training; label smoothing, ``token_labels`` and ``dynamicvit`` are used.
        teacher: The teacher; ``None`` to learn from labels only.
    """
    if section.token_labels is not None:
        return TokenLabelTask(model, section, None if teacher is None else teacher.model)
    device = next(model.parameters()).device
    criterion = nn.CrossEntropyLoss(label_smoothing=section.label_smoothing)
    if isinstance(getattr(model, "score_predictor", None), Predictors):
        how = section.dynamicvit or DynamicViTSection()
        return DynamicViTTask(model, criterion, how, None if teacher is None else FrozenTeacher(teacher.model, model))
    if isinstance(model, EvoLeViT) or has_two_heads(model):
        if teacher is None or teacher.section is None:
            return EvoLeViTTask(model, criterion) if isinstance(model, EvoLeViT) else EvoViTTask(model, criterion)
        _LOG.warning("with a teacher the model's own head learns alone: the class token gets none for training")
    if teacher is None or teacher.section is None:
        return ClassificationTask(model, criterion, device=device, verbose=False)
    how = teacher.section
    settings: dict[str, Any] = {
        "criterion": criterion, "task_loss_weight": 1 - how.weight, "distill_loss_weight": how.weight,
        "temperature": how.temperature, "device": device, "verbose": False,
    }  # fmt: skip
    frozen = FrozenTeacher(teacher.model, model)
    if how.kind == "logits":
        return LogitDistillationTask(model, frozen, **settings)
    return TokenDistillationTask(model, frozen, distill_type="hard" if how.hard else "soft", **settings)


class FrozenTeacher(DistillationTeacher):
    """timm's teacher, but the normalizations of teacher and student are compared once instead of at every batch.

    Comparing tensors on a GPU waits for it.

    Args:
        model: The teacher, on the device to train on.
        student: The student; the teacher gets the same images.
    """

    mean_kd: Tensor
    std_kd: Tensor

    def __init__(self, model: nn.Module, student: Any) -> None:
        super().__init__(model, device=next(student.parameters()).device)
        own = (self.mean_kd, self.std_kd)
        theirs = (torch.tensor(student.pretrained_cfg[key]) for key in ("mean", "std"))
        self._alike = all(torch.equal(a.flatten().cpu(), b) for a, b in zip(own, theirs, strict=True))

    def normalize_input(
        self, input: Tensor, student_mean: Tensor | None = None, student_std: Tensor | None = None
    ) -> Tensor:
        """Converts images ``[B, C, H, W]`` from the student's normalization to the teacher's."""
        if self._alike or student_mean is None or student_std is None:
            return input
        return (input * student_std + student_mean - self.mean_kd) / self.std_kd


class TokenLabelTask(ClassificationTask):
    """A timm classification task for a model with a classifier on every token.

    MixToken's boxes are drawn with PyTorch's generator, which is part of the saved state. Images are mixed within each
    process.

    Args:
        model: The model, on the device to train on.
        section: Settings of the training. Its label smoothing applies to all labels except a teacher's.
        teacher: A dense model with a classifier on every token and the same number of patches; without it, labels come
            with the images.

    Raises:
        UnsupportedModelError: The model has no classifier on every token.
    """

    def __init__(self, model: nn.Module, section: TrainSection, teacher: Any = None) -> None:
        assert section.token_labels is not None
        criterion = nn.CrossEntropyLoss(label_smoothing=section.label_smoothing)
        device = next(model.parameters()).device
        super().__init__(WithTokenLogits(model), criterion, device=device, verbose=False)
        student: Any = model
        self._how, self._smoothing = section.token_labels, section.label_smoothing
        self._grid: tuple[int, int] = student.patch_embed.grid_size
        self._classes: int = student.num_classes
        self.teacher = None
        if teacher is not None:
            self.teacher = FrozenTeacher(teacher, student)
            mean, std = (torch.tensor(student.pretrained_cfg[key], device=device) for key in ("mean", "std"))
            self._mean, self._std = mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)

    def forward(self, input: Tensor, target: Tensor, *labels: Tensor) -> dict[str, Tensor]:
        """Returns the loss, the class token's logits, and its targets (mixed if tokens are mixed).

        Args:
            input: Images ``[B, C, H, W]``.
            target: int64 ``[B]``, or probabilities ``[B, classes]``.
            *labels: Maps, boxes, flips and warps of the images for :func:`crop_token_labels`; none with a teacher.

        Raises:
            InputError: There are neither labels nor a teacher.
        """
        how, mask = self._how, None
        patches = self._patch_labels(input, labels)
        if how.mix_token:
            seed = int(torch.randint(2**62, ()))
            mix = MixToken.draw(self._grid, np.random.default_rng(seed), how.mix_token)
            mask = mix.mask(input.device)
            target, patches = mix.labels(target, self._classes), mix.tokens(patches)
        found: TokenLogits = self.trainable_module(input, mask)
        loss = token_label_loss(
            found.class_logits, found.token_logits, found.kept, target, patches, how.weight, self._smoothing
        )
        return {"loss": loss, "output": found.class_logits, "target": target}

    def _patch_labels(self, images: Tensor, labels: tuple[Tensor, ...]) -> Tensor:
        if self.teacher is not None:
            with torch.no_grad():
                shown = self.teacher.normalize_input(images, self._mean, self._std)
                return token_logits(self.teacher.model, shown).token_logits.float().softmax(dim=-1)
        if not labels:
            raise InputError("the images have no token labels", fix="Set data.token_labels, or take a teacher.")
        maps, boxes, flipped, warps = labels
        return crop_token_labels(maps, boxes, flipped, self._grid, self._classes, self._smoothing, warps)
