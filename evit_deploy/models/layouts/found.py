"""What a layout is asked and what it gives: the values that every module of this folder takes and returns."""

from collections.abc import Mapping
from typing import Any, Literal

import msgspec
from torch import Tensor

from evit_deploy.data.preprocess import Preprocess
from evit_deploy.models.layouts.table import Table
from evit_deploy.tokens.plan import TokenSpec

Output = Literal["logits", "embedding"]
"""What a model answers: one number a class, or a vector that images are compared by."""


def output_of(model_args: Mapping[str, Any]) -> Output:
    """What a model with these arguments answers: without classes, a vector."""
    return "logits" if model_args.get("num_classes", 1) else "embedding"


class Held(msgspec.Struct, frozen=True):
    """What a file holds, as layouts are asked about it.

    Args:
        where: The file, for messages.
        weights: Its tensors. Those of the model have the names they have within it, those beside it begin with ``../``
            (``../classifier.weight`` beside ``vit.embeddings.cls_token``) or, elsewhere in the file, with ``/``.
        config: The ``config.json`` beside the file, if there is one.
        model: timm name that the user gave, if any; it goes before the config's architecture.
        method_weights: Names of the tensors that were set aside as a reduction method's own.
    """

    where: object
    weights: dict[str, Tensor]
    config: dict[str, Any] | None = None
    model: str | None = None
    method_weights: frozenset[str] = frozenset()

    def inside(self) -> dict[str, Tensor]:
        """The tensors of the model alone."""
        return {name: value for name, value in self.weights.items() if not name.startswith(("../", "/"))}


class Found(msgspec.Struct, frozen=True):
    """What tensors were found to be.

    Args:
        model: timm name.
        model_args: What :func:`evit_deploy.models.create.create_model` needs besides; JSON values alone.
        weights: The tensors under timm's names.
        tokens: The reduction they were trained with, where the layout tells.
        notes: What was assumed; the user is warned of it.
        left_out: Tensors of the file that the model has no place for, under the names they were asked about. The user
            is warned of them too.
        prepared: Whether images for such weights were surely prepared as timm says of the architecture, or as
            ``preprocess`` says.
        preprocess: How all files of the layout had their images prepared, where that is another way than timm's.
        table: The names of the layout beside timm's, for the way back; ``None`` where the layout's module has another.
    """

    model: str
    model_args: dict[str, Any]
    weights: dict[str, Tensor]
    tokens: TokenSpec | None = None
    notes: tuple[str, ...] = ()
    left_out: dict[str, Tensor] = {}
    prepared: bool = True
    preprocess: Preprocess | None = None
    table: Table | None = None
