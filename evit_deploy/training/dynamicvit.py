"""DynamicViT's loss (arXiv 2106.02034, section 3.3, following the released code).

The loss of a batch::

    cross-entropy of the class token with the labels
    + ratio_weight  · mean over locations and images of (share of patches kept − target share)²
    + logits_weight · KL(teacher ‖ student) of the class token's logits
    + tokens_weight · mean squared difference between the normalized tokens of student and teacher, over the patches
                      kept to the end; for models with a classifier on every token, KL(teacher ‖ student) of its logits

The teacher is the dense model that training starts from, or another one of the same architecture; without a teacher the
last two terms are omitted. While a keep-rate schedule is at 1, nothing is masked and the ratio term is 0. Afterwards
the schedule does not affect the loss: its target shares are always those of the token spec.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from timm.task import ClassificationTask
from torch import Tensor, nn
from torch.nn import functional as F

from evit_deploy.models.timm_vit import run_blocks
from evit_deploy.recipe.sections import DynamicViTSection
from evit_deploy.tokens.methods.dynamicvit import ratios
from evit_deploy.tokens.reduce import token_spec
from evit_deploy.training.token_labels import has_token_classifier


class Said(NamedTuple):
    """Outputs of a model.

    Args:
        class_logits: ``[B, classes]``; for models with a classifier on every token, those of the class token only.
        tokens: ``[B, patches, C]`` after the last norm, or the logits of each token ``[B, patches, classes]``.
        masks: For each location, which patches are kept, ``[B, patches]``; empty for a dense model.
    """

    class_logits: Tensor
    tokens: Tensor
    masks: tuple[Tensor, ...] = ()


class WithDecisions(nn.Module):
    """A model that also returns the masks of its locations; a module, so that it can be wrapped or compiled.

    Args:
        model: Reduced by the method ``dynamicvit``; save its ``state_dict``, not the wrapper's.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, images: Tensor) -> Said:
        """Runs the model, which must be in training mode, on images ``[B, C, H, W]``."""
        x, state = run_blocks(self.model, images)
        assert state.mask is not None, "only in training mode are tokens masked"
        return Said(*outputs(self.model, self.model.norm(x)), state.decisions)


def outputs(model: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Returns class logits and tokens in the form of :class:`Said`, from the last norm's output ``[B, N, C]``."""
    if has_token_classifier(model):
        return model.class_logits(tokens), model.token_logits(tokens)
    return model.forward_head(tokens), tokens[:, model.num_prefix_tokens :]


class DynamicViTTask(ClassificationTask):
    """A timm classification task with DynamicViT's loss.

    Args:
        model: Reduced by the method ``dynamicvit``, on the device to train on.
        criterion: Loss of the class logits and labels.
        section: Weights of the other terms.
        teacher: Frozen dense teacher of the same architecture.
    """

    def __init__(self, model: nn.Module, criterion: nn.Module, section: DynamicViTSection, teacher: Any = None) -> None:
        device = next(model.parameters()).device
        super().__init__(WithDecisions(model), criterion, device=device, verbose=False)
        student: Any = model
        self._section, self.teacher, self._predictors = section, teacher, student.score_predictor
        self._ratios = [float(ratio) for ratio in ratios(token_spec(model), len(student.blocks))]
        if teacher is not None:
            mean, std = (torch.tensor(student.pretrained_cfg[key], device=device) for key in ("mean", "std"))
            self._mean, self._std = mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Returns the loss and the class token's logits.

        Args:
            input: Images ``[B, C, H, W]``.
            target: int64 ``[B]``, or probabilities ``[B, classes]``.
        """
        how, student = self._section, self.trainable_module(input)
        loss = self.criterion(student.class_logits.float(), target)
        loss = loss + how.ratio_weight * ratio_loss(student.masks, self._ratios)
        if self.teacher is not None:
            with torch.no_grad():
                shown = self.teacher.normalize_input(input, self._mean, self._std)
                teacher = Said(*outputs(self.teacher.model, self.teacher.model.forward_features(shown)))
            kept = student.masks[-1].detach() if student.masks else torch.ones_like(student.tokens[..., 0])
            by_class = has_token_classifier(self.teacher.model)
            loss = loss + how.logits_weight * divergence(student.class_logits, teacher.class_logits).mean()
            loss = loss + how.tokens_weight * token_loss(student.tokens, teacher.tokens, kept, by_class)
        # Add unused parameters with factor 0: DistributedDataParallel waits for a gradient of every parameter.
        idle = [] if student.masks else [value.sum() for value in self._predictors.parameters()]
        idle += [student.tokens.float().mean()] if self.teacher is None else []
        for part in idle:
            loss = loss + 0.0 * part
        return {"loss": loss, "output": student.class_logits}


def ratio_loss(masks: Sequence[Tensor], wanted: Sequence[float]) -> Tensor | float:
    """Mean over locations and images of (share of patches kept − target share)²; 0 without locations.

    Args:
        masks: ``[B, patches]`` for each location.
        wanted: Target share of each location.
    """
    parts = [(mask.mean(dim=1) - share).square().mean() for mask, share in zip(masks, wanted, strict=False)]
    return torch.stack(parts).mean() if parts else 0.0


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher ‖ student) of logits ``[..., classes]``, for each row; float32 ``[...]``."""
    logs, truth = student.float().log_softmax(dim=-1), teacher.float().log_softmax(dim=-1)
    return F.kl_div(logs, truth, reduction="none", log_target=True).sum(dim=-1)


def token_loss(student: Tensor, teacher: Tensor, kept: Tensor, by_class: bool) -> Tensor:
    """Distance of the kept tokens from the teacher's: :func:`divergence` or mean squared difference.

    Args:
        student: ``[B, patches, C]``.
        teacher: ``[B, patches, C]``.
        kept: ``[B, patches]``, 1 or 0.
        by_class: Whether the tokens are logits, to be compared by :func:`divergence`.

    Returns:
        The mean over the kept tokens of all images; 0 if none is kept.
    """
    each = divergence(student, teacher) if by_class else (student.float() - teacher.float()).square().mean(dim=-1)
    return (each * kept).sum() / kept.sum().clamp(min=1)
