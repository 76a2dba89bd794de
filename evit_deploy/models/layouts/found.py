"""Input and result types of layouts, used by all modules in this folder."""

from collections.abc import Mapping
from typing import Any, Literal

import msgspec
from torch import Tensor

from evit_deploy.data.preprocess import Preprocess
from evit_deploy.models.layouts.table import Table
from evit_deploy.tokens.plan import TokenSpec

Output = Literal["logits", "embedding"]
"""A model's output: one number per class, or a vector for comparing images."""


def output_of(model_args: Mapping[str, Any]) -> Output:
    """Output of a model with these arguments: a vector if it has no classes."""
    return "logits" if model_args.get("num_classes", 1) else "embedding"


class Held(msgspec.Struct, frozen=True):
    """The content of a file, as passed to layouts.

    Args:
        where: The file, for messages.
        weights: Its tensors. Names are relative to the model. Tensors one level above it begin with ``../``
            (``../classifier.weight`` for ``vit.embeddings.cls_token``), those elsewhere in the file with ``/``.
        config: The ``config.json`` next to the file, if there is one.
        model: timm name given by the user, if any; it overrides the config.
        method_weights: Names of tensors that belong to a reduction method's own layers.
    """

    where: object
    weights: dict[str, Tensor]
    config: dict[str, Any] | None = None
    model: str | None = None
    method_weights: frozenset[str] = frozenset()

    def inside(self) -> dict[str, Tensor]:
        """Only the tensors inside the model."""
        return {name: value for name, value in self.weights.items() if not name.startswith(("../", "/"))}


class Found(msgspec.Struct, frozen=True):
    """Result of identifying a file.

    Args:
        model: timm name.
        model_args: Further arguments of :func:`evit_deploy.models.create.create_model`; JSON values only.
        weights: The tensors under timm's names.
        tokens: The reduction they were trained with, if the layout implies one.
        notes: Assumptions, shown to the user as warnings.
        left_out: Tensors of the file that the model does not use, named as in :attr:`Held.weights`; shown to the user
            as warnings.
        prepared: Whether the preprocessing is certain: timm's for the architecture, or ``preprocess``.
        preprocess: Preprocessing of all files of the layout, if it differs from timm's.
        table: Mapping between the layout's names and timm's, to convert back; ``None`` if the layout's module converts
            differently.
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
