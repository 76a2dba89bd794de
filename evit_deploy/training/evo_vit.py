"""What Evo-ViT learns from (arXiv 2108.01390, as it was released): two heads, half of the loss each.

The model's own head sees the mean of all patches. The class token, whose attention ranks them, gets its own head
that only serves training. A model whose own head is the class token's has what that head is for, and learns from its
cross entropy alone. An Evo-LeViT has all of its heads from the start: two see the mean and two the class token.
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
    """What both heads say, ``[B, classes]`` each.

    Args:
        logits: The model's own, of the mean over patches.
        class_logits: The class token's.
    """

    logits: Tensor
    class_logits: Tensor


class WithClassHead(nn.Module):
    """A model with both of its heads; a module, for what wraps one.

    Args:
        model: Reduced by the method ``evo-vit``; its head pools, and it has a class token's head beside.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, images: Tensor) -> TwoHeads:
        """Images ``[B, C, H, W]``."""
        x, _ = run_blocks(self.model, images)
        class_logits = self.model.head_cls(self.model.norm_cls(x[:, 0]))
        return TwoHeads(self.model.forward_head(self.model.norm(x)), class_logits)


def has_two_heads(model: nn.Module) -> bool:
    """Whether a model is trained with a second head: Evo-ViT's whose own one pools."""
    reduced = isinstance(getattr(model, "blocks", None), TokenBlocks) and token_spec(model).method == "evo-vit"
    return reduced and backbone_of(model).pools(model)


class EvoViTTask(ClassificationTask):
    """timm's classification task with half the cross entropy of each head.

    Args:
        model: See :func:`has_two_heads`; it gets the class token's head if it has none yet.
        criterion: Of the labels.
    """

    def __init__(self, model: nn.Module, criterion: nn.Module) -> None:
        add_class_head(model)
        super().__init__(WithClassHead(model), criterion, device=next(model.parameters()).device, verbose=False)

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The loss and the logits of the model's own head.

        Args:
            input: Images ``[B, C, H, W]``.
            target: int64 ``[B]``, or probabilities ``[B, classes]``.
        """
        said: TwoHeads = self.trainable_module(input)
        loss = 0.5 * self.criterion(said.logits, target) + 0.5 * self.criterion(said.class_logits, target)
        return {"loss": loss, "output": said.logits}


class WithAllHeads(nn.Module):
    """An Evo-LeViT with what each of its heads says; a module, for what wraps one.

    Args:
        model: Its own ``state_dict`` is the one to save.
    """

    def __init__(self, model: EvoLeViT) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images ``[B, C, H, W]`` to logits ``[B, classes]`` by the name of the head."""
        return self.model.head_logits(self.model.forward_features(images))


class EvoLeViTTask(ClassificationTask):
    """timm's classification task for an Evo-LeViT: half of the cross entropy is that of the heads on the mean.

    Args:
        model: The model, on the device to train on.
        criterion: Of the labels.
    """

    def __init__(self, model: EvoLeViT, criterion: nn.Module) -> None:
        super().__init__(WithAllHeads(model), criterion, device=next(model.parameters()).device, verbose=False)

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The loss and the model's own logits.

        Args:
            input: Images ``[B, C, H, W]``.
            target: int64 ``[B]``, or probabilities ``[B, classes]``.
        """
        said: dict[str, Tensor] = self.trainable_module(input)
        kinds = [[logits for name, logits in said.items() if (name in HEADS[:2]) is mean] for mean in (True, False)]
        losses = [torch.stack([self.criterion(logits, target) for logits in kind]).mean() for kind in kinds if kind]
        return {"loss": torch.stack(losses).mean(), "output": torch.stack(kinds[0]).mean(0)}
