"""What a layout finds tensors to be: the value that every module of this folder gives."""

from typing import Any, Literal

import msgspec
from torch import Tensor

from evit_deploy.tokens.plan import TokenSpec

Output = Literal["logits", "embedding"]
"""What a model answers: one number a class, or a vector that images are compared by."""


class Found(msgspec.Struct, frozen=True):
    """What tensors were found to be.

    Args:
        model: timm name.
        model_args: What :func:`evit_deploy.models.create.create_model` needs besides; JSON values alone.
        weights: The tensors under timm's names.
        tokens: The reduction they were trained with, where the layout tells.
        output: What the model answers.
        notes: What was left out or assumed; the user is warned of it.
        prepared: Whether images for such weights were surely prepared as timm says of the architecture.
    """

    model: str
    model_args: dict[str, Any]
    weights: dict[str, Tensor]
    tokens: TokenSpec | None = None
    output: Output = "logits"
    notes: tuple[str, ...] = ()
    prepared: bool = True
