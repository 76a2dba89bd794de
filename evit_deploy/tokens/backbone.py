"""Backbones: what ``reduce_tokens_`` and ``export_onnx`` must know of a model family, one family a file."""

import copy
from typing import Any, Protocol

from evit_deploy.errors import UnsupportedModelError
from evit_deploy.registry import BACKBONES
from evit_deploy.tokens.plan import ModelCost, ModelShape


class Backbone(Protocol):
    """What a model family tells about itself; all methods take a model of that family."""

    @staticmethod
    def unsupported(model: Any) -> list[str]:
        """Why this model cannot be reduced exactly; empty when it can. Another family's begins with "it is not"."""
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
        """What a token plan has to know of the model; :func:`shape_of` asks the other methods."""
        ...

    @staticmethod
    def pools(model: Any) -> bool:
        """Whether the head sees all patch tokens, and not the class token alone."""
        ...

    @staticmethod
    def method(name: str) -> Any:
        """The method of a name, in the form that it takes in this family."""
        ...

    @staticmethod
    def blocks(model: Any) -> Any:
        """The transformer blocks, as the indexable container that holds them."""
        ...

    @staticmethod
    def set_blocks(model: Any, blocks: Any) -> None:
        """Puts another container of blocks into the model."""
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
        """A block that also applies the reducer and keeps the parameter names of the one it replaces."""
        ...

    @staticmethod
    def original(block: Any) -> Any:
        """The block that :meth:`reduced` replaced, or the block itself."""
        ...

    @staticmethod
    def ending(block: Any, rows: int) -> Any:
        """The last block in a form that gives its first tokens alone; of families with ``ModelCost.head_tokens``.

        It has the children of the given block under their own names.
        """
        ...

    @staticmethod
    def lower(model: Any) -> Any:
        """A copy in the form that exports best; the given model is left alone."""
        ...


def backbone_of(model: Any) -> type[Backbone]:
    """Finds the family that can reduce a model.

    Raises:
        UnsupportedModelError: None can; the reasons are those of the family that came closest: its own before others.
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
    """A model's shape, from what its family says of it.

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
    """Imports every family: one whose models are not timm's registers their names with timm as it is imported."""
    for name in BACKBONES.names():
        BACKBONES.get(name)


def copy_sharing_weights(model: Any) -> Any:
    """A copy of a module tree whose parameters and buffers are the original's own."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)  # deepcopy hands over what its memo already holds
