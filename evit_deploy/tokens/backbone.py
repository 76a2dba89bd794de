"""The interface between a model family and ``reduce_tokens_`` and ``export_onnx``; each family has its own file."""

import copy
from typing import Any, Protocol

from evit_deploy.errors import UnsupportedModelError
from evit_deploy.registry import BACKBONES
from evit_deploy.tokens.plan import ModelCost, ModelShape


class Backbone(Protocol):
    """Interface of a model family; all methods take a model of that family."""

    @staticmethod
    def unsupported(model: Any) -> list[str]:
        """Reasons why this model cannot be reduced exactly, or an empty list.

        For a model of another family, the first reason begins with "it is not".
        """
        ...

    @staticmethod
    def prefix_tokens(model: Any) -> int:
        """Tokens in front of the patches (class, distillation, registers); never candidates."""
        ...

    @staticmethod
    def patches(model: Any) -> int:
        """Patch tokens at the image size the model was built for."""
        ...

    @staticmethod
    def image_size(model: Any) -> tuple[int, int]:
        """Height and width in pixels."""
        ...

    @staticmethod
    def channels(model: Any) -> int:
        """Channels of the input image."""
        ...

    @staticmethod
    def shape(model: Any) -> ModelShape:
        """The values that a token plan needs; :func:`shape_of` collects them from the other methods."""
        ...

    @staticmethod
    def pools(model: Any) -> bool:
        """Whether the head uses all patch tokens instead of only the class token."""
        ...

    @staticmethod
    def method(name: str) -> Any:
        """The reduction method with this name, in the form for this family."""
        ...

    @staticmethod
    def blocks(model: Any) -> Any:
        """The transformer blocks, as the indexable container that holds them."""
        ...

    @staticmethod
    def set_blocks(model: Any, blocks: Any) -> None:
        """Replaces the model's container of blocks."""
        ...

    @staticmethod
    def scale(block: Any) -> float:
        """Factor on the attention logits of a block."""
        ...

    @staticmethod
    def cost(model: Any) -> ModelCost:
        """Multiply-adds of the model's parts."""
        ...

    @staticmethod
    def reduced(block: Any, reducer: Any) -> Any:
        """A block that also applies the reducer; its parameters keep the names of the original block's."""
        ...

    @staticmethod
    def original(block: Any) -> Any:
        """The block that :meth:`reduced` replaced, or the block itself."""
        ...

    @staticmethod
    def ending(block: Any, rows: int) -> Any:
        """The last block in a form that returns only its first ``rows`` tokens.

        Required for families with ``ModelCost.head_tokens``. The new block has the same children, under the same
        names, as the given one.
        """
        ...

    @staticmethod
    def lower(model: Any) -> Any:
        """A copy of the model in the form that exports best; the given model is not changed."""
        ...


def backbone_of(model: Any) -> type[Backbone]:
    """Finds the family that can reduce a model.

    Raises:
        UnsupportedModelError: No family can. The error lists the reasons of the closest match: the model's own family
            if it is registered.
    """
    refusals = []
    for name in BACKBONES.names():
        backbone = BACKBONES.get(name)
        reasons = backbone.unsupported(model)
        if not reasons:
            return backbone
        refusals.append(reasons)
    closest = max(refusals, key=lambda reasons: (not reasons[0].startswith("it is not"), len(reasons)))
    raise UnsupportedModelError(type(model).__name__, closest)


def shape_of(backbone: type[Backbone], model: Any, width: int) -> ModelShape:
    """Collects a model's shape from its family.

    Args:
        backbone: The family.
        model: The model.
        width: Channels of a token.
    """
    return ModelShape(
        prefix=backbone.prefix_tokens(model),
        patches=backbone.patches(model),
        depth=len(backbone.blocks(model)),
        width=width,
        cost=backbone.cost(model),
    )


def load_backbones() -> None:
    """Imports every family: families outside timm register their model names with timm on import."""
    for name in BACKBONES.names():
        BACKBONES.get(name)


def copy_sharing_weights(model: Any) -> Any:
    """Copies a module tree; the copy shares the original's parameters and buffers."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)  # deepcopy returns objects that are already in its memo
