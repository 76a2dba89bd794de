"""Builds a model from a timm name and arguments that a file can hold."""

from collections.abc import Mapping
from typing import Any

from torch import nn


def create_model(name: str, args: Mapping[str, Any]) -> Any:
    """Builds a model with random weights.

    Args:
        name: timm name.
        args: Arguments of ``timm.create_model`` as JSON values. Beside them ``projection``: width of an embedding, made
            of a model's features by a matrix, as CLIP does it; the model has no classes then.

    Raises:
        TypeError: The architecture has no such argument; others of timm's for values that do not fit.
    """
    import timm

    made = dict(args)
    projection = made.pop("projection", None)
    model: Any = timm.create_model(name, pretrained=False, **made)
    if projection is not None:
        model.head = nn.Linear(model.num_features, projection, bias=False)
    return model
