"""What DynamicViT's predictors and their model learn from (arXiv 2106.02034, section 3.3, as it was released).

The loss of a batch::

    cross entropy of the class token with the labels
    + ratio_weight  · mean over the locations and images of (share of the patches that is kept − the rate's)²
    + logits_weight · KL(teacher ‖ student) of the class token's logits
    + tokens_weight · of the patches that are kept to the end: the mean squared difference of the normalized tokens from
                      the teacher's; of a model with a classifier on every token, KL(teacher ‖ student) of its logits

The teacher is the dense model that the training starts from, or another of the same form; without one, the last two
parts are left out. Where a keep-rate schedule has no location yet, nothing is masked and there is no share to judge;
from then on it has no influence on the loss, which asks for the spec's own rates.
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
    """What a model says of its images.

    Args:
        class_logits: ``[B, classes]``; of a model with a classifier on every token, the class token's alone.
        tokens: ``[B, patches, C]`` after the last norm, or what the classifier says of each ``[B, patches, classes]``.
        masks: Of each location, who is kept ``[B, patches]``; none of a dense model.
    """

    class_logits: Tensor
    tokens: Tensor
    masks: tuple[Tensor, ...] = ()


class WithDecisions(nn.Module):
    """A model in training whose locations mask tokens, with what they decided; a module, for what wraps one.

    Args:
        model: Reduced by the method ``dynamicvit``; its own ``state_dict`` is the one to save.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, images: Tensor) -> Said:
        """Images ``[B, C, H, W]``; the model has to be in training mode."""
        x, state = run_blocks(self.model, images)
        assert state.mask is not None, "only in training mode are tokens masked"
        return Said(*outputs(self.model, self.model.norm(x)), state.decisions)


def outputs(model: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Class logits and tokens, as :class:`Said` has them, of the last norm's output ``[B, N, C]``."""
    if has_token_classifier(model):
        return model.class_logits(tokens), model.token_logits(tokens)
    return model.forward_head(tokens), tokens[:, model.num_prefix_tokens :]


class DynamicViTTask(ClassificationTask):
    """timm's classification task with the loss above.

    Args:
        model: Reduced by the method ``dynamicvit``, on the device to train on.
        criterion: Of the labels.
        section: Factors of the loss's parts.
        teacher: Frozen, dense, of the same form as the model.
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
        """The loss and the class token's logits.

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
        # Nothing, of what has no part in this: several processes wait for a gradient of every parameter.
        idle = [] if student.masks else [value.sum() for value in self._predictors.parameters()]
        idle += [student.tokens.float().mean()] if self.teacher is None else []
        for part in idle:
            loss = loss + 0.0 * part
        return {"loss": loss, "output": student.class_logits}


def ratio_loss(masks: Sequence[Tensor], wanted: Sequence[float]) -> Tensor | float:
    """Mean over locations and images of (share of the patches that is kept − the share that is wanted)².

    Args:
        masks: Of each location ``[B, patches]``; 0 where there is none.
        wanted: Shares.
    """
    parts = [(mask.mean(dim=1) - share).square().mean() for mask, share in zip(masks, wanted, strict=False)]
    return torch.stack(parts).mean() if parts else 0.0


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher ‖ student) of logits ``[..., classes]``, for each row."""
    logs, truth = student.float().log_softmax(dim=-1), teacher.float().log_softmax(dim=-1)
    return F.kl_div(logs, truth, reduction="none", log_target=True).sum(dim=-1)


def token_loss(student: Tensor, teacher: Tensor, kept: Tensor, by_class: bool) -> Tensor:
    """How far the tokens that are kept are from the teacher's; 0 where none is.

    Args:
        student: ``[B, patches, C]``.
        teacher: The same.
        kept: ``[B, patches]``, 1 or 0.
        by_class: Whether these are logits: then :func:`divergence` judges them, else the mean squared difference.

    Returns:
        The mean over the kept tokens of all images.
    """
    each = divergence(student, teacher) if by_class else (student.float() - teacher.float()).square().mean(dim=-1)
    return (each * kept).sum() / kept.sum().clamp(min=1)
