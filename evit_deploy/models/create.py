"""Builds a model from a timm name and arguments that a file can hold."""

from collections.abc import Mapping
from typing import Any


def create_model(name: str, args: Mapping[str, Any]) -> Any:
    """Builds a model with random weights.

    Args:
        name: timm name.
        args: Arguments of ``timm.create_model`` as JSON values.

    Raises:
        TypeError: The architecture has no such argument; others of timm's for values that do not fit.
    """
    import timm

    return timm.create_model(name, pretrained=False, **args)
