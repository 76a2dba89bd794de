"""Evo-ViT's loss (arXiv 2108.01390, following the released code): two heads with half of the loss each.

The model's head uses the mean of all patches. The class token ranks the patches by its attention, so for training it
gets an additional head. A model with a class token head needs no second one and is trained with plain cross-entropy. An
Evo-LeViT has all heads from the start: two on the mean and two on the class token.
"""

from typing import Any, NamedTuple

import torch
from timm.task import ClassificationTask
from torch import Tensor, nn

from evit_deploy.models.levit import HEADS, EvoLeViT
from evit_deploy.models.timm_vit import run_blocks
from evit_deploy.tokens.backbone import backbone_of
from evit_deploy.tokens.methods.evo_vit import add_class_head
from evit_deploy.tokens.reduce import token_spec
from evit_deploy.tokens.state import TokenBlocks


class TwoHeads(NamedTuple):
    """Outputs of both heads, ``[B, classes]`` each.

    Args:
        logits: Output of the model's head, on the mean over patches.
        class_logits: Output of the class token's head.
    """

    logits: Tensor
    class_logits: Tensor


class WithClassHead(nn.Module):
    """A model that returns the outputs of both heads; a module, so that it can be wrapped or compiled.

    Args:
        model: Reduced by the method ``evo-vit``, with a pooling head and an additional class token head.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, images: Tensor) -> TwoHeads:
        """Runs the model on images ``[B, C, H, W]``."""
        x, _ = run_blocks(self.model, images)
        class_logits = self.model.head_cls(self.model.norm_cls(x[:, 0]))
        return TwoHeads(self.model.forward_head(self.model.norm(x)), class_logits)


def has_two_heads(model: nn.Module) -> bool:
    """Whether a model is trained with a second head: one with a pooling head, reduced by ``evo-vit``."""
    reduced = isinstance(getattr(model, "blocks", None), TokenBlocks) and token_spec(model).method == "evo-vit"
    return reduced and backbone_of(model).pools(model)


class EvoViTTask(ClassificationTask):
    """A timm classification task with half of the cross-entropy from each head.

    Args:
        model: See :func:`has_two_heads`; the class token's head is added if it is missing.
        criterion: Loss of logits and labels.
    """

    def __init__(self, model: nn.Module, criterion: nn.Module) -> None:
        add_class_head(model)
        super().__init__(WithClassHead(model), criterion, device=next(model.parameters()).device, verbose=False)

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Returns the loss and the logits of the model's head.

        Args:
            input: Images ``[B, C, H, W]``.
            target: int64 ``[B]``, or probabilities ``[B, classes]``.
        """
        said: TwoHeads = self.trainable_module(input)
        loss = 0.5 * self.criterion(said.logits, target) + 0.5 * self.criterion(said.class_logits, target)
        return {"loss": loss, "output": said.logits}


class WithAllHeads(nn.Module):
    """An Evo-LeViT that returns the outputs of all heads; a module, so that it can be wrapped or compiled.

    Args:
        model: The model; save its ``state_dict``, not the wrapper's.
    """

    def __init__(self, model: EvoLeViT) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Returns logits ``[B, classes]`` by the name of the head, for images ``[B, C, H, W]``."""
        return self.model.head_logits(self.model.forward_features(images))


class EvoLeViTTask(ClassificationTask):
    """A timm classification task for Evo-LeViT, with half of the cross-entropy from the heads on the mean.

    Args:
        model: The model, on the device to train on.
        criterion: Loss of logits and labels.
    """

    def __init__(self, model: EvoLeViT, criterion: nn.Module) -> None:
        super().__init__(WithAllHeads(model), criterion, device=next(model.parameters()).device, verbose=False)

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Returns the loss and the model's logits.

        Args:
            input: Images ``[B, C, H, W]``.
            target: int64 ``[B]``, or probabilities ``[B, classes]``.
        """
        said: dict[str, Tensor] = self.trainable_module(input)
        kinds = [[logits for name, logits in said.items() if (name in HEADS[:2]) is mean] for mean in (True, False)]
        losses = [torch.stack([self.criterion(logits, target) for logits in kind]).mean() for kind in kinds if kind]
        return {"loss": torch.stack(losses).mean(), "output": torch.stack(kinds[0]).mean(0)}
